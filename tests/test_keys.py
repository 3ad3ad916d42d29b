"""Keys and values of the YAML, all wrong ones at once with line and advice, and every example of
LLaMA-Factory.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

import train_qwen3_ft as ft
from helpers.config import AUTO_BATCH
from helpers.launcher import fake_gpus, says

ZERO2 = {**AUTO_BATCH, "zero_optimization": {"stage": 2}}
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO3 = {**AUTO_BATCH, "zero_optimization": {"stage": 3, **GATHERED}}
EXAMPLES = json.loads(
    (Path(__file__).parent / "data" / "llamafactory_examples_keys.json").read_text(
        encoding="utf-8"
    )
)


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
