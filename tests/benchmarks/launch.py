"""Start-up and speed against llamafactory-cli and against the floor, a bare torchrun that only
calls run_exp.

python tests/benchmarks/launch.py [REPEATS]      # default 5; about 90 seconds a round on 2 cores

All three train the same configuration on 2 ranks under ZeRO-3 on a CPU, in turn, so that a busy
moment of the machine meets all of them. Prints medians and ratios: the time from the command to the
first optimizer step (demo model), the steps a second in the steady state (a Qwen3 of 33 M
parameters), and the memory of the first process.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from common import (
    Watched,
    describe_machine,
    launcher,
    llamafactory_cli,
    make_config,
    read_repeats,
)
from helpers.config import ZERO3_FILE, make_model

BARE = """import sys, yaml
from llamafactory.train.tuner import run_exp
run_exp(yaml.safe_load(open(sys.argv[1])))
"""


def bare_torchrun(config: Path) -> list[str]:
    """The least that can train: torchrun on a script that calls run_exp."""
    script = config.with_name("bare.py")
    script.write_text(BARE, encoding="utf-8")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return [*torchrun, str(script), str(config)]


COMMANDS = {
    "launcher": launcher,
    "llamafactory-cli": llamafactory_cli,
    "bare torchrun": bare_torchrun,
}


def measure(name: str, folder: Path, steps: int, **changes: object) -> Watched:
    """One run of one of the three commands."""
    folder.mkdir(parents=True)
    # With use_cpu transformers would not initialize DeepSpeed; the launcher leaves it out by
    # itself.
    changes = {
        "use_cpu": True if name == "launcher" else None,
        "deepspeed": ZERO3_FILE,
        "max_steps": steps,
        "overwrite_output_dir": None,
        **changes,
    }
    config = make_config(folder, **changes)
    return Watched(
        COMMANDS[name](config),
        folder / "out",
        NPROC_PER_NODE="2",
        FORCE_TORCHRUN="1",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
    )


def main() -> None:
    """Run the rounds and print the tables."""
    rounds = read_repeats(__doc__, 5)
    start = {name: [] for name in COMMANDS}
    steady = {name: [] for name in COMMANDS}
    memory = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(
            Path(scratch, "model"),
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
        )
        for number in range(
            rounds + 1
        ):  # the first is thrown away: it compiles DeepSpeed's operator and warms caches
            for name in COMMANDS:
                short = measure(name, Path(scratch, f"start-{number}-{name}"), 3)
                long = measure(
                    name,
                    Path(scratch, f"steady-{number}-{name}"),
                    16,
                    model_name_or_path=str(model),
                    per_device_train_batch_size=4,
                    max_samples=400,
                )
                if number:
                    start[name].append(short.first_step())
                    steady[name].append(long.rate(skip=5))
                    memory[name].append(long.peak)
                print(
                    f"# {number} {name}: first step {short.first_step():.2f} s, "
                    f"{long.rate(5):.3f} steps/s, {long.peak / 2**20:.0f} MiB",
                    flush=True,
                )
    print(describe_machine())
    print(
        "| command | to the first step (s) | steps/s | memory of the first process (MiB) |\n"
        "|---|---|---|---|"
    )
    for name in COMMANDS:
        print(
            f"| {name} | {statistics.median(start[name]):.2f} "
            f"| {statistics.median(steady[name]):.3f} | {max(memory[name]) / 2**20:.0f} |"
        )
    for other in ("llamafactory-cli", "bare torchrun"):
        print(
            f"first step, launcher / {other}: {ratio(start, other):.3f}; "
            f"steps/s: {ratio(steady, other):.3f}"
        )


def ratio(values: dict[str, list[float]], other: str) -> float:
    """The median of the rounds' ratios, launcher to the other."""
    return statistics.median(
        ours / theirs for ours, theirs in zip(values["launcher"], values[other], strict=True)
    )


if __name__ == "__main__":
    main()
