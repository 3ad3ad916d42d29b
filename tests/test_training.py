"""Real training: the real script, torchrun, LLaMA-Factory, DeepSpeed and SwanLab on the CPU."""

import csv
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

import train_qwen3_ft as ft
from helpers import ROOT, SCRIPT
from helpers.config import ZERO3_FILE, make_model, write_config, write_json
from helpers.launcher import Run, ask_python, losses, run, says, train
from helpers.real import real_fixture
from helpers.swanlab_records import read_dashboard, read_record, records

MINUTES = 60


@real_fixture
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The README's first command: the whole demo."""
    folder = tmp_path_factory.mktemp("demo")
    return train(
        folder,
        ROOT / "configs" / "demo_cpu.yaml",
        f"output_dir={folder}/out",
        ranks=None,
        seconds=15 * MINUTES,
        env={"SHOW_ALL_PACKAGES": "1"},
    )


@real_fixture
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo cut to 12 steps on two ranks under ZeRO-3, reporting to SwanLab."""
    folder = tmp_path_factory.mktemp("sharded")
    return train(
        folder,
        ROOT / "configs" / "demo_cpu.yaml",
        f"output_dir={folder}/out",
        f"deepspeed={ZERO3_FILE}",
        "max_steps=12",
        "save_steps=5",
    )


# --- the demo


def test_the_demo_learns(demo: Run) -> None:
    logged = [values[0] for values in losses(demo.run_dir).values()]
    assert logged[0] > 5
    assert logged[-1] < 1.0


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "plan.json",
        "summary.json",
        "metrics.jsonl",
        "trainer_log.jsonl",
        "training_loss.png",
        "model.safetensors",
        "tokenizer.json",
        "logs/rank0.log",
    ],
)
def test_the_demo_leaves(demo: Run, name: str) -> None:
    assert (demo.run_dir / name).stat().st_size > 0


def test_the_demo_is_recorded_in_swanlab_at_every_fifth_step(demo: Run) -> None:
    [folder] = records(demo.run_dir.parent / "swanlog")
    steps = [step for step, _ in read_record(folder)["points"]["train/loss"]]
    planned = json.loads((demo.run_dir / "plan.json").read_text())["total_steps"]
    assert steps == list(range(5, planned + 1, 5))


def test_the_demo_takes_the_planned_steps(demo: Run) -> None:
    assert (
        read_summary(demo)["steps"]
        == json.loads((demo.run_dir / "plan.json").read_text())["total_steps"]
    )


def test_the_demo_shows_how_much_its_model_answers(demo: Run) -> None:
    """The README states the number."""
    scores = read_summary(demo)["scores"]
    assert scores["exact"]["first"] == [0, 0.0, 100]
    assert scores["execution"]["last"][1] >= scores["exact"]["last"][1] >= 85
    says(
        demo.console,
        r"^step \d+/\d+  evaluation loss 0\.\d+  exact \d+ of 100 \(\+-\d+\)  execution",
    )
    says(demo.console, r"^wrong 1 +\S")


def test_scores_and_wrong_answers_are_in_swanlab(demo: Run) -> None:
    [folder] = records(demo.run_dir.parent / "swanlog")
    shares = dict(read_record(folder)["points"]["eval/exact"])
    assert shares[max(shares)] >= 0.85
    texts = [path.read_text() for path in folder.glob("media/text/*.txt")]
    assert texts and all("wanted: " in text for text in texts)


def test_the_summary_names_what_the_user_needs(demo: Run) -> None:
    summary = demo.console[demo.console.rindex("\nstate ") :]
    for wanted in (
        f"finished at step {read_summary(demo)['steps']}",
        "tokens/s",
        "peak",
        "checkpoint-",
        "training_loss.png",
        "swanlab watch ",
        "llamafactory-cli chat ",
    ):
        assert wanted in summary


@pytest.mark.parametrize(
    ("values", "command"),
    [
        (
            {
                "stage": "sft",
                "finetuning_type": "full",
                "template": "qwen3",
                "enable_thinking": False,
            },
            "llamafactory-cli chat --model_name_or_path '/a run' --template qwen3 "
            "--enable_thinking false",
        ),
        (
            {
                "stage": "dpo",
                "finetuning_type": "lora",
                "template": "qwen3",
                "model_name_or_path": "Qwen/Qwen3-8B",
            },
            "llamafactory-cli chat --model_name_or_path Qwen/Qwen3-8B "
            "--adapter_name_or_path '/a run' --template qwen3",
        ),
        ({"stage": "rm", "finetuning_type": "full"}, None),
    ],
    ids=["full", "lora", "reward model"],
)
def test_the_chat_command_fits_what_was_trained(values: dict, command: str) -> None:
    assert ft.model_commands(Path("/a run"), ft.Values(values)).get("chat") == command


def test_a_demo_that_is_piped_to_a_file_keeps_the_console_short(demo: Run) -> None:
    lines = demo.console.splitlines()
    assert len(lines) <= 75
    assert "\r" not in demo.console


def read_summary(done: Run) -> dict:
    return json.loads((done.run_dir / "summary.json").read_text(encoding="utf-8"))


# --- two ranks under ZeRO-3


def test_two_ranks_train_under_zero_3(sharded: Run) -> None:
    assert "ZeRO-3" in sharded.console
    assert len(list(sharded.run_dir.glob("checkpoint-12/global_step12/*optim_states.pt"))) == 2


def test_the_console_of_two_ranks_says_each_thing_once(sharded: Run) -> None:
    lines = [line for line in sharded.console.splitlines() if line]
    assert len(lines) <= 60
    assert len(lines) == len(set(lines))
    assert "\r" not in sharded.console
    assert "Warning" not in sharded.console


def test_the_plan_names_the_log_to_follow(sharded: Run) -> None:
    log = sharded.run_dir / "logs" / "rank0.log"
    says(sharded.console, rf"^follow +tail -F {log}$")
    assert "***** Running training *****" in log.read_text(encoding="utf-8")


def test_every_rank_has_its_own_log(sharded: Run) -> None:
    for rank in (0, 1):
        assert (
            f"Process rank: {rank}, world size: 2"
            in (sharded.run_dir / "logs" / f"rank{rank}.log").read_text()
        )


def test_swanlab_holds_the_values_of_the_trainers_own_log(sharded: Run) -> None:
    [folder] = records(sharded.run_dir.parent / "swanlog")
    record = read_record(folder)
    assert dict(record["points"]["train/loss"]) == {
        step: values[0] for step, values in losses(sharded.run_dir).items()
    }
    assert set(record["points"]) >= {
        f"train/{name}"
        for name in (
            "loss",
            "learning_rate",
            "grad_norm",
            "epoch",
            "train_tokens_per_second",
        )
    }


def test_swanlab_in_local_mode_shows_a_finished_run_under_the_run_directorys_name(
    sharded: Run,
) -> None:
    [folder] = records(sharded.run_dir.parent / "swanlog")
    assert read_record(folder)["state"] == "finished"
    assert read_dashboard(folder) == {"name": sharded.run_dir.name, "status": "finished"}


def test_swanlab_shows_the_resolved_configuration_and_the_plan(sharded: Run) -> None:
    [folder] = records(sharded.run_dir.parent / "swanlog")
    config = read_record(folder)["config"]
    assert config["max_steps"] == 12
    assert config["plan"]["world_size"] == 2
    assert config["versions"]["llamafactory"]


# --- where and how it is started


@real_fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo, cut to two steps, in a copy of the project, started from another directory with a
    closed standard output.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    home = folder / "mein Ordner ü 模型"
    home.mkdir()
    shutil.copy(SCRIPT, home)
    shutil.copytree(ROOT / "configs", home / "configs")
    (folder / "torch").mkdir()
    for name in ("random.py", "torch/__init__.py"):  # they shadow what torchrun imports
        (folder / name).write_text("raise SystemExit('taken for another')")
    closed = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, str(home / SCRIPT.name)]
    changes = ("max_steps=2", "report_to=none")
    return run(folder, "configs/demo_cpu.yaml", *changes, ranks=1, command=closed)


def test_it_works_from_another_directory_in_a_path_with_spaces_and_umlauts(
    elsewhere: Run,
) -> None:
    assert elsewhere.returncode == 0
    assert list(elsewhere.folder.glob("saves/demo_cpu/*/model.safetensors"))


def test_a_closed_standard_output_does_not_end_the_run(elsewhere: Run) -> None:
    assert (elsewhere.returncode, elsewhere.console) == (0, "")


@pytest.mark.real
def test_a_torchrun_of_the_users_is_refused_in_one_line_that_says_what_to_type(
    tmp_path: Path,
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run(tmp_path, "configs/demo_cpu.yaml", ranks=None, command=[*torchrun, str(SCRIPT)])
    said = [line for line in done.console.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(said) == 1, done.console
    assert f"NPROC_PER_NODE=2 python {SCRIPT.name}" in said[0]
    assert not (tmp_path / "saves").exists()


# What a user of torchrun may type.
FOREIGN = {
    "a run": [],
    "a resume": ["--resume", "some/run"],
    "a dry run": ["--dry-run"],
    "a mistake": ["learning_rat=1e-3"],
}


@real_fixture
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Both ranks of somebody else's torchrun for each of FOREIGN, all at once: the second waits."""
    env = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started: dict[str, list[Run]] = {}
    with ExitStack() as stack:
        for kind, arguments in FOREIGN.items():
            folder = tmp_path_factory.mktemp("foreign")
            ranks = [{**env, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
            runs = [Run(folder, *arguments, ranks=None, env=rank) for rank in ranks]
            started[kind] = [stack.enter_context(rank) for rank in runs]
        for rank in itertools.chain(*started.values()):
            rank.wait()
    return started


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_rank_of_a_torchrun_of_the_users_ends_with_exit_code_2(
    foreign: dict[str, list[Run]], kind: str
) -> None:
    first, second = foreign[kind]
    assert (first.returncode, second.returncode) == (2, 2)
    assert len(first.console.splitlines()) == 1, first.console
    assert second.console == ""


@pytest.mark.real
def test_tensorboard_wandb_offline_and_mlflow_pass_through_at_once(tmp_path: Path) -> None:
    backends = ["tensorboard", "wandb", "mlflow"]
    for package in backends:
        pytest.importorskip(package, reason=f"{package} is in tests/requirements.txt")
    config = write_config(
        tmp_path, max_steps=2, report_to=backends, deepspeed=None, project="mine"
    )
    env = {"WANDB_MODE": "offline", "SHOW_ALL_PACKAGES": "1"}
    done = train(tmp_path, config, ranks=1, env=env)
    assert list(done.run_dir.glob("tensorboard/events*"))
    [record] = done.run_dir.glob("wandb/offline-run-*/*.wandb")
    assert record.read_bytes().count(b"train/loss") >= 2, (
        "what is not written out when wandb is not ended"
    )
    with sqlite3.connect(done.run_dir.parent / "mlflow.db") as database:
        runs = database.execute(
            "select e.name, r.name, r.status, m.step, m.value from runs r join experiments e "
            "on e.experiment_id = r.experiment_id join metrics m on m.run_uuid = r.run_uuid "
            "where m.key = 'loss' order by m.step"
        ).fetchall()
    logged = [
        ("mine", done.run_dir.name, "FINISHED", step, values[0])
        for step, values in losses(done.run_dir).items()
    ]
    assert runs == logged


SECRETS = {
    "swanlab_api_key": "yaml-secret-1",
    "hf_hub_token": "yaml-secret-2",
    "ms_hub_token": "yaml-secret-3",
}


@real_fixture
def batched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process and two steps of 4 samples, by global_batch_size; with a secret in every place
    that takes one.
    """
    folder = tmp_path_factory.mktemp("batched")
    batch = {"global_batch_size": 4, "gradient_accumulation_steps": None}
    tracking = {"report_to": "swanlab", "swanlab_mode": "local"}
    config = write_config(folder, max_steps=2, deepspeed=None, **batch, **tracking, **SECRETS)
    more = ("hub_token=override-secret-4", "om_hub_token=override-secret-5")
    env = {"SWANLAB_API_KEY": "environment-secret-6", "WANDB_API_KEY": "environment-secret-7"}
    return train(folder, config, *more, ranks=1, env=env)


def test_config_yaml_launches_the_same_run_again(batched: Run, tmp_path: Path) -> None:
    again = train(tmp_path, batched.run_dir / "config.yaml", ranks=1)
    assert again.run_dir != batched.run_dir
    assert again.run_dir.parent == batched.run_dir.parent
    assert losses(again.run_dir) == losses(batched.run_dir)


def test_a_runs_config_with_a_global_batch_size_fits_another_number_of_processes(
    batched: Run, tmp_path: Path
) -> None:
    log = (batched.run_dir / "logs" / "rank0.log").read_text(encoding="utf-8")
    assert "Gradient Accumulation steps = 4" in log
    again = train(tmp_path, batched.run_dir / "config.yaml", "--dry-run")
    assert "1 per device x 2 processes x 2 accumulation = 4 samples per step" in again.console


@real_fixture
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps of two ranks on a million streamed rows."""
    folder = tmp_path_factory.mktemp("streamed")
    with open(folder / "many.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            f'{{"instruction": "get(id={n})", "output": "SELECT {n}"}}\n'
            for n in range(1_000_000)
        )
    columns = {"prompt": "instruction", "response": "output"}
    entry = {"many": {"file_name": "many.jsonl", "columns": columns}}
    write_json(folder / "dataset_info.json", entry)
    config = write_config(
        folder,
        dataset="many",
        dataset_dir=str(folder),
        streaming=True,
        max_steps=3,
        max_samples=None,
        cache_dir=str(folder / "cache"),
        deepspeed=None,
        save_strategy="no",
    )
    return train(folder, config)


def test_streamed_data_trains_for_max_steps(streamed: Run) -> None:
    assert "3 in all (the data is streamed)" in streamed.console
    assert read_summary(streamed)["steps"] == 3


def test_a_million_streamed_rows_take_hardly_more_memory_than_a_few_loaded_ones(
    streamed: Run, batched: Run
) -> None:
    peaks = [read_summary(done)["peak_memory"] for done in (streamed, batched)]
    assert peaks[0] - peaks[1] < 256 << 20


# --- the plan comes true


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets in every format that the plan counts."""
    from pyarrow import Table, parquet

    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "instruction": f"question {n}",
            "input": "with, a comma\nand a line",
            "output": f"SELECT {n};",
        }
        for n in range(23)
    ]
    write_json(folder / "a.json", rows)
    (folder / "b.jsonl").write_text(
        "\n\n".join(json.dumps(row) for row in rows[:17]) + "\n\n", encoding="utf-8"
    )
    with open(folder / "c.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:11])
    parquet.write_table(Table.from_pylist(rows[:13]), folder / "d.parquet")
    write_json(
        folder / "e.json",
        [
            {
                "conversations": [
                    {"from": "human", "value": f"question {n}"},
                    {"from": "gpt", "value": f"SELECT {n};"},
                ]
            }
            for n in range(9)
        ],
    )
    write_json(
        folder / "dataset_info.json",
        {
            **{
                file[0]: {"file_name": file}
                for file in ("a.json", "b.jsonl", "c.csv", "d.parquet")
            },
            "e": {"file_name": "e.json", "formatting": "sharegpt"},
            "drawn": {"file_name": "a.json", "num_samples": 31},
        },
    )
    return folder


COMBINATIONS = [
    (1, {"dataset": "a"}),
    (2, {"dataset": "a"}),
    (1, {"dataset": "b", "gradient_accumulation_steps": 3}),
    (2, {"dataset": "b", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
    (1, {"dataset": "c", "num_train_epochs": 2.5}),
    (2, {"dataset": "d", "num_train_epochs": 0.3}),
    (1, {"dataset": "e", "per_device_train_batch_size": 4}),
    (2, {"dataset": "e", "max_steps": 3}),
    (1, {"dataset": "a,b,c", "max_samples": 7}),
    (2, {"dataset": "a,d,e", "max_samples": 10, "gradient_accumulation_steps": 4}),
    (1, {"dataset": "a", "val_size": 5}),
    (2, {"dataset": "a,b", "val_size": 0.15}),
    (1, {"dataset": "drawn", "dataloader_drop_last": True}),
    (2, {"dataset": "a", "dataloader_drop_last": True, "num_train_epochs": 2}),
]


PLANNED = {
    "per_device_train_batch_size": 2,
    "max_samples": None,
    "num_train_epochs": 1,
    "deepspeed": None,
    "save_strategy": "no",
}
# LLaMA-Factory's own data set for each configuration, and what transformers makes of its length.
TRAINER_STEPS = """
import json
from types import SimpleNamespace
from accelerate.data_loader import prepare_data_loader
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from torch.utils.data import DataLoader
from transformers import Trainer
def one(ranks, values):
    model_args, data_args, training_args, _, _ = get_train_args(values)
    tokenizer = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
    datasets = get_dataset(template, model_args, data_args, training_args, "sft", **tokenizer)
    rows = datasets["train_dataset"]
    micro = training_args.per_device_train_batch_size
    accumulation = training_args.gradient_accumulation_steps
    loader = DataLoader(rows, batch_size=micro, drop_last=training_args.dataloader_drop_last)
    loader = prepare_data_loader(loader, num_processes=ranks, process_index=0, put_on_device=False)
    trainer = SimpleNamespace(get_total_train_batch_size=lambda args: micro * accumulation * ranks,
                              get_sp_size=lambda: 1, num_examples=lambda loader: len(rows))
    return Trainer.set_initial_training_values(trainer, training_args, loader)[6]
result = [one(*case) for case in data]
"""


def planned_config(folder: Path, data: Path, changes: dict) -> Path:
    """The configuration of a combination."""
    return write_config(folder, dataset_dir=str(data), **{**PLANNED, **changes})


@real_fixture
def trainer_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The trainer's total for each combination, all of them worked out in one process."""
    folder = tmp_path_factory.mktemp("combinations")
    cases = [
        (
            ranks,
            yaml.safe_load(planned_config(folder, data, changes).read_text(encoding="utf-8")),
        )
        for ranks, changes in COMBINATIONS
    ]
    return ask_python(TRAINER_STEPS, cases)


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_the_planned_steps_are_the_trainers_total(
    number: int, data: Path, trainer_steps: list[int], here: Callable, tmp_path: Path
) -> None:
    ranks, changes = COMBINATIONS[number]
    config = planned_config(tmp_path, data, changes)
    done = here(config, "--dry-run", "--json", env={"NPROC_PER_NODE": str(ranks)})
    assert json.loads(done.stdout)["total_steps"] == trainer_steps[number]


@pytest.mark.parametrize("number", [3, 12])  # and test_the_demo_takes_the_planned_steps
@pytest.mark.real
def test_the_planned_steps_are_those_of_a_real_run(
    number: int, data: Path, tmp_path: Path
) -> None:
    ranks, changes = COMBINATIONS[number]
    done = train(tmp_path, planned_config(tmp_path, data, changes), ranks=ranks)
    planned = json.loads((done.run_dir / "plan.json").read_text())["total_steps"]
    assert planned == read_summary(done)["steps"]
    log = (done.run_dir / "logs" / "rank0.log").read_text(encoding="utf-8")
    assert planned == int(says(log, r"Total optimization steps = ([\d,]+)")[1].replace(",", ""))


# --- no secret anywhere


def test_no_secret_reaches_a_file_or_the_console(batched: Run) -> None:
    command = [
        "grep",
        "-rlaE",
        "(yaml|override|environment)-secret-[0-9]",
        str(batched.folder),
    ]
    planted = subprocess.run(command, capture_output=True, text=True).stdout.split()
    assert planted == [str(batched.folder / "config.yaml")]


def test_the_relaunchable_config_says_which_secrets_it_left_out(batched: Run) -> None:
    text = (batched.run_dir / "config.yaml").read_text(encoding="utf-8")
    says(text, "hf_hub_token.* left out|left out.*hf_hub_token")
    assert "hf_hub_token" not in yaml.safe_load(text)


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
