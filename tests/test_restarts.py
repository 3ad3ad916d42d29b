"""Runs that crash, restart by themselves or are resumed: real ranks, really killed.

Several tests look at one run; the fixtures of a module's scope say which.
"""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import SCRIPT
from helpers.config import CONFIGS, STEPS, write_config
from helpers.launcher import (
    Run,
    ask_python,
    committed,
    logged_steps,
    losses,
    run,
    says,
    train,
    until,
    weights,
)
from helpers.swanlab_records import read_record, records

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's runs."""
    return tmp_path_factory.mktemp("crashes")


def line_of(console: str, label: str) -> str:
    """The text of a labelled line of the plan or of the summary."""
    return says(console, rf"^{label} +(.*)$")[1]


# --- a run that fails after it has been restarted


@pytest.fixture(scope="module")
def failed(scratch: Path) -> SimpleNamespace:
    """A run with one restart allowed whose rank 1 is killed twice, in step 4 and in the save of step
    6 before it writes its shard; meanwhile a second launcher tries.

    Its data is a copy, so that a test can change it. `second` is the second launcher, `before` and
    `after` the run's config.yaml around it.
    """
    folder = scratch / "failed"
    shutil.copytree(CONFIGS / "data", folder / "data")
    config = write_config(folder, max_restarts=1, dataset_dir=str(folder / "data"))
    faults = [
        {"point": "kill", "step": 4, "rank": 1},
        {"point": "one shard", "step": 6, "rank": 1},
    ]
    with Run(folder, config, faults=faults) as live:
        until(lambda: committed(live.run_dir), "the first checkpoint")
        run_dir = live.run_dir
        before = (run_dir / "config.yaml").read_bytes()
        second = run(folder, "--resume", run_dir, "learning_rate=0.5")
        after = (run_dir / "config.yaml").read_bytes()
        live.wait()
    return SimpleNamespace(
        run=live, run_dir=run_dir, folder=folder, second=second, before=before, after=after
    )


def refusal(
    failed: SimpleNamespace, *arguments: object, ranks: int = 2, run_dir: Path | None = None
) -> str:
    """The one line with which --resume is refused."""
    done = run(failed.folder, "--resume", run_dir or failed.run_dir, *arguments, ranks=ranks)
    assert done.returncode == 2, done.console
    assert len(done.console.splitlines()) == 1, done.console
    return done.console


def test_kills_after_progress_restart_as_often_as_max_restarts_says(failed: SimpleNamespace):
    assert re.findall(
        r"restart \d of \d: resuming from checkpoint-\d+", failed.run.console
    ) == ["restart 1 of 1: resuming from checkpoint-2"]
    assert failed.run.returncode == 1


def test_each_report_of_a_kill_names_the_rank_that_was_killed(failed: SimpleNamespace):
    kills = re.findall(r"^rank \d was killed by SIGKILL", failed.run.console, re.MULTILINE)
    assert kills == ["rank 1 was killed by SIGKILL"] * 2


def test_a_failed_run_says_what_is_left_and_how_to_resume(failed: SimpleNamespace):
    summary = failed.run.console[failed.run.console.rindex("\nstate ") :]
    says(summary, f"^state +failed at step 6 of {STEPS}$")
    says(summary, "^checkpoints +checkpoint-4, checkpoint-2$")
    says(
        failed.run.console,
        rf"python {re.escape(str(SCRIPT))} --resume {re.escape(str(failed.run_dir))}$",
    )
    assert (failed.run_dir / "logs" / "rank1.log").stat().st_size > 0


def test_a_second_launcher_in_a_live_run_directory_is_refused(failed: SimpleNamespace):
    assert failed.second.returncode == 2
    assert (
        f"this run is still running (launcher pid {failed.run.process.pid})"
        in failed.second.console
    )


def test_a_second_launcher_leaves_the_live_run_as_it_is(failed: SimpleNamespace):
    assert failed.before == failed.after


# --- what --resume refuses


def test_resuming_on_ranks_that_cannot_share_the_samples_of_a_step_is_refused(
    failed: SimpleNamespace,
):
    done = run(failed.folder, "--resume", failed.run_dir, ranks=3)
    assert done.returncode == 2
    assert "global_batch_size: 2 cannot be split into micro-batches" in done.console


def test_resuming_with_another_learning_rate_is_refused(failed: SimpleNamespace):
    assert (
        "learning_rate: was 0.003 when the run started and is 1e-05 now, but cannot change"
        in refusal(failed, "learning_rate=1e-5")
    )


def test_resuming_with_another_model_is_refused(failed: SimpleNamespace, tmp_path: Path):
    shutil.copytree(CONFIGS / "demo_model", tmp_path / "other")
    line = refusal(failed, f"model_name_or_path={tmp_path}/other")
    says(
        line, "model_name_or_path: was .* when the run started and is .* now, but cannot change"
    )


def test_resuming_with_changed_data_is_refused(failed: SimpleNamespace):
    path = failed.folder / "data" / "code2sql_demo.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"SELECT", b"select", 1))
    try:
        says(refusal(failed), "code2sql_demo.json.* has changed since the run started")
    finally:
        path.write_bytes(content)


def test_resuming_where_there_never_was_a_run_is_refused(
    failed: SimpleNamespace, tmp_path: Path
):
    says(refusal(failed, run_dir=tmp_path), "expected the (run )?directory")


def test_resuming_a_finished_run_says_so_and_succeeds(
    reference: SimpleNamespace, tmp_path: Path
):
    done = run(tmp_path, "--resume", reference.run_dir)
    assert done.returncode == 0
    assert done.console == (
        f"{reference.run_dir}: this run is finished, there is nothing to resume; "
        "to train its model further: "
        f"python {SCRIPT.name} model_name_or_path={reference.run_dir}\n"
    )


def test_resume_without_a_directory_takes_the_newest_unfinished_run(
    failed: SimpleNamespace, reference: SimpleNamespace, tmp_path: Path
):
    sources = {"old": failed.run_dir, "new": failed.run_dir, "finished": reference.run_dir}
    for number, (name, source) in enumerate(sources.items()):
        shutil.copytree(source, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / "config.yaml", (number, number))
    done = run(tmp_path, write_config(tmp_path), "--resume", "--dry-run")
    assert (done.returncode, line_of(done.console, "run")) == (0, f"{tmp_path}/out/new")


# --- resumed past a torn checkpoint


@pytest.fixture(scope="module")
def resumed_from_torn(failed: SimpleNamespace, scratch: Path) -> Run:
    """A copy of the failed run, resumed after one rank's optimizer shard in its newest checkpoint
    was cut in half.
    """
    run_dir = scratch / "torn" / "out" / "copy"
    shutil.copytree(failed.run_dir, run_dir)
    shard = next((run_dir / "checkpoint-4").glob("global_step4/*rank_1*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return run(scratch / "torn", "--resume", run_dir)


def test_a_resume_passes_over_a_torn_checkpoint_and_names_it(resumed_from_torn: Run):
    says(
        resumed_from_torn.console,
        r"checkpoint-4 is incomplete \(.*optim_states\.pt has \d+ bytes instead of \d+\); "
        r"moved to incomplete-checkpoint-4",
    )


def test_a_checkpoint_that_lacks_the_shard_of_a_rank_is_moved_aside_and_named(
    resumed_from_torn: Run,
):
    message = (
        "checkpoint-6 is incomplete (it has no manifest); moved to incomplete-checkpoint-6"
    )
    assert message in resumed_from_torn.console


def test_a_resume_past_a_torn_checkpoint_ends_with_identical_weights(
    resumed_from_torn: Run, reference: SimpleNamespace
):
    assert resumed_from_torn.returncode == 0, resumed_from_torn.console
    assert weights(resumed_from_torn.run_dir) == weights(reference.run_dir)
    assert losses(resumed_from_torn.run_dir) == losses(reference.run_dir)


# --- errors that are not tried again


@pytest.fixture(scope="module")
def raised(scratch: Path) -> Run:
    """A run that evaluates every second step, in which rank 1 raises in step 5, before the first
    checkpoint.
    """
    evaluation = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    config = write_config(scratch / "raised", save_steps=100, deepspeed=None, **evaluation)
    return run(scratch / "raised", config, faults=[{"point": "raise", "step": 5, "rank": 1}])


def test_an_error_before_any_checkpoint_is_not_tried_again(raised: Run):
    assert raised.returncode == 1
    assert raised.console.count("training failed") == 1 and "restart" not in raised.console, (
        raised.console
    )


def test_an_error_is_shown_with_its_own_traceback_and_without_torchruns(raised: Run):
    assert raised.console.count("RuntimeError: planted fault: the third sample is bad") == 1, (
        raised.console
    )
    assert raised.console.count("Traceback (most recent call last)") == 1
    assert not re.search(
        "ChildFailedError|torch/distributed/(run|elastic|launcher)", raised.console
    )


def test_an_error_names_the_log_of_the_rank_that_failed(raised: Run):
    log = Path(says(raised.console, r"^full log: (.*)$")[1])
    assert log == raised.run_dir / "logs" / "rank1.log"
    assert "planted fault" in log.read_text(encoding="utf-8")


def test_a_failed_run_has_its_curve_of_training_and_of_evaluation(raised: Run):
    from matplotlib.image import imread

    picture = raised.run_dir / "training_loss.png"
    assert line_of(raised.console, "curve") == str(picture)
    colours = {
        tuple(round(255 * part) for part in pixel[:3])
        for row in imread(picture)
        for pixel in row
    }
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "matplotlib's first two line colours"


# --- what a run records however it goes

ALONE = {"deepspeed": None, "max_samples": 12}  # one rank, 12 steps


@pytest.fixture(scope="module")
def rank_0_killed(scratch: Path) -> Run:
    """A run that saves the model only, so that it cannot restart, and whose only rank is killed in
    the middle, between two steps that are logged.
    """
    folder = scratch / "rank 0"
    changes = {"report_to": "swanlab", "save_only_model": True, "plot_loss": True}
    config = write_config(folder, **ALONE, **changes)
    faults = [{"point": "kill", "step": 8}]
    return run(folder, config, ranks=1, faults=faults, env={"SWANLAB_MODE": "local"})


def test_a_kill_that_leaves_nothing_to_resume_is_not_tried_again(rank_0_killed: Run):
    console = rank_0_killed.console
    assert rank_0_killed.returncode == 1
    assert "restart" not in console and "there is no checkpoint to resume from" in console


def test_a_run_that_saves_the_model_only_is_said_not_to_be_resumable(
    rank_0_killed: Run, tmp_path: Path
):
    done = run(tmp_path, "--resume", rank_0_killed.run_dir)
    assert done.returncode == 2, done.console
    says(done.console, "save_only_model")
    assert (rank_0_killed.run_dir / "checkpoint-6").is_dir(), "the saved model was moved"


def test_a_kill_of_rank_0_leaves_every_logged_step_in_the_metrics(
    rank_0_killed: Run, alone: SimpleNamespace
):
    known = losses(alone.whole.run_dir)
    assert rank_0_killed.returncode == 1, rank_0_killed.console
    assert losses(rank_0_killed.run_dir) == {step: known[step] for step in range(1, 8)}


def test_a_kill_of_rank_0_leaves_every_logged_step_in_swanlab(rank_0_killed: Run):
    [folder] = records(rank_0_killed.run_dir.parent / "swanlog")
    record = read_record(folder)
    wanted = [(step, values[0]) for step, values in losses(rank_0_killed.run_dir).items()]
    assert (record["state"], record["points"]["train/loss"]) == ("crashed", wanted)
    assert f"swanlab watch {folder.parent}" in rank_0_killed.console


def test_a_kill_of_rank_0_leaves_the_curve_of_every_logged_step(
    rank_0_killed: Run, monkeypatch: pytest.MonkeyPatch
):
    from matplotlib.axes import Axes

    import train_qwen3_ft as ft

    assert (rank_0_killed.run_dir / "training_loss.png").stat().st_size > 0
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **options: drawn.append(args))
    ft.draw_curve(ft.Run(rank_0_killed.run_dir))
    assert list(drawn[0][0]) == list(range(1, 8))


# --- one process without ZeRO


@pytest.fixture(scope="module")
def alone(scratch: Path) -> SimpleNamespace:
    """One process without DeepSpeed: undisturbed, and killed in a save and before the final model.

    In the first one's folder of compiled operators lies a build lock that nobody holds.
    """
    folder = scratch / "alone"
    lock = folder / "extensions" / "operator" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    config = write_config(folder, **ALONE, save_total_limit=None)
    whole = train(
        folder, config, ranks=1, env={"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    )
    faults = [
        {"point": "trainer state", "step": 6},
        {"point": "final save", "step": 12},
    ]
    # LLaMA-Factory takes overwrite_output_dir for an order to delete its log at each start.
    killed = run(folder, config, "overwrite_output_dir=true", ranks=1, faults=faults)
    return SimpleNamespace(whole=whole, killed=killed, lock=lock)


def test_one_process_without_zero_resumes_to_identical_weights(alone: SimpleNamespace):
    assert alone.killed.returncode == 0, alone.killed.console
    assert re.findall(r"resuming from checkpoint-(\d+)", alone.killed.console) == ["4", "12"]
    assert weights(alone.killed.run_dir) == weights(alone.whole.run_dir)


def test_a_kill_before_the_final_model_trains_no_step_more(alone: SimpleNamespace):
    assert "finished at step 12 of 12" in alone.killed.console
    assert losses(alone.killed.run_dir) == losses(alone.whole.run_dir)


def test_overwrite_output_dir_loses_no_history_at_a_restart(alone: SimpleNamespace):
    steps = set(logged_steps(alone.killed.run_dir))
    assert steps == set(losses(alone.whole.run_dir)) == set(range(1, 13))


def test_a_stale_build_lock_is_cleared_at_the_start(alone: SimpleNamespace):
    assert not alone.lock.exists()


# --- resumed in the middle


def interrupted_copy(done: Run, folder: Path, step: int) -> Path:
    """A copy of a finished run's directory, as if it had ended after its checkpoint `step`."""
    run_dir = folder / "out" / "copy"
    shutil.copytree(done.run_dir, run_dir)
    for path in (run_dir / "summary.json", run_dir / "model.safetensors"):
        path.unlink()
    for path in run_dir.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return run_dir


def test_a_resumed_run_saves_and_logs_as_it_is_told_now(alone: SimpleNamespace, tmp_path: Path):
    run_dir = interrupted_copy(alone.whole, tmp_path, 4)
    changes = ("save_steps=5", "logging_steps=5", "save_total_limit=9")
    train(tmp_path, "--resume", run_dir, *changes, ranks=1)
    assert sorted(losses(run_dir)) == [1, 2, 3, 4, 5, 10]
    assert committed(run_dir) == [2, 4, 5, 10, 12]


# --- a resumed epoch draws what it would have drawn


def test_the_order_by_length_follows_from_the_epoch_whatever_was_drawn_before():
    orders = ask_python(
        f"""
from types import SimpleNamespace
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from train_qwen3_ft import seed_length_groups
state = SimpleNamespace(epoch=0.0)
seed_length_groups(42, state)
result = []
for drawn, state.epoch in data:
    torch.manual_seed(drawn)
    result.append(list(LengthGroupedSampler(2, lengths=list(range(40)))))
""",
        [[1, 1.0], [2, 1.5], [3, 2.0]],
    )
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(40))
