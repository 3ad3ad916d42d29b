"""The plan's memory against torch's own tracker, and against what ranks on a CPU really hold.

    python tests/benchmarks/memory.py

Without a GPU: for Qwen3's shapes in bf16 with 2,048 tokens, what a micro-batch takes in each phase
beside the model states, as planned and as torch.distributed._tools.mem_tracker counts it under
FakeTensorMode (tests/helpers/memory_tracker.py). Model states and the optimizer's share of one of
8 ranks are divided by arithmetic: the tracker sees one device.

On a CPU: trains a Qwen3 of 113 M parameters and the 1 M demo model for a few steps each, with one short
sample per step, so that activations do not count, and compares the growth of a rank's resident
memory from the small to the large model with the growth of the planned parts parameters + gradients
+ optimizer. What both hold (Python, torch, DeepSpeed) cancels. The C library is told to give freed
tensors back at once, and the least that a rank holds is taken, since gathered weights and the
tensors of a step come and go; the plan counts those as buffers and activations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from common import SCRIPT, describe_machine, launcher, make_config
from helpers.config import CONFIGS, ZERO3_FILE, make_model
from helpers.launcher import losses
from helpers.memory_tracker import track
from helpers.plan import plan_phases
from train_qwen3_ft import qwen3_config

SIZES = ("0.6B", "1.7B", "4B", "8B", "14B")
TOKENS, RANKS = 2048, 8
STATES = ("parameters", "gradients", "optimizer")


def resident(tag: str) -> dict[str, int]:
    """{rank: resident bytes} of the ranks that carry `tag` in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, KeyError, ValueError):
            env = dict(
                item.split("=", 1)
                for item in (process / "environ").read_text().split("\0")
                if "=" in item
            )
            if env.get("MEMORY_TAG") == tag and "RANK" in env:
                found[env["RANK"]] = int(
                    (process / "statm").read_text().split()[1]
                ) * os.sysconf("SC_PAGE_SIZE")
    return found


def measure(folder: Path, model: Path) -> tuple[int, int]:
    """(planned, held) bytes: the plan's parts per rank, and the least that rank 1 holds in the
    middle of the run.
    """
    folder.mkdir()
    config = make_config(
        folder,
        model_name_or_path=str(model),
        deepspeed=ZERO3_FILE,
        bf16=True,
        max_steps=12,
        cutoff_len=16,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    env = {
        **os.environ,
        "NPROC_PER_NODE": "2",
        "OMP_NUM_THREADS": "1",
        "MEMORY_TAG": folder.name,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    plan = subprocess.run(
        [sys.executable, str(SCRIPT), str(config), "--dry-run", "--json"],
        env=env,
        check=True,
        capture_output=True,
    )
    process = subprocess.Popen(launcher(config), env=env, stdout=subprocess.DEVNULL)
    held = []
    while process.poll() is None:
        runs = list((folder / "out").glob("2*"))
        if runs and 6 <= max(losses(runs[0]), default=0) <= 11:
            held += [size for rank, size in resident(folder.name).items() if rank == "1"]
        time.sleep(0.02)
    memory = json.loads(plan.stdout)["memory_per_gpu"]
    return sum(memory[name] for name in STATES), min(held)


def compare_with_tracker() -> None:
    """Print planned and tracked GiB for each shape, micro-batch and phase."""
    phases = ("forward/backward", "optimizer step", "evaluation")
    print("| model | micro-batch | checkpointing | " + " | ".join(phases) + " |")
    print("|---" * 6 + "|")
    for size, checkpointing, batch in product(SIZES, (True, False), (1, 2, 4)):
        case = (qwen3_config(f"Qwen/Qwen3-{size}"), batch, TOKENS, checkpointing, RANKS)
        planned, tracked = plan_phases(*case), track(*case)
        cells = [
            f"{planned[phase] / 2**30:.2f} / {tracked[phase] / 2**30:.2f} "
            f"= {planned[phase] / tracked[phase]:.3f}"
            for phase in phases
        ]
        mode = "yes" if checkpointing else "no"
        print(f"| {size} | {batch} | {mode} | " + " | ".join(cells) + " |", flush=True)


def compare_with_ranks() -> None:
    """Train both models and print the comparison."""
    with tempfile.TemporaryDirectory() as scratch:
        large = make_model(
            Path(scratch, "model"),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=6,
            head_dim=64,
        )
        small_plan, small_held = measure(Path(scratch, "small"), CONFIGS / "demo_model")
        large_plan, large_held = measure(Path(scratch, "large"), large)
    planned, held = large_plan - small_plan, large_held - small_held
    print(
        f"planned {planned / 2**20:.0f} MiB, held {held / 2**20:.0f} MiB per rank; "
        f"planned / held {planned / held:.3f}"
    )


def main() -> None:
    """Print the machine, the table and the comparison with real ranks."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(describe_machine())
    compare_with_tracker()
    compare_with_ranks()


if __name__ == "__main__":
    main()
