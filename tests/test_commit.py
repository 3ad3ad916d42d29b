"""Checkpoints beside what other callbacks, a stop, a restart and a smaller batch do: nothing of them is lost."""

import errno
import json
import os
import re
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers.config import STEPS, make_model, write_config, write_json
from helpers.launcher import (
    Run,
    ask_python,
    committed,
    logged_steps,
    losses,
    metrics,
    run,
    train,
    weights,
)
from helpers.real import real_fixture


def differing_files(checkpoint: Path) -> list[str]:
    """The files that are not there as the manifest says, or that it does not list."""
    manifest = checkpoint / "manifest.json"
    if not manifest.exists():
        return ["manifest.json"]
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path != manifest]
    there = {str(path.relative_to(checkpoint)): path.stat().st_size for path in paths}
    names = sorted(there.keys() | listed.keys())
    return [name for name in names if there.get(name) != listed.get(name)]


# --- what is committed, and cannot be resumed from

UNRESUMABLE = "LLaMA-Factory cannot resume stage: rm"
STATE = "no optimizer state was saved"
RM = {"stage": "rm", "finetuning_type": "lora"}  # ZeRO-2 and 3: keys are missing on loading
MODEL_STATES = "global_step4/mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("problem", "file", "values"),
    [
        pytest.param("", "optimizer.pt", {"bf16": True}, id="without-deepspeed"),
        pytest.param("", "optimizer_0/__0_0.distcp", {"bf16": True}, id="fsdp"),
        pytest.param(
            "", "global_step4/bf16_zero_pp_rank_0_optim_states.pt", {"bf16": True}, id="zero"
        ),
        pytest.param("", MODEL_STATES, {}, id="stage-0-in-fp32-has-it-beside-the-weights"),
        pytest.param(STATE, MODEL_STATES, {"bf16": True}, id="stage-0-in-bf16"),
        pytest.param(STATE, "model.safetensors", {}, id="weights-only"),
        pytest.param(UNRESUMABLE, "optimizer.pt", RM, id="rm-with-lora-without-deepspeed"),
        pytest.param(
            UNRESUMABLE, "optimizer.pt", {**RM, "deepspeed": "z3.json"}, id="rm-with-lora"
        ),
        pytest.param(
            UNRESUMABLE,
            "optimizer.pt",
            {"stage": "rm", "finetuning_type": "full", "deepspeed": "z3.json"},
            id="rm-of-all-parameters",
        ),
    ],
)
def test_a_checkpoint_that_resuming_would_not_bring_back_says_so(
    tmp_path: Path, problem: str, file: str, values: dict
):
    path = tmp_path / "checkpoint-4" / file
    path.parent.mkdir(parents=True)
    path.touch()
    assert ft.resume_problem(ft.Values(values), tmp_path / "checkpoint-4") == problem


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_ends_no_run(tmp_path: Path, monkeypatch, number: int):
    monkeypatch.setattr(os, "fsync", partial(fail, OSError(number, "")))
    ft.commit_checkpoint(tmp_path, 1)
    assert ft.checkpoint_problem(tmp_path) == ""


def test_a_disk_that_fails_to_sync_commits_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "fsync", partial(fail, OSError(errno.EIO, "")))
    with pytest.raises(OSError):
        ft.commit_checkpoint(tmp_path, 1)
    assert ft.checkpoint_problem(tmp_path) == "it has no manifest"


def fail(error: OSError, descriptor: int) -> None:
    raise error


# --- a reward model, whose checkpoints LLaMA-Factory rewrites in a callback of its own


def reward_config(folder: Path, **changes: object) -> Path:
    """A reward model of full parameters on 12 pairs, saved at every second step."""
    pairs = [
        {"instruction": f"row {n}", "chosen": f"SELECT {n};", "rejected": f"no {n}"}
        for n in range(12)
    ]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    write_json(folder / "data" / "pairs.json", pairs)
    write_json(folder / "data" / "dataset_info.json", {"pairs": entry})
    data = {"dataset": "pairs", "dataset_dir": str(folder / "data")}
    return write_config(folder, stage="rm", save_total_limit=None, **data, **changes)


@real_fixture
def reward(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A reward model that is trained for three steps, to its end, without DeepSpeed.

    LLaMA-Factory cannot save one with tied embeddings then.
    """
    folder = tmp_path_factory.mktemp("reward")
    model = str(make_model(folder / "model", tie_word_embeddings=False))
    changes = {"model_name_or_path": model, "deepspeed": None, "max_steps": 3}
    return train(folder, reward_config(folder, **changes), ranks=1)


@real_fixture
def killed_reward(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A reward model under ZeRO-3 that is killed in step 5 of 6."""
    folder = tmp_path_factory.mktemp("killed")
    fault = {"point": "kill", "step": 5}
    return run(folder, reward_config(folder, max_samples=6), ranks=1, faults=[fault])


def test_every_checkpoint_of_a_reward_model_is_complete(reward: Run, killed_reward: Run):
    assert (committed(reward.run_dir), committed(killed_reward.run_dir)) == ([2, 3], [2, 4])
    for done in (reward, killed_reward):
        for checkpoint in done.run_dir.glob("checkpoint-*"):
            assert differing_files(checkpoint) == [], checkpoint
            assert ft.checkpoint_problem(checkpoint) in ("", UNRESUMABLE)


def test_the_value_head_of_a_reward_model_is_in_its_checkpoints(
    reward: Run, killed_reward: Run
):
    for done in (reward, killed_reward):
        for checkpoint in done.run_dir.glob("checkpoint-*"):
            assert (checkpoint / "value_head.safetensors").exists(), checkpoint


def test_a_killed_reward_model_is_not_restarted_from_its_first_step(killed_reward: Run):
    assert killed_reward.returncode == 1
    assert not re.search(r"^restart", killed_reward.console, re.MULTILINE), (
        killed_reward.console
    )
    assert len(losses(killed_reward.run_dir)[1]) == 1


def test_resuming_a_reward_model_is_refused_with_what_to_do(killed_reward: Run, tmp_path: Path):
    done = run(tmp_path, "--resume", killed_reward.run_dir)
    assert done.returncode == 2, done.console
    assert UNRESUMABLE in done.console and "start a new run" in done.console
    assert committed(killed_reward.run_dir) == [2, 4]


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_reward_model_that_could_not_be_saved_is_refused_before_the_start(
    here, tmp_path: Path, method: str
):
    """The demo model's embeddings are tied."""
    done = here(reward_config(tmp_path, deepspeed=None, finetuning_type=method), "--dry-run")
    assert done.returncode == 2
    assert "cannot save a reward model whose embeddings are tied" in done.stderr
    allowed = here(reward_config(tmp_path, finetuning_type=method), "--dry-run")
    assert "tied" not in allowed.stderr


# --- a stop where the configuration saves and evaluates something else


@real_fixture
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that evaluates after each step, saves the best model only, and is stopped after step 3.

    TensorBoard and MLflow follow it; LLaMA-Factory writes its log slowly.
    """
    folder = tmp_path_factory.mktemp("stopped")
    config = write_config(
        folder,
        eval_dataset="code2sql_heldout",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        save_strategy="best",
        metric_for_best_model="loss",
        greater_is_better=True,  # no evaluation after the first is better
        save_only_model=True,
        report_to=["tensorboard", "mlflow"],
    )
    faults = [{"point": "slow log", "seconds": 0.8}, {"point": "slow"}]
    env = {"SHOW_ALL_PACKAGES": "1"}
    with Run(folder, config, faults=faults, env=env) as alive:
        alive.reach(3)
        alive.process.terminate()
        alive.wait()
    assert alive.returncode == 143, alive.console
    return alive


@real_fixture
def resumed(stopped: Run) -> Run:
    """The same run, resumed to its end."""
    return train(stopped.folder, "--resume", stopped.run_dir, "report_to=none")


@real_fixture
def at_the_stop(stopped: Run) -> SimpleNamespace:
    """What the run directory held at the stop, before it is resumed."""
    lines = metrics(stopped.run_dir)
    step = max(
        int(path.name.rpartition("-")[2]) for path in stopped.run_dir.glob("checkpoint-*")
    )
    newest = stopped.run_dir / f"checkpoint-{step}"
    return SimpleNamespace(
        step=step,
        evaluated={line["step"] for line in lines if "eval_loss" in line},
        problem=ft.checkpoint_problem(newest),
        files=differing_files(newest),
        model=(stopped.run_dir / "model.safetensors").exists(),
        logged=logged_steps(stopped.run_dir),
        console=stopped.console,
    )


def test_a_stop_at_an_evaluation_step_does_not_evaluate_first(at_the_stop: SimpleNamespace):
    assert at_the_stop.evaluated == set(range(1, at_the_stop.step))


def test_a_stop_saves_resumably_whatever_the_configuration_saves(at_the_stop: SimpleNamespace):
    assert (at_the_stop.problem, at_the_stop.files, at_the_stop.model) == ("", [], False)


def test_a_run_that_saves_only_the_model_continues_after_a_stop_to_identical_weights(
    at_the_stop: SimpleNamespace, resumed: Run, reference: SimpleNamespace
):
    assert weights(resumed.run_dir) == weights(reference.run_dir)
    assert sorted(losses(resumed.run_dir)) == list(range(1, STEPS + 1))


def test_a_stop_closes_llama_factorys_log(at_the_stop: SimpleNamespace):
    assert at_the_stop.logged == list(range(1, at_the_stop.step + 1))


def test_a_stop_ends_the_mlflow_run(stopped: Run, at_the_stop: SimpleNamespace):
    with closing(sqlite3.connect(stopped.run_dir.parent / "mlflow.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


READ_TENSORBOARD = """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(data)
events.Reload()
result = [point.step for point in events.Scalars("train/loss")]
"""


def test_a_stop_loses_no_point_of_tensorboard(stopped: Run, at_the_stop: SimpleNamespace):
    [file] = stopped.run_dir.rglob("events.out.tfevents.*")
    assert ask_python(READ_TENSORBOARD, str(file.parent)) == list(
        range(1, at_the_stop.step + 1)
    )


# --- a batch that does not fit


@real_fixture
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that finds its micro-batch of 4 too large in its second step, and saves at each step."""
    folder = tmp_path_factory.mktemp("shrunk")
    faults = [{"point": "out of memory once", "step": 2}]
    config = write_config(
        folder,
        deepspeed=None,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        save_steps=1,
        save_total_limit=2,
        max_steps=5,
    )
    return train(folder, config, ranks=1, faults=faults)


def test_a_batch_that_does_not_fit_is_tried_again_with_a_smaller_one(shrunk: Run):
    assert (shrunk.folder / "markers" / "out of memory once-2").exists()
    assert sorted(losses(shrunk.run_dir)) == [1, 2, 3, 4, 5]


def test_a_smaller_batch_keeps_the_number_of_checkpoints(shrunk: Run):
    assert committed(shrunk.run_dir) == [4, 5]
    assert sorted(path.name for path in shrunk.run_dir.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-5",
    ]
