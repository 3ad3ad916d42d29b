"""Every problem before anything starts, all at once, each with what to do; and nothing refused that
works.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import train_qwen3_ft as ft
from helpers import SCRIPT
from helpers.config import AUTO_BATCH, TINY_MODEL, write_json
from helpers.launcher import FAKES, fake_gpus, says

ZERO2 = {**AUTO_BATCH, "zero_optimization": {"stage": 2}}
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO3 = {**AUTO_BATCH, "zero_optimization": {"stage": 3, **GATHERED}}
EXAMPLES = json.loads(
    (Path(__file__).parent / "data" / "llamafactory_examples_keys.json").read_text(
        encoding="utf-8"
    )
)


@pytest.fixture
def refused(
    here: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimpleNamespace]:
    """A real launch, not a dry run, that must end with exit code 2, no process started and no file
    written.
    """

    def start(*args: object, **options: object) -> None:
        pytest.fail(f"a process was started: {args}")

    def launch(*args: object, **options: object) -> SimpleNamespace:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", start)
            done = here(*args, **options)
        assert done.returncode == 2, done.stdout
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return done

    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield launch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def accepted(here: Callable) -> Callable[..., str]:
    """A dry run that must find no problem; returns the plan."""

    def launch(*args: object, **options: object) -> str:
        done = here(*args, "--dry-run", **options)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return launch


# --- Keys and values of the YAML
# -------------------------------------------------------------------------


def bad(name: str, message: str, **changes: object):
    """A row of the table: the keys that are laid over the valid configuration, and what must be
    said.
    """
    return pytest.param(changes, message, id=name)


BAD_VALUES = [
    # unknown keys, each with its line and the nearest real key
    bad(
        "unknown-key",
        r"config\.yaml:\d+: learning_rat: unknown key.*did you mean learning_rate\?",
        learning_rat=1e-5,
    ),
    bad(
        "unknown-key-older-name",
        r"evaluation_strategy: unknown key.*did you mean eval_strategy\?",
        evaluation_strategy="steps",
    ),
    bad(
        "unknown-key-hyphens",
        r"num-train-epochs: unknown key.*did you mean num_train_epochs\?",
        **{"num-train-epochs": 3},
    ),
    bad(
        "unknown-key-capitals",
        r"Learning_Rate: unknown key.*did you mean learning_rate\?",
        Learning_Rate=1e-5,
    ),
    bad(
        "unknown-key-all-capitals",
        r"LEARNING_RATE: unknown key.*did you mean learning_rate\?",
        LEARNING_RATE=1e-5,
    ),
    bad(
        "unknown-key-own",
        r"global_batchsize: unknown key.*did you mean global_batch_size\?",
        global_batchsize=64,
    ),
    bad(
        "unknown-key-without-train",
        r"per_device_batch_size: unknown key.*did you mean per_device_train_batch_size\?",
        per_device_batch_size=2,
    ),
    bad(
        "unknown-key-like-no-other",
        r"config\.yaml:\d+: qqqq: unknown key; LLaMA-Factory",
        qqqq=1,
    ),
    bad("unknown-secret", r"wandb_api_key: unknown key", wandb_api_key="x"),
    # wrong types
    bad(
        "word-for-number",
        r"num_train_epochs: expected a number, got 'three'",
        num_train_epochs="three",
    ),
    bad(
        "fraction-for-whole-number",
        r"per_device_train_batch_size: expected a whole number or auto, got 2\.5",
        per_device_train_batch_size=2.5,
    ),
    bad(
        "word-for-whole-number",
        r"gradient_accumulation_steps: expected a whole number, got 'auto'",
        gradient_accumulation_steps="auto",
    ),
    bad(
        "number-with-unit", r"max_samples: expected a whole number, got '1k'", max_samples="1k"
    ),
    bad("one-letter-for-bool", r"packing: expected true or false, got 'n'", packing="n"),
    bad("word-for-bool", r"bf16: expected true or false, got 'maybe'", bf16="maybe"),
    bad("number-for-bool", r"do_train: expected true or false, got 2", do_train=2),
    bad("bool-for-number", r"learning_rate: expected a number, got True", learning_rate=True),
    bad(
        "list-for-number",
        r"cutoff_len: expected a whole number, got \[2048\]",
        cutoff_len=[2048],
    ),
    bad(
        "mapping-for-number",
        r"logging_steps: expected a number, got \{",
        logging_steps={"every": 5},
    ),
    bad("mapping-for-text", r"dataset: expected .*, got \{", dataset={"tiny": 1}),
    bad("list-for-text", r"template: expected text, got \['qwen3'\]", template=["qwen3"]),
    bad(
        "list-for-model",
        r"model_name_or_path: expected text, got \['a', 'b'\]",
        model_name_or_path=["a", "b"],
    ),
    bad("list-for-folder", r"output_dir: expected text, got \['out'\]", output_dir=["out"]),
    bad("bool-for-path", r"deepspeed: expected .*, got True", deepspeed=True),
    bad("text-for-list", r"label_names: expected a list, got 'labels'", label_names="labels"),
    bad(
        "infinite-epochs",
        r"num_train_epochs: expected .*, got inf",
        num_train_epochs=float("inf"),
    ),
    bad(
        "infinite-steps", r"max_steps: expected a whole number, got inf", max_steps=float("inf")
    ),
    bad(
        "beyond-all-bounds",
        r"learning_rate: expected a number, got 1000",
        learning_rate=10**400,
    ),
    bad("not-a-number", r"learning_rate: expected .*, got nan", learning_rate=float("nan")),
    bad(
        "own-key-of-wrong-type",
        r"max_restarts: expected a whole number, got 'often'",
        max_restarts="often",
    ),
    bad(
        "own-batch-of-wrong-type",
        r"global_batch_size: expected a whole number, got 'big'",
        global_batch_size="big",
    ),
    # impossible choices
    bad("stage", r"stage: expected one of .*sft.*, got 'stf'; did you mean sft\?", stage="stf"),
    bad(
        "finetuning-type",
        r"finetuning_type: expected one of .*full.*, got 'ful'.*did you mean full\?",
        finetuning_type="ful",
    ),
    bad(
        "scheduler",
        r"lr_scheduler_type: expected one of .*cosine.*'cosin'.*did you mean cosine\?",
        lr_scheduler_type="cosin",
    ),
    bad("optimizer", r"optim: expected one of .*adamw_torch.*, got 'adamw'", optim="adamw"),
    bad("flash-attn", r"flash_attn: expected one of .*fa2.*, got 'flash'", flash_attn="flash"),
    bad(
        "save-strategy",
        r"save_strategy: expected one of no, steps, epoch, best, got 'never'",
        save_strategy="never",
    ),
    bad(
        "save-strategy-true",
        r"save_strategy: expected one of no, steps, epoch, best, got True",
        save_strategy=True,
    ),
    bad(
        "eval-strategy",
        r"eval_strategy: expected one of .*, got 'step'; did you mean steps\?",
        eval_strategy="step",
    ),
    bad(
        "swanlab-mode", r"swanlab_mode: expected one of .*local.*, got 'of'", swanlab_mode="of"
    ),
    bad(
        "report-to",
        r"report_to: tensorbord is unknown.*did you mean tensorboard\?",
        report_to="tensorbord",
    ),
    bad("template", r"template: .*qwen33.*did you mean qwen3\?", template="qwen33"),
    bad(
        "rope-scaling",
        r"rope_scaling: expected one of .*yarn.*, got 'yarm'",
        rope_scaling="yarm",
    ),
    # negative or zero where that cannot be
    *(
        bad(f"{key}-{value}", rf"{key}: expected .*, got {value}", **{key: value})
        for key, value in (
            ("per_device_train_batch_size", 0),
            ("per_device_train_batch_size", -2),
            ("gradient_accumulation_steps", 0),
            ("num_train_epochs", 0),
            ("num_train_epochs", -1),
            ("learning_rate", -0.001),
            ("cutoff_len", 0),
            ("max_samples", 0),
            ("max_samples", -1),
            ("logging_steps", 0),
            ("logging_steps", 1.5),
            ("save_steps", 0),
            ("save_steps", 2.5),
            ("warmup_ratio", -0.1),
            ("warmup_ratio", 1.5),
            ("warmup_steps", -1),
            ("weight_decay", -1),
            ("val_size", -1),
            ("dataloader_num_workers", -1),
            ("max_restarts", -1),
            ("max_steps", 0),
            ("preprocessing_num_workers", 0),
            ("per_device_eval_batch_size", 0),
            ("global_batch_size", 0),
            ("global_batch_size", -64),
            ("ddp_timeout", 0),
        )
    ),
    bad(
        "eval-steps-0",
        r"eval_steps: expected more than 0, got 0",
        eval_steps=0,
        eval_strategy="steps",
        val_size=0.1,
    ),
    bad(
        "eval-steps-2.5",
        r"eval_steps: expected .*, got 2\.5",
        eval_steps=2.5,
        eval_strategy="steps",
        val_size=0.1,
    ),
    # missing
    bad("no-model", r"model_name_or_path: is missing.*Qwen/Qwen3-14B", model_name_or_path=None),
    bad("no-output-dir", r"output_dir: is missing.*folder", output_dir=None),
    bad("no-dataset", r"dataset: no data to train on.*dataset_info\.json", dataset=None),
    bad("empty-dataset", r"dataset: no data to train on.*dataset_info\.json", dataset=""),
    bad("no-training", r"do_train: .*set do_train: true", do_train=False),
    bad("do-train-not-given", r"do_train: .*set do_train: true", do_train=None),
    # contradictions
    bad("bf16-and-fp16", r"fp16: cannot be combined with bf16; keep one", bf16=True, fp16=True),
    bad(
        "bf16-and-pure-bf16",
        r"pure_bf16: cannot be combined with bf16; keep one",
        bf16=True,
        pure_bf16=True,
    ),
    bad("fp16-on-a-cpu", r"fp16: cannot be used on a CPU; use bf16", fp16=True),
    bad(
        "zero3-and-pure-bf16",
        r"pure_bf16: cannot be used with ZeRO-3; use bf16: true",
        pure_bf16=True,
        deepspeed=ZERO3,
    ),
    bad(
        "zero3-and-generation",
        r"predict_with_generate: cannot be used with ZeRO-3",
        predict_with_generate=True,
        deepspeed=ZERO3,
    ),
    bad(
        "evaluation-without-data",
        r"eval_strategy: .*set eval_dataset or val_size",
        eval_strategy="epoch",
    ),
    bad("do-eval-without-data", r"do_eval: .*set eval_dataset or val_size", do_eval=True),
    bad(
        "eval-dataset-and-val-size",
        r"val_size: cannot be combined with eval_dataset; keep one",
        val_size=0.1,
        eval_dataset="tiny",
    ),
    bad("streaming-without-steps", r"streaming: .*set max_steps", streaming=True),
    bad(
        "streaming-and-max-samples",
        r"max_samples: cannot be combined with streaming: true",
        streaming=True,
        max_steps=5,
        max_samples=10,
    ),
    bad(
        "streaming-and-share",
        r"val_size: .*streaming",
        streaming=True,
        max_steps=5,
        val_size=0.1,
    ),
    bad(
        "deepspeed-and-fsdp",
        r"fsdp: cannot be combined with deepspeed; keep one",
        deepspeed=ZERO3,
        fsdp="full_shard",
    ),
    bad("quantized-and-full", r"quantization_bit: .*finetuning_type: lora", quantization_bit=4),
    bad(
        "best-model-without-evaluation",
        r"load_best_model_at_end: needs the same save_strategy and eval_strategy",
        load_best_model_at_end=True,
    ),
    bad(
        "best-model-between-evaluations",
        r"load_best_model_at_end: .*save_steps.*eval_steps",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=4,
        val_size=0.5,
    ),
    bad(
        "two-batch-sizes",
        r"global_batch_size: 8 means gradient_accumulation_steps 4 .*"
        r"gradient_accumulation_steps is 2; remove one",
        global_batch_size=8,
    ),
    bad(
        "indivisible-batch",
        r"global_batch_size: 7 cannot be split.*nearest.*6 and 8",
        global_batch_size=7,
        gradient_accumulation_steps=None,
    ),
    bad("val-size-share-of-all", r"val_size: .*1\.0", val_size=1.0),
    bad("val-size-of-all-samples", r"val_size: .*20", val_size=20),
    bad("ppo", r"stage: ppo needs trl 0\.9\.6 or older", stage="ppo"),
    # names of things that are not there
    bad("run-name-with-slash", r"run_name: 'a/b' cannot be a folder name", run_name="a/b"),
    bad("run-name-dots", r"run_name: '\.\.' cannot be a folder name", run_name=".."),
    bad(
        "model-folder",
        r"model_name_or_path: the folder .*nowhere does not exist; expected a folder",
        model_name_or_path="./nowhere",
    ),
    bad(
        "model-absolute",
        r"model_name_or_path: the folder /no/where does not exist",
        model_name_or_path="/no/where",
    ),
    bad(
        "dataset-name",
        r"config\.yaml:\d+: dataset: tiney is not in .*dataset_info\.json; did you mean tiny\?",
        dataset="tiney",
    ),
    bad(
        "dataset-name-like-no-other",
        r"dataset: qqq is not in .*dataset_info\.json; it has tiny",
        dataset="qqq",
    ),
    bad("one-of-two-dataset-names", r"dataset: tany is not in ", dataset="tiny,tany"),
    bad(
        "eval-dataset-name",
        r"eval_dataset: tany is not in .*did you mean tiny\?",
        eval_dataset="tany",
    ),
    bad(
        "dataset-dir",
        r"dataset: .*/nowhere/dataset_info\.json: no such file.*dataset_dir is the folder",
        dataset_dir="nowhere",
    ),
    bad(
        "deepspeed-file",
        r"deepspeed: .*/nowhere\.json: no such file.*configs/deepspeed/ds_z3_config\.json",
        deepspeed="nowhere.json",
    ),
    bad(
        "deepspeed-mapping-without-stage",
        r"deepspeed: .*expected .*\"stage\": 0 to 3",
        deepspeed={"bf16": {}},
    ),
    bad(
        "deepspeed-stage-4",
        r"deepspeed: .*expected .*\"stage\": 0 to 3",
        deepspeed={"zero_optimization": {"stage": 4}},
    ),
    bad(
        "resume-from-nowhere",
        r"resume_from_checkpoint: .*nowhere",
        resume_from_checkpoint="nowhere",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_bad_value_is_refused_with(refused, write_config, changes, message):
    done = refused(write_config(**changes))
    says(done.stderr, message)


def test_all_problems_of_a_file_come_at_once(refused, write_config):
    done = refused(
        write_config(
            learning_rat=1e-5,
            num_train_epochs="three",
            stage="stf",
            dataset="tiney",
            logging_steps=0,
        )
    )
    for message in (
        r"learning_rat: unknown key",
        r"num_train_epochs: expected",
        r"stage: expected",
        r"tiney is not in",
        r"logging_steps: expected more than 0",
    ):
        says(done.stderr, message)
    assert len(done.stderr.splitlines()) == 5


def test_each_message_names_file_and_line_of_its_key(refused, write_config):
    config = write_config(learning_rat=1e-5, num_train_epochs="three")
    lines = config.read_text().splitlines()
    done = refused(config)
    for key in ("learning_rat", "num_train_epochs"):
        line = 1 + next(
            number for number, text in enumerate(lines) if text.startswith(f"{key}:")
        )
        assert f"{config}:{line}: {key}: " in done.stderr


def test_dry_run_refuses_as_a_launch_does(launcher, write_config, tmp_path):
    done = launcher(write_config(learning_rat=1e-5), "--dry-run")
    assert done.returncode == 2
    assert "did you mean learning_rate?" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key",
    ["model_name_or_path", "output_dir", "dataset", "stage", "finetuning_type", "template"],
)
def test_dry_run_of_an_unfinished_file_shows_the_plan_all_the_same(here, write_config, key):
    done = here(write_config(**{key: None}), "--dry-run")
    says(done.stdout, r"^devices ")


def test_launch_as_a_process_refuses_and_leaves_nothing(launcher, write_config, tmp_path):
    done = launcher(write_config(learning_rat=1e-5))
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "out").exists()


def test_problems_are_in_the_json_too(plan_of, write_config):
    problems = plan_of(write_config(learning_rat=1e-5, stage="stf"))["problems"]
    assert len(problems) == 2
    says(
        " ".join(problems), "did you mean (learning_rate|sft).*did you mean (learning_rate|sft)"
    )


def test_json_of_a_bad_file_is_printed_before_the_problems(launcher, write_config):
    done = launcher(write_config(learning_rat=1e-5), "--dry-run", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"]


# --- Files
# -----------------------------------------------------------------------------------------------


def change_model(write: Callable[[Path], object], **changes: object) -> Callable[[Path], dict]:
    """A step that alters the model folder; with real weights expected unless `train_from_scratch`
    is kept.
    """

    def step(tmp_path: Path) -> dict:
        write(tmp_path / "model")
        return {"train_from_scratch": None, **changes}

    return step


def change_data(
    name: str, content: str | bytes, entry: object = None, **changes: object
) -> Callable[[Path], dict]:
    """A step that writes the data file `name` and names it in dataset_info.json."""

    def step(tmp_path: Path) -> dict:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "data" / name).write_bytes(data)
        if name != "dataset_info.json":
            write_json(
                tmp_path / "data" / "dataset_info.json",
                {"tiny": {"file_name": name} if entry is None else entry},
            )
        return changes

    return step


def deepspeed_file(content: bytes) -> Callable[[Path], dict]:
    """A step that writes a DeepSpeed file."""

    def step(tmp_path: Path) -> dict:
        (tmp_path / "ds.json").write_bytes(content)
        return {"deepspeed": "ds.json"}

    return step


def make_file(name: str, **changes: object) -> Callable[[Path], dict]:
    """A step that puts a plain file where a folder is wanted."""

    def step(tmp_path: Path) -> dict:
        (tmp_path / name).write_text("")
        return {key: str(tmp_path / value) for key, value in changes.items()}

    return step


INDEX = {
    "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
}


def one_shard_of_two(model: Path) -> None:
    write_json(model / "model.safetensors.index.json", INDEX)
    (model / "model-00001-of-00002.safetensors").write_bytes(b"")


def dangling(tmp_path: Path) -> Path:
    """A link to a disk that is not mounted."""
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    return tmp_path / "gone"


def half_tokenized(tmp_path: Path) -> dict:
    """tokenized_path as a run leaves it that was killed while it wrote there."""
    write_json(tmp_path / "tokens" / "dataset_dict.json", {"splits": ["train"]})
    return {"tokenized_path": str(tmp_path / "tokens")}


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
SAFETENSORS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)
BAD_FILES = [
    pytest.param(
        change_model(lambda model: (model / "config.json").unlink()),
        r"model_name_or_path: .*config\.json: (?i:no such file).*a model folder has a config\.json",
        id="no-config-json",
    ),
    pytest.param(
        change_model(
            lambda model: (model / "config.json").write_text("{"), train_from_scratch=True
        ),
        r"model_name_or_path: .*config\.json: ",
        id="config-json-broken",
    ),
    pytest.param(
        change_model(
            lambda model: (model / "config.json").write_text("[]"), train_from_scratch=True
        ),
        r"model_name_or_path: .*config\.json: ",
        id="config-json-a-list",
    ),
    pytest.param(
        change_model(
            lambda model: write_json(model / "config.json", {"model_type": "qwen3"}),
            train_from_scratch=True,
        ),
        r"model_name_or_path: .*config\.json.*hidden_size",
        id="config-json-without-sizes",
    ),
    pytest.param(
        change_model(lambda model: None),
        r"model_name_or_path: .*model\.safetensors missing; .*train_from_scratch: true",
        id="no-weights",
    ),
    pytest.param(
        change_model(one_shard_of_two),
        r"model_name_or_path: .*: model-00002-of-00002\.safetensors missing; copy the weights",
        id="missing-shard",
    ),
    pytest.param(
        change_model(lambda model: (model / "model.safetensors.index.json").write_text("{")),
        r"model_name_or_path: .*index\.json",
        id="index-broken",
    ),
    pytest.param(
        change_model(
            lambda model: [
                write_json(model / "config.json", {**TINY_MODEL, "model_type": "other"}),
                (model / "model.safetensors").write_bytes(b"\x00" * 4),
            ]
        ),
        r"model_name_or_path: .*\.safetensors",
        id="weights-cut-off",
    ),
    pytest.param(
        change_model(
            lambda model: (model / "model.safetensors").write_text("version https://git-lfs")
        ),
        r"model\.safetensors: incomplete safetensors file; copy it again",
        id="weights-a-git-lfs-pointer",
    ),
    pytest.param(
        change_model(lambda model: (model / "model.safetensors").write_bytes(SAFETENSORS[:-1])),
        r"model\.safetensors: incomplete safetensors file; copy it again",
        id="weights-a-byte-short",
    ),
    pytest.param(
        make_file("m", model_name_or_path="m"),
        r"model_name_or_path: .*/m\b.*folder",
        id="model-is-a-file",
    ),
    pytest.param(
        deepspeed_file(b"{"), r"deepspeed: .*ds\.json: not valid JSON", id="deepspeed-broken"
    ),
    pytest.param(
        deepspeed_file(b"\xff\xfe"),
        r"deepspeed: .*ds\.json: not valid JSON",
        id="deepspeed-not-text",
    ),
    pytest.param(
        deepspeed_file(b"{}"),
        r"deepspeed: .*ds\.json: expected .*\"stage\": 0 to 3",
        id="deepspeed-without-stage",
    ),
    pytest.param(
        deepspeed_file(b"[]"),
        r"deepspeed: .*ds\.json: expected .*\"stage\": 0 to 3",
        id="deepspeed-a-list",
    ),
    pytest.param(
        deepspeed_file(b'{"zero_optimization": {"stage": "3"}}'),
        r"deepspeed: .*ds\.json: expected .*\"stage\": 0 to 3",
        id="deepspeed-stage-as-text",
    ),
    pytest.param(
        deepspeed_file(b'{"zero_optimization": {"stage": 3, "offload_optimizer": true}}'),
        r"deepspeed: .*ds\.json: expected .*(offload_optimizer|stage)",
        id="deepspeed-offload-a-bool",
    ),
    pytest.param(
        lambda tmp_path: {"deepspeed": str(tmp_path)},
        r"deepspeed: .*directory",
        id="deepspeed-a-folder",
    ),
    pytest.param(
        change_data("dataset_info.json", "{"),
        r"dataset: .*dataset_info\.json: not valid JSON",
        id="info-broken",
    ),
    pytest.param(
        change_data("dataset_info.json", "[]"),
        r"dataset: .*dataset_info\.json: expected a JSON object",
        id="info-a-list",
    ),
    pytest.param(
        change_data("dataset_info.json", b"\xff\xff"),
        r"dataset: .*dataset_info\.json: ",
        id="info-not-text",
    ),
    pytest.param(
        change_data("x.json", "[]", {"file_name": "gone.json"}),
        r"dataset: tiny: .*/gone\.json does not exist; .*file_name",
        id="data-file-missing",
    ),
    pytest.param(
        change_data("x.json", "[{}]", {"path": "x.json"}),
        r"dataset: tiny .*file_name",
        id="info-without-file-name",
    ),
    pytest.param(
        change_data("x.json", "[]"),
        r"dataset: tiny: .*x\.json.*(empty|no rows|no samples)",
        id="data-empty-array",
    ),
    pytest.param(
        change_data("x.jsonl", ""),
        r"dataset: tiny: .*x\.jsonl.*(empty|no rows|no samples)",
        id="data-empty-file",
    ),
    pytest.param(
        change_data("x.json", '[{"instruction": "a", "output": "b"}, {'),
        r"dataset: tiny: .*x\.json.*JSON",
        id="data-json-cut-off",
    ),
    pytest.param(
        change_data("x.json", '[{"instruction": "a", "output": "b"}]'),
        r"dataset: tiny: .*x\.json has no column input, only instruction, output; describe it in "
        r'dataset_info\.json with "columns": \{"prompt": "instruction", "response": "output"\} '
        r"\(use --force to start anyway\)",
        id="data-without-input",
    ),
    pytest.param(
        change_data("x.csv", "question,answer\na,b\n"),
        r'has no column instruction, input, output, only answer, question; .*\{"prompt": "\.\.\.", '
        r'"response": "\.\.\."\}',
        id="data-with-other-columns",
    ),
    pytest.param(
        change_data("x.jsonl", '{"conversations": []}\n'),
        'with "formatting": "sharegpt"',
        id="data-sharegpt",
    ),
    pytest.param(
        change_data(
            "x.jsonl", '{"messages": []}\n', {"file_name": "x.jsonl", "formatting": "sharegpt"}
        ),
        r'has no column conversations, only messages; .*\{"messages": "\.\.\."\}',
        id="data-openai",
    ),
    pytest.param(
        change_data("x.txt", "some text\n"),
        r"has no column instruction, input, output, only text; ",
        id="data-plain-text",
    ),
    pytest.param(
        change_data("x.json", '[{"instruction": "a", "input": "b", "output": "c"},]'),
        r"x\.json: not valid JSON after element 1: a comma before the end",
        id="data-comma-at-the-end",
    ),
    pytest.param(
        change_data(
            "x.json", b'\xef\xbb\xbf[{"instruction": "a", "input": "b", "output": "c"}]'
        ),
        r"x\.json: begins with a byte order mark",
        id="data-with-a-mark",
    ),
    pytest.param(
        lambda tmp_path: {"output_dir": str(dangling(tmp_path) / "runs")},
        r"output_dir: .*/gone is a link that leads nowhere",
        id="output-behind-a-dangling-link",
    ),
    pytest.param(
        half_tokenized,
        r"tokenized_path: .*/tokens holds incomplete tokenized data; remove",
        id="tokenized-by-half",
    ),
    pytest.param(
        change_data("x.xlsx", "PK"),
        r"dataset: tiny: .*x\.xlsx.*json",
        id="data-of-unknown-kind",
    ),
    pytest.param(
        change_data("x.json", '[{"chosen": "a"}]', {"file_name": "x.json", "ranking": True}),
        r"dataset: tiny.*(ranking|stage)",
        id="preference-data-for-sft",
    ),
    pytest.param(
        make_file("o", output_dir="o"),
        r"output_dir: .*/o is a file; choose a folder",
        id="output-is-a-file",
    ),
    pytest.param(
        make_file("o", output_dir="o/runs"),
        r"output_dir: .*/o is a file; choose a folder",
        id="output-below-a-file",
    ),
]


@pytest.mark.parametrize(("step", "message"), BAD_FILES)
def test_bad_file_is_refused_with(refused, write_config, tmp_path, step, message):
    write_config()
    config = tmp_path / "config.yaml"
    values = {**yaml.safe_load(config.read_text()), **step(tmp_path)}
    config.write_text(
        yaml.safe_dump({key: value for key, value in values.items() if value is not None})
    )
    says(refused(config).stderr, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_that_cannot_be_written_is_refused(refused, write_config, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = refused(write_config(output_dir=str(tmp_path / "locked" / "runs")))
    says(done.stderr, r"output_dir: .*locked cannot be written; choose a folder")


def test_run_name_that_is_taken_is_refused(refused, write_config, tmp_path):
    (tmp_path / "out" / "first").mkdir(parents=True)
    says(
        refused(write_config(run_name="first")).stderr,
        r"out/first: exists already; choose another run_name, or .*--resume",
    )


def test_resume_without_a_run_is_refused(refused, write_config):
    says(refused(write_config(), "--resume").stderr, r"--resume: there is no run under .*/out")


def test_resume_takes_a_yaml_behind_it_as_the_config(refused, write_config):
    says(refused("--resume", write_config()).stderr, r"--resume: there is no run under .*/out")


def test_resume_of_a_run_that_is_not_there_is_refused(refused):
    says(
        refused("--resume", "nowhere").stderr,
        r"--resume nowhere: .*config\.yaml does not exist",
    )


def test_resume_of_a_run_goes_by_its_own_config(refused, write_config):
    says(
        refused(write_config(), "--resume", "some/run").stderr,
        r"--resume some/run uses that run's own config\.yaml; leave out .*config\.yaml",
    )


# --- Packages and compilers
# ------------------------------------------------------------------------------

HIDE = """
import importlib.machinery, os
hidden, real = os.environ["HIDDEN"].split(","), importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else real(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.fixture
def launch_without(launcher: Callable, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """A dry run in a Python in which the packages named with `hidden` cannot be found."""

    def launch(
        config: Path, hidden: str = "", *args: str, **options: object
    ) -> SimpleNamespace:
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
        env = {
            "PYTHONPATH": f"{tmp_path / 'site'}:{FAKES}",
            "HIDDEN": hidden,
            **options.pop("env", {}),
        }
        return launcher(config, *args, "--dry-run", env=env, **options)

    return launch


@pytest.mark.parametrize(
    ("hidden", "changes", "message"),
    [
        pytest.param(
            "wandb",
            {"report_to": "wandb"},
            r"report_to: wandb needs a package.*pip install wandb",
            id="wandb",
        ),
        pytest.param(
            "tensorboard,tensorboardX",
            {"report_to": ["tensorboard"]},
            r"report_to: tensorboard needs a package.*pip install tensorboard",
            id="tensorboard",
        ),
        pytest.param(
            "swanlab",
            {"report_to": "swanlab"},
            r"report_to: swanlab needs a package.*pip install swanlab",
            id="swanlab",
        ),
        pytest.param(
            "swanlab",
            {"use_swanlab": True},
            r"swanlab needs a package.*pip install swanlab",
            id="use-swanlab",
        ),
        pytest.param(
            "deepspeed",
            {"deepspeed": ZERO3},
            r"package deepspeed is not installed.*requirements\.txt",
            id="deepspeed",
        ),
        pytest.param(
            "flash_attn",
            {"flash_attn": "fa2", "bf16": True},
            r"flash_attn: needs the package flash-attn",
            id="flash-attn",
        ),
        pytest.param(
            "torch", {}, r"package torch is not installed.*requirements\.txt", id="torch"
        ),
        pytest.param(
            "torch,transformers,llamafactory",
            {},
            r"package torch, transformers, llamafactory is not installed",
            id="three",
        ),
    ],
)
def test_missing_package_is_refused_with(
    launch_without, write_config, tmp_path, hidden, changes, message
):
    done = launch_without(write_config(**changes), hidden)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    says(done.stderr, message)
    assert not (tmp_path / "out").exists()


def test_missing_deepspeed_does_not_matter_without_deepspeed(launch_without, write_config):
    assert launch_without(write_config(), "deepspeed").returncode == 0


PINS = {
    line.split("==")[0]: line.split("==")[1]
    for line in (SCRIPT.parent / "requirements.txt").read_text().splitlines()
    if re.match(r"(torch|transformers|llamafactory|deepspeed)==", line)
}


@pytest.fixture
def launch_with_version(launch_without, write_config, tmp_path):
    """A ZeRO-3 dry run beside an installed package of this version."""

    def launch(
        package: str, version: str, *args: str, script: Path = SCRIPT, **changes: object
    ) -> SimpleNamespace:
        info = tmp_path / "site" / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        config = write_config(**{"deepspeed": ZERO3, **changes})
        return launch_without(config, "", *args, script=script)

    return launch


UNTESTED = [
    ("transformers", "5.6.0"),
    ("transformers", "4.57.1"),
    ("torch", "2.14.1"),
    ("torch", "2.8.0"),
    ("deepspeed", "0.18.5"),
    ("deepspeed", "0.17.6"),
    ("llamafactory", "0.9.4"),
    ("llamafactory", "0.9.6.dev0"),
]


@pytest.mark.parametrize(("package", "version"), UNTESTED)
def test_version_that_was_not_tested_is_refused_with_the_one_that_was(
    launch_with_version, package, version
):
    done = launch_with_version(package, version)
    assert done.returncode == 2
    assert (
        f"error: {package} {version} is installed, but this launcher was tested with {package} "
        f"{PINS[package]}; pip install -r requirements.txt (use --force to start anyway)\n"
    ) in done.stderr


def test_version_that_was_not_tested_can_be_forced(launch_with_version):
    done = launch_with_version("torch", "2.8.0", "--force")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("package", "version"),
    [
        pytest.param("torch", "2.11.0+cu126", id="local-build"),
        pytest.param("torch", "2.11.1", id="patch-release"),
        pytest.param("transformers", "5.5.0", id="older-patch-release"),
        pytest.param("llamafactory", "0.9.5.post1", id="post-release"),
    ],
)
def test_the_tested_version_in_another_build_is_accepted(launch_with_version, package, version):
    done = launch_with_version(package, version)
    assert (done.returncode, done.stderr) == (0, "")


def test_version_of_deepspeed_does_not_matter_without_deepspeed(launch_with_version):
    done = launch_with_version("deepspeed", "0.17.6", deepspeed=None)
    assert (done.returncode, done.stderr) == (0, "")


def test_script_without_its_requirements_knows_no_tested_versions(
    launch_with_version, tmp_path
):
    script = tmp_path / "elsewhere" / SCRIPT.name
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    done = launch_with_version("torch", "2.8.0", script=script)
    assert (done.returncode, done.stderr) == (0, "")


def installed(tmp_path: Path, *names: str) -> dict[str, str]:
    """An environment in which packages of these names can be found."""
    for name in names:
        (tmp_path / "more" / name).mkdir(parents=True)
        (tmp_path / "more" / name / "__init__.py").write_text("")
    return {"PYTHONPATH": f"{tmp_path / 'more'}:{FAKES}"}


GENERATES = {"predict_with_generate": True, "do_eval": True}


@pytest.mark.parametrize(
    ("package", "changes"),
    [
        ("wandb", {"report_to": "wandb"}),
        ("tensorboard", {"report_to": "tensorboard"}),
        ("flash_attn", {"flash_attn": "fa2", "bf16": True}),
        ("mlflow", {"report_to": ["mlflow", "swanlab"]}),
        ("bitsandbytes", {"finetuning_type": "lora", "quantization_bit": 4}),
        ("jieba nltk rouge_chinese", {"deepspeed": ZERO2, "val_size": 4, **GENERATES}),
    ],
)
def test_installed_package_is_accepted(launcher, write_config, tmp_path, package, changes):
    done = launcher(
        write_config(**changes),
        "--dry-run",
        env={**installed(tmp_path, *package.split()), "WANDB_MODE": "offline"},
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def tools(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment whose PATH has only the named programs, which do nothing unless their text is
    given.
    """

    def path(*names: str, **texts: str) -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        for name, text in {**dict.fromkeys(names, "#!/bin/sh\n"), **texts}.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        return {"PATH": str(tmp_path / "bin")}

    return path


OFFLOAD = {
    **AUTO_BATCH,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, **GATHERED},
}


def test_deepspeed_on_a_cpu_needs_a_compiler(here, write_config, tools):
    done = here(write_config(deepspeed=ZERO3), "--dry-run", env=tools())
    assert done.returncode == 2
    says(done.stderr, r"C\+\+ compiler.*install g\+\+")


def test_offloaded_optimizer_needs_a_compiler(here, write_config, tools):
    done = here(
        write_config(use_cpu=None, deepspeed=OFFLOAD),
        "--dry-run",
        env=tools("nvcc"),
        gpus=fake_gpus(1),
    )
    says(done.stderr, r"C\+\+ compiler.*install g\+\+")


# DeepSpeed's CPUAdamBuilder compiles against CUDA wherever torch sees a GPU (op_builder/builder.py,
# jit_load). Without an nvcc it raises MissingCUDAException, with one of another CUDA version
# CUDAMismatchException: in every rank, after the model is loaded.
TORCH_VERSION = Path(find_spec("torch").origin).with_name("version.py").read_text()
TORCH_CUDA = re.search(r"^cuda\b.*'(\d+\.\d+)", TORCH_VERSION, re.MULTILINE)


def offload_problems(launcher: Callable, config: Path, env: dict[str, str]) -> str:
    """What a dry run with an offloaded optimizer on one GPU says against the machine."""
    return launcher(config, "--dry-run", env=env, gpus=fake_gpus(1)).stderr


def nvcc_of(release: str) -> str:
    """A program that answers as the nvcc of this CUDA release."""
    return f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n"


@pytest.mark.parametrize(
    "home", [True, False], ids=["cuda-home-without-nvcc", "no-cuda-at-all"]
)
def test_offloaded_optimizer_on_a_gpu_needs_nvcc(here, write_config, tools, tmp_path, home):
    if not home and Path("/usr/local/cuda").exists():
        pytest.skip("torch finds the nvcc of /usr/local/cuda without PATH and CUDA_HOME")
    env = {**tools("c++", "g++"), **({"CUDA_HOME": str(tmp_path / "nothing")} if home else {})}
    said = offload_problems(here, write_config(use_cpu=None, deepspeed=OFFLOAD), env)
    says(said, r"nvcc.*CUDA_HOME|CUDA_HOME.*nvcc|nvcc.*CUDA toolkit")


def test_an_optimizer_of_deepspeed_needs_nvcc_unless_it_is_torch_s(
    launcher, write_config, tools, tmp_path
):
    env = {**tools("c++", "g++"), "CUDA_HOME": str(tmp_path / "nothing")}
    for params, needs in (({"lr": "auto"}, True), ({"torch_adam": True}, False)):
        optimizer = {"optimizer": {"type": "AdamW", "params": params}}
        config = write_config(use_cpu=None, deepspeed={**ZERO3, **optimizer})
        assert ("nvcc" in offload_problems(launcher, config, env)) == needs, params


@pytest.mark.skipif(not TORCH_CUDA, reason="torch was built without CUDA")
def test_nvcc_of_another_cuda_is_refused(here, write_config, tools):
    env = tools("c++", "g++", nvcc=nvcc_of("9.2"))
    said = offload_problems(here, write_config(use_cpu=None, deepspeed=OFFLOAD), env)
    says(said, r"nvcc.*CUDA 9.*CUDA_HOME")


@pytest.mark.skipif(not TORCH_CUDA, reason="torch was built without CUDA")
def test_nvcc_of_torch_s_cuda_is_accepted(here, write_config, tools):
    env = tools("c++", "g++", nvcc=nvcc_of(TORCH_CUDA[1]))
    assert offload_problems(here, write_config(use_cpu=None, deepspeed=OFFLOAD), env) == ""


def test_deepspeed_on_a_gpu_without_offload_needs_no_compiler(here, write_config, tools):
    done = here(
        write_config(use_cpu=None, deepspeed=ZERO3), "--dry-run", env=tools(), gpus=fake_gpus(1)
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_compiler_named_by_cxx_is_enough(here, write_config, tools, tmp_path):
    # torch's extension builder takes CXX, else c++
    env = {**tools("clang++"), "CXX": str(tmp_path / "bin" / "clang++")}
    assert here(write_config(deepspeed=ZERO3), "--dry-run", env=env).returncode == 0


def test_plain_training_needs_no_compiler(here, write_config, tools):
    assert here(write_config(), "--dry-run", env=tools()).returncode == 0


# --- What must be accepted
# -------------------------------------------------------------------------------


def good(name: str, **changes: object):
    """A row of the table of configurations in which nothing is wrong."""
    return pytest.param(changes, id=name)


@pytest.mark.parametrize(
    "changes",
    [
        good("save-strategy-no", save_strategy="no"),
        good("save-strategy-false", save_strategy=False),
        good("eval-strategy-no", eval_strategy="no"),
        good("eval-strategy-false", eval_strategy=False),
        good("do-train-yes", do_train="yes"),
        good("plot-loss-on", plot_loss="on"),
        good("bf16-off", bf16="off"),
        good("number-in-quotes", learning_rate="1e-3"),
        good("whole-number-in-quotes", per_device_train_batch_size="4"),
        good("int-for-float", num_train_epochs=3),
        good("float-for-int", per_device_train_batch_size=2.0, seed=42.0),
        good("zero-learning-rate", learning_rate=0),
        good("dataset-as-list", dataset=["tiny"]),
        good("dataset-with-spaces", dataset=" tiny , tiny "),
        good("warmup-as-share", warmup_steps=0.1),
        good("warmup-ratio", warmup_ratio=0.1),
        good("warmup-steps", warmup_steps=10),
        good("logging-as-share", logging_steps=0.1),
        good("saving-as-share", save_steps=0.25),
        good("report-to-none", report_to="none"),
        good("report-to-list", report_to=["none"]),
        good("report-to-empty-list", report_to=[]),
        good("report-to-not-given", report_to=None),
        good("report-to-swanlab", report_to="swanlab"),
        good("swanlab-local", report_to="swanlab", swanlab_mode="local"),
        good("max-steps-by-epochs", max_steps=-1),
        good("max-steps", max_steps=10),
        good("adamw", optim="adamw_torch"),
        good("one-checkpoint-of-weights-only", save_total_limit=1, save_only_model=True),
        good("one-checkpoint", save_total_limit=1),
        good("two-checkpoints", save_total_limit=2),
        good("mapping", lr_scheduler_kwargs={"num_cycles": 2}),
        good("mapping-as-json", lr_scheduler_kwargs='{"num_cycles": 2}'),
        good("bool-or-text", include_num_input_tokens_seen="all"),
        good("bool-or-text-as-bool", include_num_input_tokens_seen=True),
        good("bf16-on-a-cpu", bf16=True),
        good("deepspeed-mapping", deepspeed=ZERO2),
        good("deepspeed-beside-the-script", deepspeed="configs/deepspeed/ds_z3_config.json"),
        good("evaluation-on-a-share", val_size=0.2, eval_strategy="steps", eval_steps=5),
        good("evaluation-on-a-number", val_size=4, eval_strategy="epoch"),
        good(
            "evaluation-on-a-dataset",
            eval_dataset="tiny",
            eval_strategy="epoch",
            per_device_eval_batch_size=4,
        ),
        good(
            "best-model",
            val_size=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
        ),
        good("agreeing-batch-sizes", global_batch_size=4),
        good("more-samples-than-there-are", max_samples=1000),
        good("streaming", streaming=True, max_steps=5),
        good("packing", packing=True),
        good("fractional-epochs", num_train_epochs=0.5),
        good("lora", finetuning_type="lora", lora_rank=8, lora_target="all"),
        good("lora-targets", finetuning_type="lora", lora_target="q_proj,v_proj"),
        good("pretraining", stage="pt"),
        good(
            "scheduler-with-kwargs",
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": 1e-5},
        ),
        good("template-of-another-family", template="llama3"),
        good("no-template", template=None),
        good("tf32", tf32=False),
        good("restarts-off", max_restarts=0),
        good("run-name", run_name="größe 1"),
        good("run-name-a-number", run_name=2024),
        good("tokenized-path-to-be-made", tokenized_path="tokens"),
        good("seed-0", seed=0),
        good("no-warmup", warmup_steps=0),
        good("no-clipping", max_grad_norm=0),
        good("no-workers", dataloader_num_workers=0),
        good("gradient-checkpointing-off", disable_gradient_checkpointing=True),
        good("token", hf_hub_token="x"),
        good("thinking", enable_thinking=False),
    ],
)
def test_right_configuration_is_accepted(accepted, write_config, changes):
    accepted(write_config(**changes))


def test_a_run_name_that_looks_like_a_number_is_kept_as_it_is_written(
    here, write_config, tmp_path
):
    config = write_config()
    config.write_text(config.read_text() + "run_name: 2024_11_24\n")
    assert f"{tmp_path}/out/2024_11_24" in here(config, "--dry-run").stdout
    assert f"{tmp_path}/out/1.10" in here(config, "run_name=1.10", "--dry-run").stdout


def test_long_fields_of_a_csv_file_are_counted(accepted, write_config, tmp_path):
    config = write_config()
    change_data("x.csv", "instruction,input,output\n" + f"a,{'b' * 200_000},c\n" * 3)(tmp_path)
    assert "3 samples" in accepted(config)


PAIR = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(
    ("name", "row", "entry", "stage"),
    [
        pytest.param(
            "x.jsonl",
            {"q": "a", "a": "b"},
            {"columns": {"prompt": "q", "response": "a"}},
            "sft",
            id="columns",
        ),
        pytest.param(
            "x.json", {"conversations": []}, {"formatting": "sharegpt"}, "sft", id="sharegpt"
        ),
        pytest.param(
            "x.json",
            {"instruction": "a", "chosen": "b", "rejected": "c"},
            {"ranking": True, "columns": PAIR},
            "dpo",
            id="preferences",
        ),
        pytest.param(
            "x.txt", "some text", {"columns": {"prompt": "text"}}, "pt", id="plain-text"
        ),
    ],
)
def test_data_of_another_shape_is_accepted(
    accepted, write_config, tmp_path, name, row, entry, stage
):
    config = write_config(stage=stage)
    text = row if isinstance(row, str) else json.dumps([row] if name == "x.json" else row)
    change_data(name, text + "\n", {"file_name": name, **entry})(tmp_path)
    accepted(config)


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        pytest.param("max_samples: 1_0", 3, id="underscore"),
        pytest.param("max_samples: 0o12", 3, id="octal"),
        pytest.param("max_samples: 0xA", 3, id="hexadecimal"),
        pytest.param("num_train_epochs: 1e1", 50, id="exponent"),
        pytest.param("streaming: off", 5, id="off"),
        pytest.param("dataloader_drop_last: on", 5, id="on"),
        pytest.param("packing: no", 5, id="no"),
    ],
)
def test_yaml_word_means_what_it_says(here, write_config, line, steps):
    config = write_config(num_train_epochs=None) if "epochs" in line else write_config()
    config.write_text(config.read_text() + line + "\n")
    done = here(config, "--dry-run", "--json")
    assert (json.loads(done.stdout)["total_steps"], done.stderr) == (steps, "")


def test_hub_model_is_noted_as_a_download_with_its_size(here):
    # 14,768,307,200 parameters of 2 bytes; the files on the hub are in bf16.
    done = here("--dry-run", gpus=fake_gpus(4))
    says(done.stdout, r"Qwen/Qwen3-14B.*27\.5 GiB.*download")


def test_hub_model_of_unknown_size_is_noted_as_a_download(here, write_config):
    done = here(
        write_config(model_name_or_path="someone/some-model", train_from_scratch=None),
        "--dry-run",
    )
    assert done.returncode == 0
    says(done.stdout, r"someone/some-model.*download")


@pytest.mark.parametrize("revision", [None, "abc"], ids=["main", "a commit"])
def test_model_in_the_cache_is_no_download(here, write_config, tmp_path, revision):
    repository = tmp_path / "hub" / "models--someone--some-model"
    write_json(repository / "snapshots" / "abc" / "config.json", TINY_MODEL)
    (repository / "snapshots" / "abc" / "model.safetensors").write_bytes(SAFETENSORS)
    if not revision:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    config = write_config(
        model_name_or_path="someone/some-model",
        model_revision=revision,
        train_from_scratch=None,
    )
    done = here(config, "--dry-run", env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr
    assert "download" not in done.stdout


# --- LLaMA-Factory's own examples
# ------------------------------------------------------------------------


# A field of transformers 4 that transformers 5 has only in fsdp_config: LLaMA-Factory 0.9.5 with
# the pinned one ends with "Some keys are not used by the HfArgumentParser" for it, so the launcher
# has to refuse it too.
GONE = {"examples/extras/fp8/llama3_fp8_fsdp_sft.yaml": "fsdp_transformer_layer_cls_to_wrap"}
# What this machine may lack, as opposed to what is wrong with a key or a value.
LACKING = (
    r"dataset_info\.json|no such file|does not exist|not installed|pip install|login|flash-attn|"
    r"memory: |is needed, .* is free|resume_from_checkpoint"
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_key_of_an_example_of_llamafactory_is_accepted(here, tmp_path, example):
    """tests/data/llamafactory_examples_keys.json: keys and values of the YAML files under
    examples/, tag v0.9.5.

    All that have `stage` and `do_train: true`. Left out: examples/v1 (LLaMA-Factory's second,
    separate trainer with other keys), examples/megatron (keys of mcore_adapter, with USE_MCA),
    examples/accelerate and ktransformers/accelerate (accelerate's files, not LLaMA-Factory's),
    inference/, merge_lora/ and nlg_eval (they do not train), multi_tokens/tokens_cfg.yaml (a list
    of tokens).
    """
    values = {
        key: value for key, value in EXAMPLES[example].items() if key != GONE.get(example)
    }
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(values))
    done = here(tmp_path / "example.yaml", "--dry-run", "--json", gpus=fake_gpus(8, 1000))
    problems = json.loads(done.stdout)["problems"]
    assert set(values) <= set(ft.known_fields())
    assert [
        text
        for text in problems
        if re.search(r"unknown key|example\.yaml:\d+: \w+: expected ", text)
    ] == []
    assert [text for text in problems if not re.search(LACKING, text)] == []


@pytest.mark.parametrize(("example", "key"), GONE.items())
def test_key_that_llamafactory_no_longer_takes_is_unknown(here, tmp_path, example, key):
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(EXAMPLES[example]))
    assert (
        f"{key}: unknown key"
        in here(tmp_path / "example.yaml", "--dry-run", gpus=fake_gpus(8)).stderr
    )


def test_there_are_enough_bad_inputs_in_the_tables():
    assert len(BAD_VALUES) + len(BAD_FILES) >= 45
