"""20 random SIGKILLs of workers over one run, each restarted by the launcher, against an
uninterrupted run.

    python tests/tools/soak_kills.py                     # about 10 minutes on two cores
    python tests/tools/soak_kills.py --kills 5 --seed 3

Two ranks under ZeRO-3 on the CPU. A kill comes at a random moment (also within a save) after each
start has committed a checkpoint, so that each one is followed by an automatic restart. Exit code 0:
the final weights are bit-identical and the loss of every logged step is equal.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.config import write_config
from helpers.launcher import Run, committed, losses, run, until, weights


def kill_once(live: Run, before: int, chance: random.Random) -> str:
    """Wait for a checkpoint newer than `before`, then up to a second, and SIGKILL a rank; returns
    what was done.
    """
    until(
        lambda: max([0, *committed(live.run_dir)]) > before or live.process.poll() is not None,
        "a save",
    )
    time.sleep(chance.uniform(0, 1))
    rank, step = chance.randrange(2), live.last_step()
    worker = live.worker(rank)
    assert worker, f"no rank {rank} is there to be killed:\n{live.console}"
    os.kill(worker, signal.SIGKILL)
    return f"rank {rank} killed after step {step}"


def soak(folder: Path, kills: int, seed: int, changes: dict) -> Run:
    """The run that is killed."""
    chance, restarts = random.Random(seed), 0
    with Run(folder, write_config(folder, max_restarts=kills, **changes)) as live:
        while restarts < kills:
            before = max(committed(live.run_dir), default=0) if restarts else 0
            done = kill_once(live, before, chance)
            restarts += 1
            resumed = live.see(
                rf"^restart {restarts} of {kills}: resuming from (checkpoint-\d+)$"
            )[1]
            print(f"kill {restarts}: {done}, resumed from {resumed}", flush=True)
        live.wait(1200)
    return live


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=240)
    options = parser.parse_args()
    folder, changes = Path(tempfile.mkdtemp(prefix="soak-")), {"max_samples": 2 * options.steps}
    begun = time.monotonic()
    whole = run(folder / "whole", write_config(folder / "whole", **changes), seconds=1200)
    killed = soak(folder / "killed", options.kills, options.seed, changes)
    assert whole.process.returncode == 0, whole.console
    print(
        f"{options.kills} kills (seed {options.seed}), "
        f"{killed.console.count(chr(10) + 'restart ')} restarts, "
        f"{len(list(killed.run_dir.glob('incomplete-*')))} incomplete checkpoints moved aside, "
        f"exit {killed.process.returncode}, "
        f"{time.monotonic() - begun:.0f} s"
    )
    same = killed.process.returncode == 0 and weights(killed.run_dir) == weights(whole.run_dir)
    logged = losses(whole.run_dir)
    equal = sum(losses(killed.run_dir).get(step) == values for step, values in logged.items())
    print(
        f"final weights bit-identical: {'yes' if same else 'NO'}; "
        f"equal losses: {equal} of {len(logged)} logged steps"
    )
    good = same and equal == len(logged)
    if good:
        shutil.rmtree(folder)
    else:
        print(f"both runs are in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
