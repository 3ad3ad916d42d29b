"""What the agreement to stop costs: one tiny all-reduce at the end of each step, as a share of the
step.

python tests/benchmarks/agreement.py            # a Qwen3 of 34 M parameters, 2 ranks; about 2
minutes on two cores

Each rank trains in plain data-parallel (a step of which is cheaper than one of ZeRO-3, so the share
is the larger) and calls the launcher's own RankCallback.agree_to_stop after each step. A barrier
before the call keeps the waiting for the slower rank, which the next collective would do anyway,
out of its time. At most 1 % is allowed.
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


def build_model():
    """A Qwen3 of 34 M parameters with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
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


def work(steps: int, tokens: int) -> None:
    """One rank: trains, times its steps and its agreements; rank 0 prints."""
    import torch
    from torch import distributed

    from train_qwen3_ft import RankCallback, Run

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(0, 8192, (1, tokens))
    callback = SimpleNamespace(run=Run(Path(tempfile.mkdtemp())))
    args = SimpleNamespace(device=torch.device("cpu"))
    times: list[list[float]] = [[], []]
    for number in range(steps + 2):  # the first two warm up
        marks = [time.perf_counter()]
        train_step(model, optimizer, batch)
        distributed.barrier()
        marks.append(time.perf_counter())
        assert not RankCallback.agree_to_stop(callback, args)
        marks.append(time.perf_counter())
        if number > 1:
            times[0].append(marks[1] - marks[0])
            times[1].append(marks[2] - marks[1])
    if distributed.get_rank() == 0:
        step, agreement = map(statistics.median, times)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{parameters / 1e6:.1f} M parameters, {distributed.get_world_size()} ranks, "
            f"{tokens} tokens each, "
            f"{steps} steps: median step {step * 1e3:.1f} ms, agreement {agreement * 1e3:.3f} ms = "
            f"{agreement / step:.3%} of it (at most 1 %)"
        )
        Path(os.environ["BENCHMARK_RESULT"]).write_text(str(agreement / step))
    distributed.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="per rank and step")
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        work(options.steps, options.tokens)
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
        return 0 if float(Path(result.name).read_text()) <= 0.01 else 1


if __name__ == "__main__":
    raise SystemExit(main())
