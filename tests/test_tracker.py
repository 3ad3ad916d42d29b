"""SwanLab for real: what it records, and that nothing it does can hurt the run."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import SCRIPT
from helpers.config import write_config
from helpers.launcher import FOREIGN, Run, command_of, losses, run
from helpers.swanlab_records import dashboard_points, read_dashboard, read_record, records
from helpers.swanlab_service import SwanLabService

FAULTS = Path(__file__).resolve().parent / "faults"
SETTINGS = {"report_to": "swanlab", "deepspeed": None, "max_steps": 12, "logging_steps": 5, "save_steps": 4}


def train(folder: Path, *arguments: object, **options: object) -> Run:
    """A run of 12 steps that reports to SwanLab, to its end, whatever that is."""
    changes = options.pop("changes", {})
    return run(folder, write_config(folder, **{**SETTINGS, **changes}), *arguments, ranks=1, **options)


def logged(done: Run) -> dict[int, float]:
    """{step: loss} of the trainer's own log."""
    return {step: values[-1] for step, values in losses(done.run_dir).items()}


def swanlog(done: Run) -> list[Path]:
    return records(done.run_dir.parent / "swanlog")


# --- modes


def test_without_a_key_the_run_is_recorded_locally(tmp_path: Path) -> None:
    done = train(tmp_path)
    assert "SwanLab local (no API key was found)" in done.console
    [folder] = swanlog(done)
    assert dashboard_points(folder, "train/loss") == list(logged(done).items())
    assert [step for step, _ in dashboard_points(folder, "train/loss")] == [5, 10]


def test_offline_mode_keeps_every_point_for_a_later_sync(tmp_path: Path) -> None:
    done = train(tmp_path, env={"SWANLAB_MODE": "offline"})
    assert "SwanLab offline (from SWANLAB_MODE)" in done.console
    [folder] = swanlog(done)
    record = read_record(folder)
    assert dict(record["points"]["train/loss"]) == logged(done)
    assert record["state"] == "finished"


def test_online_the_service_gets_every_point_and_the_end(tmp_path: Path) -> None:
    with SwanLabService() as service:
        done = train(tmp_path, env=service.environment)
        [remote] = service.runs.values()
    assert done.process.returncode == 0
    assert remote["scalars"]["train/loss"] == logged(done)
    assert remote["state"] == "FINISHED"
    assert remote["name"] == done.run_dir.name
    assert re.search(rf"^dashboard +{re.escape(service.environment['SWANLAB_WEB_HOST'])}/", done.console, re.MULTILINE)


def test_the_older_spelling_use_swanlab_works(tmp_path: Path) -> None:
    done = train(tmp_path, changes={"report_to": None, "use_swanlab": True, "swanlab_run_name": "mine",
                                    "swanlab_logdir": str(tmp_path / "elsewhere")})
    [folder] = records(tmp_path / "elsewhere")
    assert read_dashboard(folder) == {"name": "mine", "status": "finished"}
    assert done.process.returncode == 0


EVALUATED = {"val_size": 8, "eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 4,
             "max_samples": 40}


def test_the_evaluation_loss_is_recorded_once_at_its_step(tmp_path: Path) -> None:
    done = train(tmp_path, changes=EVALUATED)
    [folder] = swanlog(done)
    log = [json.loads(line) for line in (done.run_dir / "trainer_log.jsonl").read_text().splitlines()]
    assert read_record(folder)["points"]["eval/loss"] == dashboard_points(folder, "eval/loss") == [
        (line["current_steps"], line["eval_loss"]) for line in log if "eval_loss" in line]
    assert re.findall(r"step (\d+)/12  evaluation loss \d", done.console) == ["6", "12"]


def test_each_evaluated_data_set_has_its_own_loss(tmp_path: Path) -> None:
    done = train(tmp_path, changes={**EVALUATED, "val_size": None, "eval_on_each_dataset": True,
                                    "eval_dataset": "code2sql_demo,code2sql_heldout", "max_samples": 24})
    [folder] = swanlog(done)
    for name in ("code2sql_demo", "code2sql_heldout"):
        assert [step for step, _ in read_record(folder)["points"][f"eval/{name}_loss"]] == [6, 12]
        assert len(re.findall(rf"step \d+/12  evaluation loss \d.* on {name}$", done.console, re.MULTILINE)) == 2


# --- the state after another end


def test_a_stopped_run_is_recorded_as_stopped_by_the_user(tmp_path: Path) -> None:
    with Run(tmp_path, write_config(tmp_path, **{**SETTINGS, "max_steps": 200, "max_samples": 400}), ranks=1) as live:
        live.reach(5)
        live.process.send_signal(signal.SIGTERM)
        live.wait()
    [folder] = swanlog(live)
    record = read_record(folder)
    assert (record["state"], record["error"]) == ("aborted", "stopped by the user")


def test_a_killed_run_is_recorded_as_crashed_with_all_points_but_the_one_in_flight(tmp_path: Path) -> None:
    changes = {"max_steps": 400, "max_samples": 400, "save_strategy": "no", "per_device_train_batch_size": 16}
    with Run(tmp_path, write_config(tmp_path, **{**SETTINGS, **changes}), ranks=1) as live:
        live.reach(30)
        os.kill(live.worker(0), signal.SIGKILL)
        live.wait()
        live.left_after(10)
    [folder] = swanlog(live)
    record = read_record(folder)
    assert record["state"] == "crashed"
    stored, known = record["points"]["train/loss"], list(logged(live).items())
    assert stored == known[:len(stored)]
    assert len(stored) >= len(known) - 1
    assert f"swanlab watch {folder.parent}" in live.console


def test_a_killed_tracker_is_replaced_and_no_point_is_lost(tmp_path: Path) -> None:
    changes = {"max_steps": 200, "max_samples": 400, "save_strategy": "no", "per_device_train_batch_size": 16}
    with Run(tmp_path, write_config(tmp_path, **{**SETTINGS, **changes}), ranks=1) as live:
        live.reach(20)
        [tracker] = [pid for pid in live.pids() if "--tracker" in command_of(pid)]
        os.kill(tracker, signal.SIGKILL)
        assert live.wait() == 0
    assert live.console.count("SwanLab's process ended") == 1
    record = read_record(swanlog(live)[-1])
    assert (record["state"], dict(record["points"]["train/loss"])) == ("finished", logged(live))


def test_a_resumed_run_continues_the_same_experiment_online(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{**SETTINGS, "max_steps": 40, "max_samples": 400})
    with SwanLabService() as service:
        with Run(tmp_path, config, ranks=1, env=service.environment) as live:
            live.reach(5)
            live.process.send_signal(signal.SIGTERM)
            live.wait()
        done = run(tmp_path, config, "--resume", ranks=1, env=service.environment)
        [remote] = service.runs.values()
    assert done.process.returncode == 0
    assert list(remote["scalars"]["train/loss"]) == list(range(5, 41, 5))


def test_a_resumed_run_is_a_second_local_record_whose_name_says_so(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{**SETTINGS, "max_steps": 40, "max_samples": 400})
    with Run(tmp_path, config, ranks=1) as live:
        live.reach(5)
        live.process.send_signal(signal.SIGTERM)
        live.wait()
    done = run(tmp_path, config, "--resume", ranks=1)
    names = [read_record(folder)["name"] for folder in swanlog(done)]
    assert sorted(names) == [done.run_dir.name, f"{done.run_dir.name} (resume 1)"]
    assert [len(values) for values in losses(done.run_dir).values()] == [1] * 8


# --- a service that fails


@pytest.mark.parametrize(("mode", "cause"), [("refuse", "AuthenticationError"), ("hang", "no answer in")])
def test_a_service_that_cannot_be_used_costs_one_warning(mode: str, cause: str, tmp_path: Path) -> None:
    with SwanLabService(mode) as service:
        done = train(tmp_path, env=service.environment)
    assert done.process.returncode == 0
    [warning] = [line for line in done.console.splitlines() if "SwanLab cannot be reached" in line]
    assert cause in warning
    local = [folder for folder in swanlog(done) if (folder / "logs").is_dir() and any((folder / "logs").iterdir())]
    assert f"swanlab sync {local[-1]} -i " in warning
    assert dashboard_points(local[-1], "train/loss") == list(logged(done).items())


@pytest.mark.parametrize("dies", [False, True], ids=["falls silent", "dies"])
def test_a_service_that_ends_in_the_middle_costs_no_point(dies: bool, tmp_path: Path) -> None:
    with SwanLabService(8, dies) as service:  # the login and the run's creation are answered
        done = train(tmp_path, env=service.environment)
    assert done.process.returncode == 0
    assert "swanlab sync" in done.console
    [folder] = swanlog(done)
    record = read_record(folder)
    assert dict(record["points"]["train/loss"]) == logged(done)
    assert record["state"] == "finished"


def test_a_machine_without_git_trains_and_records_all_the_same(tmp_path: Path) -> None:
    done = train(tmp_path, env={"PATH": str(tmp_path)})
    assert done.process.returncode == 0, done.console
    [folder] = swanlog(done)
    assert read_record(folder)["state"] == "finished"


@pytest.mark.parametrize("fault", ["init raises", "init sleeps", "log raises", "log sleeps"])
def test_a_broken_swanlab_does_not_touch_training(fault: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(*fault.split()), encoding="utf-8")
    done = train(tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.process.returncode == 0, done.console
    assert list(logged(done)) == [5, 10]


BROKEN = """
import sys
if "--tracker" in sys.argv:
    import time
    import swanlab
    def broken(*args, **kwargs):
        time.sleep(600) if "{1}" == "sleeps" else 1 / 0
    if "{0}" == "init":
        swanlab.init = broken
    else:
        from swanlab.sdk.internal.run import Run
        Run.log = broken
"""


# --- the console


def test_a_terminal_shows_a_live_bar(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{**SETTINGS, "report_to": "none"})
    leader, follower = pty.openpty()
    env = {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(config)], stdin=follower, stdout=follower,
                               stderr=follower, env={**env, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the last writer has closed the terminal
            break
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    assert re.search(r"\r.*loss \d+\.\d+  lr .*\d+/12", text)
    assert "finished at step 12 of 12" in text
