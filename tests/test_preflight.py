"""Files that a run needs, every problem of them before anything starts; and nothing refused that
works.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers.config import AUTO_BATCH, TINY_MODEL, write_json
from helpers.launcher import fake_gpus, says

ZERO2 = {**AUTO_BATCH, "zero_optimization": {"stage": 2}}
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO3 = {**AUTO_BATCH, "zero_optimization": {"stage": 3, **GATHERED}}


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
