"""What the console shows of a run, from lines of metrics.jsonl and a data.json as ranks write them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers.config import write_json
from helpers.launcher import says

FIGURES = {
    "rows": 100,
    "kept": 97,
    "dropped": 3,
    "cut": 10,
    "unlearned": 0,
    "unended": 0,
    "tokens": {"min": 12, "median": 50, "p99": 180, "max": 210},
    "padding": 0.071,
    "cutoff_len": 192,
    "enough": [210, 0],
    "template": "",
}


def begin(step: int = 0, total: int = 100, time: float = 0.0) -> dict:
    """The line with which each start of the ranks begins."""
    return {"event": "begin", "step": step, "total_steps": total, "time": time}


def logged(step: int, time: float, **more: float) -> dict:
    """The line of a step that the trainer logs."""
    line = {"step": step, "time": time, "loss": 7.08191, "learning_rate": 1.6e-4}
    return {**line, "train_tokens_per_second": 5171.4, **more}


@pytest.fixture
def shown(capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """shown(*lines): what a console without a terminal prints of them."""

    def show(*lines: dict) -> list[str]:
        console = ft.Console()
        for line in lines:
            console.show(line)
        return capsys.readouterr().out.splitlines()

    return show


def test_a_step_has_its_loss_rate_throughput_and_the_time_that_is_left(shown):
    [text] = shown(begin(), logged(5, time=10.0))
    assert text == "step 5/100  loss 7.0819  lr 1.60e-04  5171 tokens/s  0:03:10 left"


def test_after_a_resume_the_time_that_is_left_is_that_of_this_start(shown):
    [text] = shown(begin(step=50, time=1000.0), logged(60, time=1020.0))
    assert text.endswith("0:01:20 left")


def test_a_long_run_has_about_thirty_lines(shown):
    steps = [logged(step, time=step / 10) for step in range(1, 301)]
    assert 28 <= len(shown(begin(total=300), *steps)) <= 31


def test_a_slow_run_has_a_line_per_minute(shown):
    steps = [logged(step, time=20.0 * step) for step in range(1, 10)]
    assert len(shown(begin(total=10_000), *steps)) == 3


def test_each_evaluation_is_said_once_with_its_data_set(shown):
    evaluation = {"step": 50, "time": 9.0, "eval_loss": 1.25, "eval_runtime": 3.0}
    by_set = {"step": 60, "time": 9.0, "eval_my_set_loss": 1.5}
    assert shown(begin(), evaluation, evaluation, by_set) == [
        "step 50/100  evaluation loss 1.2500",
        "step 60/100  evaluation loss 1.5000 on my_set",
    ]


def show_data(folder: Path, capsys: pytest.CaptureFixture, **changes: object) -> str:
    """What the console says of data with these figures, asked twice."""
    write_json(folder / "data.json", {**FIGURES, **changes})
    (folder / "logs").mkdir()
    (folder / "logs" / "rank0.log").write_text(">> Dropped lengthy example with length 300.\n")
    console = ft.Console()
    for _ in range(2):
        console.show_data(ft.Run(folder))
    return capsys.readouterr().out


def test_the_figures_of_the_data_are_said_once(tmp_path, capsys):
    text = show_data(tmp_path, capsys)
    line = "97 of 100 rows, 12-210 tokens (median 50, 99 %: 180), 10 cut at 192, 3 dropped, 7 % padding"
    assert re.findall(r"^data +(.*)$", text, re.MULTILINE) == [line]


def test_dropped_rows_have_the_first_reason(tmp_path, capsys):
    says(show_data(tmp_path, capsys), r"^dropped +3 rows; the first: Dropped lengthy example")


def test_many_cut_samples_have_the_cutoff_len_that_cuts_none(tmp_path, capsys):
    says(show_data(tmp_path, capsys), r"^cut +10 samples; cutoff_len=210 would cut none$")


def test_clean_data_has_one_line(tmp_path, capsys):
    assert len(show_data(tmp_path, capsys, dropped=0, cut=0).splitlines()) == 1


def test_an_evaluation_is_shown_with_its_scores_each_data_set_with_its_own(shown):
    counts = {"exact": [93.0, 100], "execution": [95.0, 100]}
    scored = {"event": "scores", "step": 48, "at": 48, "time": 1.0, "counts": counts}
    lines = shown(
        begin(total=48),
        {**scored, "name": ""},
        {"step": 48, "time": 2.0, "eval_loss": 0.0123},
        {**scored, "name": "old", "counts": {"exact": [7.0, 10]}},
        {"step": 48, "time": 3.0, "eval_old_loss": 0.5},
    )
    assert lines == [
        "step 48/48  evaluation loss 0.0123  exact 93 of 100 (+-5)  execution 95 of 100",
        "step 48/48  evaluation loss 0.5000 on old  exact 7 of 10 (+-3)",
    ]
