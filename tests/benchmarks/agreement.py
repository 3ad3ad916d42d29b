"""What stopping together, watching for a sick run and proving a resume cost.

python tests/benchmarks/agreement.py    # a Qwen3 of 34 M parameters, 2 ranks; about 2 minutes

Each rank trains in plain data-parallel (a step of which is cheaper than one of ZeRO-3, so the share
is the larger) and calls the launcher's own code: RankCallback.agree after each step (at most 1 % of
it), tell and LossWatch (at most 0.5 %), and local_state, gathered, beside a checkpoint of weights
and optimizer that is written and synced. A barrier before each call keeps the waiting for
the slower rank, which the next collective would do anyway, out of its time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def build_model(width: int):
    """A Qwen3 with random weights; 34 M parameters with a width of 512."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=False,
        )
    )


def train_step(model, optimizer, tokens) -> None:
    """One optimizer step."""
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds_of(action) -> float:
    """How long an action takes, once every rank is there."""
    from torch import distributed

    distributed.barrier()
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def save(model, optimizer, folder: Path) -> None:
    """Write a checkpoint to the disk."""
    import torch

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with open(folder / "checkpoint.pt", "wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())


def work(steps: int, tokens: int, width: int) -> None:
    """One rank: trains and times; rank 0 prints the medians."""
    import torch
    from torch import distributed

    from train_qwen3_ft import LossWatch, RankCallback, Run, gather, local_state

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(build_model(width))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(0, 8192, (1, tokens))
    folder, loss_watch = Path(tempfile.mkdtemp()), LossWatch()
    state = SimpleNamespace(global_step=1)
    callback = SimpleNamespace(run=Run(folder), progress=folder / "progress", state=state)
    args = SimpleNamespace(
        device=torch.device("cpu"), process_index=distributed.get_rank(), world_size=2
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    about = {"model": model, "optimizer": optimizer, "lr_scheduler": rates, "deepspeed": None}
    trainer = SimpleNamespace(
        args=args, state=SimpleNamespace(global_step=1, epoch=1.0), **about
    )

    def watch() -> None:
        RankCallback.tell(callback, "training")  # before and after each step
        RankCallback.tell(callback, "training")
        loss_watch.problem(1, {"loss": 1.0, "grad_norm": 1.0}, False, True)

    actions = {
        "step": lambda: train_step(model, optimizer, batch),
        "agreement": lambda: RankCallback.agree(callback, args),
        "watch": watch,
    }
    times = {name: [] for name in actions}
    for number in range(steps + 2):  # the first two warm up
        for name, action in actions.items():
            seconds = seconds_of(action)
            if number > 1:
                times[name].append(seconds)
    saving = {
        "checkpoint": lambda: save(model, optimizer, folder),
        "proof": lambda: gather(local_state(trainer)),
    }
    times |= {name: [seconds_of(action) for _ in range(5)] for name, action in saving.items()}
    if distributed.get_rank() == 0:
        report(model, tokens, {name: statistics.median(found) for name, found in times.items()})
    distributed.destroy_process_group()


def report(model, tokens: int, seconds: dict[str, float]) -> None:
    """Print what was measured; leave the two shares of a step that have a limit."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shares = [seconds[name] / seconds["step"] for name in ("agreement", "watch")]
    print(f"{parameters / 1e6:.1f} M parameters, 2 ranks, {tokens} tokens each; medians:")
    for name, value in seconds.items():
        whole = "checkpoint" if name in ("checkpoint", "proof") else "step"
        print(f"{name:<12}{value * 1e3:10.3f} ms  {value / seconds[whole]:8.3%} of a {whole}")
    Path(os.environ["BENCHMARK_RESULT"]).write_text(" ".join(map(str, shares)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="per rank and step")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the model")
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        work(options.steps, options.tokens, options.width)
        return 0
    with tempfile.NamedTemporaryFile() as result:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "BENCHMARK_RESULT": result.name,
        }
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
        ]
        subprocess.run([*command, *sys.argv[1:]], env=env, check=True)
        agreement, watch = map(float, Path(result.name).read_text().split())
        return 0 if agreement <= 0.01 and watch <= 0.005 else 1


if __name__ == "__main__":
    raise SystemExit(main())
