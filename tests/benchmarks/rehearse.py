"""What a rehearsal says against what the run then takes: the demo and a Qwen3 of 33 M parameters, on
1 and 2 ranks under ZeRO-3.

    python tests/benchmarks/rehearse.py [REPEATS]        # default 1

Prints seconds per step, the most resident memory of a rank and the bytes of a checkpoint, as the
rehearsal said and as the run's summary has them, and what the rehearsal took after its first step
began. Where several rounds are run, the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from common import describe_machine, launcher, make_config, read_repeats
from helpers.config import ZERO3_FILE, make_model

SIZES = {  # 33 M parameters
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
STEPS = 30
COMPARED = ("step_seconds", "peak_memory", "checkpoint_bytes")


def measure(config: Path, ranks: int) -> tuple[dict, dict]:
    """The figures of a rehearsal, and of the run after it."""
    env = {**os.environ, "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = launcher(config)
    done = subprocess.run(
        [*command, "--rehearse", "--json"],
        check=True,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    [summary] = (config.parent / "out").glob("*/summary.json")
    return json.loads(done.stdout), json.loads(summary.read_text(encoding="utf-8"))


def main() -> None:
    """Rehearse and run each case in turn and print the table."""
    repeats = read_repeats(__doc__, 1)
    print(describe_machine())
    print(
        "| model | ranks | s per step | run | MiB | run | checkpoint bytes | run | after start |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        model = str(make_model(Path(scratch, "model"), **SIZES))
        changes = {"deepspeed": ZERO3_FILE, "save_strategy": "steps", "save_steps": STEPS}
        for name, more in (("demo", {}), ("33 M", {"model_name_or_path": model})):
            for ranks in (1, 2):
                rounds = []
                for repeat in range(repeats):
                    folder = Path(scratch, f"{name}-{ranks}-{repeat}")
                    sizes = {"max_samples": STEPS * 8 * ranks, "num_train_epochs": 1}
                    config = make_config(folder, **sizes, **changes, **more)
                    rounds.append(measure(config, ranks))
                show(name, ranks, rounds)


def show(name: str, ranks: int, rounds: list[tuple[dict, dict]]) -> None:
    """A line of the table."""
    cells = []
    for key in COMPARED:
        for figures in zip(*rounds, strict=True):
            value = statistics.median(line[key] for line in figures)
            if key == "peak_memory":
                value = round(value / (1 << 20))
            cells.append(f"{value:.3g}" if key == "step_seconds" else f"{value:,.0f}")
    after = statistics.median(said["seconds"] - said["start_seconds"] for said, _ in rounds)
    print(f"| {name} | {ranks} | {' | '.join(cells)} | {after:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
