"""SwanLab for real: what it records, and that nothing it does can hurt the run."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers.config import write_config
from helpers.launcher import Run, command_of, losses, metrics, run, says, until
from helpers.real import real_fixture
from helpers.swanlab_records import dashboard_points, read_dashboard, read_record, records
from helpers.swanlab_service import SwanLabService

SETTINGS = {
    "report_to": "swanlab",
    "deepspeed": None,
    "max_steps": 12,
    "logging_steps": 5,
    "save_steps": 4,
}
SLOW = [{"point": "slow"}]


def train(folder: Path, *arguments: object, **options: object) -> Run:
    """A run of 12 steps that reports to SwanLab, to its end, whatever that is."""
    changes = options.pop("changes", {})
    return run(
        folder, write_config(folder, **{**SETTINGS, **changes}), *arguments, ranks=1, **options
    )


def logged(done: Run) -> dict[int, float]:
    """{step: loss} of the run's own metrics."""
    return {step: values[-1] for step, values in losses(done.run_dir).items()}


def swanlog(done: Run) -> list[Path]:
    """The run's SwanLab folders."""
    return records(done.run_dir.parent / "swanlog")


# --- runs whose SwanLab fails: what waits is begun first and looked at last

# The arguments of the service, of which 8 requests are the login and the run's creation; or what
# SwanLab's log() does.
FAILURES = {
    "hang": ("hang",),
    "falls silent": (8,),
    "log sleeps": "sleeps",
    "refuse": ("refuse",),
    "dies": (8, True),
    "log raises": "raises",
}
WAITING = list(FAILURES)[:3]
BROKEN = """
import sys
if "--tracker" in sys.argv:
    import time
    from swanlab.sdk.internal.run import Run
    Run.log = lambda *args, **kwargs: time.sleep(600) if "{0}" == "sleeps" else 1 / 0
"""


def begin(name: str, folder: Path, stack: ExitStack) -> Run:
    """Start a run under one of the failures; `stack` ends it and its service."""
    if isinstance(FAILURES[name], str):
        (folder / "sitecustomize.py").write_text(
            BROKEN.format(FAILURES[name]), encoding="utf-8"
        )
        env = {"PYTHONPATH": str(folder)}
    else:
        env = stack.enter_context(SwanLabService(*FAILURES[name])).environment
    return stack.enter_context(Run(folder, write_config(folder, **SETTINGS), ranks=1, env=env))


@real_fixture
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """The runs that wait for long, while the others run: the first fixture asks for them."""
    with ExitStack() as stack:
        yield {name: begin(name, tmp_path_factory.mktemp("waiting"), stack) for name in WAITING}


@real_fixture
def failures(
    waiting: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """A run under each of the failures, ended."""
    with ExitStack() as stack:
        prompt = [name for name in FAILURES if name not in WAITING]
        runs = {name: begin(name, tmp_path_factory.mktemp("prompt"), stack) for name in prompt}
        runs |= waiting
        for started in runs.values():
            started.wait()
    return runs


# --- modes


EVALUATED = {
    "val_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "per_device_eval_batch_size": 4,
    "max_samples": 40,
}


@real_fixture
def local(waiting: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without a key that evaluates, in a terminal, on a PATH that is empty: no git, no shell;
    by use_swanlab, the older spelling, with a name and a folder.
    """
    folder = tmp_path_factory.mktemp("local")
    (folder / "nothing").mkdir()
    changes = {
        **EVALUATED,
        "report_to": None,
        "use_swanlab": True,
        "swanlab_run_name": "mine",
        "swanlab_logdir": str(folder / "out" / "swanlog"),
    }
    env = {"PATH": str(folder / "nothing")}
    return train(folder, changes=changes, env=env, terminal=True)


def test_without_a_key_the_run_is_recorded_locally(local: Run) -> None:
    assert "SwanLab local (no API key was found)" in local.console
    [folder] = swanlog(local)
    assert dashboard_points(folder, "train/loss") == list(logged(local).items())
    assert [step for step, _ in dashboard_points(folder, "train/loss")] == [5, 10]


def test_the_evaluation_loss_is_recorded_once_at_its_step(local: Run) -> None:
    [folder] = swanlog(local)
    # LLaMA-Factory evaluates once more at the end, at the same step.
    lines = [line for line in metrics(local.run_dir) if "eval_loss" in line]
    known = {line["step"]: line["eval_loss"] for line in lines}
    assert read_record(folder)["points"]["eval/loss"] == list(known.items())
    assert dashboard_points(folder, "eval/loss") == list(known.items())
    assert re.findall(r"step (\d+)/12  evaluation loss \d", local.console) == ["6", "12"]


@real_fixture
def offline(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in offline mode that evaluates two data sets."""
    changes = {
        **EVALUATED,
        "val_size": None,
        "eval_on_each_dataset": True,
        "eval_dataset": "code2sql_demo,code2sql_heldout",
        "max_samples": 24,
    }
    folder = tmp_path_factory.mktemp("offline")
    return train(folder, changes=changes, env={"SWANLAB_MODE": "offline"})


def test_offline_mode_keeps_every_point_for_a_later_sync(offline: Run) -> None:
    assert "SwanLab offline (from SWANLAB_MODE)" in offline.console
    [folder] = swanlog(offline)
    record = read_record(folder)
    assert dict(record["points"]["train/loss"]) == logged(offline)
    assert record["state"] == "finished"


def test_each_evaluated_data_set_has_its_own_loss(offline: Run) -> None:
    [folder] = swanlog(offline)
    points = read_record(folder)["points"]
    for name in ("code2sql_demo", "code2sql_heldout"):
        assert [step for step, _ in points[f"eval/{name}_loss"]] == [6, 12]
        shown = rf"step \d+/12  evaluation loss \d.* on {name}$"
        assert len(re.findall(shown, offline.console, re.MULTILINE)) == 2


def test_the_older_spelling_use_swanlab_works(local: Run) -> None:
    [folder] = swanlog(local)
    assert read_dashboard(folder) == {"name": "mine", "status": "finished"}


def test_a_node_without_git_trains_and_records_all_the_same(local: Run) -> None:
    assert local.returncode == 0, local.console
    [folder] = swanlog(local)
    assert read_record(folder)["state"] == "finished"


# --- a resume, and a tracker that is killed


@real_fixture
def online(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with a service, stopped after its first logged step and resumed to its end; `remote` is
    {run id: what the service has}.
    """
    folder = tmp_path_factory.mktemp("online")
    config = write_config(folder, **{**SETTINGS, "logging_steps": 2})
    with SwanLabService() as service:
        env = service.environment
        with Run(folder, config, ranks=1, faults=SLOW, env=env) as live:
            live.reach(2)
            live.process.send_signal(signal.SIGTERM)
            live.wait()
        done = run(folder, config, "--resume", ranks=1, env=env)
        return SimpleNamespace(done=done, remote=service.runs, web=env["SWANLAB_WEB_HOST"])


def test_a_resumed_run_continues_the_same_experiment_online(online: SimpleNamespace) -> None:
    assert online.done.returncode == 0, online.done.console
    [remote] = online.remote.values()
    assert list(remote["scalars"]["train/loss"]) == [2, 4, 6, 8, 10, 12]
    assert [len(values) for values in losses(online.done.run_dir).values()] == [1] * 6


def test_online_the_service_gets_every_point_and_the_end(online: SimpleNamespace) -> None:
    [remote] = online.remote.values()
    assert remote["scalars"]["train/loss"] == logged(online.done)
    assert (remote["state"], remote["name"]) == ("FINISHED", online.done.run_dir.name)
    place = re.compile(rf"^dashboard +{re.escape(online.web)}/", re.MULTILINE)
    assert place.search(online.done.console)


@pytest.mark.real
def test_a_killed_tracker_is_replaced_and_no_point_is_lost(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{**SETTINGS, "logging_steps": 1, "max_steps": 20})
    with Run(tmp_path, config, ranks=1, faults=SLOW) as live:
        until(lambda: swanlog(live), "SwanLab's first record")
        [tracker] = [pid for pid in live.pids() if "--tracker" in command_of(pid)]
        os.kill(tracker, signal.SIGKILL)
        assert live.wait() == 0
    assert live.console.count("SwanLab's process ended") == 1
    record = read_record(swanlog(live)[-1])
    assert (record["state"], dict(record["points"]["train/loss"])) == ("finished", logged(live))


# --- a service that fails, and a SwanLab that is broken


@pytest.mark.parametrize(
    ("mode", "cause"), [("refuse", "AuthenticationError"), ("hang", "no answer in")]
)
def test_a_service_that_cannot_be_used_costs_one_warning(
    failures: dict[str, Run], mode: str, cause: str
) -> None:
    done = failures[mode]
    assert done.returncode == 0
    [warning] = [
        line for line in done.console.splitlines() if "SwanLab cannot be reached" in line
    ]
    assert cause in warning
    local = [
        folder
        for folder in swanlog(done)
        if (folder / "logs").is_dir() and any((folder / "logs").iterdir())
    ]
    assert f"swanlab sync {local[-1]} -i " in warning
    assert dashboard_points(local[-1], "train/loss") == list(logged(done).items())


@pytest.mark.parametrize("mode", ["falls silent", "dies"])
def test_a_service_that_ends_in_the_middle_costs_no_point(
    failures: dict[str, Run], mode: str
) -> None:
    done = failures[mode]
    assert done.returncode == 0
    assert "swanlab sync" in done.console
    [folder] = swanlog(done)
    record = read_record(folder)
    assert dict(record["points"]["train/loss"]) == logged(done)
    assert record["state"] == "finished"


@pytest.mark.parametrize("fault", ["log raises", "log sleeps"])
def test_a_failures_does_not_touch_training(failures: dict[str, Run], fault: str) -> None:
    done = failures[fault]
    assert done.returncode == 0, done.console
    assert list(logged(done)) == [5, 10]


# --- the console


def test_a_line_in_a_terminal_does_not_stand_behind_the_bar(monkeypatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    console = ft.Console()
    console.show({"event": "begin", "step": 0, "total_steps": 12, "time": 0.0})
    console.show({"step": 1, "loss": 7.0, "learning_rate": 1e-3, "time": 1.0})
    ft.say("SIGINT: stopping")
    console.close()
    says(screen.getvalue(), r"loss 7\.0000.*\rSIGINT: stopping\n")


def test_a_terminal_shows_a_live_bar(local: Run) -> None:
    says(local.console, r"\r.*loss \d+\.\d+  lr .*\d+/12")
    assert "finished at step 12 of 12" in local.console


# --- without ranks: what is recorded of a metrics.jsonl, and a tracker that is not SwanLab's

LINES = [
    {"event": "begin", "step": 0, "total_steps": 12, "time": 0.0},
    {"step": 5, "loss": 7.0, "learning_rate": 1e-3, "time": 1.0},
    {"step": 6, "eval_loss": 4.5, "time": 2.0},
    {"step": 6, "eval_my_set_loss": 4.0, "time": 3.0},
]


class Record:
    """What stands for SwanLab's run: `points` is all that is logged."""

    def __init__(self):
        self.points: list[tuple[int, dict]] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.points.append((step, numbers))


def follow(folder: Path, order: str) -> tuple[Record, dict | None]:
    """The record of LINES and the end, where stdin holds this `order`."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "orders").write_text(order)
    record = Record()
    with open(folder / "orders", "rb", buffering=0) as orders:
        end = ft.follow_to_the_end(record, ft.Follower(folder / "metrics.jsonl", 0), orders)
    return record, end


def test_every_number_is_recorded_at_its_step_under_train_or_eval(tmp_path: Path) -> None:
    record, end = follow(tmp_path, '{"state": "success"}\n')
    assert record.points == [
        (5, {"train/loss": 7.0, "train/learning_rate": 1e-3}),
        (6, {"eval/loss": 4.5}),
        (6, {"eval/my_set_loss": 4.0}),
    ]
    assert end == {"state": "success"}


def test_a_launcher_that_died_has_told_no_end(tmp_path: Path) -> None:
    record, end = follow(tmp_path, "")
    assert end is None and len(record.points) == 3


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """tracked(mode, answer): a launch whose trackers answer so, to its end; what each was told."""
    (tmp_path / "logs").mkdir()
    real = subprocess.Popen

    def launch(mode: str, **answers: dict) -> list[dict]:
        told = tmp_path / "told"
        code = f"""
import json, os, sys, time
init = json.loads(input())
open({str(told)!r}, "a").write(json.dumps(init) + "\\n")
state = {answers!r}[init["mode"]] | {{"pid": os.getpid()}}
state |= {{"id": init["id"], "launches": init["launches"]}}
with open({str(tmp_path / "draft")!r}, "w") as file:
    json.dump(state, file)
os.replace({str(tmp_path / "draft")!r}, {str(tmp_path / "logs" / "swanlab.json")!r})
if "problem" in state:
    time.sleep(0.5)  # the launcher reads it before the process has ended
    sys.exit(1)
input()
"""
        told.write_text("")

        def start(command: list[str], **options: object) -> subprocess.Popen:
            return real([sys.executable, "-c", code], **options)

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", start)
            tracking = ft.Tracking("SwanLab", mode, "asked for", {"name": "first"})
            env = dict(os.environ)
            tracker = ft.TrackerProcess("swanlab", tracking, ft.Run(tmp_path), env, {})
            tracker.begin()
            tracker.finish("finished", "")
        return [json.loads(line) for line in told.read_text().splitlines()]

    return launch


PLACE = {"dashboard": "swanlab watch /swanlog", "later": "but later: swanlab sync run-1"}


def test_a_launch_without_the_service_goes_on_locally_and_says_how_to_sync(
    tracked: Callable, capsys: pytest.CaptureFixture
) -> None:
    refused = {"problem": "no such key"}
    first, second = tracked("online", online=refused, local=PLACE)
    assert (first["mode"], second["mode"]) == ("online", "local")
    assert first["id"] == second["id"]
    text = capsys.readouterr().out
    says(text, r"SwanLab cannot be reached \(no such key\), but later: swanlab sync run-1$")


def test_a_tracker_that_never_begins_is_given_up_after_three_starts(
    tracked: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert len(tracked("local", local={"problem": "broken"})) == 3
    says(
        capsys.readouterr().out,
        r"SwanLab does not record this run \(broken\); see .*swanlab\.log",
    )


def test_a_tracker_that_tells_a_problem_has_not_begun(
    tracked: Callable, capsys: pytest.CaptureFixture
) -> None:
    broken = {"problem": "broken"}
    assert len(tracked("online", online=broken, local=broken)) == 3
    text = capsys.readouterr().out
    says(text, r"\ASwanLab does not record this run \(broken\); see .*swanlab\.log\n\Z")


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        pytest.param("local", ["first", "first (resume 1)"], id="local-has-a-record-each"),
        pytest.param("online", ["first", "first"], id="online-continues-its-experiment"),
    ],
)
def test_a_resumed_launch_has_the_same_id(tracked: Callable, mode: str, names: list) -> None:
    [first], [second] = (tracked(mode, **{mode: PLACE}) for _ in range(2))
    assert [first["name"], second["name"]] == names
    assert first["id"] == second["id"]
