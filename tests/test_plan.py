"""The plan: samples, steps, memory and disk, against hand-made tables and against the libraries
themselves.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow.parquet
import pytest

import train_qwen3_ft as ft
from helpers import ROOT
from helpers.config import AUTO_BATCH, TINY_MODEL, write_json
from helpers.launcher import ask_python, fake_gpus, says
from helpers.plan import bare_plan, plan_phases
from helpers.real import real_fixture

GIB = 1 << 30
QWEN3_14B = 14_768_307_200  # what transformers counts for Qwen/Qwen3-14B's config.json
LARGEST_LAYER = 151_936 * 5_120
OFFLOAD = "configs/deepspeed/ds_z3_offload_config.json"
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO3 = {**AUTO_BATCH, "zero_optimization": {"stage": 3, **GATHERED}}


# --- Steps
# -----------------------------------------------------------------------------------------------


def steps(
    samples: int, micro: int, accumulation: int, ranks: int, epochs: float = 1, **more: object
) -> tuple:
    """(steps per epoch, steps in all)."""
    values = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
        **more,
    }
    plan = ft.plan_steps([samples], values, ranks)
    return plan.per_epoch, plan.total


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        pytest.param((1000, 2, 8, 4, 3), (16, 48), id="default-1000/64=15.6"),
        pytest.param((1024, 2, 8, 4, 3), (16, 48), id="no-rest-1024/64=16"),
        pytest.param((1025, 2, 8, 4, 3), (17, 51), id="one-sample-more"),
        pytest.param((10, 3, 1, 1, 1), (4, 4), id="last-batch-short"),
        pytest.param((10, 1, 4, 1, 1), (3, 3), id="last-group-short"),
        pytest.param((10, 2, 2, 2, 1), (2, 2), id="5-batches-3-a-rank-2-groups"),
        pytest.param((9, 2, 1, 4, 1), (2, 2), id="even-batches-fill-up"),
        pytest.param((3, 8, 16, 8, 1), (1, 1), id="less-than-one-step"),
        pytest.param((100, 10, 1, 1, 0.5), (10, 5), id="half-an-epoch"),
        pytest.param((100, 10, 1, 1, 0.55), (10, 6), id="epochs-round-up"),
        pytest.param((100, 10, 1, 1, 2.01), (10, 21), id="a-little-over-two"),
    ],
)
def test_steps_by_hand(given, wanted):
    assert steps(*given) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        pytest.param((10, 3, 1, 1), (3, 3), id="short-batch-dropped"),
        pytest.param((17, 2, 1, 4), (2, 2), id="8-batches-2-a-rank"),
        pytest.param((15, 2, 1, 4), (1, 1), id="7-batches-1-a-rank"),
    ],
)
def test_steps_where_the_rest_is_dropped_by_hand(given, wanted):
    assert steps(*given, dataloader_drop_last=True) == wanted


def test_max_steps_wins_over_epochs():
    assert steps(1000, 2, 8, 4, 3, max_steps=7) == (16, 7)


def test_defaults_are_those_of_transformers():
    plan = ft.plan_steps([80], {}, 1)  # 8 samples a batch, no accumulation, 3 epochs
    assert (plan.per_epoch, plan.total) == (10, 30)


@pytest.mark.real
def test_steps_equal_those_of_accelerate_and_transformers():
    grid = [
        dict(samples=n, micro=m, accumulation=a, ranks=r, epochs=e, drop_last=d, max_steps=s)
        for n, m, a, r, e, d, s in product(
            (7, 64, 1000, 1001),
            (1, 3, 8),
            (1, 4),
            (1, 2, 4),
            (0.3, 1, 2.5),
            (False, True),
            (-1, 5),
        )
        if not (d and n < m * r)
    ]
    real = ask_python(
        """
from types import SimpleNamespace
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer
def one(samples, micro, accumulation, ranks, epochs, drop_last, max_steps):
    loader = DataLoader(range(samples), batch_size=micro, drop_last=drop_last)
    loader = prepare_data_loader(loader, num_processes=ranks, process_index=0, put_on_device=False)
    args = SimpleNamespace(max_steps=max_steps, gradient_accumulation_steps=accumulation,
                           num_train_epochs=epochs, per_device_train_batch_size=micro,
                           include_tokens_per_second=False)
    trainer = SimpleNamespace(get_total_train_batch_size=lambda args: micro * accumulation * ranks,
                              get_sp_size=lambda: 1, num_examples=lambda loader: samples)
    values = Trainer.set_initial_training_values(trainer, args, loader)
    return [values[1], values[6]]
result = [one(**case) for case in data]
""",
        grid,
    )
    planned = [
        list(
            steps(
                case["samples"],
                case["micro"],
                case["accumulation"],
                case["ranks"],
                case["epochs"],
                max_steps=case["max_steps"],
                dataloader_drop_last=case["drop_last"],
            )
        )
        for case in grid
    ]
    assert len(grid) > 300
    assert [
        (case, plan, true)
        for case, plan, true in zip(grid, planned, real, strict=True)
        if plan != true
    ] == []


# --- Samples
# ---------------------------------------------------------------------------------------------

ROW = {"instruction": 'a [b] {c}, "d"\n', "input": "", "output": "SELECT '1';"}


def write_rows(path: Path, count: int) -> Path:
    """A data file of `count` rows, of the kind its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROW)
            writer.writeheader()
            writer.writerows([ROW] * count)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * count), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(ROW) + "\n" for _ in range(count)))
    else:
        write_json(path, [ROW] * count)
    return path


@pytest.mark.parametrize(("limit", "rows"), [(None, 7), (3, 3), (7, 7), (8, 7)])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_rows_of_a_file(tmp_path, kind, limit, rows):
    assert ft.count_rows(write_rows(tmp_path / f"rows.{kind}", 7), limit) == rows


def test_rows_of_a_parquet_file(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", 7)
    assert [ft.count_rows(path, limit) for limit in (None, 3, 8)] == [7, 3, 7]


def test_rows_of_a_folder_are_those_of_its_files_and_limited_together(tmp_path):
    for name in ("a", "b", "c"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", 7)
    assert [ft.count_rows(tmp_path / "rows", limit) for limit in (None, 10, 100)] == [
        21,
        10,
        21,
    ]


def test_a_folder_of_parquet_files_is_counted_by_one_process(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        write_rows(tmp_path / "rows" / f"{name}.parquet", 7)
    started, run = [], subprocess.run

    def counted(*args, **options):
        started.append(args)
        return run(*args, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    assert ft.count_rows(tmp_path / "rows", None) == 21
    assert len(started) == 1


@pytest.mark.parametrize(("limit", "rows"), [(None, None), (3, 3)])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_very_large_text_file_is_not_counted_to_its_end(
    tmp_path, monkeypatch, kind, limit, rows
):
    monkeypatch.setattr(ft, "COUNTED_TEXT", 50, raising=False)
    assert ft.count_rows(write_rows(tmp_path / f"rows.{kind}", 7), limit) == rows


def test_a_data_set_that_is_named_twice_is_loaded_once(plan_of, write_config):
    assert plan_of(write_config(dataset="tiny,tiny"))["steps_per_epoch"] == 5


def test_rows_of_a_large_json_array(tmp_path):
    # more than one block of reading, so that rows are cut in two
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{**ROW, "output": "ü" * 3000}] * 1500, indent=1, ensure_ascii=False),
        encoding="utf-8",
    )
    assert ft.count_rows(path, None) == 1500


ODD_FILES = {
    "blank-lines.jsonl": '{"a": "1"}\n\n{"a": "2"}\n   \n{"a": "3"}\n\n',
    "no-last-newline.jsonl": '{"a": "1"}\n{"a": "2"}',
    "windows.jsonl": '{"a": "1"}\r\n{"a": "2"}\r\n',
    "lines-in-a.json": '{"a": "1"}\n{"a": "2"}\n',
    "array-in-a.jsonl": '[{"a": "1"}, {"a": "2"}]',
    "pretty.json": '\n\n [\n  {"a": "1"},\n\n  {"a": "]"}\n ]\n',
    "nested.json": '[{"a": [{"b": "1"}, {"b": "2"}]}, {"a": []}]',
    "quoted-newlines.csv": 'a,b\n"1\n2\n3",x\n"""4""\n",y\n',
    "blank-lines.csv": "a,b\n1,x\n\n2,y\n\n",
    "no-last-newline.csv": "a,b\n1,x\n2,y",
    "windows.csv": "a,b\r\n1,x\r\n2,y\r\n",
    "header-only-plus-one.csv": "a\n1\n",
    "text.txt": "one\ntwo\nthree\n",
    "blank-lines.txt": "one\n\ntwo\n",
    "no-last-newline.txt": "one\ntwo",
}


@pytest.mark.real
def test_rows_of_odd_files_are_those_that_datasets_reads(tmp_path):
    for name, text in ODD_FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    real = ask_python(
        """
from datasets import disable_progress_bars, load_dataset
disable_progress_bars()
kinds = {"json": "json", "jsonl": "json", "csv": "csv", "txt": "text"}
def rows(name):
    kind = kinds[name.rpartition(".")[2]]
    return len(load_dataset(kind, data_files=f"{data[0]}/{name}", split="train",
                            cache_dir=f"{data[0]}/cache"))
result = {name: rows(name) for name in data[1]}
""",
        [str(tmp_path), list(ODD_FILES)],
    )
    assert {name: ft.count_rows(tmp_path / name, None) for name in ODD_FILES} == real


def bytes_read() -> int:
    """What this process has read so far, from files and elsewhere."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads are counted in /proc")
def test_limit_keeps_a_long_file_cheap(tmp_path):
    row = '{"instruction": "select them all", "output": "SELECT 1;"}\n'
    (tmp_path / "tiny.jsonl").write_text(row * 500_000)
    before = bytes_read()
    assert ft.count_rows(tmp_path / "tiny.jsonl", 1000) == 1000
    assert bytes_read() - before < 100_000 * len(row)


@pytest.fixture
def samples_of(
    write_config: Callable, plan_of: Callable, tmp_path: Path
) -> Callable[..., int | None]:
    """The planned samples for these data sets ({name: entry of dataset_info.json}) and keys."""

    def samples(info: dict, **keys: object) -> int | None:
        write_json(tmp_path / "data" / "dataset_info.json", info)
        return plan_of(write_config(dataset=",".join(info), **keys))["samples"]

    return samples


@pytest.mark.parametrize(
    ("keys", "samples"),
    [
        pytest.param({}, 100, id="all"),
        pytest.param({"max_samples": 30}, 30, id="max-samples"),
        pytest.param({"max_samples": 300}, 100, id="max-samples-above"),
        pytest.param({"val_size": 25}, 75, id="val-size-number"),
        pytest.param({"val_size": 0.25}, 75, id="val-size-share"),
        pytest.param({"val_size": 0.015}, 98, id="val-size-share-rounds-up"),
        pytest.param({"val_size": 0.1, "max_samples": 55}, 49, id="val-size-after-max-samples"),
        pytest.param({"val_size": 0}, 100, id="val-size-0"),
    ],
)
def test_samples_of_one_data_set(samples_of, tmp_path, keys, samples):
    write_rows(tmp_path / "data" / "a.json", 100)
    assert samples_of({"a": {"file_name": "a.json"}}, **keys) == samples


def test_val_size_1_is_one_sample_or_refused(here, write_config):
    # LLaMA-Factory gives a 1 to train_test_split as a number of samples, and a 1.0 as a share,
    # which raises.
    done = here(write_config(val_size=1), "--dry-run", "--json")
    assert (
        json.loads(done.stdout)["samples"] == 19
        if done.returncode == 0
        else re.search("val_size: .*1", done.stderr)
    )


def test_max_samples_counts_for_each_data_set(samples_of, tmp_path):
    write_rows(tmp_path / "data" / "a.json", 100)
    write_rows(tmp_path / "data" / "b.jsonl", 7)
    assert (
        samples_of(
            {"a": {"file_name": "a.json"}, "b": {"file_name": "b.jsonl"}}, max_samples=30
        )
        == 37
    )


def test_max_samples_counts_for_a_parquet_file(samples_of, tmp_path):
    write_rows(tmp_path / "data" / "a.parquet", 50)
    assert samples_of({"a": {"file_name": "a.parquet"}}, max_samples=30) == 30


def test_max_samples_counts_for_a_folder(samples_of, tmp_path):
    write_rows(tmp_path / "data" / "a" / "1.json", 20)
    write_rows(tmp_path / "data" / "a" / "2.json", 20)
    assert samples_of({"a": {"file_name": "a"}}, max_samples=30) == 30


@pytest.mark.parametrize(
    ("drawn", "limit", "samples"), [(5, None, 5), (50, None, 50), (50, 30, 30), (5, 30, 5)]
)
def test_num_samples_of_dataset_info_draws_so_many(samples_of, tmp_path, drawn, limit, samples):
    write_rows(tmp_path / "data" / "a.json", 20)
    assert (
        samples_of({"a": {"file_name": "a.json", "num_samples": drawn}}, max_samples=limit)
        == samples
    )


def test_sharegpt_data_is_counted_alike(samples_of, tmp_path):
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    write_json(tmp_path / "data" / "a.json", [talk] * 9)
    assert samples_of({"a": {"file_name": "a.json", "formatting": "sharegpt"}}) == 9


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        pytest.param({"packing": True}, "packing", id="packing"),
        pytest.param({"neat_packing": True}, "packing", id="neat-packing"),
        pytest.param({"stage": "pt"}, "packing", id="pretraining-packs"),
        pytest.param({"streaming": True, "max_steps": 5}, "streamed", id="streaming"),
        pytest.param({"dataset_dir": "REMOTE:someone/data"}, "loaded", id="hub"),
        pytest.param(
            {"dataset": "tiny,tiny2", "mix_strategy": "interleave_over"},
            "interleav",
            id="interleaving",
        ),
    ],
)
def test_samples_that_cannot_be_known_are_null_with_the_reason(
    here, write_config, tmp_path, keys, reason
):
    write_json(
        tmp_path / "data" / "dataset_info.json",
        {"tiny": {"file_name": "tiny.json"}, "tiny2": {"file_name": "tiny.json"}},
    )
    config = write_config(**keys)
    plan = json.loads(here(config, "--dry-run", "--json").stdout)
    assert (plan["samples"], plan["steps_per_epoch"], plan["total_steps"]) == (
        None,
        None,
        keys.get("max_steps"),
    )
    says(
        here(config, "--dry-run").stdout,
        rf"steps +{keys.get('max_steps', 'unknown')} in all \(.*{reason}",
    )


def test_hub_data_set_of_dataset_info_is_unknown(samples_of):
    assert samples_of({"a": {"hf_hub_url": "someone/data"}}) is None


def test_packing_switched_off_makes_pretraining_countable(plan_of, write_config):
    assert plan_of(write_config(stage="pt", packing=False))["samples"] == 20


# --- Batch
# -----------------------------------------------------------------------------------------------


BATCH_AND_STEPS = ("world_size", "global_batch_size", "steps_per_epoch", "total_steps")


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_global_batch_size_makes_the_same_steps_on_any_number_of_gpus(plan_of, gpus):
    plan = plan_of(
        "global_batch_size=64",
        "gradient_accumulation_steps=null",
        "max_samples=1000",
        gpus=fake_gpus(4),
        env={"CUDA_VISIBLE_DEVICES": ",".join("0123"[:gpus])},
    )
    assert [plan[key] for key in BATCH_AND_STEPS] == [gpus, 64, 16, 48]


def test_default_config_makes_48_steps_of_64_samples(plan_of):
    plan = plan_of(gpus=fake_gpus(4))
    assert [plan[key] for key in BATCH_AND_STEPS] == [4, 64, 16, 48]


def test_batch_arithmetic_is_shown_in_full(here):
    says(here("--dry-run", gpus=fake_gpus(4)).stdout, r"batch +2 .*x 4 GPUs x 8 .*= 64 samples")


@pytest.mark.parametrize(
    ("wanted", "micro", "near"),
    [
        (7, 2, "6 and 8"),
        (1, 2, "2"),
        (65, 2, "64 and 66"),
        (10, 4, "8 and 12"),
        (9, 8, "8 and 16"),
    ],
)
def test_indivisible_batch_names_the_nearest_that_can(here, write_config, wanted, micro, near):
    done = here(
        write_config(
            global_batch_size=wanted,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=None,
        ),
        "--dry-run",
    )
    assert done.returncode == 2
    says(done.stderr.strip(), rf"global_batch_size: {wanted} .*nearest.*: {near}$")


def test_batch_that_disagrees_with_the_accumulation_is_refused(here, write_config):
    done = here(write_config(global_batch_size=64, gradient_accumulation_steps=8), "--dry-run")
    assert done.returncode == 2
    says(
        done.stderr,
        r"global_batch_size: 64 means gradient_accumulation_steps 32 .*"
        r"gradient_accumulation_steps is 8; remove one",
    )


def test_batch_that_agrees_with_the_accumulation_is_accepted(plan_of, write_config):
    plan = plan_of(write_config(global_batch_size=64, gradient_accumulation_steps=32))
    assert (plan["problems"], plan["global_batch_size"]) == ([], 64)


def test_batch_of_the_command_line_replaces_the_accumulation_of_the_file(plan_of, write_config):
    plan = plan_of(write_config(gradient_accumulation_steps=8), "global_batch_size=32")
    assert (plan["problems"], plan["global_batch_size"]) == ([], 32)


def test_accumulation_of_the_command_line_replaces_the_batch_of_the_file(plan_of, write_config):
    config = write_config(global_batch_size=64, gradient_accumulation_steps=None)
    plan = plan_of(config, "gradient_accumulation_steps=3")
    assert (plan["problems"], plan["global_batch_size"]) == ([], 6)


def test_batch_and_accumulation_that_disagree_on_the_command_line_are_refused(
    here, write_config
):
    done = here(
        write_config(), "global_batch_size=32", "gradient_accumulation_steps=2", "--dry-run"
    )
    assert done.returncode == 2
    says(
        done.stderr, r"command line: global_batch_size: 32 means gradient_accumulation_steps 16"
    )


# --- Parameters
# ------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-untied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    # the shapes of the Qwen3 releases that the launcher knows by name
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-14B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.real
def test_parameters_are_those_that_transformers_makes(here, write_config, tmp_path):
    shapes = {name: {**SMALL, **shape} for name, shape in SHAPES.items()}
    real = ask_python(
        """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
result = {}
for name, shape in data.items():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    model.tie_weights()
    result[name] = sum(p.numel() for p in model.parameters())  # a tied matrix is one parameter
""",
        shapes,
    )
    planned = {}
    for name, shape in shapes.items():
        write_config()
        write_json(tmp_path / "model" / "config.json", shape)
        words = [f"model_name_or_path={name}"] if "/" in name else []
        planned[name] = json.loads(
            here(tmp_path / "config.yaml", *words, "--dry-run", "--json").stdout
        )["parameters"]
    assert planned == real
    assert real["Qwen/Qwen3-14B"] == QWEN3_14B


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model_type": "other"}, id="other"),
        pytest.param({"model_type": "qwen3_moe", "num_experts": 6}, id="experts"),
        pytest.param({"attention_bias": True}, id="biases"),
    ],
)
def test_parameters_of_another_architecture_are_unknown(here, write_config, tmp_path, changes):
    config = write_config()
    write_json(tmp_path / "model" / "config.json", {**TINY_MODEL, **changes})
    plan = json.loads(here(config, "--dry-run", "--json").stdout)
    assert [
        plan[key] for key in ("parameters", "memory_per_gpu", "host_memory", "checkpoint_bytes")
    ] == [None] * 4


def test_parameters_of_another_architecture_come_from_its_weights(here, write_config, tmp_path):
    config = write_config(train_from_scratch=None)
    write_json(tmp_path / "model" / "config.json", {**TINY_MODEL, "model_type": "other"})
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [10, 20], "data_offsets": [0, 800]},
            "b": {"dtype": "F32", "shape": [7], "data_offsets": [800, 828]},
        }
    ).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(828)
    )
    assert json.loads(here(config, "--dry-run", "--json").stdout)["parameters"] == 207


# --- Memory
# ----------------------------------------------------------------------------------------------


@real_fixture
def deepspeed_estimates() -> dict[str, list[int]]:
    """[host, each GPU] bytes for Qwen3-14B on four GPUs by DeepSpeed's own estimate."""
    return ask_python(
        """
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate
cases = {"none": (False, False), "optimizer": (True, False), "all": (True, True)}
result = {name: estimate(*data, num_gpus_per_node=4, cpu_offload=first,
                         cpu_offload_params=second)[:2]
          for name, (first, second) in cases.items()}
""",
        [QWEN3_14B, LARGEST_LAYER],
    )


OFFLOADS = {
    "none": ZERO3,
    "optimizer": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    "all": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    },
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_model_states_of_qwen3_14b_agree_with_deepspeed(plan_of, deepspeed_estimates, offload):
    plan = plan_of(f"deepspeed={json.dumps(OFFLOADS[offload])}", gpus=fake_gpus(4))
    states = sum(
        plan["memory_per_gpu"][part] for part in ("parameters", "gradients", "optimizer")
    )
    host, gpu = deepspeed_estimates[offload]
    if offload == "none":  # it counts all gradients in 32 bit too, of which a step holds some
        gpu -= 2 * QWEN3_14B // 4
    assert plan["parameters"] == QWEN3_14B
    assert states == pytest.approx(gpu, rel=0.1)
    if (
        offload != "none"
    ):  # without offload DeepSpeed names what loading takes on the host, not model states
        assert plan["host_memory"] == pytest.approx(host, rel=0.1)


def test_shipped_offload_file_puts_the_states_in_host_memory(plan_of, deepspeed_estimates):
    plan = plan_of(f"deepspeed={OFFLOAD}", gpus=fake_gpus(4))
    assert plan["host_memory"] == pytest.approx(deepspeed_estimates["all"][0], rel=0.1)
    assert plan["memory_per_gpu"]["optimizer"] == plan["memory_per_gpu"]["gradients"] == 0


def test_without_offload_nothing_is_said_of_offloading(here):
    assert "for offloading" not in here("--dry-run", gpus=fake_gpus(4)).stdout


def test_plan_says_that_the_gathered_weights_do_not_fit_in_host_memory(here, monkeypatch):
    monkeypatch.setattr("train_qwen3_ft.host_bytes", lambda: 60 * GIB)
    words = ["model_name_or_path=Qwen/Qwen3-32B", "--dry-run"]
    text = here(*words, gpus=fake_gpus(8, 80)).stdout
    says(text, r"^host +saving gathers 61.0 GiB on rank 0")


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        pytest.param(1, (2, 2, 3), id="zero1-divides-the-optimizer"),
        pytest.param(2, (2, 0.5, 3), id="zero2-the-gradients-too"),
        pytest.param(3, (0.5, 0.5, 3), id="zero3-the-parameters-too"),
    ],
)
def test_zero_stage_divides_by_the_ranks(plan_of, stage, parts):
    plan = plan_of(f"deepspeed={{zero_optimization: {{stage: {stage}}}}}", gpus=fake_gpus(4))
    extra = 4 * LARGEST_LAYER if stage == 3 else 0  # the layer that is gathered at the time
    found = [plan["memory_per_gpu"][part] for part in ("parameters", "gradients", "optimizer")]
    found[0] -= extra
    assert found == pytest.approx([QWEN3_14B * bytes_each for bytes_each in parts], rel=0.01)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("cutoff_len=4096", "activations"),
        ("cutoff_len=4096", "logits"),
        ("per_device_train_batch_size=4", "activations"),
        ("per_device_train_batch_size=4", "logits"),
        ("disable_gradient_checkpointing=true", "activations"),
    ],
)
def test_more_tokens_take_more_memory(plan_of, change, part):
    before, after = (
        plan_of(*words, gpus=fake_gpus(4))["memory_per_gpu"][part] for words in ([], [change])
    )
    assert after >= 2 * before > 0


def not_fitting(plan: dict) -> list[str]:
    """The problems with memory."""
    return [text for text in plan["problems"] if re.search("memory", text)]


def test_default_config_fits_four_gpus_of_80_gib(plan_of):
    assert not_fitting(plan_of(gpus=fake_gpus(4, 80))) == []


def remedies(problems: list[str]) -> tuple[list[str], int | None]:
    """The key=value words and the number of devices that the memory message recommends."""
    text = next(text for text in problems if re.match(r"(GPU |host )?memory", text))
    advice = text.partition("fits with")[2]
    devices = re.search(r"(\d+) (devices|GPUs)", advice)
    return re.findall(r"\b\w+=[\w./-]+", advice), int(devices[1]) if devices else None


def test_default_config_on_four_gpus_of_24_gib_names_what_fits_and_that_is_accepted(
    plan_on_node,
):
    plan_of = plan_on_node(512)
    words, devices = remedies(plan_of(gpus=fake_gpus(4, 24))["problems"])
    assert words or devices
    ids = [f"cuda_visible_devices={list(range(devices))}"] if devices else []
    plan = plan_of(*words, *ids, gpus=fake_gpus(devices or 4, 24))
    assert not_fitting(plan) == []


# 216 M parameters: 3.6 GiB of states under ZeRO on one GPU, 1.7 GiB with offload, and 5.4 GiB of
# host memory for that
MEDIUM = {
    **TINY_MODEL,
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def medium(write_config: Callable, tmp_path: Path) -> Callable[..., Path]:
    """A configuration for the model above on GPUs with ZeRO-3."""

    def write(**changes: object) -> Path:
        config = write_config(
            **{
                "use_cpu": None,
                "bf16": True,
                "deepspeed": ZERO3,
                "cutoff_len": 512,
                "per_device_train_batch_size": 1,
                **changes,
            }
        )
        write_json(tmp_path / "model" / "config.json", MEDIUM)
        return config

    return write


@pytest.fixture
def plan_on_node(here: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """plan_on_node(64)(*args, gpus=...): the plan as JSON on a node of 64 GiB, with disk enough."""

    def on_node(host: int) -> Callable[..., dict]:
        monkeypatch.setattr("train_qwen3_ft.host_bytes", lambda: host * GIB)
        monkeypatch.setattr("train_qwen3_ft.free_bytes", lambda folder: 100 << 40)
        return lambda *args, **options: json.loads(
            here(*args, "--dry-run", "--json", **options).stdout
        )

    return on_node


def test_what_does_not_fit_is_refused_with_what_is_needed_and_what_is_there(here, medium):
    done = here(medium(), "--dry-run", gpus=fake_gpus(1, 3))
    assert done.returncode == 2
    says(done.stderr, r"memory: \d\.\d GiB is needed .*3\.0 GiB is there")


def test_force_starts_what_does_not_fit(here, medium):
    assert here(medium(), "--dry-run", "--force", gpus=fake_gpus(1, 3)).returncode == 0


def test_offload_is_named_where_it_makes_the_run_fit_and_is_accepted(plan_on_node, medium):
    plan_of = plan_on_node(16)
    config = medium()
    words, _ = remedies(plan_of(config, gpus=fake_gpus(1, 3))["problems"])
    assert f"deepspeed={OFFLOAD}" in words
    assert not_fitting(plan_of(config, *words, gpus=fake_gpus(1, 3))) == []


def test_smaller_micro_batch_is_named_where_it_makes_the_run_fit_and_is_the_same_step(
    plan_on_node, medium
):
    plan_of = plan_on_node(16)
    config = medium(per_device_train_batch_size=64, gradient_accumulation_steps=2)
    words, _ = remedies(plan_of(config, gpus=fake_gpus(1, 10))["problems"])
    assert any(word.startswith("per_device_train_batch_size=") for word in words)
    plan = plan_of(config, *words, gpus=fake_gpus(1, 10))
    assert (plan["problems"], plan["global_batch_size"]) == ([], 128)


def test_more_gpus_are_named_where_only_they_make_the_run_fit(plan_on_node):
    plan_of = plan_on_node(500)  # 600 GiB of states: no room to offload them
    words, devices = remedies(
        plan_of("model_name_or_path=Qwen/Qwen3-32B", gpus=fake_gpus(4, 80))["problems"]
    )
    assert devices and devices > 4
    plan = plan_of(
        "model_name_or_path=Qwen/Qwen3-32B",
        *words,
        f"cuda_visible_devices={list(range(devices))}",
        gpus=fake_gpus(devices, 80),
    )
    assert not_fitting(plan) == []


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6])
def test_a_suggested_number_of_gpus_is_one_that_nodes_have(plan_on_node, gpus):
    plan_of = plan_on_node(64)
    model = "model_name_or_path=Qwen/Qwen3-32B"
    ids = f"cuda_visible_devices={list(range(gpus))}"
    _, devices = remedies(plan_of(model, ids, gpus=fake_gpus(gpus, 80))["problems"])
    assert devices in (2, 4, 8, 16, 32, 64)


def test_offload_that_the_host_cannot_hold_is_refused(here, monkeypatch):
    monkeypatch.setattr("train_qwen3_ft.host_bytes", lambda: 800 * GIB)
    done = here(
        "model_name_or_path=Qwen/Qwen3-32B",
        f"deepspeed={OFFLOAD}",
        "--dry-run",
        gpus=fake_gpus(4, 80),
    )
    says(done.stderr, r"host memory: .*8\d\d\.\d GiB.*this node has 800\.0 GiB")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        pytest.param({"finetuning_type": "lora"}, "finetuning_type: lora", id="lora"),
        pytest.param({"flash_attn": "disabled"}, "flash_attn: disabled", id="eager-attention"),
        pytest.param({"optim": "adafactor"}, "optim: adafactor", id="optimizer"),
        pytest.param({"use_dft_loss": True}, "use_dft_loss", id="another-loss"),
    ],
)
def test_memory_that_is_unknown_is_not_guessed_and_the_plan_names_the_key(
    here, plan_of, write_config, changes, key
):
    config = write_config(**changes)
    plan = plan_of(config)
    assert plan["memory_per_gpu"] is None
    assert (plan["checkpoint_bytes"] is None) == (
        key.split()[0] in ("finetuning_type:", "optim:")
    )
    text = here(config, "--dry-run").stdout
    says(text, rf"^memory +not estimated with {key}$")


TRACKED = {**TINY_MODEL, "vocab_size": 4000, "num_hidden_layers": 6, "head_dim": 16}


@pytest.mark.real
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
def test_phases_are_within_10_percent_of_torchs_memory_tracker(checkpointing):
    shapes = [
        {**TRACKED, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 16},
        {**TRACKED, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4},
    ]
    real = ask_python(
        f"""
sys.path[:0] = [{str(ROOT / "tests")!r}]
from helpers.memory_tracker import track
result = [track(shape, 2, 256, data[1], 2) for shape in data[0]]
""",
        [shapes, checkpointing],
    )
    for shape, tracked in zip(shapes, real, strict=True):
        assert plan_phases(shape, 2, 256, checkpointing, 2) == pytest.approx(tracked, rel=0.1)


@pytest.fixture
def peak_of(plan_of: Callable) -> Callable[..., dict]:
    """The parts of the default configuration's largest phase on four GPUs, with these words."""
    return lambda *words: plan_of(*words, gpus=fake_gpus(4, 80))["memory_per_gpu"]


EVALUATES = ("val_size=0.1", "eval_strategy=epoch")


def test_an_evaluation_after_training_counts_with_its_default_batch_of_8(peak_of):
    parts = peak_of("val_size=0.1", "do_eval=true")
    assert parts["logits"] == 8 * 2048 * 151_936 * 10


def test_an_evaluation_with_larger_batches_than_training_is_the_peak(peak_of, here):
    assert peak_of(*EVALUATES, "per_device_eval_batch_size=1") == peak_of()
    evaluation = peak_of(*EVALUATES, "per_device_eval_batch_size=4")
    assert evaluation["logits"] == 4 * 2048 * 151_936 * 10
    done = here(*EVALUATES, "per_device_eval_batch_size=16", "--dry-run", gpus=fake_gpus(4, 80))
    says(done.stderr, r"it fits with per_device_eval_batch_size=\d")


def test_where_training_does_not_fit_either_the_advice_is_for_both(here, monkeypatch):
    monkeypatch.setattr("train_qwen3_ft.host_bytes", lambda: 1 << 40)
    words = ("per_device_train_batch_size=8", "per_device_eval_batch_size=64")
    done = here(*EVALUATES, *words, "--dry-run", gpus=fake_gpus(4, 60))
    says(done.stderr, r"it fits with deepspeed=\S+offload\S+ per_device_eval_batch_size=1 ")


def test_an_evaluation_that_takes_more_than_training_gets_the_largest_batch_that_fits():
    values = {
        "cutoff_len": 4096,
        "enable_liger_kernel": True,
        "eval_strategy": "epoch",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
    }
    shape = ft.qwen3_config("Qwen/Qwen3-0.6B")
    plan = ft.estimate(bare_plan(shape, ft.Zero(3, used=True), 1, 24 << 30, **values))
    assert "it fits with per_device_eval_batch_size=2 (" in ft.nearest_that_fits(plan)


@pytest.mark.parametrize(
    ("stage", "sequences", "bytes_each", "reference"),
    [
        pytest.param(["stage=dpo", "pref_loss=sigmoid"], 2, 16, 2, id="dpo"),
        pytest.param(["stage=dpo", "pref_loss=orpo"], 2, 12, 0, id="orpo-has-no-reference"),
        pytest.param(["stage=kto"], 1, 20, 2, id="kto"),
        pytest.param(["stage=rm"], 2, 6, 0, id="rm"),
    ],
)
def test_preference_stages_take_pairs_and_a_reference_model(
    peak_of, stage, sequences, bytes_each, reference
):
    parts = peak_of(*stage)
    assert parts["logits"] == sequences * 2 * 2048 * 151_936 * bytes_each
    assert parts.get("reference", 0) == reference * QWEN3_14B // 4


def test_liger_makes_no_logits(peak_of):
    assert "logits" not in {
        k for k, size in peak_of("enable_liger_kernel=true").items() if size
    }


@pytest.mark.parametrize(
    ("words", "bytes_each"),
    [
        pytest.param(["optim=adamw_8bit"], 4 + 2, id="8-bit"),
        pytest.param(["optim=paged_adamw_8bit"], 4 + 2, id="paged-8-bit"),
        pytest.param(["optim=paged_adamw_32bit"], 4 + 8, id="paged"),
    ],
)
def test_optimizers_have_their_own_bytes_per_parameter(peak_of, words, bytes_each):
    assert peak_of(*words)["optimizer"] == bytes_each * QWEN3_14B // 4


def test_pure_bf16_without_deepspeed_keeps_no_32_bit_states(peak_of):
    parts = peak_of("deepspeed=null", "bf16=null", "pure_bf16=true")
    states = [parts[name] for name in ("parameters", "gradients", "optimizer")]
    assert states == [2 * QWEN3_14B, 2 * QWEN3_14B, 4 * QWEN3_14B]


def test_a_fit_over_95_percent_is_a_warning_and_no_problem(here, medium, plan_of):
    needed = sum(plan_of(medium(), gpus=fake_gpus(1, 80))["memory_per_gpu"].values()) / GIB
    for room, warned in ((needed / 0.97, True), (needed / 0.93, False)):
        done = here(medium(), "--dry-run", gpus=fake_gpus(1, room))
        assert ("over 95 %" in done.stdout, done.returncode) == (warned, 0)


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [
        pytest.param("0::/job/step\n", "job/memory.max", id="v2-of-the-cgroup-above"),
        pytest.param("0::/job/step\n", "job/step/memory.max", id="v2"),
        pytest.param(
            "3:cpu:/\n9:memory:/slurm/job\n0::/\n",
            "memory/slurm/job/memory.limit_in_bytes",
            id="v1",
        ),
        pytest.param("0::/of/the/host\n", "memory.max", id="container"),
    ],
)
def test_memory_of_the_host_is_what_the_cgroups_of_the_process_allow(
    monkeypatch, tmp_path, cgroup, file
):
    (tmp_path / "self").write_text(cgroup)
    limit = tmp_path / "cgroup" / file
    limit.parent.mkdir(parents=True)
    limit.write_text("1048576\n")
    if limit.parent.name == "step":
        (limit.parent.parent / "memory.max").write_text("max\n")
    monkeypatch.setattr(ft, "PROCESS_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(ft, "CGROUPS", tmp_path / "cgroup")
    assert ft.host_bytes() == 1 << 20


def test_plan_shows_memory_by_part_against_what_the_gpu_has(here):
    line = says(here("--dry-run", gpus=fake_gpus(4, 80)).stdout, r"^memory .*")[0]
    assert "of 80.0 GiB" in line
    assert all(
        part in line
        for part in ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    )


# --- A larger micro-batch under ZeRO-3
# -------------------------------------------------------------------


def suggested(plan_text: str) -> list[str]:
    """The key=value words of the first suggestion; [] where there is none."""
    line = re.search(r"^faster +(.*?) is the same step", plan_text, re.MULTILINE)
    return line[1].split() if line else []


def test_zero3_with_room_suggests_a_larger_micro_batch_that_is_the_same_step(here, plan_of):
    eight = "cuda_visible_devices=[0,1,2,3,4,5,6,7]"
    words = suggested(here(eight, "--dry-run", gpus=fake_gpus(8, 80)).stdout)
    before, after = (plan_of(eight, *more, gpus=fake_gpus(8, 80)) for more in ([], words))
    assert [word.partition("=")[0] for word in words] == [
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ]
    assert (after["global_batch_size"], after["total_steps"]) == (
        before["global_batch_size"],
        before["total_steps"],
    )
    assert int(words[1].partition("=")[2]) <= 4, "half of the default's 8 micro-batches at most"
    assert not_fitting(after) == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["deepspeed={zero_optimization: {stage: 2}}"], id="zero2-gathers-nothing"),
        pytest.param(["gradient_accumulation_steps=1"], id="nothing-to-exchange"),
    ],
)
def test_no_suggestion_where_there_is_nothing_to_gain(here, changes):
    done = here(
        "cuda_visible_devices=[0,1,2,3,4,5,6,7]", *changes, "--dry-run", gpus=fake_gpus(8, 200)
    )
    assert suggested(done.stdout) == []


def test_no_suggestion_that_would_not_fit_but_what_frees_memory(here, plan_of):
    words = suggested(here("--dry-run", gpus=fake_gpus(4, 76)).stdout)
    assert "enable_liger_kernel=true" in words
    assert not_fitting(plan_of(*words, gpus=fake_gpus(4, 76))) == []
    assert suggested(here(*words, "--dry-run", gpus=fake_gpus(4, 76)).stdout) == []


# --- Disk
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "checkpoint", "disk"),
    [
        # bytes a parameter: 2 for the weights, 12 for the optimizer; then checkpoints at once (one
        # more than is kept, while the new one is written) and the final model
        pytest.param([], 14, 3 * 14 + 2, id="default-keeps-2"),
        pytest.param(["save_only_model=true"], 2, 3 * 2 + 2, id="weights-only"),
        pytest.param(
            ["save_total_limit=null"], 14, 3 * 14 + 2, id="all-three-of-48-steps-by-16"
        ),
        pytest.param(
            ["save_total_limit=null", "save_steps=10"],
            14,
            5 * 14 + 2,
            id="the-last-step-is-saved-too",
        ),
        pytest.param(["save_total_limit=5"], 14, 3 * 14 + 2, id="fewer-saves-than-the-limit"),
        pytest.param(["save_strategy=no"], 14, 2, id="no-checkpoints"),
        pytest.param(
            ["save_strategy=epoch", "save_total_limit=null"], 14, 3 * 14 + 2, id="one-an-epoch"
        ),
        pytest.param(
            ["save_steps=0.5", "save_total_limit=null"],
            14,
            2 * 14 + 2,
            id="every-half-of-all-steps",
        ),
        pytest.param(
            ["deepspeed={zero_optimization: {stage: 2}}"],
            16,
            3 * 16 + 2,
            id="zero2-holds-the-weights-twice",
        ),
    ],
)
def test_bytes_on_disk(plan_of, words, checkpoint, disk):
    plan = plan_of(*words, gpus=fake_gpus(4))
    assert plan["checkpoint_bytes"] == pytest.approx(QWEN3_14B * checkpoint, rel=0.01)
    assert plan["disk_bytes"] == pytest.approx(QWEN3_14B * disk, rel=0.01)


def test_disk_that_is_too_small_is_refused_unless_forced(here, write_config, tmp_path):
    config = write_config(save_steps=1)
    write_json(
        tmp_path / "model" / "config.json",
        {**MEDIUM, "hidden_size": 32768, "num_hidden_layers": 300},
    )
    done = here(config, "--dry-run")
    says(
        done.stderr,
        r"output_dir: disk: .* is needed, .* is free; lower save_total_limit.*--force",
    )
    assert here(config, "--dry-run", "--force").returncode == 0


# --- The plan as data and as text
# ------------------------------------------------------------------------

CONTRACT = {
    "devices",
    "world_size",
    "global_batch_size",
    "steps_per_epoch",
    "total_steps",
    "memory_per_gpu",
    "host_memory",
    "checkpoint_bytes",
    "problems",
    "command",
    "environment",
}


@pytest.mark.parametrize(
    "options", [{"gpus": fake_gpus(4)}, {"gpus": None}], ids=["gpus", "no-driver"]
)
def test_json_has_the_keys_of_the_contract(plan_of, options):
    assert set(plan_of(**options)) >= CONTRACT


def test_json_is_all_of_stdout(launcher, write_config):
    done = launcher(write_config(), "--dry-run", "--json")
    assert set(json.loads(done.stdout)) >= CONTRACT
    assert done.stderr == ""


def test_plan_is_one_aligned_screen(launcher, write_config):
    lines = launcher(write_config(), "--dry-run").stdout.splitlines()
    assert len(lines) <= 24
    labels = {line.partition(" ")[0] for line in lines}
    assert labels >= {"model", "devices", "batch", "steps", "schedule", "memory", "disk"}
    assert all(
        re.match(r"\w+ {2,}\S", line) and line[12] != " " and line[11] == " " for line in lines
    )


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        pytest.param({}, r"log every 5 steps, save every 500 steps, no evaluation", id="steps"),
        pytest.param(
            {"save_strategy": "epoch", "val_size": 4, "eval_strategy": "epoch"},
            r"save every epoch, evaluate every epoch",
            id="epoch",
        ),
        pytest.param({"save_strategy": "no"}, r"no checkpoints?", id="no"),
        pytest.param(
            {"val_size": 4, "eval_strategy": "steps", "eval_steps": 3},
            r"evaluate every 3 steps",
            id="evaluation",
        ),
        pytest.param(
            {"save_steps": 0.5},
            r"save every (3 steps|0\.5 of all steps)",
            id="share-of-all-steps",
        ),
    ],
)
def test_plan_says_when_it_logs_saves_and_evaluates(here, write_config, keys, text):
    says(says(here(write_config(**keys), "--dry-run").stdout, r"^schedule .*")[0], text)


def test_dry_run_of_the_default_config_leaves_nothing_behind(launcher, tmp_path, root):
    before = sorted(tmp_path.rglob("*")), sorted(root.rglob("configs/**/*"))
    launcher("--dry-run", gpus=fake_gpus(4))
    launcher("--dry-run", "--json", gpus=fake_gpus(4))
    assert (sorted(tmp_path.rglob("*")), sorted(root.rglob("configs/**/*"))) == before


def test_dry_run_shows_a_command_that_can_be_pasted(here, write_config):
    line = says(here(write_config(), "--dry-run").stdout, r"^command +(.*)")[1]
    says(
        line,
        r"FORCE_TORCHRUN=1 .*torch\.distributed\.run.* --nproc-per-node 1 .*\.py \S+/config\.yaml$",
    )


def peak_kib(code: str, *args: str, env: dict, cwd: Path) -> int:
    """The largest memory of a Python that runs `code`."""
    code += "\nprint(next(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    return int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_dry_run_of_the_default_config_is_small(clean_env, tmp_path):
    """Beside a Python that has imported nothing; torch alone takes fifty times as much."""
    env = {**clean_env, "FAKE_GPUS": json.dumps(fake_gpus(4))}
    dry_run = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import train_qwen3_ft as t\n"
        "t.main(['--dry-run'])"
    )
    peak = peak_kib(dry_run, str(ROOT), env=env, cwd=tmp_path)
    assert peak < 5 * peak_kib("", env=env, cwd=tmp_path)


def test_the_measured_peak_of_a_rehearsal_counts_in_the_suggested_split(tmp_path):
    keys = {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1}
    plan = bare_plan(
        ft.qwen3_config("Qwen/Qwen3-0.6B"),
        ft.Zero(3, used=True),
        2,
        24 << 30,
        output_dir=str(tmp_path),
        **keys,
    )
    plan = ft.estimate(plan)
    assert ft.suggest_split(plan).startswith("per_device_train_batch_size=4 ")
    measured = {
        "configuration": ft.decisive_values(plan),
        "peak_memory": plan.needed + (6 << 30),
    }
    write_json(tmp_path / "rehearsal.json", measured)
    assert ft.suggest_split(plan).startswith("per_device_train_batch_size=2 ")


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
