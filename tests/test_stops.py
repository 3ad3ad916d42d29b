"""Stops of every kind, and that nothing outlives a run: real runs, really signalled and killed."""

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers import SCRIPT
from helpers.config import STEPS, write_config
from helpers.launcher import Run, command_of, committed, losses, says, until, weights
from helpers.swanlab_records import read_record, records

pytestmark = pytest.mark.real

# A rank killed while it loads DeepSpeed's operator leaves a build lock that others wait for.
PLAIN = {"deepspeed": None}
# So that tokenizing processes are there, of a rank that needs nothing else.
HELD = {"preprocessing_num_workers": 2, "overwrite_cache": True, **PLAIN}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's runs."""
    return tmp_path_factory.mktemp("stops")


# --- stops


def everybody(live: Run) -> list[int]:
    """Whom a scheduler signals: every process of the job."""
    return [pid for pid in live.pids() if pid != live.process.pid] + [live.process.pid]


def signal_all(pids: list[int], number: int) -> None:
    """Signal each of these processes that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# On how many ranks, how the stop is asked for, of which processes, and the exit code; None: by a
# STOP file. Two ranks train under ZeRO-3, one without, recorded by SwanLab.
STOPS = {
    "SIGTERM to every process": (2, signal.SIGTERM, everybody, 143),
    "SIGTERM": (1, signal.SIGTERM, lambda live: [live.process.pid], 143),
    "STOP file": (1, None, None, 143),
    "SIGINT": (1, signal.SIGINT, lambda live: [live.process.pid], 130),
    "SIGHUP": (1, signal.SIGHUP, lambda live: [live.process.pid], 129),
}


def stop(live: Run, kind: str) -> SimpleNamespace:
    """Ask for a stop in the first step of a start; returns all that the tests look at."""
    _, number, whom, code = STOPS[kind]
    live.see_training()
    loaders = len(live.children(0))
    kept = committed(live.run_dir)
    if number is None:
        (live.run_dir / "STOP").touch()
    else:
        signal_all(whom(live), number)
    status = live.wait()
    problems = [ft.checkpoint_problem(path) for path in live.run_dir.glob("checkpoint-*")]
    return SimpleNamespace(
        run_dir=live.run_dir,
        status=status,
        wanted=code,
        console=live.console,
        left=live.left_after(),
        step=live.last_step(),
        kept=kept,
        loaders=loaders,
        committed=committed(live.run_dir),
        model=(live.run_dir / "model.safetensors").exists(),
        problems=[problem for problem in problems if problem],
    )


@pytest.fixture(scope="module")
def stopped(scratch: Path) -> SimpleNamespace:
    """Two runs that are stopped and resumed again and again; the one of two ranks is finished at
    last under nohup, with a hangup to the launcher and a SIGTERM to one rank.

    They save at their stops only, and have DataLoader workers. `stops` is {kind: what was seen},
    `last` the start that finished.
    """
    stops, slow, arguments = {}, [{"point": "slow"}], {}
    for ranks, more in ((1, {**PLAIN, "report_to": "swanlab"}), (2, {})):
        workers = {"save_steps": 100, "save_total_limit": None, "dataloader_num_workers": 1}
        arguments[ranks] = (write_config(scratch / str(ranks), **workers, **more),)
    for kind, (ranks, *_) in STOPS.items():
        with Run(scratch / str(ranks), *arguments[ranks], ranks=ranks, faults=slow) as live:
            stops[kind] = stop(live, kind)
            arguments[ranks] = ("--resume", live.run_dir)
    with Run(scratch / "2", *arguments[2], nohup=True, faults=slow) as last:
        last.see_training()
        os.kill(last.process.pid, signal.SIGHUP)
        os.kill(last.worker(1), signal.SIGTERM)
        last.wait()
    return SimpleNamespace(stops=stops, last=last)


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_leaves_exactly_one_complete_checkpoint_at_its_step(
    stopped: SimpleNamespace, kind: str
):
    seen = stopped.stops[kind]
    assert (seen.committed, seen.problems) == ([*seen.kept, seen.step], []), seen.console
    assert seen.loaders == 1, "no DataLoader worker lived when the stop was asked for"


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_has_the_exit_code_of_its_signal(stopped: SimpleNamespace, kind: str):
    assert stopped.stops[kind].status == stopped.stops[kind].wanted, stopped.stops[kind].console


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_leaves_no_process(stopped: SimpleNamespace, kind: str):
    assert stopped.stops[kind].left == []


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_writes_no_final_model_and_names_the_checkpoint_to_chat_with(
    stopped: SimpleNamespace, kind: str
):
    seen = stopped.stops[kind]
    assert not seen.model
    model = seen.run_dir / f"checkpoint-{seen.step}"
    assert f"chat        llamafactory-cli chat --model_name_or_path {model} " in seen.console


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_says_how_to_resume(stopped: SimpleNamespace, kind: str):
    seen = stopped.stops[kind]
    ranks = STOPS[kind][0]
    command = says(seen.console, r"^resume +(.*)$")[1]
    assert command == f"NPROC_PER_NODE={ranks} python {SCRIPT} --resume {seen.run_dir}"


def test_a_stopped_run_is_recorded_as_stopped_by_the_user(stopped: SimpleNamespace):
    for folder in records(stopped.stops["SIGINT"].run_dir.parent / "swanlog"):
        record = read_record(folder)
        assert (record["state"], record["error"]) == ("aborted", "stopped by the user")


def test_a_resumed_run_is_another_local_record_whose_name_says_so(stopped: SimpleNamespace):
    run_dir = stopped.stops["SIGINT"].run_dir
    names = [read_record(folder)["name"] for folder in records(run_dir.parent / "swanlog")]
    resumes = [f"{run_dir.name} (resume {number})" for number in (1, 2, 3)]
    assert sorted(names) == [run_dir.name, *resumes]


def test_under_nohup_a_hangup_does_not_stop_the_run(stopped: SimpleNamespace):
    assert stopped.last.returncode == 0, stopped.last.console
    assert "SIGHUP" not in stopped.last.console and "stopping" not in stopped.last.console


def test_a_sigterm_to_one_rank_alone_does_not_stop_or_hurt_the_run(stopped: SimpleNamespace):
    assert stopped.last.returncode == 0, stopped.last.console
    assert "training failed" not in stopped.last.console


def test_a_run_that_was_stopped_and_resumed_ends_with_identical_weights(
    stopped: SimpleNamespace, reference: SimpleNamespace
):
    assert weights(stopped.last.run_dir) == weights(reference.run_dir)
    assert losses(stopped.last.run_dir) == losses(reference.run_dir)


def test_a_sigterm_to_everybody_in_tokenization_is_a_stop_before_the_first_step(tmp_path: Path):
    fault = {"point": "hold tokenization", "seconds": 3}
    with Run(tmp_path, write_config(tmp_path, **HELD), ranks=1, faults=[fault]) as live:
        until(lambda: len(live.children(0)) >= 2, "the tokenizing processes")
        signal_all(everybody(live), signal.SIGTERM)
        assert live.wait(120) == 143, live.console
    assert f"stopped at step 0 of {2 * STEPS}" in live.console


def test_a_stop_before_the_first_step_promises_no_resume(tmp_path: Path):
    with Run(tmp_path, write_config(tmp_path, **PLAIN), ranks=1) as live:
        until(lambda: live.worker(0), "the rank")
        live.process.terminate()
        assert live.wait() == 143, live.console
        assert not committed(live.run_dir) and "--resume" not in live.console, live.console


@pytest.fixture(scope="module")
def window_closed(scratch: Path) -> SimpleNamespace:
    """A run in a terminal whose window is closed after the first step."""
    folder = scratch / "window"
    config = write_config(folder, save_steps=100, **PLAIN)
    with Run(folder, config, ranks=1, faults=[{"point": "slow"}], terminal=True) as live:
        live.reach(1)
        live.terminal.close()
        status = live.wait()
        return SimpleNamespace(
            status=status,
            left=live.left_after(),
            committed=committed(live.run_dir),
            step=live.last_step(),
        )


def test_closing_the_terminal_is_a_stop_with_a_checkpoint(window_closed: SimpleNamespace):
    assert (window_closed.status, window_closed.committed) == (129, [window_closed.step])


def test_closing_the_terminal_leaves_no_process(window_closed: SimpleNamespace):
    assert window_closed.left == []


@pytest.fixture(scope="module")
def impatient(scratch: Path) -> SimpleNamespace:
    """A run that cannot reach the end of a step, and three times Ctrl-C."""
    folder = scratch / "impatient"
    config = write_config(folder, **HELD)
    with Run(folder, config, ranks=1, faults=[{"point": "hold tokenization"}]) as live:
        until(lambda: len(live.children(0)) >= 2, "the tokenizing processes")
        os.kill(live.process.pid, signal.SIGINT)
        live.see("SIGINT: stopping")
        os.kill(live.process.pid, signal.SIGINT)
        live.see("press Ctrl-C once more to kill")
        live_at_two = live.process.poll() is None
        os.kill(live.process.pid, signal.SIGINT)
        status = live.wait(30)
        return SimpleNamespace(
            status=status,
            left=live.left_after(),
            live_at_two=live_at_two,
            console=live.console,
        )


def test_two_interrupts_wait_and_the_third_kills_at_once(impatient: SimpleNamespace):
    assert (impatient.live_at_two, impatient.status) == (True, 1), impatient.console
    assert "killed, without a checkpoint" in impatient.console
    assert "training failed" not in impatient.console


def test_three_interrupts_leave_no_process(impatient: SimpleNamespace):
    assert impatient.left == []


# --- no orphans

VICTIMS = {
    "launcher": lambda live: live.process.pid,
    "torchrun": lambda live: live.torchrun(),
    "rank 0": lambda live: live.worker(0),
    "rank 1": lambda live: live.worker(1),
}


def kill_and_look(live: Run, victim: str) -> list[str]:
    """SIGKILL one process of a run; returns what of the run still lives a minute later."""
    os.kill(VICTIMS[victim](live), signal.SIGKILL)
    return live.left_after()


@pytest.mark.parametrize("victim", ["launcher", "torchrun", "rank 1"])
def test_a_kill_in_training_leaves_no_process(tmp_path: Path, victim: str):
    ranks = 2 if victim == "rank 1" else 1
    changes = {**PLAIN, "save_steps": 100, "dataloader_num_workers": 1, "report_to": "swanlab"}
    config = write_config(tmp_path, max_restarts=0, **changes)
    with Run(
        tmp_path, config, ranks=ranks, env={"SWANLAB_MODE": "local"}, faults=[{"point": "slow"}]
    ) as live:
        live.reach(1)
        assert [len(live.children(rank)) for rank in range(ranks)] == [1] * ranks, (
            "no DataLoader workers"
        )
        until(
            lambda: any("--tracker" in command_of(pid) for pid in live.pids()),
            "the tracker",
        )
        assert kill_and_look(live, victim) == []


@pytest.mark.parametrize("victim", ["launcher", "torchrun", "rank 0"])
def test_a_kill_in_tokenization_leaves_no_process(tmp_path: Path, victim: str):
    config = write_config(tmp_path, max_restarts=0, **HELD)
    with Run(tmp_path, config, ranks=1, faults=[{"point": "hold tokenization"}]) as live:
        until(lambda: len(live.children(0)) >= 2, "the tokenizing processes")
        assert kill_and_look(live, victim) == []


@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_a_kill_while_the_workers_start_leaves_no_process(tmp_path: Path, victim: str):
    with Run(tmp_path, write_config(tmp_path, **PLAIN)) as live:
        until(lambda: live.worker(1), "the ranks")
        assert kill_and_look(live, victim) == []
