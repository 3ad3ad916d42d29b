"""What the plan promises of nodes, disk, folders, threads and precision holds in the run."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers.config import CONFIGS, ZERO3_FILE, make_model, write_config, write_json
from helpers.launcher import Run, fake_gpus, losses, train
from helpers.real import real_fixture

OFFLOAD_FILE = str(CONFIGS / "deepspeed" / "ds_z3_offload_config.json")

# --- several nodes that meet at a host name


def local_address(**env: str) -> str:
    """The address under which torchrun offers this node to the others."""
    variables = {"NNODES": "2", "MASTER_PORT": "29500", **env}
    command = ft.build_torchrun_command(
        ft.Devices((), "", 1), Path("/out/run/config.yaml"), variables
    )
    return command[command.index("--local-addr") + 1]


@pytest.mark.parametrize("host", ["10.0.0.7", "node-a.example", "localhost"])
def test_node_0_offers_master_addr_itself(host: str):
    """Its own /etc/hosts may know the name as a loopback address, as localhost is one."""
    assert local_address(NODE_RANK="0", MASTER_ADDR=host) == host


def test_node_1_offers_the_address_by_which_node_0_reaches_it():
    assert local_address(NODE_RANK="1", MASTER_ADDR="127.0.0.2") == "127.0.0.1"


# --- the disk of a run that is resumed

HELD = 50 << 20  # bytes of its two checkpoints


@pytest.fixture
def stopped(tmp_path: Path, write_config) -> Path:
    """The directory of a stopped run that keeps two checkpoints."""
    path = tmp_path / "out" / "stopped"
    for step in (2, 4):
        size = HELD // 2
        checkpoint = path / f"checkpoint-{step}"
        write_json(checkpoint / "trainer_state.json", {"max_steps": 15})
        with open(checkpoint / "states.pt", "wb") as file:
            file.truncate(size - (checkpoint / "trainer_state.json").stat().st_size)
        files = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
        manifest = {"world_size": 1, "resumable": True, "problem": "", "files": files}
        write_json(checkpoint / "manifest.json", manifest)
    write_config(save_total_limit=2, save_steps=2).rename(path / "config.yaml")
    return path


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has not a byte left."""
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))


def test_resuming_counts_the_runs_own_checkpoints_as_room(here, stopped: Path, full_disk):
    done = here("--resume", stopped, "--dry-run")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_new_run_on_a_full_disk_is_refused(here, write_config, full_disk):
    done = here(write_config(save_total_limit=2, save_steps=2), "--dry-run")
    assert "disk: " in done.stderr and "0 B is free" in done.stderr


# --- compiled operators, on a home that several hosts share


def host_folder(monkeypatch: pytest.MonkeyPatch, host: str) -> Path:
    """The folder of compiled operators on a host of this name."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: host)
        return ft.extensions_folder()


def test_each_host_has_its_own_folder_of_compiled_operators(plan_of, write_config):
    folder = plan_of(write_config())["environment"]["TORCH_EXTENSIONS_DIR"]
    assert socket.gethostname() in Path(folder).name


def test_each_virtual_environment_has_its_own_folder_of_compiled_operators(
    monkeypatch: pytest.MonkeyPatch,
):
    """Else two of them compile it anew in turn, and wait for each other's lock."""
    here = ft.extensions_folder()
    monkeypatch.setattr(sys, "prefix", "/another/venv")
    assert ft.extensions_folder() != here and ft.extensions_folder().parent == here.parent


def test_what_can_be_made_again_goes_to_the_cache_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in huggingface_hub/constants.py."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert ft.hub_cache(ft.Values()) == tmp_path / "cache" / "huggingface" / "hub"
    assert ft.extensions_folder().parent == tmp_path / "cache" / "torch_extensions"


def test_a_build_lock_of_another_host_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other host is building; nobody on this one holds the lock."""
    monkeypatch.setenv("HOME", str(tmp_path))
    locks = [
        host_folder(monkeypatch, host) / "cpu_adam" / "lock" for host in ("ours", "theirs")
    ]
    for lock in locks:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    ft.clear_stale_locks(host_folder(monkeypatch, "ours"))
    assert [lock.exists() for lock in locks] == [False, True]


# --- the threads of an offloaded optimizer


@pytest.fixture
def threads(here, write_config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """threads(deepspeed, gpus, **env): OMP_NUM_THREADS as the plan sets it on a node of 16 cores.

    None where the plan leaves it alone.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def plan(deepspeed: str, count: int, **env: str) -> str | None:
        config = write_config(use_cpu=None, deepspeed=deepspeed)
        done = here(config, "--dry-run", "--json", gpus=fake_gpus(count), env=env)
        return json.loads(done.stdout)["environment"].get("OMP_NUM_THREADS")

    return plan


@pytest.mark.parametrize(("gpus", "wanted"), [(2, "8"), (4, "4"), (32, "1")])
def test_an_offloaded_optimizer_on_several_gpus_shares_the_cores(
    threads, gpus: int, wanted: str
):
    assert threads(OFFLOAD_FILE, gpus) == wanted


def test_the_users_own_number_of_threads_wins(threads):
    assert threads(OFFLOAD_FILE, 2, OMP_NUM_THREADS="7") in (None, "7")


def test_without_offload_the_number_of_threads_is_left_to_torchrun(threads):
    assert threads(ZERO3_FILE, 2) is None


def test_on_one_gpu_the_number_of_threads_is_left_to_torch(threads):
    assert threads(OFFLOAD_FILE, 1) is None


# --- the precision of the default configuration


@real_fixture
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of a model of 30 million parameters in bf16 under ZeRO-3, on one CPU rank."""
    folder = tmp_path_factory.mktemp("bf16")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}
    model = make_model(folder / "model", **sizes, num_attention_heads=8, num_key_value_heads=4)
    changes = {"max_samples": 2, "save_steps": 2, "cutoff_len": 64, "save_total_limit": 1}
    config = write_config(folder, model_name_or_path=str(model), bf16=True, **changes)
    return train(folder, config, ranks=1)


def stored_tensors(path: Path) -> list[dict]:
    """What the header of a safetensors file says of each tensor."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [tensor for name, tensor in header.items() if name != "__metadata__"]


def test_a_bf16_model_is_written_in_bf16(in_bf16: Run):
    assert {
        tensor["dtype"] for tensor in stored_tensors(in_bf16.run_dir / "model.safetensors")
    } == {"BF16"}


def test_a_bf16_checkpoint_has_the_bytes_of_the_plan(in_bf16: Run):
    plan = json.loads((in_bf16.run_dir / "plan.json").read_text(encoding="utf-8"))
    checkpoint = in_bf16.run_dir / "checkpoint-2"
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    parameters = (in_bf16.run_dir / "model.safetensors").stat().st_size / 2
    assert parameters > 25e6
    assert plan["checkpoint_bytes"] == pytest.approx(14 * parameters, rel=0.01)
    assert written == pytest.approx(plan["checkpoint_bytes"], rel=0.03)


def test_a_bf16_model_learns(in_bf16: Run):
    [[first], [last]] = losses(in_bf16.run_dir).values()
    assert last < first
