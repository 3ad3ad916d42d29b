"""The launcher as a real process for the fault tests: started, watched, killed, and every process of it found."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml
from conftest import FOREIGN, ROOT, SCRIPT

FAULTS = Path(__file__).resolve().parent / "faults"
ZERO = str(ROOT / "configs" / "deepspeed" / "ds_z3_config.json")
DEMO = ROOT / "configs"
PATIENCE = 240  # seconds: a slow machine is no failure
TAG = "FAULT_TEST_TAG"
# 40 samples on 2 ranks: 20 steps.
BASE = {
    "model_name_or_path": str(DEMO / "demo_model"), "train_from_scratch": True, "stage": "sft", "do_train": True,
    "finetuning_type": "full", "template": "qwen3", "use_cpu": True, "dataset": "code2sql_demo",
    "dataset_dir": str(DEMO / "data"), "cutoff_len": 192, "max_samples": 40, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1, "learning_rate": 3.0e-3, "num_train_epochs": 1, "logging_steps": 1,
    "save_steps": 2, "save_total_limit": 2, "dataloader_num_workers": 2, "preprocessing_num_workers": 2,
    "plot_loss": False, "report_to": "none", "disable_gradient_checkpointing": True, "deepspeed": ZERO,
}


def write_config(folder: Path, **changes: object) -> Path:
    """Write BASE with `changes` (None takes a key out) as folder/config.yaml; runs go to folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**BASE, "output_dir": str(folder / "out"), **changes}
    values = {key: value for key, value in values.items() if value is not None}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> object:
    """Poll until `condition()` is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return value


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; {} where it is gone or a zombie."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
    return {}


def command_of(pid: int) -> str:
    """A process's command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def parent_of(pid: int) -> int:
    """A process's parent; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def settle_signals(nohup: bool, terminal: bool) -> None:
    """In the launcher's process before it starts: signals as a user's shell leaves them, whatever the tests were
    started from; under nohup without a hangup; with `terminal` its stdin is the terminal that controls the session.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A terminal whose text goes to a file; closing it is what closing its window does."""

    def __init__(self, path: Path):
        self.master, self.slave = pty.openpty()
        self.path, self.closing = path, threading.Event()
        self.thread = threading.Thread(target=self.copy)
        self.thread.start()

    def copy(self) -> None:
        with open(self.path, "ab", buffering=0) as file:
            while not self.closing.is_set():
                if select.select([self.master], [], [], 0.05)[0]:
                    file.write(os.read(self.master, 4096).replace(b"\r\n", b"\n"))

    def close(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            self.thread.join()
            os.close(self.slave)
            os.close(self.master)


class Run:
    """The launcher, started on `arguments` in a session of its own; everything it starts carries a tag."""

    def __init__(self, folder: Path, *arguments: object, ranks: int = 2, faults: list[dict] | None = None,
                 env: dict[str, str] | None = None, nohup: bool = False, terminal: bool = False,
                 command: list[str] | None = None):
        self.folder, self.tag, self.begun = folder, uuid.uuid4().hex, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        markers = folder / "markers"
        markers.mkdir(exist_ok=True)
        clean = {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}
        full = {**clean, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": str(ranks), TAG: self.tag, **(env or {})}
        if faults:
            full |= {"PYTHONPATH": str(FAULTS), "FAULTS": json.dumps(faults), "FAULT_MARKERS": str(markers)}
        self.console_path = folder / f"console-{self.tag[:6]}.txt"
        self.terminal = Terminal(self.console_path) if terminal else None
        with open(self.console_path, "ab") as file:
            console = self.terminal.slave if terminal else file
            self.process = subprocess.Popen(
                [*(command or [sys.executable, str(SCRIPT)]), *map(str, arguments)],
                stdin=console if terminal else subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, cwd=folder,
                start_new_session=True, env=full,
                preexec_fn=partial(settle_signals, nohup, terminal))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.terminal:
            self.terminal.close()

    @property
    def console(self) -> str:
        """What the user has seen so far."""
        return self.console_path.read_text(encoding="utf-8", errors="replace")

    @property
    def run_dir(self) -> Path:
        """The run directory that the plan named."""
        return Path(self.see(r"^run +(/.*)$")[1])

    def see(self, pattern: str, seconds: float = PATIENCE) -> re.Match:
        """Wait until the console shows `pattern`; fail at once where the launcher ends without it."""
        def look() -> re.Match | None:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.console, re.MULTILINE)
            assert found or not ended, f"ended with {self.process.returncode} before {pattern!r}:\n{self.console}"
            return found

        return until(look, f"{pattern!r} on the console", seconds)

    def last_step(self) -> int:
        """The last step in the run's log."""
        return max(losses(self.run_dir), default=0)

    def reach(self, step: int) -> "Run":
        """Wait until `step` has been logged; fail where the launcher ends before."""
        until(lambda: self.last_step() >= step or self.process.poll() is not None, f"step {step}")
        assert self.last_step() >= step, self.console
        return self

    def wait(self, seconds: float = PATIENCE) -> int:
        """The launcher's exit code."""
        until(lambda: self.process.poll() is not None, f"the end of the launcher; console:\n{self.console}", seconds)
        return self.process.returncode

    def pids(self) -> list[int]:
        """Every live process that this run has started, the launcher included."""
        found = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in found if environment_of(pid).get(TAG) == self.tag]

    def torchrun(self) -> int | None:
        """torchrun's pid."""
        return next((pid for pid in self.pids() if "torch.distributed.run" in command_of(pid)), None)

    def worker(self, rank: int) -> int | None:
        """The pid of a rank, or None."""
        agent = self.torchrun()
        return next((pid for pid in self.pids() if agent and parent_of(pid) == agent
                     and environment_of(pid).get("RANK") == str(rank)), None)

    def children(self, rank: int) -> list[int]:
        """The processes that a rank has forked: DataLoader workers, tokenizers."""
        worker = self.worker(rank)
        forked = [pid for pid in self.pids() if worker and parent_of(pid) == worker]
        return [pid for pid in forked if command_of(pid) == command_of(worker)]

    def left_after(self, seconds: float = 10) -> list[str]:
        """The processes of this run that still live `seconds` from now; returns as soon as there are none."""
        deadline = time.monotonic() + seconds
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [f"{pid} {command_of(pid)}" for pid in pids]


def run(folder: Path, *arguments: object, seconds: float = PATIENCE, **options: object) -> Run:
    """Start the launcher and wait for its end."""
    with Run(folder, *arguments, **options) as started:
        started.wait(seconds)
    return started


def weights(run_dir: Path) -> str:
    """The fingerprint of the final model."""
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


def losses(run_dir: Path) -> dict[int, list[float]]:
    """{step: the losses that were logged for it}; a line that is being written does not count."""
    found: dict[int, list[float]] = {}
    with contextlib.suppress(OSError):
        for text in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if "loss" in line:
                    found.setdefault(line["current_steps"], []).append(line["loss"])
    return found


def committed(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that have a manifest, as the folder shows it."""
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in run_dir.glob("checkpoint-*/manifest.json"))
