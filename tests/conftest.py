"""What the tests share: a clean environment, a small configuration, and the launcher as a process or in this one."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_qwen3_ft.py"
FAKES = Path(__file__).resolve().parent / "fakes"
sys.path.insert(0, str(ROOT))

# Set by a scheduler, a user or another test, each of these would change what the launcher decides.
FOREIGN = re.compile(
    r"CUDA_|NVIDIA_|SWANLAB_|WANDB_|HF_|HUGGING|TRANSFORMERS_|DS_|MASTER_|TORCHELASTIC_|QWEN3_FT_|FAKE_GPUS|"
    r"PYTHON|(NPROC_PER_NODE|NNODES|NODE_RANK|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|FORCE_TORCHRUN|USE_RAY|USE_V1|USE_MCA|CC|CXX)$"
)
TINY_MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 768, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}


def fake_gpus(count: int, total: float = 80, **more: object) -> list[dict]:
    """`count` equal GPUs for the fake NVML; sizes in GiB."""
    return [{"name": "NVIDIA Test GPU", "total": total, **more} for _ in range(count)]


def write_json(path: Path, content: object) -> Path:
    """Write `content` as JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def clean_env(tmp_path: Path) -> dict[str, str]:
    """An environment without anything that steers the launcher; its home is empty, its NVML the fake one."""
    env = {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}
    (tmp_path / "home").mkdir(exist_ok=True)
    return {**env, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(FAKES)}


@pytest.fixture
def launcher(clean_env: dict[str, str], tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Run the script as a user does: launcher("config.yaml", "--dry-run", env={...}, gpus=fake_gpus(4)).

    Returns returncode, stdout, stderr. `gpus=None` is a machine without a driver.
    """
    def launch(*args: object, env: dict[str, str] | None = None, cwd: Path = tmp_path, gpus: list | None = None,
               script: Path = SCRIPT, timeout: float = 60) -> SimpleNamespace:
        full = {**clean_env, **({} if gpus is None else {"FAKE_GPUS": json.dumps(gpus)}), **(env or {})}
        command = [sys.executable, str(script), *map(str, args)]
        done = subprocess.run(command, env=full, cwd=cwd, capture_output=True, encoding="utf-8", timeout=timeout)
        return SimpleNamespace(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return launch


@pytest.fixture
def plan_of(launcher: Callable[..., SimpleNamespace]) -> Callable[..., dict]:
    """The JSON of --dry-run --json; problems in it do not matter."""
    def plan(*args: object, **options: object) -> dict:
        done = launcher(*args, "--dry-run", "--json", **options)
        assert done.stdout.startswith("{"), done.stderr
        return json.loads(done.stdout)

    return plan


@pytest.fixture
def here(clean_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
         capsys: pytest.CaptureFixture) -> Callable[..., SimpleNamespace]:
    """The same as `launcher`, but main() in this process, which saves the start of a Python."""
    for key in set(os.environ) - set(clean_env):
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", clean_env["HOME"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    def launch(*args: object, env: dict[str, str] | None = None, gpus: list | None = None) -> SimpleNamespace:
        from train_qwen3_ft import main

        with monkeypatch.context() as patch:
            for key, value in (env or {}).items():
                patch.setenv(key, value)
            if gpus is not None:
                patch.setenv("FAKE_GPUS", json.dumps(gpus))
            capsys.readouterr()
            code = main([str(arg) for arg in args])
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=shown.out, stderr=shown.err)

    yield launch
    sys.modules.pop("pynvml", None)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a small valid configuration, with `changes` laid over it (None takes a key out); returns its path.

    A tiny Qwen3 to be trained from scratch, 20 samples of data and the output folder `out`, all under tmp_path.
    """
    def write(name: str = "config.yaml", **changes: object) -> Path:
        write_json(tmp_path / "model" / "config.json", TINY_MODEL)
        write_json(tmp_path / "data" / "tiny.json", [
            {"instruction": f"row {n}", "input": "", "output": f"SELECT {n};"} for n in range(20)])
        if not (tmp_path / "data" / "dataset_info.json").exists():
            write_json(tmp_path / "data" / "dataset_info.json", {"tiny": {"file_name": "tiny.json"}})
        values = {
            "model_name_or_path": str(tmp_path / "model"), "train_from_scratch": True, "stage": "sft", "do_train": True,
            "finetuning_type": "full", "template": "qwen3", "dataset": "tiny", "dataset_dir": str(tmp_path / "data"),
            "cutoff_len": 64, "use_cpu": True, "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": 1.0e-3, "num_train_epochs": 1.0, "logging_steps": 5,
            "report_to": "none", **changes,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None},
                                       sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write
