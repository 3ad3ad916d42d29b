"""The launcher as a real process: started, watched, killed, and every process of it found."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from helpers import HELPERS, SCRIPT

STARTUP = HELPERS / "startup"
FAKES = HELPERS / "fakes"
PATIENCE = 240  # seconds: a slow machine is no failure
TAG = "FAULT_TEST_TAG"
# Set by a scheduler, a user or another test, each of these would change what the launcher decides.
FOREIGN = re.compile(
    r"CUDA_|NVIDIA_|SWANLAB_|WANDB_|HF_|HUGGING|TRANSFORMERS_|DS_|MASTER_|TORCHELASTIC_|QWEN3_FT_|"
    r"FAKE_GPUS|PYTHON|(NPROC_PER_NODE|NNODES|NODE_RANK|RANK|LOCAL_RANK|WORLD_SIZE|"
    r"LOCAL_WORLD_SIZE|FORCE_TORCHRUN|USE_RAY|USE_V1|USE_MCA|CC|CXX|NETRC|"
    r"USE_MODELSCOPE_HUB|USE_OPENMIND_HUB|DISABLE_VERSION_CHECK)$"
)


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that steers the launcher."""
    return {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}


def fake_gpus(count: int, total: float = 80, **more: object) -> list[dict]:
    """`count` equal GPUs for the fake NVML; sizes in GiB."""
    return [{"name": "NVIDIA Test GPU", "total": total, **more} for _ in range(count)]


def free_port() -> int:
    """A port of this node that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> object:
    """Poll until `condition()` is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
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
        return (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
        )
    return ""


def parent_of(pid: int) -> int:
    """A process's parent; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def settle_signals(nohup: bool, terminal: bool) -> None:
    """In the launcher's process before it starts: signals as a user's shell leaves them, whatever
    the tests were started from; under nohup without a hangup; with `terminal` its stdin is the
    terminal that controls the session.
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
    """The launcher, started on `arguments` in a session of its own; all that it starts carries a
    tag.

    `folder` takes what the run shows and its fault markers; `cwd` (default: the same) is where it
    is started. With `apart` the console holds stdout only and `errors` stderr.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        ranks: int | None = 2,
        faults: list[dict] | None = None,
        env: dict[str, str] | None = None,
        nohup: bool = False,
        terminal: bool = False,
        command: list[str] | None = None,
        cwd: Path | None = None,
        apart: bool = False,
    ):
        self.folder, self.tag, self.begun = folder, uuid.uuid4().hex, time.monotonic()
        (folder / "markers").mkdir(parents=True, exist_ok=True)
        full = {**clean_environment(), "OMP_NUM_THREADS": "1", TAG: self.tag}
        full["PYTHONPATH"] = str(STARTUP)
        if ranks:
            full["NPROC_PER_NODE"] = str(ranks)
        full |= env or {}
        if faults:
            full |= {"FAULTS": json.dumps(faults), "FAULT_MARKERS": str(folder / "markers")}
        self.console_path = folder / f"console-{self.tag[:6]}.txt"
        self.errors_path = folder / f"errors-{self.tag[:6]}.txt" if apart else self.console_path
        self.terminal = Terminal(self.console_path) if terminal else None
        with open(self.console_path, "ab") as file, open(self.errors_path, "ab") as errors:
            console = self.terminal.slave if terminal else file
            self.process = subprocess.Popen(
                [*(command or [sys.executable, str(SCRIPT)]), *map(str, arguments)],
                stdin=console if terminal else subprocess.DEVNULL,
                stdout=console,
                stderr=errors if apart else subprocess.STDOUT,
                cwd=cwd or folder,
                start_new_session=True,
                env=full,
                preexec_fn=partial(settle_signals, nohup, terminal),
            )

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
        return self.console_path.read_bytes().decode("utf-8", errors="replace")

    @property
    def errors(self) -> str:
        """What stderr got, where it is kept apart."""
        return self.errors_path.read_text(encoding="utf-8", errors="replace")

    @property
    def returncode(self) -> int:
        """The launcher's exit code; fails while it is running."""
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def run_dir(self) -> Path:
        """The run directory that the plan named."""
        return Path(self.see(r"^run +(/.*)$")[1])

    def see(self, pattern: str, seconds: float = PATIENCE) -> re.Match:
        """Wait until the console shows `pattern`; fail where the launcher ends without it."""

        def look() -> re.Match | None:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.console, re.MULTILINE)
            assert found or not ended, (
                f"ended with {self.process.returncode} before {pattern!r}:\n{self.console}"
            )
            return found

        return until(look, f"{pattern!r} on the console", seconds)

    def last_step(self) -> int:
        """The last step in the run's log."""
        return max(losses(self.run_dir), default=0)

    def see_training(self) -> None:
        """Wait until rank 0 of this start is in a step; its first batch is there by then."""
        progress = self.run_dir / "logs" / "rank0.progress"
        until(
            lambda: progress.exists() and progress.read_text().endswith("training"),
            "a first step",
        )

    def reach(self, step: int) -> "Run":
        """Wait until `step` has been logged; fail where the launcher ends before."""
        until(
            lambda: self.last_step() >= step or self.process.poll() is not None, f"step {step}"
        )
        assert self.last_step() >= step, self.console
        return self

    def wait(self, seconds: float = PATIENCE) -> int:
        """The launcher's exit code."""
        until(
            lambda: self.process.poll() is not None,
            f"the end of the launcher; console:\n{self.console}",
            seconds,
        )
        return self.process.returncode

    def pids(self) -> list[int]:
        """Every live process that this run has started, the launcher included."""
        found = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in found if environment_of(pid).get(TAG) == self.tag]

    def torchrun(self) -> int | None:
        """torchrun's pid."""
        return next(
            (pid for pid in self.pids() if "torch.distributed.run" in command_of(pid)), None
        )

    def worker(self, rank: int) -> int | None:
        """The pid of a rank, or None."""
        agent = self.torchrun()
        return next(
            (
                pid
                for pid in self.pids()
                if agent
                and parent_of(pid) == agent
                and environment_of(pid).get("RANK") == str(rank)
            ),
            None,
        )

    def children(self, rank: int) -> list[int]:
        """The processes that a rank has forked: DataLoader workers, tokenizers."""
        worker = self.worker(rank)
        forked = [pid for pid in self.pids() if worker and parent_of(pid) == worker]
        return [pid for pid in forked if command_of(pid) == command_of(worker)]

    def left_after(self, seconds: float = 60) -> list[str]:
        """The processes of this run that still live `seconds` from now; returns as soon as there
        are none, a second later on a free node.
        """
        deadline = time.monotonic() + seconds
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{pid} {command_of(pid)}" for pid in pids]


def run(folder: Path, *arguments: object, seconds: float = PATIENCE, **options: object) -> Run:
    """Start the launcher and wait for its end."""
    with Run(folder, *arguments, **options) as started:
        started.wait(seconds)
    return started


def train(folder: Path, *arguments: object, **options: object) -> Run:
    """A run that must end well."""
    done = run(folder, *arguments, **options)
    assert done.process.returncode == 0, done.console
    return done


def says(shown: str, pattern: str) -> re.Match:
    """Where `pattern` is in what was shown; `^` and `$` are those of a line. Fails with both."""
    found = re.search(pattern, shown, re.MULTILINE)
    if not found:
        raise AssertionError(f"not said: {pattern}\nwhat was said:\n{shown}")
    return found


def fork(source: Path, name: str, step: int) -> Path:
    """A copy of a run directory as it was when only this checkpoint was there."""
    copy = source.parent / name
    copy.mkdir()
    for path in source.iterdir():
        if path.name in ("config.yaml", "plan.json", f"checkpoint-{step}"):
            copier = shutil.copytree if path.is_dir() else shutil.copy
            copier(path, copy / path.name)
    return copy


def weights(run_dir: Path) -> str:
    """The fingerprint of the final model."""
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


def metrics(run_dir: Path) -> list[dict]:
    """The log lines of metrics.jsonl that count, in order; one that is being written does not.

    A line {"event": "begin", "step": N} says that training begins again after step N, so that the
    earlier lines of the steps beyond N were trained again.
    """
    path, found = run_dir / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if line.get("event") == "begin":
                found = [known for known in found if known["step"] <= line["step"]]
            elif "event" not in line:
                found.append(line)
    return found


def losses(run_dir: Path) -> dict[int, list[float]]:
    """{step: the losses that were logged for it}."""
    found: dict[int, list[float]] = {}
    for line in metrics(run_dir):
        if "loss" in line:
            found.setdefault(line["step"], []).append(line["loss"])
    return found


def logged_steps(run_dir: Path) -> list[int]:
    """The steps whose loss LLaMA-Factory's own log has."""
    lines = (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["current_steps"] for line in map(json.loads, lines) if "loss" in line]


def committed(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that have a manifest, as the folder shows it."""
    return sorted(
        int(path.parent.name.rpartition("-")[2])
        for path in run_dir.glob("checkpoint-*/manifest.json")
    )


def ask_python(code: str, data: object) -> object:
    """Run code in a fresh Python with `data` in it; it must set `result`. Heavy packages stay in
    there.
    """
    begin = "import json, sys\ndata = json.load(sys.stdin)\n"
    frame = f"{begin}{code}\nprint('RESULT', json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-c", frame, "ask_python"],  # the word is for startup/only_real.py
        input=json.dumps(data),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert "RESULT" in done.stdout, done.stderr
    return json.loads(done.stdout.partition("RESULT")[2])
