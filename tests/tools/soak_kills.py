"""Random SIGKILLs of workers over one run, each restarted by the launcher, against a run that nobody
killed.

    python tests/tools/soak_kills.py                          # 20 kills of two ranks, 10 minutes
    python tests/tools/soak_kills.py --ranks 2 1 2 --kills 40 # two changes of the number of ranks

Under ZeRO-3 in bf16 on the CPU. A kill comes at a random moment (also within a save) after each
start has committed a checkpoint, so that each one is followed by an automatic restart. Where the
number of ranks changes, the whole launch is killed and resumed, and the other run changes it at the
same checkpoint. Exit code 0: the final weights are bit-identical and the loss of every logged step
is equal.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.config import write_config
from helpers.launcher import Run, committed, fork, losses, train, until, weights


def kill_once(live: Run, before: int, ranks: int, chance: random.Random) -> str:
    """Wait for a checkpoint newer than `before`, then up to a second, and SIGKILL a rank; returns
    what was done.
    """
    until(
        lambda: max([0, *committed(live.run_dir)]) > before or live.process.poll() is not None,
        "a save",
    )
    time.sleep(chance.uniform(0, 1))
    rank, step = chance.randrange(ranks), live.last_step()
    worker = live.worker(rank)
    assert worker, f"no rank {rank} is there to be killed:\n{live.console}"
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    return f"rank {rank} of {ranks} killed after step {step}"


def soak(live: Run, ranks: int, kills: int, before: int, chance: random.Random) -> None:
    """Kill a rank of one launch again and again."""
    for restarts in range(1, kills + 1):
        done = kill_once(live, before, ranks, chance)
        resumed = live.see(
            rf"^restart {restarts} of {kills}: resuming from (checkpoint-(\d+))$"
        )
        before = int(resumed[2])
        print(f"kill {restarts}: {done}, resumed from {resumed[1]}", flush=True)


def killed_run(folder: Path, config: Path, options: argparse.Namespace) -> tuple[Path, list]:
    """The run that is killed: its directory, and from which step on it had how many ranks."""
    chance, changes, run_dir = random.Random(options.seed), [], None
    kills = options.kills // len(options.ranks)
    for ranks in options.ranks:
        arguments = ["--resume", run_dir] if run_dir else [config]
        with Run(folder, *arguments, f"max_restarts={kills}", ranks=ranks) as live:
            run_dir = live.run_dir
            before = 0
            if changes:
                found = live.see(r"^resharded +checkpoint-(\d+): ")
                before = int(found[1])
            changes.append((before, ranks))
            print(f"{ranks} ranks from step {before} on", flush=True)
            soak(live, ranks, kills, before, chance)
            if len(changes) == len(options.ranks):
                live.wait(2400)
                assert live.process.returncode == 0, live.console
    return run_dir, changes


def undisturbed_run(folder: Path, config: Path, changes: list) -> Path:
    """The run with the same numbers of ranks, and without a kill."""
    _, ranks = changes[0]
    done = train(folder, config, "save_total_limit=-1", ranks=ranks, seconds=2400)
    for step, ranks in changes[1:]:
        copy = fork(done.run_dir, f"from-{step}", step)
        done = train(folder, "--resume", copy, ranks=ranks, seconds=2400)
    return done.run_dir


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    # Two samples per step, whatever the number of ranks.
    settings = {
        "max_samples": 2 * options.steps,
        "gradient_accumulation_steps": None,
        "global_batch_size": 2,
    }
    begun = time.monotonic()
    config = write_config(folder / "killed", **settings)
    killed, changes = killed_run(folder / "killed", config, options)
    config = write_config(folder / "whole", **settings)
    whole = undisturbed_run(folder / "whole", config, changes)
    consoles = [path.read_text(errors="replace") for path in folder.glob("killed/console-*")]
    text = "\n".join(consoles)
    print(
        f"{options.kills} kills (seed {options.seed}), "
        f"{len(re.findall('^restart ', text, re.MULTILINE))} restarts, "
        f"{len(list(killed.glob('incomplete-*')))} incomplete checkpoints moved aside, "
        f"{len(re.findall('is not loaded as it was saved', text))} false alarms, "
        f"{time.monotonic() - begun:.0f} s"
    )
    same = weights(killed) == weights(whole)
    ours, theirs = losses(killed), losses(whole)
    equal = sum(ours.get(step) == values for step, values in theirs.items())
    print(
        f"final weights bit-identical: {'yes' if same else 'NO'}; "
        f"equal losses: {equal} of {len(theirs)} logged steps"
    )
    good = same and equal == len(theirs)
    if good:
        shutil.rmtree(folder)
    else:
        print(f"both runs are in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
