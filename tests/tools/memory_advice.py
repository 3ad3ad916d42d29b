"""The memory table of tests/benchmarks/README.md: what the plan computes for Qwen3 on 1 to 8 GPUs
of 24, 48 and 80 GB.

    python tests/tools/memory_advice.py

For each machine: the largest Qwen3 that full fine-tuning in bf16 fits under plain ZeRO-3, and
Qwen3-14B with the offload file, both with sequences of 2,048 tokens and the largest micro-batch of
1, 2, 4, 8 or 16 that leaves 5 % of a GPU free.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.plan import bare_plan
from train_qwen3_ft import QWEN3_SHAPES, Zero, estimate, format_bytes, qwen3_config

# What NVML reports of such cards, in bytes: 24, 48 and 80 GB cards hold a little less or more than
# they are called.
CARDS = {"24 GB": 24 * 2**30, "48 GB": 48 * 2**30, "80 GB": 80 * 2**30}
COLUMNS = {
    "largest under ZeRO-3": (Zero(3, used=True), tuple(reversed(QWEN3_SHAPES))),
    "14B with offload": (Zero(3, True, True, used=True), ("14B",)),
}


def best(strategy: Zero, sizes: tuple[str, ...], count: int, room: int) -> str:
    """`14B, batch 2 (61.0 GiB)` of the first model that fits, with the host memory that offloading
    takes.
    """
    for size in sizes:
        shape = qwen3_config(f"Qwen/Qwen3-{size}")
        for batch in (16, 8, 4, 2, 1):
            keys = {"per_device_train_batch_size": batch, "cutoff_len": 2048}
            plan = estimate(bare_plan(shape, strategy, count, room, **keys))
            if plan.needed <= 0.95 * room:
                host = plan.host_memory
                on_host = f", host {format_bytes(host)}" if host else ""
                return f"{size}, batch {batch} ({format_bytes(plan.needed)}{on_host})"
    return "none"


def main() -> None:
    """Print the table."""
    print(
        "| GPUs | " + " | ".join(f"{card}, {name}" for card in CARDS for name in COLUMNS) + " |"
    )
    print("|---" * (1 + len(CARDS) * len(COLUMNS)) + "|")
    for count in (1, 2, 4, 8):
        cells = [
            best(*column, count, room) for room in CARDS.values() for column in COLUMNS.values()
        ]
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
