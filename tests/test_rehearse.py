"""A rehearsal measures a few steps of the run that it stands for, and leaves nothing behind."""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers.config import write_config
from helpers.launcher import Run, committed, run, train
from helpers.plan import bare_plan
from helpers.real import real_fixture

MEASURED = (
    "step_seconds",
    "start_seconds",
    "checkpoint_seconds",
    "checkpoint_bytes",
    "peak_memory",
)
LONG = 100  # tokens; of the demo's samples few have more
SLOW = [{"point": "slow", "step": 1}]


def left_in(folder: Path) -> list[str]:
    """What a rehearsal of folder/config.yaml has left, but for what it measured."""
    kept = ("rehearsal.json", "data.json")
    return [path.name for path in (folder / "out").glob("*") if path.name not in kept]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# --- two ranks under ZeRO-3, and the run that was rehearsed


@real_fixture
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A rehearsal after one whose launcher was killed; the run evaluates and asks for a message."""
    folder = tmp_path_factory.mktemp("rehearsed")
    config = write_config(
        folder,
        eval_strategy="steps",
        eval_steps=5,
        val_size=8,
        save_steps=8,
        max_samples=56,
        per_device_train_batch_size="auto",
        global_batch_size=4,
        gradient_accumulation_steps=None,
        notify="http://127.0.0.1:9/nobody-listens",
    )
    (folder / "out" / ".rehearsal-20260101-000000" / "logs").mkdir(parents=True)
    return train(folder, config, "--rehearse", "--json", apart=True)


@real_fixture
def real(rehearsed: Run) -> Run:
    """The run itself, afterwards."""
    return train(rehearsed.folder, rehearsed.folder / "config.yaml", "notify=")


def test_with_json_stdout_is_one_object_and_the_rest_is_on_stderr(rehearsed: Run):
    figures = json.loads(rehearsed.console)
    assert figures["state"] == "finished"
    assert all(figures[key] > 0 for key in MEASURED)
    assert 0 <= figures["input_wait"] < 1 and figures["peak_rank"] in (0, 1)
    assert "step 10/10" in rehearsed.errors and "evaluation loss" in rehearsed.errors


def test_it_says_what_the_whole_run_would_take(rehearsed: Run):
    figures = json.loads(rehearsed.console)
    steps, pace = 12, figures["step_seconds"]  # 48 samples, 4 in a step
    assert figures["counts"] == {"step": 12, "checkpoint": 2, "evaluation": 3}
    expected = figures["start_seconds"] + steps * pace
    expected += 2 * figures["checkpoint_seconds"] + 3 * figures["evaluation_seconds"]
    assert figures["total_seconds"] == pytest.approx(expected)
    assert figures["evaluation_seconds"] > 0


def test_it_leaves_what_it_measured_and_nothing_else(rehearsed: Run):
    assert sorted(os.listdir(rehearsed.folder / "out")) == ["data.json", "rehearsal.json"]
    assert not rehearsed.left_after()


def test_with_auto_each_split_is_tried_and_the_fastest_is_kept_for_the_run(
    rehearsed: Run, real: Run
):
    kept = json.loads(rehearsed.console)["configuration"]["per_device_train_batch_size"]
    tried = re.findall(r"^batch +(\d) per device x 2 processes", rehearsed.errors, re.MULTILINE)
    assert sorted(tried) == ["1", "2"]
    assert real.see(rf"^batch +{kept} per device x 2 processes .* 4 samples per step \(auto: ")
    assert "tokenizing first" in rehearsed.errors and "tokenizing first" not in real.console


def test_it_tells_nobody(rehearsed: Run):
    assert "was not delivered" not in rehearsed.errors


def test_the_summary_of_a_run_holds_the_same_figures(rehearsed: Run, real: Run):
    summary, said = read_json(real.run_dir / "summary.json"), json.loads(rehearsed.console)
    assert all(summary[key] > 0 for key in (*MEASURED, "evaluation_seconds"))
    assert summary["rehearsal"] == said
    assert committed(real.run_dir) == [8, 12]
    # The trainer's state has a line for each step that was logged.
    assert summary["checkpoint_bytes"] == pytest.approx(said["checkpoint_bytes"], rel=0.01)


def test_the_end_of_a_run_compares_with_plan_and_rehearsal(real: Run):
    assert real.see(r"^memory +[\d.]+ [MG]iB of .* at the peak \(rank \d\), the rehearsal ")
    assert real.see(r"^time .* per step, .* in the rehearsal$")
    assert real.see(r"^checkpoint +[\d.]+ MiB in .* \([\d.e-]+ GB/s\)$")


# --- one rank without DeepSpeed


@real_fixture
def tight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A rehearsal on a GPU that holds one long sample at a time, with a micro-batch of 2."""
    folder = tmp_path_factory.mktemp("tight")
    sizes = {"max_samples": 200, "per_device_train_batch_size": 2, "cutoff_len": 512}
    config = write_config(folder, deepspeed=None, save_strategy="no", **sizes)
    faults = [{"point": "out of memory", "samples": 1, "over": LONG}]
    return run(folder, config, "--rehearse", ranks=1, faults=faults)


def test_samples_that_do_not_fit_are_found_in_the_first_step(tight: Run):
    assert "phase: training" in tight.console
    first, *_, last = tight.console.split("starting again with ")
    assert "step 1/10" not in first and "step 10/10" in last


def test_it_names_the_micro_batch_that_works(tight: Run):
    assert tight.returncode == 0
    works = "per_device_train_batch_size=1 gradient_accumulation_steps=2"
    assert tight.see(rf"^memory .* with {works}; a GPU is out of memory with 2$")
    assert left_in(tight.folder) == []


def test_a_run_of_another_configuration_is_not_compared_with_it(tight: Run):
    figures = read_json(tight.folder / "out" / "rehearsal.json")
    values = ft.Values(figures["configuration"], output_dir=str(tight.folder / "out"))
    plan = replace(bare_plan({}, ft.Zero(), 1), values=values)
    assert ft.rehearsal_of(plan) == figures
    assert ft.rehearsal_of(replace(plan, values=ft.Values(values, cutoff_len=511))) == {}


@pytest.mark.real
def test_where_no_micro_batch_fits_it_says_so(tmp_path: Path):
    config = write_config(tmp_path, deepspeed=None)
    faults = [{"point": "out of memory", "samples": 0}]
    done = run(tmp_path, config, "--rehearse", ranks=1, faults=faults)
    assert done.returncode == 1
    assert done.see(
        r"^memory +a GPU is out of memory, also with per_device_train_batch_size=1$"
    )
    assert os.listdir(tmp_path / "out") == []


# --- nothing is left behind


@pytest.mark.real
def test_ctrl_c_ends_it_at_once_and_leaves_nothing(tmp_path: Path):
    config = write_config(tmp_path, deepspeed=None)
    with Run(tmp_path, config, "--rehearse", ranks=1, faults=SLOW) as stopped:
        stopped.see_training()
        os.kill(stopped.process.pid, signal.SIGINT)
        assert stopped.wait() == 128 + signal.SIGINT
        assert not stopped.left_after()
    assert os.listdir(tmp_path / "out") == []
    assert "step 10/10" not in stopped.console


@pytest.mark.real
def test_a_rank_that_is_killed_ends_it_and_leaves_nothing(tmp_path: Path):
    faults = [{"point": "kill", "step": 3}]
    config = write_config(tmp_path, deepspeed=None)
    done = run(tmp_path, config, "--rehearse", ranks=1, faults=faults)
    assert done.returncode == 1
    assert "was killed by SIGKILL" in done.console and "restart" not in done.console
    assert "full log" not in done.console
    assert os.listdir(tmp_path / "out") == []


# --- the command line


@pytest.mark.parametrize("other", ["--resume", "--dry-run", "--preview"])
def test_it_is_refused_with_what_starts_no_run_of_its_own(
    other: str, write_config: Callable[..., Path], here
):
    done = here(write_config(), "--rehearse", other)
    assert done.returncode == 2
    assert "--rehearse begins a run of its own" in done.stderr


def test_one_that_was_killed_is_no_run_to_resume(
    tmp_path: Path, write_config: Callable[..., Path], here
):
    config = write_config()
    left = tmp_path / "out" / ".rehearsal-20260101-000000"
    left.mkdir(parents=True)
    (left / "config.yaml").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    done = here(config, "--resume")
    assert done.returncode == 2
    assert "there is no run under" in done.stderr


# --- without ranks: what the whole run would take, from a summary that is written by hand

SUMMARY = {
    "state": "finished",
    "run": "/saves/.rehearsal-first",
    "step_seconds": 2.0,
    "checkpoint_seconds": 10.0,
    "evaluation_seconds": 5.0,
    "start_seconds": 30.0,
}


def rehearsed_plan(steps: ft.Steps, **values: object) -> ft.Plan:
    """A plan of these steps, which saves every 8th and evaluates every 4th."""
    every = {"save_steps": 8, "eval_steps": 4, "eval_strategy": "steps"}
    return replace(bare_plan({}, ft.Zero(), 1, **every, **values), steps=steps)


def test_the_whole_run_is_the_start_and_all_steps_saves_and_evaluations():
    figures = ft.forecast(rehearsed_plan(ft.Steps(48, 12, 24)), SUMMARY)
    assert figures["counts"] == {"step": 24, "checkpoint": 3, "evaluation": 6}
    assert figures["total_seconds"] == 30 + 24 * 2 + 3 * 10 + 6 * 5
    assert figures["epoch_seconds"] == 12 * 2


@pytest.mark.parametrize(
    ("steps", "summary"),
    [
        pytest.param(
            ft.Steps(None, None, None, "packing"), SUMMARY, id="steps-that-are-unknown"
        ),
        pytest.param(
            ft.Steps(48, 12, 24), {"state": "failed"}, id="a-rehearsal-without-a-step"
        ),
    ],
)
def test_nothing_is_forecast_from(steps: ft.Steps, summary: dict):
    assert "total_seconds" not in ft.forecast(rehearsed_plan(steps), summary)


def test_a_forecast_has_nothing_of_the_rehearsals_own_run():
    assert "run" not in ft.forecast(rehearsed_plan(ft.Steps(48, 12, 24)), SUMMARY)
