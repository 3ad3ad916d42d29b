"""What a fault costs: real runs of two ranks under ZeRO-3 on the CPU, really killed, stopped and torn.

Several tests look at one run; the fixtures of a module's scope say which. Waiting is for events, never for a time.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SCRIPT
from fault_helpers import (
    DEMO,
    PATIENCE,
    Run,
    committed,
    losses,
    run,
    until,
    weights,
    write_config,
)

from train_qwen3_ft import (
    MANIFEST,
    checkpoint_problem,
    clear_stale_locks,
    commit_checkpoint,
    lock_run,
    newest_checkpoint,
    quarantine_incomplete_checkpoints,
)

STEPS = 20


def plan_line(console: str, label: str) -> str:
    """The text of a labelled line of the plan or of the account."""
    found = re.search(rf"^{label} +(.*)$", console, re.MULTILINE)
    assert found, console
    return found[1]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def reference(scratch: Path) -> Path:
    """The run directory of the uninterrupted run."""
    done = run(scratch / "reference", write_config(scratch / "reference"))
    assert done.process.returncode == 0, done.console
    assert sorted(losses(done.run_dir)) == list(range(1, STEPS + 1))
    return done.run_dir


# ---------------------------------------------------------------------------------------------------------
# Checkpoints that can be trusted
# ---------------------------------------------------------------------------------------------------------

# Where a rank is killed in the save of which step (the rotation's number is the old checkpoint's), on which rank.
IN_SAVES = {"weights": (4, 0), "one shard": (6, 1), "trainer state": (8, 0), "manifest": (10, 0),
            "manifest rename": (12, 0), "rotation": (12, 0)}


@pytest.fixture(scope="module")
def killed_in_saves(scratch: Path) -> Run:
    """One run that is killed during six of its saves, each time at another point, and restarted by the launcher."""
    faults = [{"point": point, "step": step, "rank": rank} for point, (step, rank) in IN_SAVES.items()]
    config = write_config(scratch / "saves", max_restarts=len(faults))
    return run(scratch / "saves", config, faults=faults, seconds=3 * PATIENCE)


@pytest.mark.parametrize("point", IN_SAVES)
def test_a_kill_in_a_save_resumes_from_the_committed_checkpoint_before_it(killed_in_saves: Run, point: str):
    step = IN_SAVES[point][0]
    wanted = (step + 2, step + 4) if point == "rotation" else (step - 2,)  # rotation may come after the commit
    assert (killed_in_saves.folder / "markers" / f"{point}-{step}").exists(), "the fault did not strike"
    resumed = re.findall(r"resuming from checkpoint-(\d+)", killed_in_saves.console)
    assert int(resumed[list(IN_SAVES).index(point)]) in wanted, killed_in_saves.console


@pytest.mark.parametrize("point", [point for point in IN_SAVES if point != "rotation"])
def test_a_checkpoint_torn_by_a_kill_is_moved_aside_and_named(killed_in_saves: Run, point: str):
    name = f"checkpoint-{IN_SAVES[point][0]}"
    assert (killed_in_saves.run_dir / f"torn-{name}").is_dir()
    assert f"{name} is not resumed from: it was not committed; moved to torn-{name}" in killed_in_saves.console


def test_a_run_killed_in_its_saves_ends_with_identical_weights(killed_in_saves: Run, reference: Path):
    assert killed_in_saves.process.returncode == 0, killed_in_saves.console
    assert weights(killed_in_saves.run_dir) == weights(reference)


def test_a_run_killed_in_its_saves_has_logged_each_loss_once_and_equal(killed_in_saves: Run, reference: Path):
    assert losses(killed_in_saves.run_dir) == losses(reference)


def test_a_run_killed_in_its_saves_keeps_as_many_checkpoints_as_it_should(killed_in_saves: Run):
    names = sorted(path.name for path in killed_in_saves.run_dir.glob("checkpoint-*"))
    assert names == ["checkpoint-18", "checkpoint-20"]


def test_each_report_of_a_kill_names_the_rank_that_was_killed(killed_in_saves: Run):
    named = re.findall(r"^rank (\d) was killed by SIGKILL", killed_in_saves.console, re.MULTILINE)
    assert list(map(int, named)) == [rank for _, rank in IN_SAVES.values()]


def test_a_kill_in_a_rotation_and_one_in_a_later_save_leave_a_trusted_checkpoint(scratch: Path):
    faults = [{"point": "rotation", "step": 2}, {"point": "manifest", "step": 6}, {"point": "manifest", "step": 10}]
    done = run(scratch / "rotation", write_config(scratch / "rotation", max_restarts=1), faults=faults)
    assert "restart 1 of at most 1" in done.console and done.process.returncode == 1, done.console
    assert newest_checkpoint(done.run_dir), sorted(path.name for path in done.run_dir.iterdir())


def test_a_run_that_keeps_one_checkpoint_has_it_until_the_next_is_committed(scratch: Path):
    config = write_config(scratch / "one", save_total_limit=1, num_train_epochs=0.5)
    done = run(scratch / "one", config, faults=[{"point": "manifest", "step": 6}])
    assert "resuming from checkpoint-4" in done.console and done.process.returncode == 0, done.console
    assert committed(done.run_dir) == [10]


def tear(path: Path, how: str) -> None:
    """Delete a file, or cut it to half or to nothing, without touching a hard link to it elsewhere."""
    content = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(content[: len(content) // 2] if how == "halved" else b"")


@pytest.mark.parametrize("how", ["deleted", "halved", "emptied"])
def test_any_torn_file_of_the_newest_checkpoint_makes_the_older_one_count(reference: Path, tmp_path: Path, how: str):
    newest = reference / "checkpoint-20"
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    assert {MANIFEST, "latest", "trainer_state.json", "rng_state_1.pth", "model.safetensors"} <= set(names)
    trusted = []
    for number, name in enumerate(names):
        run_dir = tmp_path / str(number)
        for step in (18, 20):
            shutil.copytree(reference / f"checkpoint-{step}", run_dir / f"checkpoint-{step}", copy_function=os.link)
        assert newest_checkpoint(run_dir).name == "checkpoint-20"
        tear(run_dir / "checkpoint-20" / name, how)
        if newest_checkpoint(run_dir) != run_dir / "checkpoint-18":
            trusted.append(name)
        lines = quarantine_incomplete_checkpoints(run_dir)
        assert len(lines) == 1 and lines[0].startswith("checkpoint-20 is not resumed from: "), name
        assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-18", "torn-checkpoint-20"], name
    assert trusted == []


def test_a_file_system_without_locks_and_folder_syncs_holds_runs_and_checkpoints_too(
        reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(code: int):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", lambda *args: refuse(errno.ENOSYS))
    monkeypatch.setattr("os.fsync", lambda *args: refuse(errno.EINVAL))
    shutil.copytree(reference / "checkpoint-20", tmp_path / "checkpoint-20")
    lock_run(tmp_path).close()
    commit_checkpoint(tmp_path / "checkpoint-20", 2, True)
    assert checkpoint_problem(tmp_path / "checkpoint-20") == ""


def test_moving_aside_never_overwrites_what_was_moved_aside_before(reference: Path, tmp_path: Path):
    for _ in range(2):
        shutil.copytree(reference / "checkpoint-20", tmp_path / "checkpoint-20")
        (tmp_path / "checkpoint-20" / MANIFEST).unlink()
        quarantine_incomplete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torn-checkpoint-20", "torn-checkpoint-20.1"]


# ---------------------------------------------------------------------------------------------------------
# Restarts, and a run that has failed
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(scratch: Path) -> SimpleNamespace:
    """A run with one restart allowed that is killed twice, in its steps 4 and 6; meanwhile a second launcher tries.

    Its data is a copy, so that a test can change it. `second` is the second launcher, `before` and `after` the
    run's config.yaml around it.
    """
    folder = scratch / "failed"
    shutil.copytree(DEMO / "data", folder / "data")
    config = write_config(folder, max_restarts=1, dataset_dir=str(folder / "data"))
    faults = [{"point": "kill", "step": 4, "rank": 1, "name": name} for name in ("first", "second")]
    with Run(folder, config, faults=faults) as alive:
        until(lambda: committed(alive.run_dir), "the first checkpoint")
        run_dir = alive.run_dir
        before = (run_dir / "config.yaml").read_bytes()
        second = run(folder, "--resume", run_dir, "learning_rate=0.5")
        after = (run_dir / "config.yaml").read_bytes()
        alive.wait()
    return SimpleNamespace(run=alive, run_dir=run_dir, folder=folder, second=second, before=before, after=after)


def refusal(failed: SimpleNamespace, *arguments: object, ranks: int = 2, run_dir: Path | None = None) -> str:
    """The one line with which --resume is refused."""
    done = run(failed.folder, "--resume", run_dir or failed.run_dir, *arguments, ranks=ranks)
    assert done.process.returncode == 2, done.console
    assert len(done.console.splitlines()) == 1, done.console
    return done.console


def test_kills_after_progress_restart_as_often_as_max_restarts_says(failed: SimpleNamespace):
    assert re.findall(r"restart \d of at most \d: resuming from checkpoint-\d+", failed.run.console) == [
        "restart 1 of at most 1: resuming from checkpoint-2"]
    assert failed.run.process.returncode == 1


def test_a_failed_run_says_what_is_left_and_how_to_resume(failed: SimpleNamespace):
    account = failed.run.console[failed.run.console.rindex("\nstate "):]
    assert re.search("^state +failed at step [45] of 20$", account, re.MULTILINE)
    assert re.search("^checkpoints +checkpoint-4, checkpoint-2$", account, re.MULTILINE)
    assert re.search(rf"python {re.escape(str(SCRIPT))} --resume {re.escape(str(failed.run_dir))}$", failed.run.console,
                     re.MULTILINE)
    assert (failed.run_dir / "logs" / "rank1.log").stat().st_size > 0


def test_a_second_launcher_in_a_live_run_directory_is_refused(failed: SimpleNamespace):
    assert failed.second.process.returncode == 2
    assert f"this run is alive (launcher pid {failed.run.process.pid})" in failed.second.console


def test_a_second_launcher_leaves_the_live_run_as_it_is(failed: SimpleNamespace):
    assert failed.before == failed.after


def test_resuming_with_another_number_of_ranks_is_refused(failed: SimpleNamespace):
    assert re.search("checkpoint-4 was written by 2 ranks, now there are 1", refusal(failed, ranks=1))


def test_resuming_with_another_learning_rate_is_refused(failed: SimpleNamespace):
    assert re.search("learning_rate: was 0.003 when the run began and cannot change now",
                     refusal(failed, "learning_rate=1e-5"))


def test_resuming_with_another_model_is_refused(failed: SimpleNamespace, tmp_path: Path):
    shutil.copytree(DEMO / "demo_model", tmp_path / "other")
    line = refusal(failed, f"model_name_or_path={tmp_path}/other")
    assert re.search("model_name_or_path: was .* and cannot change now", line)


def test_resuming_with_changed_data_is_refused(failed: SimpleNamespace):
    path = failed.folder / "data" / "code2sql_demo.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"SELECT", b"select", 1))
    try:
        assert re.search("code2sql_demo.json: has changed since the run began", refusal(failed))
    finally:
        path.write_bytes(content)


def test_resuming_where_there_never_was_a_run_is_refused(failed: SimpleNamespace, tmp_path: Path):
    assert "expected the directory of a run" in refusal(failed, run_dir=tmp_path)


def test_resuming_a_finished_run_says_so_and_succeeds(reference: Path, tmp_path: Path):
    done = run(tmp_path, "--resume", reference)
    assert done.process.returncode == 0
    assert done.console == (f"{reference}: this run is finished; nothing to resume. To train its model further: python "
                            f"{SCRIPT.name} model_name_or_path={reference}\n")


def test_resume_without_a_directory_takes_the_newest_unfinished_run(failed: SimpleNamespace, reference: Path,
                                                                    tmp_path: Path):
    sources = {"old": failed.run_dir, "new": failed.run_dir, "finished": reference}
    for number, (name, source) in enumerate(sources.items()):
        shutil.copytree(source, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / "config.yaml", (number, number))
    done = run(tmp_path, write_config(tmp_path), "--resume", "--dry-run")
    assert (done.process.returncode, plan_line(done.console, "run")) == (0, f"{tmp_path}/out/new")


@pytest.fixture(scope="module")
def resumed_from_torn(failed: SimpleNamespace, scratch: Path) -> Run:
    """A copy of the failed run, resumed after one rank's optimizer shard in its newest checkpoint was cut in half."""
    run_dir = scratch / "torn" / "out" / "copy"
    shutil.copytree(failed.run_dir, run_dir)
    tear(next((run_dir / "checkpoint-4").glob("global_step4/*rank_1*optim_states.pt")), "halved")
    return run(scratch / "torn", "--resume", run_dir)


def test_a_resume_passes_over_a_torn_checkpoint_and_names_it(resumed_from_torn: Run):
    assert re.search(r"checkpoint-4 is not resumed from: .*optim_states\.pt has \d+ bytes instead of \d+; "
                     r"moved to torn-checkpoint-4", resumed_from_torn.console)


def test_a_resume_past_a_torn_checkpoint_ends_with_identical_weights(resumed_from_torn: Run, reference: Path):
    assert resumed_from_torn.process.returncode == 0, resumed_from_torn.console
    assert weights(resumed_from_torn.run_dir) == weights(reference)
    assert losses(resumed_from_torn.run_dir) == losses(reference)


def test_a_kill_before_the_final_model_trains_no_step_more(tmp_path: Path):
    whole, cut = (write_config(tmp_path / name, max_steps=5, deepspeed=None) for name in ("whole", "cut"))
    undisturbed = run(tmp_path / "whole", whole, ranks=1)
    killed = run(tmp_path / "cut", cut, ranks=1, faults=[{"point": "final save", "step": 5}])
    assert "resuming from checkpoint-5" in killed.console
    assert "finished at step 5 of 5" in killed.console
    assert weights(killed.run_dir) == weights(undisturbed.run_dir)
    assert losses(killed.run_dir) == losses(undisturbed.run_dir)


@pytest.fixture(scope="module")
def raised(scratch: Path) -> Run:
    """A run that evaluates every second step, in which rank 1 raises in step 5, before the first checkpoint."""
    config = write_config(scratch / "raised", save_steps=100, val_size=4, eval_strategy="steps", eval_steps=2)
    return run(scratch / "raised", config, faults=[{"point": "raise", "step": 5, "rank": 1}])


def test_an_error_before_any_checkpoint_is_not_tried_again(raised: Run):
    assert raised.process.returncode == 1
    assert raised.console.count("training failed") == 1 and "restart" not in raised.console, raised.console


def test_an_error_is_shown_with_its_own_traceback_and_without_torchruns(raised: Run):
    assert raised.console.count("RuntimeError: planted fault: the third sample is bad") == 1, raised.console
    assert raised.console.count("Traceback (most recent call last)") == 1
    assert not re.search("ChildFailedError|torch/distributed/(run|elastic|launcher)", raised.console)


def test_an_error_names_the_log_of_the_rank_that_failed(raised: Run):
    log = Path(re.search(r"^full log: (.*)$", raised.console, re.MULTILINE)[1])
    assert log == raised.run_dir / "logs" / "rank1.log"
    assert "planted fault" in log.read_text(encoding="utf-8")


def test_a_failed_run_has_its_curve_of_training_and_of_evaluation(raised: Run):
    from matplotlib.image import imread

    picture = raised.run_dir / "training_loss.png"
    assert f"curve       {picture}" in raised.console
    colours = {tuple(round(255 * part) for part in pixel[:3]) for row in imread(picture) for pixel in row}
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "matplotlib's first two line colours"


@pytest.fixture(scope="module")
def model_only(scratch: Path) -> Run:
    """A run that saves the model only and is killed in step 4, after checkpoint-2."""
    return run(scratch / "model only", write_config(scratch / "model only", save_only_model=True),
               faults=[{"point": "kill", "step": 4}])


def test_a_kill_that_leaves_nothing_to_resume_is_not_tried_again(model_only: Run):
    assert model_only.process.returncode == 1
    assert "restart" not in model_only.console and "there is no checkpoint to resume from" in model_only.console


def test_a_run_that_saves_the_model_only_is_said_not_to_be_resumable(model_only: Run, tmp_path: Path):
    done = run(tmp_path, "--resume", model_only.run_dir)
    assert done.process.returncode == 2, done.console
    assert re.search("save_only_model", done.console)
    assert (model_only.run_dir / "checkpoint-2").is_dir(), "the saved model was moved"


# ---------------------------------------------------------------------------------------------------------
# Stops
# ---------------------------------------------------------------------------------------------------------


def everybody(alive: Run) -> list[int]:
    """Whom a scheduler signals: every process of the job."""
    return [pid for pid in alive.pids() if pid != alive.process.pid] + [alive.process.pid]


# How each stop is asked for, of which processes, and the exit code; None: by a STOP file.
STOPS = {
    "SIGTERM": (signal.SIGTERM, lambda alive: [alive.process.pid], 143),
    "SIGINT": (signal.SIGINT, lambda alive: [alive.process.pid], 130),
    "SIGHUP": (signal.SIGHUP, lambda alive: [alive.process.pid], 129),
    "SIGTERM to one rank": (signal.SIGTERM, lambda alive: [alive.worker(1)], 143),
    "SIGTERM to every process": (signal.SIGTERM, everybody, 143),
    "STOP file": (None, None, 143),
}


def stop(alive: Run, step: int, kind: str) -> SimpleNamespace:
    """Ask for a stop once `step` is done; returns all that the tests look at."""
    number, whom, code = STOPS[kind]
    alive.reach(step)
    kept, loaders = committed(alive.run_dir), len(alive.children(0))
    if number is None:
        (alive.run_dir / "STOP").touch()
    else:
        for pid in whom(alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    status = alive.wait()
    return SimpleNamespace(
        status=status, wanted=code, console=alive.console, left=alive.left_after(10), step=alive.last_step(), kept=kept,
        loaders=loaders, committed=committed(alive.run_dir), model=(alive.run_dir / "model.safetensors").exists(),
        faults=[fault for path in alive.run_dir.glob("checkpoint-*") if (fault := checkpoint_problem(path))])


@pytest.fixture(scope="module")
def stopped(scratch: Path) -> SimpleNamespace:
    """One run that is stopped in each way and resumed each time, at last under nohup with a hangup to the launcher.

    It saves at its stops only. `stops` is {kind: what was seen}, `last` the start that finished.
    """
    folder, stops, step, slow = scratch / "stops", {}, 0, [{"point": "slow"}]
    arguments = (write_config(folder, save_steps=100, save_total_limit=None),)
    for kind in STOPS:
        with Run(folder, *arguments, faults=slow) as alive:
            stops[kind] = stop(alive, step + 1, kind)
            arguments, step = ("--resume", alive.run_dir), stops[kind].step
    with Run(folder, *arguments, nohup=True, faults=slow) as last:
        last.reach(step + 1)
        os.kill(last.process.pid, signal.SIGHUP)
        last.wait()
    return SimpleNamespace(stops=stops, last=last)


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_leaves_exactly_one_complete_checkpoint_at_its_step(stopped: SimpleNamespace, kind: str):
    seen = stopped.stops[kind]
    assert (seen.committed, seen.faults) == ([*seen.kept, seen.step], []), seen.console
    assert seen.loaders == 2, "no DataLoader workers lived when the stop was asked for"


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_has_the_exit_code_of_its_signal(stopped: SimpleNamespace, kind: str):
    assert stopped.stops[kind].status == stopped.stops[kind].wanted, stopped.stops[kind].console


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_leaves_no_process(stopped: SimpleNamespace, kind: str):
    assert stopped.stops[kind].left == []


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_writes_no_final_model(stopped: SimpleNamespace, kind: str):
    assert not stopped.stops[kind].model


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_says_how_to_resume(stopped: SimpleNamespace, kind: str):
    assert plan_line(stopped.stops[kind].console, "resume") == (
        f"NPROC_PER_NODE=2 python {SCRIPT} --resume {stopped.last.run_dir}")


def test_under_nohup_a_hangup_does_not_stop_the_run(stopped: SimpleNamespace):
    assert stopped.last.process.returncode == 0, stopped.last.console
    assert "SIGHUP" not in stopped.last.console and "stopping" not in stopped.last.console


def test_a_run_that_was_stopped_and_resumed_ends_with_identical_weights(stopped: SimpleNamespace, reference: Path):
    assert weights(stopped.last.run_dir) == weights(reference)
    assert losses(stopped.last.run_dir) == losses(reference)


def test_two_ranks_without_deepspeed_resume_to_identical_weights(tmp_path: Path):
    whole, cut = (write_config(tmp_path / name, deepspeed=None, save_steps=100) for name in ("whole", "cut"))
    uninterrupted = run(tmp_path / "whole", whole)
    with Run(tmp_path / "cut", cut, faults=[{"point": "slow"}]) as alive:
        alive.reach(3)
        alive.process.send_signal(signal.SIGTERM)
        alive.wait()
    resumed = run(tmp_path / "cut", "--resume", alive.run_dir)
    assert resumed.process.returncode == 0, resumed.console
    assert weights(resumed.run_dir) == weights(uninterrupted.run_dir)
    assert losses(resumed.run_dir) == losses(uninterrupted.run_dir)


def test_a_resumed_run_saves_and_logs_as_it_is_told_now(tmp_path: Path):
    config = write_config(tmp_path, deepspeed=None, max_steps=12)
    with Run(tmp_path, config, ranks=1, faults=[{"point": "slow"}]) as alive:
        alive.reach(3)
        alive.process.send_signal(signal.SIGTERM)
        alive.wait()
    stopped = max(committed(alive.run_dir))
    run(tmp_path, "--resume", alive.run_dir, "save_steps=5", "logging_steps=5", "save_total_limit=9", ranks=1)
    assert [step for step in losses(alive.run_dir) if step > stopped] == [step for step in (5, 10) if step > stopped]
    assert {10, 12} <= set(committed(alive.run_dir)) and 8 not in committed(alive.run_dir)


def test_a_sigterm_to_everybody_in_tokenization_is_a_stop_before_the_first_step(tmp_path: Path):
    fault = {"point": "hold tokenization", "seconds": 3}
    config = write_config(tmp_path, deepspeed=None, overwrite_cache=True)  # an earlier run of this test left a cache
    with Run(tmp_path, config, ranks=1, faults=[fault]) as alive:
        until(lambda: len(alive.children(0)) >= 2, "the tokenizing processes")
        for pid in everybody(alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert alive.wait(120) == 143, alive.console
    assert "stopped at step 0 of 40" in alive.console


def test_a_torchrun_of_the_users_stops_resumes_and_finishes_once(tmp_path: Path):
    """SIGTERM to torchrun itself, which ends the ranks; then --dry-run, --resume, and --resume of what is finished."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    with Run(tmp_path, write_config(tmp_path, save_steps=100), command=torchrun, faults=[{"point": "slow"}]) as alive:
        alive.reach(3)
        alive.process.send_signal(signal.SIGTERM)
        alive.wait()
        assert alive.left_after(10) == []
    steps = committed(alive.run_dir)
    planned = run(tmp_path, "--resume", alive.run_dir, "--dry-run", command=torchrun)
    assert (planned.process.returncode, committed(alive.run_dir)) == (0, steps), planned.console
    resumed = run(tmp_path, "--resume", alive.run_dir, command=torchrun)
    assert (resumed.process.returncode, committed(alive.run_dir)) == (0, [*steps, 20]), resumed.console
    model = weights(alive.run_dir)
    again = run(tmp_path, "--resume", alive.run_dir, command=torchrun)
    assert "this run is finished" in again.console
    assert (again.process.returncode, weights(alive.run_dir), committed(alive.run_dir)) == (0, model, [*steps, 20])


def test_a_stop_before_the_first_step_promises_no_resume(tmp_path: Path):
    with Run(tmp_path, write_config(tmp_path)) as alive:
        until(lambda: alive.worker(1), "the workers")
        alive.process.terminate()
        assert alive.wait() == 143, alive.console
        assert not committed(alive.run_dir) and "--resume" not in alive.console, alive.console


@pytest.fixture(scope="module")
def window_closed(scratch: Path) -> SimpleNamespace:
    """A run in a terminal whose window is closed after the first step."""
    folder = scratch / "window"
    with Run(folder, write_config(folder, save_steps=100), faults=[{"point": "slow"}], terminal=True) as alive:
        alive.reach(1)
        alive.terminal.close()
        status = alive.wait()
        return SimpleNamespace(status=status, left=alive.left_after(10), committed=committed(alive.run_dir),
                               step=alive.last_step())


def test_closing_the_terminal_is_a_stop_with_a_checkpoint(window_closed: SimpleNamespace):
    assert (window_closed.status, window_closed.committed) == (129, [window_closed.step])


def test_closing_the_terminal_leaves_no_process(window_closed: SimpleNamespace):
    assert window_closed.left == []


@pytest.fixture(scope="module")
def impatient(scratch: Path) -> SimpleNamespace:
    """A run that cannot reach the end of a step, and three times Ctrl-C."""
    folder = scratch / "impatient"
    with Run(folder, write_config(folder), faults=[{"point": "hold tokenization"}]) as alive:
        until(lambda: len(alive.children(0)) >= 2, "the tokenizing processes")
        os.kill(alive.process.pid, signal.SIGINT)
        alive.see("SIGINT: stopping")
        os.kill(alive.process.pid, signal.SIGINT)
        alive.see("press Ctrl-C once more to kill")
        alive_at_two = alive.process.poll() is None
        os.kill(alive.process.pid, signal.SIGINT)
        status = alive.wait(30)
        return SimpleNamespace(status=status, left=alive.left_after(10), alive_at_two=alive_at_two,
                               console=alive.console)


def test_two_interrupts_wait_and_the_third_kills_at_once(impatient: SimpleNamespace):
    assert (impatient.alive_at_two, impatient.status) == (True, 1), impatient.console
    assert "killed, without a checkpoint" in impatient.console
    assert "training failed" not in impatient.console


def test_three_interrupts_leave_no_process(impatient: SimpleNamespace):
    assert impatient.left == []


# ---------------------------------------------------------------------------------------------------------
# No orphans
# ---------------------------------------------------------------------------------------------------------

VICTIMS = {
    "launcher": lambda alive: alive.process.pid,
    "torchrun": lambda alive: alive.torchrun(),
    "rank 0": lambda alive: alive.worker(0),
    "rank 1": lambda alive: alive.worker(1),
}


def kill_and_look(alive: Run, victim: str) -> list[str]:
    """SIGKILL one process of a run; returns what of the run still lives 10 seconds later."""
    os.kill(VICTIMS[victim](alive), signal.SIGKILL)
    return alive.left_after(10)


@pytest.mark.parametrize("victim", ["launcher", "torchrun", "rank 1"])
def test_a_kill_in_training_leaves_no_process(tmp_path: Path, victim: str):
    config = write_config(tmp_path, max_restarts=0, report_to="swanlab", save_steps=100)
    with Run(tmp_path, config, env={"SWANLAB_MODE": "local"}) as alive:
        alive.reach(2)
        assert len(alive.children(0)) == len(alive.children(1)) == 2, "no DataLoader workers"
        assert any("--tracker" in Path(f"/proc/{pid}/cmdline").read_text() for pid in alive.pids()), "no tracker"
        assert kill_and_look(alive, victim) == []


@pytest.mark.parametrize("victim", ["launcher", "torchrun", "rank 0"])
def test_a_kill_in_tokenization_leaves_no_process(tmp_path: Path, victim: str):
    with Run(tmp_path, write_config(tmp_path, max_restarts=0), faults=[{"point": "hold tokenization"}]) as alive:
        until(lambda: len(alive.children(0)) >= 2, "the tokenizing processes")
        assert kill_and_look(alive, victim) == []


@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_a_kill_while_the_workers_start_leaves_no_process(tmp_path: Path, victim: str):
    with Run(tmp_path, write_config(tmp_path)) as alive:
        until(lambda: alive.worker(1), "the workers")
        assert kill_and_look(alive, victim) == []


# ---------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------


def mount(*arguments: object) -> bool:
    """Whether mount could be called and succeeded."""
    with contextlib.suppress(OSError):
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0
    return False


@pytest.fixture(scope="module")
def full_disk(scratch: Path) -> Iterator[SimpleNamespace]:
    """A run on a disk that is full during its third save, and its resume after room was made."""
    folder, out = scratch / "full disk", scratch / "full disk" / "out"
    out.mkdir(parents=True)
    if not mount("-t", "tmpfs", "-o", "size=48m", "tmpfs", out):
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    try:
        full = run(folder, write_config(folder, save_total_limit=4), "--force")
        kept = [path.name for path in full.run_dir.glob("checkpoint-*") if not checkpoint_problem(path)]
        described = [(full.run_dir / name).read_bytes() for name in ("config.yaml", "plan.json")]
        still_full = run(folder, "--resume", full.run_dir, "--force", "logging_steps=1")
        after = [(full.run_dir / name).read_bytes() for name in ("config.yaml", "plan.json")]
        mount("-o", "remount,size=400m", out)
        yield SimpleNamespace(full=full, kept=kept, still_full=still_full, unharmed=described == after,
                              resumed=run(folder, "--resume", full.run_dir))
    finally:
        subprocess.run(["umount", str(out)])


def test_a_full_disk_ends_the_run_and_names_the_cause(full_disk: SimpleNamespace):
    assert full_disk.full.process.returncode == 1, full_disk.full.console
    assert "the disk is full: make room" in full_disk.full.console, full_disk.full.console


def test_a_full_disk_does_not_upset_the_launcher_itself(full_disk: SimpleNamespace):
    assert ", in main" not in full_disk.full.console, full_disk.full.console
    assert f"--resume {full_disk.full.run_dir}" in full_disk.full.console.replace("'", "")


def test_a_resume_on_a_disk_that_is_still_full_fails_in_one_line_and_harms_nothing(full_disk: SimpleNamespace):
    console = full_disk.still_full.console
    assert full_disk.still_full.process.returncode in (1, 2) and "Traceback" not in console, console
    assert full_disk.unharmed


def test_a_full_disk_leaves_the_earlier_checkpoints_intact(full_disk: SimpleNamespace):
    assert sorted(full_disk.kept) == ["checkpoint-2", "checkpoint-4"]


def test_resuming_after_room_was_made_ends_with_identical_weights(full_disk: SimpleNamespace, reference: Path):
    assert full_disk.resumed.process.returncode == 0, full_disk.resumed.console
    assert weights(full_disk.resumed.run_dir) == weights(reference)


# ---------------------------------------------------------------------------------------------------------
# One process without ZeRO, and hazards of the start
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(scratch: Path) -> SimpleNamespace:
    """Two runs of one process without DeepSpeed, one of them killed in the save of step 6 and in step 12.

    In the first one's folder of compiled operators lies a build lock that nobody holds.
    """
    folder = scratch / "alone"
    lock = folder / "extensions" / "operator" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = write_config(folder, deepspeed=None, max_samples=20)
    whole = run(folder, config, ranks=1, env={"TORCH_EXTENSIONS_DIR": str(folder / "extensions")})
    killed = run(folder, config, ranks=1, faults=[{"point": "trainer state", "step": 6}, {"point": "kill", "step": 8}])
    return SimpleNamespace(whole=whole, killed=killed, lock=lock)


def test_one_process_without_zero_resumes_to_identical_weights(alone: SimpleNamespace):
    assert (alone.whole.process.returncode, alone.killed.process.returncode) == (0, 0), alone.killed.console
    assert re.findall(r"resuming from checkpoint-(\d+)", alone.killed.console) == ["4", "10"]
    assert weights(alone.killed.run_dir) == weights(alone.whole.run_dir)


def test_a_stale_build_lock_is_cleared_at_the_start(alone: SimpleNamespace):
    assert not alone.lock.exists()


def test_a_build_lock_that_a_living_process_holds_open_is_left(tmp_path: Path):
    (tmp_path / "operator").mkdir()
    script = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); sys.stdin.read()"
    lock = tmp_path / "operator" / "lock"
    command = [sys.executable, "-c", script, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout.readline() == b"held\n"
        clear_stale_locks(tmp_path)
        held = lock.exists()
        builder.stdin.close()
    clear_stale_locks(tmp_path)
    assert (held, lock.exists()) == (True, False)


def test_a_torchrun_of_the_users_shows_the_problems_of_a_bad_config_once(tmp_path: Path):
    config = write_config(tmp_path, learning_rat=1.0e-3)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]
    done = run(tmp_path, config, command=torchrun)
    assert done.process.returncode != 0
    assert done.console.count("learning_rat:") == 1 and "learning_rate" in done.console, done.console
    assert not (tmp_path / "out").exists()
