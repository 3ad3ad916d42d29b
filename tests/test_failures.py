"""Why a run failed: the cause is found where it was written, and is not that of an earlier start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import train_qwen3_ft as ft
from helpers import SCRIPT
from helpers.config import write_config
from helpers.launcher import FAKES, STARTUP, Run, fake_gpus, run, says, until
from helpers.real import real_fixture

WATCHDOG = (
    "[rank1]:[E1125 10:00:00.1 ProcessGroupNCCL.cpp:683] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600010 milliseconds "
    "before timing out.\n"
)
PORT_TAKEN = (
    "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
    "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use\n"
)


def killed(rank: int, number: int, name: str) -> str:
    """What torchrun says of a rank that a signal has ended."""
    return f"""train_qwen3_ft.py FAILED
Failures:
  <NO_OTHER_FAILURES>
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_10:00:00
  host      : node
  rank      : {rank} (local_rank: {rank})
  exitcode  : -{number} (pid: 1234)
  error_file: <N/A>
  traceback : Signal {number} ({name}) received by PID 1234
"""


@pytest.fixture
def explain(tmp_path: Path) -> Callable[..., str]:
    """explain(torchrun="...", **files): what is said of a start that has left these logs.

    `rank1_log="..."` is the text of logs/rank1.log; `earlier` is what torchrun said in earlier starts.
    """

    def ask(torchrun: str = "", earlier: str = "", **files: str) -> str:
        logs = tmp_path / "run" / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / "torchrun.log"
        log.write_text(earlier + torchrun, encoding="utf-8")
        for name, text in files.items():
            (logs / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return ft.describe_failure(ft.Run(tmp_path / "run"), log, len(earlier.encode()))

    return ask


# --- causes


def test_an_abort_after_an_nccl_timeout_is_a_collective_that_timed_out(explain):
    text = explain(
        killed(1, 6, "SIGABRT"), rank0_log="step 7\n", rank1_log=WATCHDOG + "frame #0\n" * 500
    )
    assert text.startswith("rank 1 was killed by SIGABRT")
    assert "likely cause: a collective timed out" in text
    says(text, "full log: .*/rank1.log$")


def test_an_abort_for_a_reason_that_nobody_knows_has_no_likely_cause(explain):
    text = explain(
        killed(0, 6, "SIGABRT"), rank0_log="terminate called without an active exception\n"
    )
    assert text.startswith("rank 0 was killed by SIGABRT") and "likely cause" not in text


def test_a_rank_that_is_killed_for_its_memory_points_to_the_host_memory(explain):
    text = explain(killed(0, 9, "SIGKILL"), rank0_log=WATCHDOG)
    assert "likely cause: the kernel's out-of-memory killer" in text


@pytest.mark.parametrize(
    ("seconds", "first"), [(-5, "rank 0's own error"), (5, "rank 1 was killed by SIGABRT")]
)
def test_an_abort_hides_no_error_that_came_before_it(tmp_path: Path, explain, seconds, first):
    """NCCL aborts a rank whose peer has failed; an abort makes its peers fail."""
    explain(rank0_error="rank 0's own error", rank1_log="the last words\n")
    error = tmp_path / "run" / "logs" / "rank0.error"
    now = (tmp_path / "run" / "logs" / "rank1.log").stat().st_mtime
    os.utime(error, (now + seconds,) * 2)
    assert explain(killed(1, 6, "SIGABRT")).startswith(first)


def test_a_bus_error_is_a_full_dev_shm(explain):
    assert "likely cause: /dev/shm is full" in explain(killed(0, 7, "SIGBUS"))


# What a rank's traceback ends with, and the cause.
TRACEBACKS = {
    "shared memory": (
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_77_1_0>: No space left on device (28)",
        "/dev/shm is full",
    ),
    "a loader's bus error": (
        "RuntimeError: DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
        "/dev/shm is full",
    ),
    "quota": (
        "OSError: [Errno 122] Disk quota exceeded: '/home/me/run/checkpoint-4/x.pt'",
        "your disk quota is used up",
    ),
    "disk": (
        "OSError: [Errno 28] No space left on device: '/data/run/checkpoint-4/x.pt'",
        "the disk is full",
    ),
    "cuBLAS": (
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "a GPU is out of memory",
    ),
    "port": (PORT_TAKEN, "another process has taken the port"),
    "CUDA's own word": (
        "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "a GPU is out of memory: use a smaller per_device_train_batch_size",
    ),
    "NCCL": (
        "torch.distributed.DistBackendError: NCCL error: Cuda failure 2 'out of memory'",
        "a GPU is out of memory",
    ),
    "an evaluation": (
        '  File "trainer.py", line 2702, in evaluation_loop\n    losses\n'
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "a GPU is out of memory in an evaluation: use a smaller per_device_eval_batch_size",
    ),
    "a tokenizing process": (
        "RuntimeError: One of the subprocesses has abruptly died during map operation.",
        "the kernel's out-of-memory killer",
    ),
    "a loader's kill": (
        "RuntimeError: DataLoader worker (pid 77) is killed by signal: Killed.",
        "the kernel's out-of-memory killer",
    ),
}


@pytest.mark.parametrize("kind", TRACEBACKS)
def test_a_traceback_has_its_cause(explain, kind: str):
    error, cause = TRACEBACKS[kind]
    text = explain("anything", rank0_error=f"Traceback (most recent call last):\n{error}")
    assert f"likely cause: {cause}" in text


def test_a_kernel_that_needs_too_much_memory_of_its_gpu_does_not_blame_dev_shm(explain):
    error = (
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456"
    )
    assert "/dev/shm" not in explain(rank0_error=error)


def test_a_port_that_torchrun_cannot_have_is_named(explain):
    assert "likely cause: another process has taken the port" in explain(PORT_TAKEN)


# --- what an earlier start has left


def test_what_torchrun_said_of_an_earlier_start_is_no_cause_of_this_one(explain):
    text = explain("the new reason\n", earlier=killed(0, 9, "SIGKILL"))
    assert text.startswith("the new reason")


def test_a_timeout_of_an_earlier_start_is_no_cause_of_this_one(tmp_path: Path, explain):
    explain(killed(1, 6, "SIGABRT"), rank1_log=WATCHDOG)
    ft.roll_back_to_checkpoint(ft.Run(tmp_path / "run"))
    with open(tmp_path / "run" / "logs" / "rank1.log", "a", encoding="utf-8") as log:
        log.write(f"{ft.RANK_START}\na new start\n")
    text = explain(killed(1, 11, "SIGSEGV"))
    assert text.startswith("rank 1 was killed by SIGSEGV") and "timed out" not in text


def test_an_error_of_an_earlier_start_is_no_cause_of_this_one(tmp_path: Path, explain):
    explain(rank0_error="RuntimeError: the old reason")
    error = tmp_path / "run" / "logs" / "rank0.error"
    os.utime(error, (time.time() + 3600,) * 2)  # the clock of a shared file system is ahead
    ft.roll_back_to_checkpoint(ft.Run(tmp_path / "run"))
    assert explain("the new reason\n").startswith("the new reason")


def test_ranks_that_this_start_has_no_more_do_not_lengthen_the_wait_for_it(tmp_path: Path):
    """What they did last was to save, for which a rank gets longer than for a step."""
    run_dir = ft.Run(tmp_path)
    run_dir.logs.mkdir()
    (run_dir.logs / "rank3.progress").write_text("12 saving", encoding="utf-8")
    ft.roll_back_to_checkpoint(run_dir)
    (run_dir.logs / "rank0.progress").write_text("12 training", encoding="utf-8")
    watch = ft.HangWatch(run_dir, 0.2)
    assert not watch.is_stuck([])
    time.sleep(0.3)
    assert watch.is_stuck([])


WRITES = "import time\nwhile True: open('{}', 'wb').write(bytes(4 << 20)); time.sleep(0.1)"
COMPUTES = "import os, time\nif os.fork(): time.sleep(60)\nwhile True: pass"


@pytest.mark.parametrize(
    ("code", "is_stuck"),
    [(WRITES, False), (COMPUTES, False), ("import time; time.sleep(60)", True)],
    ids=["a download", "tokenizing children", "nothing"],
)
def test_a_start_that_reads_writes_or_computes_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, is_stuck: bool
):
    """Not even after 6 x hang_timeout, by a clock that is 10 minutes further at each look."""
    run_dir, clock = ft.Run(tmp_path), iter(range(0, 10**6, 601))
    run_dir.logs.mkdir()
    (run_dir.logs / "rank0.progress").write_text("0 starting", encoding="utf-8")
    monkeypatch.setattr("train_qwen3_ft.time", SimpleNamespace(monotonic=lambda: next(clock)))
    command = [sys.executable, "-c", code.format(tmp_path / "file")]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            watch, found = ft.HangWatch(run_dir, 600), False
            rank = psutil.Process(process.pid)
            for number in range(12):
                time.sleep(0.3)
                for child in rank.children():  # a busy machine gives it less
                    until(lambda: child.cpu_times().user > 0.3 * number, "its work")  # noqa: B023
                found |= watch.is_stuck([rank])
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert found is is_stuck


STALE = "RuntimeError: what failed in an earlier start"


@real_fixture
def lingering(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that loses its torchrun twice, in the fourth step of a start, while rank 1 stays for 4 seconds.

    Before the first loss rank 0 leaves an error, by a clock that is ahead. `alive` says whether rank 1 was
    still there when the restart was announced.
    """
    folder = tmp_path_factory.mktemp("lingering")
    fault = {"point": "outlive torchrun", "step": 4, "rank": 1, "seconds": 4}
    faults = [{**fault, "name": "first"}, {**fault, "name": "second"}]
    config = write_config(folder, deepspeed=None, max_restarts=1)
    with Run(folder, config, faults=faults) as alive:
        rank = until(lambda: alive.worker(1), "rank 1")
        error = alive.run_dir / "logs" / "rank0.error"
        error.write_text(STALE, encoding="utf-8")
        os.utime(error, (time.time() + 3600,) * 2)
        alive.see("restart 1 of")
        stayed = rank in alive.pids()
        alive.wait()
    return SimpleNamespace(run=alive, rank=rank, alive=stayed)


def test_a_restart_waits_until_the_ranks_of_the_last_start_are_gone(lingering: SimpleNamespace):
    assert lingering.rank and not lingering.alive, lingering.run.console


def test_a_later_failure_does_not_show_the_error_of_an_earlier_start(
    lingering: SimpleNamespace,
):
    first, restarted, second = lingering.run.console.partition("restart 1 of")
    assert STALE in first and "training failed" in second, lingering.run.console
    assert STALE not in second, second


# --- GPUs that are planned


@pytest.fixture
def small_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's /dev/shm of 64 MiB."""
    usage = shutil.disk_usage

    def answer(path: object) -> object:
        found = usage(path)
        return found._replace(total=64 << 20) if str(path) == "/dev/shm" else found

    monkeypatch.setattr(shutil, "disk_usage", answer)


def test_two_gpus_with_a_small_dev_shm_are_refused_before_the_start(
    here, write_config, small_dev_shm
):
    done = here(write_config(use_cpu=None), "--dry-run", gpus=fake_gpus(2))
    assert done.returncode == 2
    says(done.stderr, "^error: /dev/shm: .*--shm-size.*use --force to start anyway")


def test_two_gpus_with_a_small_dev_shm_can_be_forced(here, write_config, small_dev_shm):
    done = here(write_config(use_cpu=None), "--dry-run", "--force", gpus=fake_gpus(2))
    assert "/dev/shm" not in done.stderr.replace("use --force", ""), done.stderr


def test_one_gpu_needs_no_large_dev_shm(here, write_config, small_dev_shm):
    done = here(write_config(use_cpu=None), "--dry-run", gpus=fake_gpus(1))
    assert "/dev/shm" not in done.stderr, done.stderr


@pytest.mark.real
def test_gpus_that_torch_does_not_see_are_one_clear_error(tmp_path: Path):
    config = write_config(tmp_path, use_cpu=None, bf16=None, deepspeed=None, max_steps=2)
    env = {"PYTHONPATH": f"{STARTUP}:{FAKES}", "FAKE_GPUS": json.dumps(fake_gpus(2))}
    done = run(tmp_path, config, ranks=None, env=env)
    assert done.returncode == 1, done.console
    assert len(re.findall("2 GPUs planned, but torch sees 0", done.console)) == 1, done.console
    assert "restart" not in done.console and f"python {SCRIPT} --resume" not in done.console
