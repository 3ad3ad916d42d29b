"""A sick run: divergence, weights that are not finite, ranks that make no progress."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers.config import write_config
from helpers.launcher import Run, committed, losses, metrics, run, says, train, weights
from helpers.real import real_fixture

ALONE = {"deepspeed": None, "bf16": None}


def summary(done: Run) -> dict:
    return json.loads((done.run_dir / "summary.json").read_text(encoding="utf-8"))


# --- what counts as a divergence


def first_problem(
    losses: list[float], fp16: bool = False, warm: bool = True, norms=None
) -> tuple:
    """(the log at which a divergence is noticed, from 1, and what is said); (0, '') for none."""
    watch = ft.LossWatch()
    for number, loss in enumerate(losses, 1):
        norm = norms[number - 1] if norms else 1.0
        text = watch.problem(10 * number, {"loss": loss, "grad_norm": norm}, fp16, warm)
        if text:
            return number, text
    return 0, ""


def test_a_loss_that_is_nan_twice_in_a_row_is_a_divergence() -> None:
    assert first_problem([3.0, math.nan, math.nan]) == (3, "loss nan since step 20")


def test_a_gradient_norm_that_is_infinite_twice_in_a_row_is_a_divergence() -> None:
    number, text = first_problem([3.0] * 4, norms=[1.0, math.inf, math.inf, 1.0])
    assert (number, text) == (3, "grad_norm inf since step 20")


def test_one_log_that_is_not_finite_is_none() -> None:
    assert first_problem([3.0, math.nan, 3.0, math.nan, 3.0])[0] == 0


def test_steps_that_the_loss_scaler_of_fp16_skips_are_none() -> None:
    assert first_problem([3.0] * 9, fp16=True, norms=[math.inf] * 9)[0] == 0


def test_a_loss_that_stays_over_five_times_its_median_is_a_divergence() -> None:
    number, text = first_problem([2.0] * 25 + [11.0] * 10)
    assert (number, text) == (30, "loss 11, over 5 times its median of 2 for 5 logs")


@pytest.mark.parametrize(
    ("values", "warm"),
    [
        pytest.param([2.0] * 25 + [6.0] * 20, True, id="three-times-the-median"),
        pytest.param([2.0] * 25 + [11.0] * 4 + [2.0] * 20, True, id="four-logs"),
        pytest.param([2.0] * 5 + [11.0] * 15 + [2.0] * 9, True, id="in-the-first-twenty-logs"),
        pytest.param([2.0] * 25 + [11.0] * 10, False, id="in-the-warm-up"),
        pytest.param([-1.0] * 40, True, id="a-loss-below-zero"),
        pytest.param(
            [6.0] * 5 + [0.0007] * 25 + [7.2, 6.8, 6.1, 6.2, 5.55] + [5.5] * 30,
            True,
            id="a-harder-data-set",
        ),
        pytest.param([8.0] * 5 + [0.5] * 25 + [7.0] * 30, True, id="not-above-the-first-ones"),
    ],
)
def test_a_healthy_run_raises_no_alarm(values: list[float], warm: bool) -> None:
    assert first_problem(values, warm=warm) == (0, "")


def test_twenty_noisy_runs_with_a_spike_raise_no_alarm() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        values = [7 * 0.97**n * noise.uniform(0.7, 1.4) for n in range(200)]
        spike = noise.randrange(30, 190)
        values[spike : spike + 3] = [3 * value for value in values[spike : spike + 3]]
        assert first_problem(values) == (0, ""), seed


# --- a run that diverges


@real_fixture
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """From its 5th step on the loss of rank 1 of two is NaN; a checkpoint every second step, a
    restart allowed.
    """
    folder = tmp_path_factory.mktemp("diverged")
    faults = [{"point": "nan loss", "step": 5, "rank": 1}]
    return run(folder, write_config(folder, **ALONE, max_samples=48), faults=faults)


def test_a_divergence_ends_the_run_at_the_second_log_and_says_so(diverged: Run) -> None:
    assert diverged.process.returncode == 1, diverged.console
    assert (summary(diverged)["state"], summary(diverged)["steps"]) == ("diverged", 6)
    assert "diverged at step 6: loss nan since step 5" in diverged.console
    assert "usual causes" in diverged.console and "restart" not in diverged.console


def test_the_summary_of_a_divergence_is_strict_json(diverged: Run) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (diverged.run_dir / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["last_loss"] is None


def test_a_divergence_keeps_the_good_checkpoints_and_saves_none_after_it(diverged: Run) -> None:
    assert committed(diverged.run_dir) == [2, 4]
    assert not (diverged.run_dir / "checkpoint-6").exists()
    assert not (diverged.run_dir / "model.safetensors").exists()


def test_a_diverged_run_resumes_with_another_learning_rate(diverged: Run) -> None:
    done = train(diverged.folder, "--resume", diverged.run_dir, "learning_rate=1e-3", ranks=1)
    rates = {
        line["step"]: line["learning_rate"] for line in metrics(done.run_dir) if "loss" in line
    }
    assert rates[7] == pytest.approx(
        1e-3 * (24 - 6) / 24, rel=1e-6
    )  # linear, as at its 7th step


@pytest.mark.real
def test_weights_that_are_not_finite_on_one_rank_are_never_committed(tmp_path: Path) -> None:
    faults = [{"point": "nan weights", "step": 5, "rank": 1}]
    done = run(tmp_path, write_config(tmp_path), faults=faults)
    assert (done.process.returncode, summary(done)["state"]) == (1, "diverged"), done.console
    assert set(committed(done.run_dir)) <= {2, 4} and 4 in committed(done.run_dir)


# --- ranks that make no progress


@real_fixture
def hung(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rank 1 leaves a collective out in its 3rd step, and after the restart from checkpoint-2 it is
    stopped by a signal in step 6.
    """
    folder = tmp_path_factory.mktemp("hang")
    faults = [
        {"point": "collective left out", "step": 3, "rank": 1},
        {"point": "SIGSTOP", "step": 4, "rank": 1},
    ]
    return run(folder, write_config(folder, hang_timeout=10), faults=faults, seconds=400)


def test_a_rank_that_leaves_a_collective_out_is_said_where_it_is(hung: Run) -> None:
    says(
        hung.console,
        r"no progress for \d+ s: rank 0 in \w+ \(\w+\.py:\d+\); rank 1 in barrier \(\w+\.py:\d+\)\n"
        "restart 1 of 3: resuming from checkpoint-2",
    )
    log = (hung.run_dir / "logs" / "rank0.log").read_text(encoding="utf-8")
    assert "most recent call first" in log


def test_a_rank_that_is_stopped_is_named_and_the_run_restarts(hung: Run) -> None:
    says(
        hung.console,
        r"no progress for \d+ s: .*rank 1 is stopped by a signal \(SIGSTOP\)\n"
        "restart . of 3: resuming from checkpoint-4",
    )


def test_a_run_that_hung_ends_with_the_weights_of_one_that_did_not(
    hung: Run, reference: SimpleNamespace
) -> None:
    assert hung.process.returncode == 0, hung.console
    assert weights(hung.run_dir) == weights(reference.run_dir)
    assert losses(hung.run_dir) == losses(reference.run_dir)


@pytest.mark.real
def test_a_slow_save_is_waited_for_and_a_batch_that_never_comes_is_not(tmp_path: Path) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "val_size": 2}  # before the save
    changes = {**ALONE, **evaluation, "hang_timeout": 6, "max_restarts": 0, "save_steps": 3}
    config = write_config(tmp_path, **changes)
    faults = [
        {"point": "save slowly", "step": 3, "seconds": 18},
        {"point": "sleep in collator", "step": 7},
    ]
    done = run(tmp_path, config, ranks=1, faults=faults)
    assert committed(done.run_dir) == [3]
    assert (done.process.returncode, summary(done)["state"]) == (1, "hung"), done.console
    says(summary(done)["cause"], r"no progress for \d+ s: rank 0 in action \(faults.py")
    assert summary(done)["resume"]
