"""A run that continues on another number of ranks, or with a smaller micro-batch, exactly."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers.config import ZERO3_FILE, write_config
from helpers.launcher import Run, fork, losses, run, says, train, weights
from helpers.real import real_fixture

# Two ranks x 1 x 2 = 4 samples per step, 48 samples: 12 steps. Single precision, since it is exact.
SETTINGS = {
    "bf16": None,
    "max_samples": 48,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "warmup_steps": 6,
    "save_steps": 4,
    "save_total_limit": None,
}
ZERO2 = json.loads(Path(ZERO3_FILE).read_text(encoding="utf-8"))
ZERO2["zero_optimization"] = {"stage": 2}


def difference(done: Run, reference: Run) -> float:
    """The largest relative difference of a logged loss."""
    ours, theirs = losses(done.run_dir), losses(reference.run_dir)
    assert max(ours) == max(theirs) == 12
    return max(abs(ours[step][0] / theirs[step][0] - 1) for step in ours)


@real_fixture(params=["ZeRO-3", "ZeRO-2", "none"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp(request.param)
    kinds = {"ZeRO-3": {}, "ZeRO-2": {"deepspeed": ZERO2}, "none": {"deepspeed": None}}
    return train(folder, write_config(folder, **SETTINGS, **kinds[request.param]))


@real_fixture
def on_one(whole: Run) -> Run:
    """Resumed on one rank from checkpoint-4, which two ranks have saved."""
    return train(whole.folder, "--resume", fork(whole.run_dir, "one", 4), ranks=1)


def test_two_ranks_continue_as_one_with_the_same_losses(whole: Run, on_one: Run) -> None:
    assert "1 per device x 1 process x 4 accumulation = 4 samples per step" in on_one.console
    assert "resharded   checkpoint-4: 2 ranks -> 1 rank" in on_one.console
    assert min(losses(on_one.run_dir)) == 5
    assert difference(on_one, whole) < 1e-5


@pytest.mark.parametrize("whole", ["ZeRO-3", "ZeRO-2"], indirect=True)
def test_one_rank_continues_as_two_with_the_same_losses(whole: Run, on_one: Run) -> None:
    done = train(whole.folder, "--resume", fork(on_one.run_dir, "two again", 8), ranks=2)
    assert "resharded   checkpoint-8: 1 rank -> 2 ranks" in done.console
    assert difference(done, whole) < 1e-5


@pytest.mark.parametrize("whole", ["ZeRO-3"], indirect=True)
def test_two_ranks_continue_with_another_split_of_the_step_and_the_same_losses(
    whole: Run,
) -> None:
    split = fork(whole.run_dir, "split", 8)
    done = train(whole.folder, "--resume", split, "per_device_train_batch_size=2")
    assert "2 per device x 2 processes x 1 accumulation = 4 samples per step" in done.console
    assert difference(done, whole) < 1e-5


@pytest.mark.parametrize("whole", ["none"], indirect=True)
def test_two_ranks_without_deepspeed_resume_to_identical_weights(whole: Run) -> None:
    done = train(whole.folder, "--resume", fork(whole.run_dir, "same", 8))
    assert weights(done.run_dir) == weights(whole.run_dir)


@pytest.mark.parametrize("whole", ["ZeRO-3"], indirect=True)
def test_two_ranks_continue_as_four_with_the_same_losses(whole: Run) -> None:
    done = train(whole.folder, "--resume", fork(whole.run_dir, "four", 8), ranks=4)
    assert difference(done, whole) < 1e-5


def test_a_number_of_ranks_that_cannot_keep_the_samples_of_a_step_is_refused(
    whole: Run,
) -> None:
    run_dir = fork(whole.run_dir, "three", 4)
    done = run(whole.folder, "--resume", run_dir, "--dry-run", ranks=3)
    assert done.process.returncode == 2
    says(done.console, r"global_batch_size: 4 cannot be split .*use 1 or 2 or 4 processes")


@pytest.mark.parametrize("whole", ["ZeRO-3"], indirect=True)
def test_kills_in_the_first_step_and_the_first_save_after_resharding_lose_nothing(
    whole: Run,
) -> None:
    run_dir = fork(whole.run_dir, "killed", 8)
    for fault in ({"point": "kill", "step": 1}, {"point": "manifest", "step": 12}):
        killed = run(whole.folder, "--resume", run_dir, ranks=1, faults=[fault])
        assert killed.process.returncode == 1, killed.console
    done = train(whole.folder, "--resume", run_dir, ranks=1)
    assert "resharded   checkpoint-8: 2 ranks -> 1 rank" in done.console
    assert difference(done, whole) < 1e-5


# --- out of memory

ALONE = {**SETTINGS, "deepspeed": None, "gradient_accumulation_steps": 1}


def memory_for(samples: int) -> list[dict]:
    return [{"point": "out of memory", "samples": samples}]


TWELVE = {
    **ALONE,
    "save_steps": 1,
    "global_batch_size": 12,
    "gradient_accumulation_steps": None,
}


@real_fixture
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that chooses its micro-batch, on a GPU that has memory for 5 samples at a time."""
    folder = tmp_path_factory.mktemp("shrunk")
    config = write_config(
        folder, **TWELVE, per_device_train_batch_size="auto", overwrite_cache=True
    )
    return train(folder, config, ranks=1, faults=memory_for(5))


def test_data_of_unknown_lengths_is_tokenized_first_and_only_once(shrunk: Run) -> None:
    first, _, rest = shrunk.console.partition("\nmodel ")
    assert first == "tokenizing first: the micro-batch goes by the lengths of the samples"
    assert "12 per device x 1 process x 1 accumulation = 12 samples per step (auto: " in rest
    assert "Running tokenizer" not in (shrunk.run_dir / "logs" / "rank0.log").read_text()
    own, left = (shrunk.run_dir / "data.json", shrunk.run_dir.parent / "data.json")
    figures = [json.loads(path.read_text()) for path in (own, left)]
    assert figures[0]["lengths"] == figures[1]["lengths"]


def test_a_gpu_that_is_out_of_memory_gets_the_next_smaller_micro_batch_until_it_fits(
    shrunk: Run, tmp_path: Path
) -> None:
    asked = re.findall(r"starting again with per_device_train_batch_size=(\d)", shrunk.console)
    assert asked == ["6", "4"]
    four = train(
        tmp_path, write_config(tmp_path, **TWELVE, per_device_train_batch_size=4), ranks=1
    )
    assert losses(shrunk.run_dir) == losses(four.run_dir)


def test_the_configuration_of_the_run_has_numbers(shrunk: Run) -> None:
    text = (shrunk.run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "per_device_train_batch_size: 4" in text and "global_batch_size: 12" in text


@pytest.mark.parametrize(
    ("times", "in_deepspeed", "shrinks"),
    [(2, "auto", True), (3, "auto", False), (0, 16, False)],
    ids=["a third time", "not a fourth time", "not where DeepSpeed's file has it"],
)
def test_the_micro_batch_shrinks(
    tmp_path: Path, times: int, in_deepspeed: object, shrinks: bool
) -> None:
    config = ft.load_config(write_config(tmp_path, per_device_train_batch_size=16), {})
    zero = ft.Zero(settings={"train_micro_batch_size_per_gpu": in_deepspeed})
    plan = SimpleNamespace(zero=zero)
    launch = SimpleNamespace(config=config, plan=plan, shrunk=times, leads=False)
    assert ft.Supervisor.shrink_batch(launch, evaluates=False) is shrinks


@pytest.mark.real
def test_a_micro_batch_of_one_that_does_not_fit_ends_the_run_with_advice(
    tmp_path: Path,
) -> None:
    done = run(tmp_path, write_config(tmp_path, **ALONE), ranks=1, faults=memory_for(0))
    assert done.process.returncode == 1
    assert "starting again" not in done.console
    assert "likely cause: a GPU is out of memory" in done.console
