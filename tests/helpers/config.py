"""Configurations and models for the tests: one function writes them all."""

import json
import re
from pathlib import Path

import yaml

from helpers import ROOT

CONFIGS = ROOT / "configs"
ZERO3_FILE = str(CONFIGS / "deepspeed" / "ds_z3_config.json")
# What every DeepSpeed configuration needs beside its zero_optimization.
AUTO_BATCH = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    "auto",
)
TINY_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 768,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
COMMON = {
    "train_from_scratch": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "template": "qwen3",
    "use_cpu": True,
    "num_train_epochs": 1.0,
    "report_to": "none",
}
# What real runs start from: 24 samples on two ranks are 12 steps. No process but the ranks.
BASE = {
    **COMMON,
    "model_name_or_path": str(CONFIGS / "demo_model"),
    "dataset": "code2sql_demo",
    "dataset_dir": str(CONFIGS / "data"),
    "bf16": True,  # as on GPUs: bf16 weights with fp32 masters
    "cutoff_len": 192,
    "max_samples": 24,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3.0e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "plot_loss": False,
    "disable_gradient_checkpointing": True,
    "deepspeed": ZERO3_FILE,
}
STEPS = 12
# What dry runs start from: a model and 20 samples that lie beside the configuration.
SMALL = {
    **COMMON,
    "dataset": "tiny",
    "cutoff_len": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1.0e-3,
    "logging_steps": 5,
}


def write_json(path: Path, content: object) -> Path:
    """Write `content` as JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_config(
    folder: Path, base: dict = BASE, name: str = "config.yaml", **changes: object
) -> Path:
    """Write `base` with `changes` (None takes a key out) as folder/name; runs go to folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**base, "output_dir": str(folder / "out"), **changes}
    values = {key: value for key, value in values.items() if value is not None}
    path = folder / name
    path.write_text(
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    return path


def write_small_config(folder: Path, name: str = "config.yaml", **changes: object) -> Path:
    """SMALL with `changes`, and its model and data in folder/model and folder/data."""
    write_json(folder / "model" / "config.json", TINY_MODEL)
    rows = [
        {"instruction": f"row {n}", "input": "", "output": f"SELECT {n};"} for n in range(20)
    ]
    write_json(folder / "data" / "tiny.json", rows)
    if not (folder / "data" / "dataset_info.json").exists():
        write_json(folder / "data" / "dataset_info.json", {"tiny": {"file_name": "tiny.json"}})
    places = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data")}
    return write_config(folder, {**SMALL, **places}, name, **changes)


def demo_base() -> dict:
    """configs/demo_cpu.yaml with absolute paths, a log line per step, and nothing else written or
    evaluated.
    """
    values = yaml.safe_load((CONFIGS / "demo_cpu.yaml").read_text(encoding="utf-8"))
    return {
        **{key: value for key, value in values.items() if not re.match("eval_|score", key)},
        "model_name_or_path": str(CONFIGS / "demo_model"),
        "dataset_dir": str(CONFIGS / "data"),
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_loss": False,
    }


def make_model(folder: Path, **sizes: int) -> Path:
    """A model folder for train_from_scratch: the demo's tokenizer and config.json with `sizes`."""
    folder.mkdir(parents=True)
    for path in (CONFIGS / "demo_model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = sizes.get("num_hidden_layers", config["num_hidden_layers"])
    config |= {**sizes, "layer_types": ["full_attention"] * layers, "max_window_layers": layers}
    write_json(folder / "config.json", config)
    return folder
