"""The run proves itself: what it does is what was asked, what it resumes is what was saved."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers import HELPERS
from helpers.config import ZERO3_FILE, write_config, write_json
from helpers.launcher import (
    Run,
    ask_python,
    committed,
    losses,
    metrics,
    run,
    train,
    weights,
)
from helpers.real import real_fixture

ZERO3 = json.loads(Path(ZERO3_FILE).read_text(encoding="utf-8"))
KINDS = {
    "ZeRO-3": {},
    "ZeRO-2": {"deepspeed": {**ZERO3, "zero_optimization": {"stage": 2}}},
    "none": {"deepspeed": None},
}
EIGHT_STEPS = {"max_samples": 16, "save_steps": 4, "save_total_limit": None}


def summary(done: Run) -> dict:
    return json.loads((done.run_dir / "summary.json").read_text(encoding="utf-8"))


def is_refused(done: Run) -> str:
    """Why a run ended with exit code 1 before it trained a step."""
    assert done.process.returncode == 1, done.console
    assert not re.search(r"^step ", done.console, re.MULTILINE), done.console
    assert "restart" not in done.console
    return summary(done)["cause"]


# --- the states that are compared

STATE = {
    "step": 8,
    "epoch": 0.5,
    "optimizer steps": [8],
    "scheduler step": 8,
    "learning rates": [1e-3, 1e-3],
    "sums": {
        "masters": [1e6, 1062.5, 4000.0, 5e8],
        "exp_avg": [1e6, 0.01, 0.02, 3000.0],
    },
}


def changed(name: str, place: int, factor: float) -> dict:
    """STATE with one of its sums multiplied."""
    sums = {key: list(value) for key, value in STATE["sums"].items()}
    sums[name][place] *= factor
    return {**STATE, "sums": sums}


@pytest.mark.parametrize(
    ("loaded", "difference"),
    [
        ({**STATE, "scheduler step": 7}, "scheduler step 8 saved, 7 loaded"),
        ({**STATE, "learning rates": [1e-3, 0.0]}, "learning rates [0.001, 0.001] saved"),
        ({**STATE, "epoch": 0.25}, "epoch 0.5 saved, 0.25 loaded"),
        (changed("masters", 1, 1.0804 / 1.0625), "sum of masters 1062.5 saved, 1080.4 loaded"),
        (changed("exp_avg", 2, 0.0), "squares of exp_avg 0.02 saved, 0 loaded"),
        (changed("exp_avg", 3, 1.1), "places of exp_avg 3000 saved, 3300 loaded"),
        ({**STATE, "sums": {"masters": STATE["sums"]["masters"]}}, "elements of exp_avg"),
        (changed("masters", 1, math.nan), "sum of masters 1062.5 saved, nan loaded"),
    ],
    ids=["schedule", "rates", "epoch", "masters", "zero", "place", "missing", "nan"],
)
def test_a_state_that_differs_is_named_with_both_numbers(loaded: dict, difference: str) -> None:
    [found] = ft.state_differences(STATE, loaded)
    assert difference in found


@pytest.mark.parametrize(
    "loaded",
    [STATE, changed("masters", 1, 1 + 1e-13), changed("exp_avg", 3, 1 - 1e-13)],
    ids=["the same", "rounding of a sum", "rounding of places"],
)
def test_a_state_that_differs_by_rounding_only_is_the_same(loaded: dict) -> None:
    assert not list(ft.state_differences(STATE, loaded))


@pytest.mark.real
def test_the_sums_are_the_same_however_the_vectors_are_cut() -> None:
    code = """
import torch
from train_qwen3_ft import Vector, measure
torch.manual_seed(0)
whole, found = [torch.randn(7), torch.randn(100_003)], []
for ranks in (1, 2, 3):
    total = torch.zeros(4, dtype=torch.float64)
    for rank in range(ranks):
        tensors, vectors = [], []
        for group, vector in enumerate(whole):
            part = -(-len(vector) // ranks)
            own = torch.full((part,), float("nan"))  # the padding
            piece = vector[rank * part : (rank + 1) * part]
            own[: len(piece)] = piece
            tensors.append(own)
            vectors.append(Vector(group, 0, part, len(vector)))
        total += torch.tensor(measure(tensors, vectors, rank), dtype=torch.float64)
    found.append(total.tolist())
result = found
"""
    one, two, three = ask_python(code, None)
    assert one[0] == 100_010
    assert two == pytest.approx(one, rel=1e-12) and three == pytest.approx(one, rel=1e-12)


@pytest.mark.real
def test_weights_that_fsdp_has_cut_are_measured() -> None:
    code = """
import os, tempfile, torch
from types import SimpleNamespace
from torch.distributed.fsdp import fully_shard
from train_qwen3_ft import local_state, weights_are_finite
store = tempfile.mkstemp()[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}x", rank=0, world_size=1)
model = fully_shard(torch.nn.Linear(8, 8), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 8)).sum().backward()
optimizer.step()
trainer = SimpleNamespace(
    model=model, optimizer=optimizer, deepspeed=None, is_fsdp_enabled=True,
    args=SimpleNamespace(world_size=1, process_index=0),
    state=SimpleNamespace(global_step=1, epoch=1.0),
    lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
)
state = local_state(trainer)
result = [sorted(state["sums"]), state["sums"]["weights"][0], weights_are_finite(state)]
with torch.no_grad():
    next(model.parameters()).fill_(float("inf"))
result.append(weights_are_finite(local_state(trainer)))
"""
    names, count, before, after = ask_python(code, None)
    assert names == ["exp_avg", "exp_avg_sq", "weights"]
    assert (count, before, after) == (72, True, False)


@pytest.mark.real
def test_an_optimizer_whose_state_cannot_be_proven_says_so_in_the_log() -> None:
    code = """
import contextlib, io, tempfile, torch
from types import SimpleNamespace
from train_qwen3_ft import local_state
store = tempfile.mkstemp()[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}x", rank=0, world_size=1)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = SimpleNamespace(
    model=model, optimizer=optimizer, deepspeed=None, args=SimpleNamespace(process_index=0),
    state=SimpleNamespace(global_step=1, epoch=1.0),
    lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
)
with contextlib.redirect_stdout(io.StringIO()) as log:
    state = local_state(trainer)
result = [sorted(state["sums"]), log.getvalue()]
"""
    names, log = ask_python(code, None)
    assert names == ["weights"] and "cannot be proven for SGD: KeyError('exp_avg')" in log


def test_a_rank_that_is_not_like_the_others_is_named_with_what_differs() -> None:
    here = {
        "step": 4,
        "checkpoint": "checkpoint-4",
        "llamafactory": "0.9.5",
        "/d.json": "12 ab",
    }
    there = {**here, "llamafactory": "0.9.4", "/d.json": "12 cd"}
    assert ft.rank_differences([here, here]) == []
    [text] = ft.rank_differences([here, here, there])
    assert "llamafactory is 0.9.4 on rank 2, 0.9.5 on rank 0" in text
    assert "/d.json is 12 cd on rank 2, 12 ab on rank 0" in text


# --- a resume loads what was saved


@real_fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 8 steps with checkpoint-4 and checkpoint-8; under ZeRO on two ranks."""
    folder, kind = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    ranks = 2 if "ZeRO" in request.param else 1
    changes = {**EIGHT_STEPS, "gradient_accumulation_steps": None, "global_batch_size": 2}
    return train(folder, write_config(folder, **changes, **kind), ranks=ranks)


def tampered(saved: Run, name: str, change: str) -> Path:
    """A copy of the run whose checkpoint-8 was changed, at the same size.

    `change` is code that gets `states`, the optimizer's states of each rank's file, and `masters`,
    lists of the fp32 weights, and changes them in place; or `scheduler`, or `files`.
    """
    copy = saved.run_dir.parent / name
    shutil.copytree(saved.run_dir, copy)
    for left in ("summary.json", "model.safetensors"):
        (copy / left).unlink(missing_ok=True)
    code = f"""
import glob, os, torch
folder = data["folder"]
files = sorted(glob.glob(folder + "/global_step8/*optim_states.pt")) or [folder + "/optimizer.pt"]
contents = [torch.load(file, weights_only=False) for file in files]
scheduler = torch.load(folder + "/scheduler.pt", weights_only=False)
states, masters = [], []
for content in contents:
    zero = content.get("optimizer_state_dict", {{}})
    own = zero.get("base_optimizer_state") or zero.get("optimizer_state_dict") or content
    states.append(own["state"])
    masters.append(zero.get("single_partition_of_fp32_groups") or zero.get("fp32_flat_groups"))
{change}
for file, content in zip(files, contents):
    torch.save(content, file)
torch.save(scheduler, folder + "/scheduler.pt")
manifest = json.load(open(folder + "/manifest.json"))
sizes = {{name: os.path.getsize(folder + "/" + name) for name in manifest["files"]}}
manifest["files"] = sizes
json.dump(manifest, open(folder + "/manifest.json", "w"))
result = None
"""
    ask_python(code, {"folder": str(copy / "checkpoint-8")})
    return copy


CHANGES = {
    "two ranks' shards swapped": (
        "files.reverse()",
        r"places of exp_avg [\d.e+-]+ saved, [\d.e+-]+ loaded",
    ),
    "one master changed": (
        "masters[-1][0].data[5] += 1e-2",
        r"sum of masters [\d.e+-]+ saved, [\d.e+-]+ loaded",
    ),
    "a moment set to zero": (
        "states[-1][0]['exp_avg_sq'].zero_()",
        r"of exp_avg_sq [\d.e+-]+ saved, [\d.e+-]+ loaded",
    ),
    "the optimizer's step": (
        "[state[0].__setitem__('step', torch.tensor(5.0)) for state in states]",
        r"optimizer steps \[8\] saved, \[5(, 8)?\] loaded",
    ),
    "the scheduler's step": (
        "scheduler['last_epoch'] -= 1",
        "scheduler step 8 saved, 7 loaded",
    ),
}


def test_a_checkpoint_that_holds_other_numbers_is_refused_before_a_step(saved: Run) -> None:
    """All changes at once: each is named. tests/tools/tamper.py tries them one by one."""
    is_cut = "ZeRO" in saved.folder.name
    names = list(CHANGES) if is_cut else list(CHANGES)[2:]
    copy = tampered(saved, "changed", "\n".join(CHANGES[name][0] for name in names))
    before = {path: path.read_bytes() for path in (copy / "checkpoint-8").rglob("*.pt")}
    ranks = 2 if is_cut else 1
    done = run(saved.folder, "--resume", copy, "max_steps=12", ranks=ranks)
    cause = is_refused(done)
    for name in names:
        assert re.search(CHANGES[name][1], cause), (name, cause)
    assert f"to go on from checkpoint-4: mv {copy}/checkpoint-8" in cause
    assert {path: path.read_bytes() for path in (copy / "checkpoint-8").rglob("*.pt")} == before


@pytest.mark.parametrize("saved", ["none"], indirect=True)
def test_with_force_other_numbers_are_only_named_and_the_run_goes_on_at_its_own_rate(
    saved: Run,
) -> None:
    """The schedule of 8 steps had ended at a rate of 0; that of 9 has one step left."""
    copy = tampered(saved, "forced", CHANGES["a moment set to zero"][0])
    forced = run(saved.folder, "--resume", copy, "max_steps=9", "--force", ranks=1)
    assert forced.process.returncode == 0, forced.console
    assert "checkpoint-8 is not loaded as it was saved" in forced.console
    rates = {
        line["step"]: line["learning_rate"]
        for line in metrics(forced.run_dir)
        if "loss" in line
    }
    assert rates[9] == pytest.approx(3e-3 * (9 - 8) / 9, rel=1e-6)


# --- what is done is what was asked


def without_rule(text: str) -> list[str]:
    """The command of a launcher without the rules whose text holds `text`."""
    return [sys.executable, str(HELPERS / "without_rules.py"), text]


@pytest.mark.real
def test_clipping_that_deepspeed_would_leave_out_ends_the_run(tmp_path: Path) -> None:
    settings = {key: value for key, value in ZERO3.items() if key != "gradient_clipping"}
    config = write_config(tmp_path, deepspeed=settings, max_grad_norm=0.01)
    cause = is_refused(run(tmp_path, config, command=without_rule('to "auto"'), ranks=1))
    assert "max_grad_norm: 0.01 was asked for, 0.0 would be used" in cause


@pytest.mark.real
def test_masters_that_stage_0_does_not_save_end_a_resume(tmp_path: Path) -> None:
    settings = {**ZERO3, "zero_optimization": {"stage": 0}}
    changes = {**EIGHT_STEPS, "lr_scheduler_type": "constant"}
    config = write_config(tmp_path, deepspeed=settings, **changes)
    command = without_rule("stage 0")
    done = train(tmp_path, config, command=command, ranks=1)
    for folder in done.run_dir.glob("checkpoint-*"):  # as it was before manifests knew
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        write_json(folder / "manifest.json", {**manifest, "problem": ""})
    resumed = run(tmp_path, "--resume", done.run_dir, "max_steps=12", command=command, ranks=1)
    assert re.search(r"of masters [\d.e+-]+ saved, [\d.e+-]+ loaded", is_refused(resumed))


STALE = {"point": "stale folder", "rank": 1, "hidden": "checkpoint-8"}


@pytest.mark.parametrize("saved", ["none"], indirect=True)
def test_a_rank_that_does_not_see_the_newest_checkpoint_resumes_from_rank_0s(
    saved: Run,
) -> None:
    copy = saved.run_dir.parent / "told"
    shutil.copytree(saved.run_dir, copy)
    train(saved.folder, "--resume", copy, "max_steps=9", faults=[STALE])
    begun = [line for line in copy.joinpath("metrics.jsonl").open() if '"begin"' in line]
    assert json.loads(begun[-1])["step"] == 8


@pytest.mark.parametrize("saved", ["none"], indirect=True)
def test_ranks_of_another_checkpoint_and_another_version_end_the_run(saved: Run) -> None:
    """Without torchrun's store, through which rank 0 tells its choice."""
    copy = saved.run_dir.parent / "untold"
    shutil.copytree(saved.run_dir, copy)
    version = {"package": "llamafactory", "version": "0.9.4"}
    faults = [STALE, {"point": "other version", "rank": 1, "name": "version", **version}]
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    cause = is_refused(
        run(saved.folder, "--resume", copy, "max_steps=9", faults=faults, env=own)
    )
    assert "checkpoint is checkpoint-4 on rank 1, checkpoint-8 on rank 0" in cause
    assert "llamafactory is 0.9.4 on rank 1, 0.9.5 on rank 0" in cause


# --- SAVE, and starts without a checkpoint


@pytest.mark.real
def test_a_save_file_gives_a_checkpoint_at_the_next_step_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path, save_strategy="no")
    with Run(
        tmp_path, config, faults=[{"point": "slow"}, {"point": "slow", "rank": 1}]
    ) as alive:
        alive.reach(3)
        (alive.run_dir / "SAVE").touch()
        found = alive.see(r"^checkpoint-(\d+) is saved, as the file SAVE asked$")
        assert alive.wait() == 0, alive.console
    assert committed(alive.run_dir) == [int(found[1])] and int(found[1]) < 12
    assert sorted(losses(alive.run_dir)) == list(range(1, 13))
    assert not (alive.run_dir / "SAVE").exists()


@pytest.mark.real
def test_a_start_without_a_committed_checkpoint_begins_at_step_0(tmp_path: Path) -> None:
    """LLaMA-Factory would resume from checkpoint-4, which has weights only."""
    config = write_config(
        tmp_path,
        **KINDS["none"],
        max_samples=16,
        save_steps=2,
        save_only_model=True,
        per_device_train_batch_size=2,
    )
    done = run(tmp_path, config, ranks=1, faults=[{"point": "out of memory once", "step": 7}])
    assert done.process.returncode == 0, done.console
    begins = [
        json.loads(line)
        for line in (done.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"begin"' in line
    ]
    assert [line["step"] for line in begins] == [0, 0]
    assert sorted(losses(done.run_dir)) == list(range(1, 9))


@pytest.mark.real
def test_out_of_memory_in_an_evaluation_halves_the_evaluation_batch(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        **KINDS["none"],
        max_samples=24,
        val_size=8,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=4,
    )
    fault = {"point": "out of memory in evaluation", "samples": 2}
    done = run(tmp_path, config, ranks=1, faults=[fault])
    assert done.process.returncode == 0, done.console
    asked = re.findall(r"starting again with (\S+), the same samples", done.console)
    assert asked == ["per_device_eval_batch_size=2"]
    assert "in an evaluation: use a smaller per_device_eval_batch_size" in done.console
    assert weights(done.run_dir)
