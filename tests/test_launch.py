"""What a launch sets for torchrun and the ranks: addresses, folders, threads."""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers.config import CONFIGS, ZERO3_FILE
from helpers.launcher import fake_gpus

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
