"""The same global batch, split differently between micro-batch and gradient accumulation, under
ZeRO-3 on 2 ranks.

    python tests/benchmarks/batch_split.py [REPEATS]        # default 3

ZeRO-3 gathers all weights for every micro-batch, so fewer and larger micro-batches do the same step
with less traffic. Prints the steps per second (median), the first and last loss, and the bytes that
each rank gathers from the other per step: all weights twice per micro-batch, for the forward and
the backward pass, half of them from the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import SCRIPT, Watched, describe_machine, launcher, make_config, read_repeats
from helpers.config import ZERO3_FILE

SPLITS = ((2, 8), (4, 4), (8, 2), (16, 1))


def main() -> None:
    """Run every split `repeats` times in turn and print the table."""
    repeats = read_repeats(__doc__, 3)
    rates, losses, gathered = {split: [] for split in SPLITS}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for micro, accumulation in SPLITS:
                folder = Path(scratch, f"{repeat}-{micro}")
                folder.mkdir()
                config = make_config(
                    folder,
                    deepspeed=ZERO3_FILE,
                    max_steps=20,
                    per_device_train_batch_size=micro,
                    gradient_accumulation_steps=accumulation,
                )
                plan = subprocess.run(
                    [sys.executable, str(SCRIPT), str(config), "--dry-run", "--json"],
                    check=True,
                    capture_output=True,
                    env={"NPROC_PER_NODE": "2", "PATH": "/usr/bin:/bin"},
                )
                run = Watched(
                    launcher(config), folder / "out", NPROC_PER_NODE="2", OMP_NUM_THREADS="1"
                )
                rates[micro, accumulation].append(run.rate(skip=5))
                losses[micro, accumulation] = (run.losses[1], run.losses[max(run.losses)])
                weights = 4 * json.loads(plan.stdout)["parameters"]  # in float32
                gathered[micro, accumulation] = weights * 2 * accumulation / 2
    print(describe_machine())
    print(
        "| micro-batch x accumulation | steps/s | against 2 x 8 | first loss | last loss "
        "| gathered per step (MB) |"
    )
    print("|---|---|---|---|---|---|")
    base = statistics.median(rates[SPLITS[0]])
    for split in SPLITS:
        rate = statistics.median(rates[split])
        first, last = losses[split]
        print(
            f"| {split[0]} x {split[1]} | {rate:.2f} | {rate / base:.2f} | {first:.6f} "
            f"| {last:.6f} | {gathered[split] / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
