"""How a run ended, from a run directory as ranks and launcher leave it, written by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers import SCRIPT
from helpers.config import write_json
from helpers.launcher import says

STARTED = 100.0  # seconds since 1970
BEFORE = [
    {"event": "begin", "step": 0, "total_steps": 12, "time": 90.0},
    {"step": 2, "loss": 7.5, "learning_rate": 1e-3, "time": 95.0},
]
THIS_LAUNCH = [
    {"event": "begin", "step": 0, "total_steps": 12, "time": 112.5},
    {"step": 2, "loss": 7.0, "learning_rate": 1e-3, "time": 113.0},
    {"step": 4, "loss": 5.0, "train_tokens_per_second": 900.0, "time": 114.0},
    {"step": 6, "eval_loss": 4.5, "time": 115.0},
]


@pytest.fixture
def run(tmp_path: Path) -> ft.Run:
    """A run of two launches, the second of which began anew, with one checkpoint and a torn one."""
    run = ft.Run(tmp_path / "out" / "first")
    for step in (4, 6):
        folder = run.path / f"checkpoint-{step}"
        write_json(folder / "trainer_state.json", {"global_step": step})
        (folder / "model.safetensors").write_bytes(b"weights")
    ft.commit_checkpoint(run.path / "checkpoint-4", 2)
    lines = [json.dumps(line) + "\n" for line in BEFORE + THIS_LAUNCH]
    run.metrics_file.write_text("".join(lines) + '{"step": 8, "lo')  # a line that was cut
    return run


@pytest.fixture
def printed(
    run: ft.Run, write_config: Callable, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """printed(state, cause): what the console says at the end of the run."""

    def end(state: str, cause: str = "", **figures: object) -> str:
        summary = ft.summarize(run, state, cause, STARTED)
        nothing = {"device_memory": None, "planned_memory": None, "resident": True}
        ft.print_summary(
            run, ft.load_config(write_config(), {}), {**summary, **nothing, **figures}
        )
        return capsys.readouterr().out

    return end


def test_losses_and_steps_are_those_that_count(run):
    summary = ft.summarize(run, "failed", "why", STARTED)
    wanted = {"first_loss": 7.0, "last_loss": 5.0, "steps": 6, "total_steps": 12}
    assert {key: summary[key] for key in wanted} == wanted


def test_the_start_is_that_of_this_launch(run):
    assert ft.summarize(run, "failed", "why", STARTED)["start_seconds"] == 12.5


def test_only_a_committed_checkpoint_counts(run):
    summary = ft.summarize(run, "failed", "why", STARTED)
    assert summary["checkpoints"] == ["checkpoint-4"]
    assert summary["model"] == str(run.path / "checkpoint-4")


def test_a_failed_run_says_where_it_is_and_how_to_resume(printed, run, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    text = printed("failed")
    says(text, r"^state +failed at step 6 of 12$")
    says(text, r"^loss +7\.0000 at first, 5\.0000 at last$")
    says(text, rf"^resume +NPROC_PER_NODE=2 python {SCRIPT} --resume {run.path}$")


def test_a_run_that_is_not_finished_chats_with_its_checkpoint(printed, run):
    says(printed("stopped"), rf"^chat .*--model_name_or_path {run.path}/checkpoint-4 ")


def test_a_run_without_a_checkpoint_says_so(printed, run):
    (run.path / "checkpoint-4" / "manifest.json").unlink()
    says(printed("failed"), r"^resume +there is no checkpoint to resume from$")


def test_a_diverged_run_has_a_hint(printed):
    says(printed("diverged", "loss is NaN"), r"^hint +usual causes: a learning rate")


def test_a_finished_run_has_nothing_to_resume(printed, run):
    (run.path / "model.safetensors").write_bytes(b"weights")
    text = printed("finished")
    says(text, rf"^model +{run.path}$")
    assert "\nresume " not in text


MEASURED = {
    "step_seconds": 0.5,
    "checkpoint_seconds": 2.0,
    "checkpoint_bytes": 4 << 30,
    "peak_memory": 3 << 30,
    "peak_rank": 1,
    "input_wait": 0.02,
}


def test_on_a_cpu_the_peak_is_not_compared_with_a_plan_that_knows_no_python(printed):
    plan = {"device_memory": 8 << 30, "planned_memory": 2 << 20, "resident": True}
    text = printed("failed", rehearsal=None, **MEASURED, **plan)
    says(text, r"^memory +3\.0 GiB of 8\.0 GiB at the peak \(rank 1\)$")


def test_what_was_measured_is_compared_with_the_plan_and_the_rehearsal(printed):
    plan = {"device_memory": 8 << 30, "planned_memory": 2 << 30, "resident": False}
    rehearsal = {"peak_memory": 1 << 30, "step_seconds": 0.4}
    text = printed("failed", rehearsal=rehearsal, **MEASURED, **plan)
    says(text, r"^memory +3\.0 GiB of 8\.0 GiB at the peak \(rank 1\), the plan said 2\.0 GiB")
    says(text, r"^memory .*, the rehearsal 1\.0 GiB$")
    says(text, r"^time .*, 900 tokens/s, 0\.5 s per step, 0\.4 s in the rehearsal$")
    says(text, r"^checkpoint +4\.0 GiB in 2 s \(2\.1 GB/s\)$")
    says(text, r"^start +12 s to the first step$")
    says(text, r"^input +the ranks waited for data 2 % of the time$")


def test_a_run_that_has_logged_no_loss_has_no_curve(run):
    run.metrics_file.write_text(json.dumps(BEFORE[0]) + "\n")
    ft.draw_curve(run)
    assert ft.summarize(run, "failed", "why", STARTED)["curve"] is None


def test_a_run_that_has_logged_losses_has_a_curve(run):
    ft.draw_curve(run)
    curve = run.path / "training_loss.png"
    assert ft.summarize(run, "failed", "why", STARTED)["curve"] == str(curve)
    assert curve.read_bytes().startswith(b"\x89PNG")
