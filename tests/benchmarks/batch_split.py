"""The same optimizer step, split differently between micro-batch and gradient accumulation, under
ZeRO-3 on 2 ranks.

    python tests/benchmarks/batch_split.py [REPEATS]        # default 3: the demo's data
    python tests/benchmarks/batch_split.py --long-tail      # lengths from 50 to 2,000, every split

ZeRO-3 gathers all weights for every micro-batch, so fewer and larger micro-batches do the same step
with less traffic, but pad more where lengths differ. On the demo's data the launcher with
`per_device_train_batch_size: auto`, the launcher and llamafactory-cli with 2 x 8 take turns, once
grouped by length and once in random order: steps per second (medians), and how far any loss is from
that of the launcher with 2 x 8 (llamafactory-cli groups by length from another seed). With
--long-tail every split is run in both orders; `auto` marks the one that the launcher would choose.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from common import SCRIPT, describe_machine, launcher, llamafactory_cli, make_config
from helpers.config import ZERO3_FILE, make_model, write_json

SAMPLES = 16  # per rank and step
PAIR = {"instruction": "objects", "input": "", "output": "SELECT"}
OURS = ("launcher, auto", "launcher, 2 x 8")
THEIRS = "llamafactory-cli, 2 x 8"
KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def run(command: list[str], folder: Path) -> common.Watched:
    """One run of two ranks on the CPU."""
    environment = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "FORCE_TORCHRUN": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return common.Watched(command, folder / "out", **environment)


def make(folder: Path, split: tuple[int, int] | None, **changes: object) -> Path:
    """A configuration with this split of 16 samples per rank; None: auto."""
    sizes = dict(zip(KEYS, split or ("auto", None), strict=True))
    sizes["global_batch_size"] = None if split else 2 * SAMPLES
    return make_config(folder, deepspeed=ZERO3_FILE, **sizes, **changes)


def side_by_side(scratch: Path, repeats: int, order: str) -> None:
    """The launcher with auto, with 2 x 8, and llamafactory-cli with 2 x 8, in this order of samples."""
    rates: dict[str, list[float]] = {}
    starts: dict[str, list[float]] = {}
    losses: dict[str, dict[int, float]] = {}
    for number in range(repeats):
        for name in (*OURS, THEIRS):
            folder = scratch / order / f"{number}-{name.replace(' ', '')}"
            folder.mkdir(parents=True)
            split = None if name == OURS[0] else (2, 8)
            # With use_cpu transformers would not initialize DeepSpeed.
            more = {"max_steps": 20, "use_cpu": True if name in OURS else None}
            more |= {"train_sampling_strategy": order, "overwrite_output_dir": None}
            config = make(folder, split, **more)
            done = run(launcher(config) if name in OURS else llamafactory_cli(config), folder)
            rates.setdefault(name, []).append(done.rate(skip=5))
            starts.setdefault(name, []).append(done.first_step())
            losses[name] = done.losses
            print(
                f"# {order} {number} {name}: {done.rate(5):.2f} steps/s, {done.first_step():.1f} s"
            )
    print(
        f"\n{order}: | command | steps/s | times | first step (s) | last loss | furthest off |"
    )
    print("|---|---|---|---|---|---|")
    given, base = losses[OURS[1]], statistics.median(rates[THEIRS])
    for name, own in losses.items():
        rate, start = (statistics.median(seen[name]) for seen in (rates, starts))
        off = max(abs(own[step] / given[step] - 1) for step in given)
        print(
            f"| {name} | {rate:.2f} | {rate / base:.2f} | {start:.1f} | {own[20]:.6f} | {off:.1e} |",
            flush=True,
        )


def write_long_tail(folder: Path) -> dict[str, object]:
    """Pairs of 50 to 2,000 tokens, most of them short, and a small model that takes them."""
    draw, rows = random.Random(0), []
    for _ in range(800):
        tokens = min(int(50 * math.exp(abs(draw.gauss(0, 1.3)))), 2000)
        rows.append(PAIR | {"output": " WHERE" * max(tokens - 16, 1)})
    write_json(folder / "rows.json", rows)
    write_json(folder / "dataset_info.json", {"rows": {"file_name": "rows.json"}})
    model = make_model(folder / "model", max_position_embeddings=2048)
    return {
        "dataset": "rows",
        "dataset_dir": str(folder),
        "cutoff_len": 2000,
        "model_name_or_path": str(model),
        "max_steps": 20,
        "seed": 1,
    }


def chosen_split(config: Path) -> int:
    """The micro-batch that the launcher chooses by itself."""
    plan = subprocess.run(
        [sys.executable, str(SCRIPT), str(config), "--dry-run", "--json"],
        check=True,
        capture_output=True,
        env={"NPROC_PER_NODE": "2", "PATH": "/usr/bin:/bin"},
    )
    return json.loads(plan.stdout)["configuration"][KEYS[0]]


def long_tail(scratch: Path) -> None:
    """Every split of a long-tailed data set, in random order and grouped by length."""
    data = write_long_tail(scratch / "data")
    print("| order | micro-batch x accumulation | steps/s | of the best | |")
    print("|---|---|---|---|---|")
    for order in ("random", "group_by_length"):
        rates = {}
        for size in (n for n in range(1, SAMPLES + 1) if SAMPLES % n == 0):
            folder = scratch / order / str(size)
            given = {
                **data,
                "train_sampling_strategy": order,
                "output_dir": str(folder / "out"),
            }
            done = run(launcher(make(folder, (size, SAMPLES // size), **given)), folder)
            rates[size] = done.rate(skip=2)
        chosen = chosen_split(make(folder, None, **given))
        for size, rate in rates.items():
            mark = "auto" if size == chosen else ""
            share = 100 * rate / max(rates.values())
            print(
                f"| {order} | {size} x {SAMPLES // size} | {rate:.3f} | {share:.0f} % | {mark} |"
            )


def main() -> None:
    """Run one of the two and print its table."""
    with tempfile.TemporaryDirectory() as scratch:
        if sys.argv[1:] == ["--long-tail"]:
            long_tail(Path(scratch))
        else:
            repeats = common.read_repeats(__doc__, 3)
            for order in ("group_by_length", "random"):
                side_by_side(Path(scratch), repeats, order)
    print(describe_machine())


if __name__ == "__main__":
    main()
