"""Checkpoints that can be trusted: ranks under ZeRO-3 on the CPU, really killed while they save.

Several tests look at one run; the fixtures of a module's scope say which. Waiting is for events,
never for a time.
"""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers.config import write_config
from helpers.launcher import PATIENCE, Run, committed, losses, run, train, weights
from helpers.real import real_fixture
from helpers.swanlab_records import dashboard_points, read_record, records


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's runs."""
    return tmp_path_factory.mktemp("checkpoints")


# --- killed while saving


# Where the rank is killed in the save of which step (the rotation's number is the old checkpoint's).
IN_SAVES = {
    "weights": 2,
    "rotation": 3,
    "trainer state": 6,
    "manifest": 7,
    "manifest rename": 8,
}
SETTINGS = {"max_samples": 12, "save_steps": 1, "save_total_limit": 1}


@real_fixture
def undisturbed(scratch: Path) -> Run:
    """One rank under ZeRO-3 that saves at each step and keeps one checkpoint."""
    folder = scratch / "undisturbed"
    return train(folder, write_config(folder, **SETTINGS), ranks=1)


@real_fixture
def killed_in_saves(scratch: Path) -> Run:
    """The same, reporting to SwanLab, killed in five saves, each time at another point."""
    folder = scratch / "saves"
    faults = [{"point": point, "step": step} for point, step in IN_SAVES.items()]
    changes = {**SETTINGS, "max_restarts": len(faults), "report_to": "swanlab"}
    options = {"env": {"SWANLAB_MODE": "local"}, "seconds": 3 * PATIENCE}
    return run(folder, write_config(folder, **changes), ranks=1, faults=faults, **options)


@pytest.mark.parametrize("point", IN_SAVES)
def test_a_kill_in_a_save_resumes_from_the_committed_checkpoint_before_it(
    killed_in_saves: Run, point: str
):
    step = IN_SAVES[point]
    # The old one is removed after the new one's commit.
    wanted = step + 1 if point == "rotation" else step - 1
    assert (killed_in_saves.folder / "markers" / f"{point}-{step}").exists(), (
        "the fault did not strike"
    )
    resumed = re.findall(r"resuming from checkpoint-(\d+)", killed_in_saves.console)
    assert int(resumed[list(IN_SAVES).index(point)]) == wanted, killed_in_saves.console


@pytest.mark.parametrize("point", [point for point in IN_SAVES if point != "rotation"])
def test_a_checkpoint_torn_by_a_kill_is_moved_aside_and_named(killed_in_saves: Run, point: str):
    name = f"checkpoint-{IN_SAVES[point]}"
    assert (killed_in_saves.run_dir / f"incomplete-{name}").is_dir()
    message = f"{name} is incomplete (it has no manifest); moved to incomplete-{name}"
    assert message in killed_in_saves.console


def test_a_run_killed_in_its_saves_ends_with_identical_weights(
    killed_in_saves: Run, undisturbed: Run
):
    assert killed_in_saves.returncode == 0, killed_in_saves.console
    assert weights(killed_in_saves.run_dir) == weights(undisturbed.run_dir)


def test_a_run_killed_in_its_saves_has_logged_each_loss_once_and_equal(
    killed_in_saves: Run, undisturbed: Run
):
    assert losses(killed_in_saves.run_dir) == losses(undisturbed.run_dir)


def test_a_run_killed_five_times_is_one_experiment_with_each_step_once(
    killed_in_saves: Run, undisturbed: Run
):
    [folder] = records(killed_in_saves.run_dir.parent / "swanlog")
    record = read_record(folder)
    wanted = [(step, values[0]) for step, values in losses(undisturbed.run_dir).items()]
    assert (record["state"], record["points"]["train/loss"]) == ("finished", wanted)
    assert dashboard_points(folder, "train/loss") == wanted


def test_a_run_killed_in_its_saves_keeps_as_many_checkpoints_as_it_should(killed_in_saves: Run):
    names = [path.name for path in killed_in_saves.run_dir.glob("checkpoint-*")]
    assert (names, committed(killed_in_saves.run_dir)) == (["checkpoint-12"], [12])


def test_a_kill_in_a_rotation_and_one_in_a_later_save_leave_a_trusted_checkpoint(
    killed_in_saves: Run,
):
    rotation = list(IN_SAVES).index("rotation")
    resumed = re.findall(r"resuming from checkpoint-(\d+)", killed_in_saves.console)
    assert [int(step) for step in resumed[rotation : rotation + 2]] == [4, 5]


def test_a_run_that_keeps_one_checkpoint_has_it_until_the_next_is_committed(
    killed_in_saves: Run,
):
    """Each kill before a commit finds the one checkpoint of the step before."""
    resumed = re.findall(r"resuming from checkpoint-(\d+)", killed_in_saves.console)
    assert list(map(int, resumed)) == [1, 4, 5, 6, 7]


# --- torn files


def tear(path: Path, how: str) -> None:
    """Delete a file, or cut it to half or to nothing, but not what a hard link to it shows."""
    content = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(content[: len(content) // 2] if how == "halved" else b"")


@pytest.mark.parametrize("how", ["deleted", "halved", "emptied"])
def test_any_torn_file_of_the_newest_checkpoint_makes_the_older_one_count(
    reference: SimpleNamespace, tmp_path: Path, how: str
):
    newest = reference.run_dir / "checkpoint-12"
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    assert {
        ft.MANIFEST,
        "latest",
        "trainer_state.json",
        "rng_state_1.pth",
        "model.safetensors",
    } <= set(names)
    trusted = []
    for number, name in enumerate(names):
        run_dir = tmp_path / str(number)
        for step in (10, 12):
            shutil.copytree(
                reference.run_dir / f"checkpoint-{step}",
                run_dir / f"checkpoint-{step}",
                copy_function=os.link,
            )
        assert ft.Run(run_dir).newest_checkpoint().name == "checkpoint-12"
        tear(run_dir / "checkpoint-12" / name, how)
        if ft.Run(run_dir).newest_checkpoint() != run_dir / "checkpoint-10":
            trusted.append(name)
        lines = ft.quarantine_incomplete_checkpoints(ft.Run(run_dir))
        assert len(lines) == 1 and lines[0].startswith("checkpoint-12 is incomplete ("), name
        assert sorted(path.name for path in run_dir.iterdir()) == [
            "checkpoint-10",
            "incomplete-checkpoint-12",
        ], name
    assert trusted == []


def test_a_file_system_without_locks_and_folder_syncs_holds_runs_and_checkpoints_too(
    reference: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(code: int):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", lambda *args: refuse(errno.ENOSYS))
    monkeypatch.setattr("os.fsync", lambda *args: refuse(errno.EINVAL))
    shutil.copytree(reference.run_dir / "checkpoint-12", tmp_path / "checkpoint-12")
    ft.Run(tmp_path).lock().close()
    ft.commit_checkpoint(tmp_path / "checkpoint-12", 2)
    assert ft.checkpoint_problem(tmp_path / "checkpoint-12") == ""


def test_moving_aside_never_overwrites_what_was_moved_aside_before(
    reference: SimpleNamespace, tmp_path: Path
):
    for _ in range(2):
        shutil.copytree(reference.run_dir / "checkpoint-12", tmp_path / "checkpoint-12")
        (tmp_path / "checkpoint-12" / ft.MANIFEST).unlink()
        ft.quarantine_incomplete_checkpoints(ft.Run(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["incomplete-checkpoint-12", "incomplete-checkpoint-12.1"]


# --- a full disk


def mount(*arguments: object) -> bool:
    """Whether mount could be called and succeeded."""
    with contextlib.suppress(OSError):
        return (
            subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0
        )
    return False


@real_fixture
def full_disk(scratch: Path) -> Iterator[SimpleNamespace]:
    """A run on a disk that is full during its third save, and its resume after room was made."""
    folder, out = scratch / "full disk", scratch / "full disk" / "out"
    out.mkdir(parents=True)
    if not mount("-t", "tmpfs", "-o", "size=40m", "tmpfs", out):
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    try:
        config = write_config(folder, max_samples=12, save_total_limit=4)
        full = run(folder, config, "--force", ranks=1)
        kept = [
            path.name
            for path in full.run_dir.glob("checkpoint-*")
            if not ft.checkpoint_problem(path)
        ]
        described = [
            (full.run_dir / name).read_bytes() for name in ("config.yaml", "plan.json")
        ]
        resume = ("--resume", full.run_dir)
        still_full = run(folder, *resume, "--force", "logging_steps=1", ranks=1)
        after = [(full.run_dir / name).read_bytes() for name in ("config.yaml", "plan.json")]
        mount("-o", "remount,size=400m", out)
        yield SimpleNamespace(
            full=full,
            kept=kept,
            still_full=still_full,
            unharmed=described == after,
            resumed=run(folder, *resume, ranks=1),
        )
    finally:
        subprocess.run(["umount", str(out)])


def test_a_full_disk_ends_the_run_and_names_the_cause(full_disk: SimpleNamespace):
    assert full_disk.full.returncode == 1, full_disk.full.console
    assert "the disk is full" in full_disk.full.console, full_disk.full.console


def test_a_full_disk_does_not_upset_the_launcher_itself(full_disk: SimpleNamespace):
    assert ", in main" not in full_disk.full.console, full_disk.full.console
    assert f"--resume {full_disk.full.run_dir}" in full_disk.full.console.replace("'", "")


def test_a_resume_on_a_disk_that_is_still_full_fails_in_one_line_and_harms_nothing(
    full_disk: SimpleNamespace,
):
    console = full_disk.still_full.console
    assert full_disk.still_full.returncode in (1, 2) and "Traceback" not in console, console
    assert full_disk.unharmed


def test_a_full_disk_leaves_the_earlier_checkpoints_intact(full_disk: SimpleNamespace):
    assert sorted(full_disk.kept) == ["checkpoint-2", "checkpoint-4"]


def test_resuming_after_room_was_made_ends_with_identical_weights(
    full_disk: SimpleNamespace, undisturbed: Run
):
    assert full_disk.resumed.returncode == 0, full_disk.resumed.console
    assert weights(full_disk.resumed.run_dir) == weights(undisturbed.run_dir)


# --- build locks


def test_a_build_lock_that_a_living_process_holds_open_is_left(tmp_path: Path):
    (tmp_path / "operator").mkdir()
    script = (
        "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "operator" / "lock"
    command = [sys.executable, "-c", script, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout.readline() == b"held\n"
        ft.clear_stale_locks(tmp_path)
        held = lock.exists()
        builder.stdin.close()
    ft.clear_stale_locks(tmp_path)
    assert (held, lock.exists()) == (True, False)
