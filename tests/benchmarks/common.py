"""What the benchmark scripts share: configurations for small models, and a watcher of a run's own
log.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import SCRIPT
from helpers.config import demo_base, write_config


def read_repeats(description: str, default: int) -> int:
    """How often a benchmark measures, from the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repeats", metavar="REPEATS", type=int, nargs="?", default=default)
    return parser.parse_args().repeats


def make_config(folder: Path, **changes: object) -> Path:
    """The demo's configuration for measuring, with `changes`."""
    return write_config(folder, demo_base(), **changes)


class Watched:
    """A command that trains, run to its end: when each optimizer step was logged, and the memory of
    the process.

    `steps` is {step: seconds since the command}, `losses` {step: loss}, `peak` the most resident
    bytes of the command's own process (not its children), `console` what it printed.
    """

    def __init__(self, command: list[str], out: Path, **environment: str):
        self.steps, self.losses, self.peak = {}, {}, 0
        env = {
            key: value
            for key, value in os.environ.items()
            if not re.match("CUDA|SWANLAB|NPROC|MASTER|NNODES", key)
        }
        with tempfile.TemporaryFile("w+") as output:
            begun = time.perf_counter()
            env |= {
                "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
                **environment,
            }  # where torchrun is
            process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
            while process.poll() is None:
                self.look(process.pid, out, begun)
                time.sleep(0.005)
            self.look(process.pid, out, begun)
            output.seek(0)
            self.console = output.read()
        if process.returncode:
            raise SystemExit(
                f"{command}: exit code {process.returncode}\n{self.console[-3000:]}"
            )

    def look(self, pid: int, out: Path, begun: float) -> None:
        now = time.perf_counter() - begun
        for log in [*out.glob("trainer_log.jsonl"), *out.glob("*/trainer_log.jsonl")]:
            for text in log.read_text(encoding="utf-8").splitlines()[len(self.steps) :]:
                line = json.loads(text) if text.endswith("}") else {}
                if "loss" in line and line["current_steps"] not in self.steps:
                    self.steps[line["current_steps"]] = now
                    self.losses[line["current_steps"]] = line["loss"]
        try:
            with open(f"/proc/{pid}/status", encoding="ascii") as status:
                peaks = [
                    int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")
                ]
                self.peak = max([self.peak, *peaks])
        except OSError:
            pass

    def first_step(self) -> float:
        """Seconds from the command to the log line of the first optimizer step."""
        return self.steps[1]

    def rate(self, skip: int) -> float:
        """Optimizer steps a second after the first `skip`."""
        last = max(self.steps)
        return (last - skip) / (self.steps[last] - self.steps[skip])


def launcher(config: Path) -> list[str]:
    """The launcher's command."""
    return [sys.executable, str(SCRIPT), str(config)]


def llamafactory_cli(config: Path) -> list[str]:
    """llamafactory-cli's command; it wants FORCE_TORCHRUN=1 and NPROC_PER_NODE to be set."""
    return [str(Path(sys.executable).with_name("llamafactory-cli")), "train", str(config)]


def describe_machine() -> str:
    """Machine, date and versions, for the head of a table."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next(
            (line.split(":")[1].strip() for line in info if line.startswith("model name")),
            platform.machine(),
        )
    packages = ("torch", "transformers", "llamafactory", "deepspeed")
    versions = ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in packages),
        ]
    )
    return f"{model}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {versions}"
