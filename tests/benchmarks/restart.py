"""How long a restart takes: from the death of a worker to the next training step, against a cold
start.

    python tests/benchmarks/restart.py              # five rounds, about 2 minutes on two idle cores

It starts the launcher as the fault tests do, and needs tests/requirements.txt as they do.

Both end when the first training step is done: the cold start begins with the command, the restart
with a SIGKILL of a rank. Two ranks under ZeRO-3 on the CPU. Prints the medians and the ratio; 1.3
is allowed.
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.config import write_config
from helpers.launcher import Run, committed, until


def steps_done(folder: Path) -> list[float]:
    """When each training step was done on rank 0, in seconds since the epoch."""
    path = folder / "markers" / "clock"
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def measure(folder: Path, rank: int) -> tuple[float, float]:
    """(cold start, restart) in seconds of one run, whose `rank` is killed."""
    config, begun = write_config(folder, max_restarts=1), time.time()
    with Run(folder, config, faults=[{"point": "clock"}]) as live:
        cold = until(lambda: steps_done(folder), "the first step")[0] - begun
        until(lambda: committed(live.run_dir), "a checkpoint")
        killed = time.time()
        os.kill(live.worker(rank), signal.SIGKILL)
        live.see("restart 1 of 1")
        restarted = time.time()
        after = until(
            lambda: [done for done in steps_done(folder) if done > restarted],
            "a step after the restart",
        )
        return cold, after[0] - killed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds, folder = parser.parse_args().rounds, Path(tempfile.mkdtemp(prefix="restart-"))
    pairs = []
    for number in range(rounds):
        pairs.append(measure(folder / str(number), number % 2))
        print(
            f"round {number + 1}: cold start {pairs[-1][0]:.1f} s, restart {pairs[-1][1]:.1f} s",
            flush=True,
        )
    cold, restart = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"median of {rounds}: cold start {cold:.2f} s, restart {restart:.2f} s, "
        f"ratio {restart / cold:.2f} (at most 1.3)"
    )
    shutil.rmtree(folder)
    return 0 if restart <= 1.3 * cold else 1


if __name__ == "__main__":
    raise SystemExit(main())
