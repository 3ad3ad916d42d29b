"""Rules between keys, devices, folders of other users, resumes: what is refused, and what is not."""

import builtins
import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.config import AUTO_BATCH, TINY_MODEL, write_json
from helpers.launcher import FAKES, fake_gpus, says

GATHER = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO2 = {**AUTO_BATCH, "zero_optimization": {"stage": 2}}
ZERO3 = {**AUTO_BATCH, "zero_optimization": {"stage": 3, **GATHER}}
OFFLOAD2 = {
    **AUTO_BATCH,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
OFFLOAD3 = {
    **AUTO_BATCH,
    "zero_optimization": {"stage": 3, **GATHER, "offload_optimizer": {"device": "cpu"}},
}
MIG = ("MIG-0a1b2c3d-1111-2222-3333-444455556666", "MIG-0a1b2c3d-1111-2222-3333-444455557777")
PAIRS = {"prompt": "instruction", "query": "input", "chosen": "output", "rejected": "worse"}
FEEDBACK = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "good"}
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
SAFETENSORS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)


@pytest.fixture
def said(here: Callable, write_config: Callable) -> Callable[..., str]:
    """The problems that a dry run with these keys finds; it must find some."""

    def check(
        *args: object, env: dict | None = None, gpus: list | None = None, **changes: object
    ) -> str:
        done = here(write_config(**changes), *args, "--dry-run", env=env, gpus=gpus)
        assert done.returncode == 2, f"accepted:\n{done.stdout}"
        assert "Traceback" not in done.stderr
        return done.stderr

    return check


@pytest.fixture
def plan(here: Callable, write_config: Callable) -> Callable[..., str]:
    """The plan that a dry run with these keys shows; it must find no problem."""

    def check(
        *args: object, env: dict | None = None, gpus: list | None = None, **changes: object
    ) -> str:
        done = here(write_config(**changes), *args, "--dry-run", env=env, gpus=gpus)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return check


def describe_data(tmp_path: Path, **entry: object) -> None:
    """Write rows with all columns there are, and a dataset_info.json with this `entry`."""
    write_json(
        tmp_path / "data" / "tiny.json",
        [
            {
                "instruction": f"row {n}",
                "input": "",
                "output": "SELECT 1;",
                "worse": "SELECT",
                "good": n % 2 == 0,
            }
            for n in range(20)
        ],
    )
    write_json(
        tmp_path / "data" / "dataset_info.json", {"tiny": {"file_name": "tiny.json", **entry}}
    )


# --- 6: what may not change on resume -------------------------------------------------------------


@pytest.fixture
def stopped_run(here: Callable, write_config: Callable, tmp_path: Path) -> Callable[..., Path]:
    """A run directory as a run leaves it that was stopped at its 4th step, with these keys."""

    def stop(name: str = "first", step: int = 4, **changes: object) -> Path:
        import train_qwen3_ft as ft

        config, run = write_config(**changes), tmp_path / "out" / name
        (run / "logs").mkdir(parents=True)
        planned = here(config, "--dry-run", "--json").stdout
        (run / "plan.json").write_text(planned)
        shutil.copy(config, run / "config.yaml")
        write_json(
            run / f"checkpoint-{step}" / "trainer_state.json",
            {"global_step": step, "max_steps": 5, "epoch": 0.8},
        )
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(SAFETENSORS)
        ft.commit_checkpoint(run / f"checkpoint-{step}", json.loads(planned)["world_size"])
        return run

    return stop


LORA = {"finetuning_type": "lora", "lora_rank": 8}
DPO = {**LORA, "stage": "dpo"}
TWO = {
    "dataset": "tiny,more",
    "mix_strategy": "interleave_under",
    "interleave_probs": "0.5,0.5",
}


def resumed(name: str, key: str, override: object, **before: object):
    """A row: the key, its new value, and the keys with which the run was started."""
    return pytest.param(key, override, before, id=name)


@pytest.mark.parametrize(
    ("key", "override", "before"),
    [
        resumed("zero-stage", "deepspeed", json.dumps(ZERO3), deepspeed=ZERO2),
        resumed("zero-stage-lower", "deepspeed", json.dumps(ZERO2), deepspeed=ZERO3),
        resumed("zero-taken-away", "deepspeed", "", deepspeed=ZERO3),
        resumed("zero-given", "deepspeed", json.dumps(ZERO2)),
        resumed("lora-rank", "lora_rank", 16, **LORA),
        resumed("lora-alpha", "lora_alpha", 64, **LORA),
        resumed("lora-target", "lora_target", "q_proj", **LORA),
        resumed("lora-dropout", "lora_dropout", 0.1, **LORA),
        resumed("pref-beta", "pref_beta", 0.5, **DPO),
        resumed("pref-loss", "pref_loss", "ipo", **DPO),
        resumed("ref-model", "ref_model", "someone/other-model", **DPO),
        resumed("train-on-prompt", "train_on_prompt", "true"),
        resumed("mask-history", "mask_history", "true"),
        resumed("neat-packing", "neat_packing", "true", packing=True),
        resumed("mix-strategy", "mix_strategy", "interleave_over", **TWO),
        resumed("interleave-probs", "interleave_probs", "0.9,0.1", **TWO),
        resumed("enable-thinking", "enable_thinking", "false"),
        resumed("sampling-strategy", "train_sampling_strategy", "sequential"),
        resumed("disable-shuffling", "disable_shuffling", "true"),
        *(
            resumed(key, key, value)
            for key, value in {
                "tokenized_path": "tokens",
                "buffer_size": 9,
                "default_system": "Be brief.",
                "tool_format": "qwen",
                "model_revision": "v2",
                "resize_vocab": "true",
                "rope_scaling": "yarn",
                "fsdp": "full_shard",
            }.items()
        ),
        resumed("streaming", "streaming", "true", max_steps=5),
        resumed("frozen-layers", "freeze_trainable_layers", 1, finetuning_type="freeze"),
        resumed("frozen-modules", "freeze_trainable_modules", "mlp", finetuning_type="freeze"),
        resumed("frozen-extras", "freeze_extra_modules", "lm_head", finetuning_type="freeze"),
        resumed("dora", "use_dora", "true", **LORA),
        resumed("additional-target", "additional_target", "lm_head", **LORA),
        resumed("packing-processes", "preprocessing_num_workers", 2, packing=True),
        resumed("packing-batches", "preprocessing_batch_size", 9, neat_packing=True),
        resumed("pretraining-packs", "preprocessing_batch_size", 9, stage="pt"),
        resumed("bf16", "bf16", "true"),
        resumed("bf16-taken-away", "bf16", "", bf16=True),
    ],
)
def test_resume_with_a_key_that_would_train_something_else_is_refused(
    here, stopped_run, tmp_path, key, override, before
):
    describe_data(
        tmp_path,
        **({"ranking": True, "columns": PAIRS} if before.get("stage") == "dpo" else {}),
    )
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    write_json(tmp_path / "data" / "dataset_info.json", {**info, "more": info["tiny"]})
    done = here("--resume", stopped_run(**before), f"{key}={override}", "--dry-run")
    assert done.returncode == 2, done.stdout
    says(
        done.stderr,
        rf"^error: command line: {key}: .*cannot change on resume; start a new run instead$",
    )


def test_resume_of_a_run_whose_plan_is_lost_compares_its_configuration(here, stopped_run):
    run_dir = stopped_run()
    (run_dir / "plan.json").unlink()
    done = here("--resume", run_dir, "seed=5", "--dry-run")
    says(done.stderr, r"seed: was None .*cannot change on resume")


def test_resume_minds_no_link_that_leads_nowhere(here, stopped_run):
    run_dir = stopped_run()
    next(run_dir.glob("checkpoint-*")).joinpath("link").symlink_to("nowhere")
    assert here("--resume", run_dir, "--dry-run").returncode == 0


@pytest.mark.parametrize("gpus", [1, 2], ids=["fewer", "more"])
def test_a_run_on_all_gpus_resumes_on_those_that_there_are_now(here, stopped_run, gpus):
    import train_qwen3_ft as ft

    run_dir = stopped_run()
    config = ft.load_config(run_dir / "config.yaml", {"use_cpu": "null"})
    all_of_them = ft.Devices(tuple("0123"[: 3 - gpus]), "all GPUs of this node", 3 - gpus)
    (run_dir / "config.yaml").write_text(ft.launchable_config(config, all_of_them))
    done = here("--resume", run_dir, "--dry-run", "--json", gpus=fake_gpus(gpus))
    assert (done.returncode, json.loads(done.stdout)["world_size"]) == (0, gpus), done.stderr


def change_file_of_folder(data: Path) -> None:
    (data / "rows" / "b.jsonl").write_text('{"instruction": "b", "output": "c"}')


def add_file_to_folder(data: Path) -> None:
    (data / "rows" / "c.jsonl").write_text('{"instruction": "c", "output": "c"}')


def describe_otherwise(data: Path) -> None:
    entry = {"file_name": "rows", "columns": {"prompt": "output", "response": "instruction"}}
    write_json(data / "dataset_info.json", {"tiny": entry})


def describe_another(data: Path) -> None:
    entry = {"file_name": "rows"}
    write_json(data / "dataset_info.json", {"tiny": entry, "other": entry})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_file_of_folder, r"data/rows: has changed since"),
        (add_file_to_folder, r"data/rows: has changed since"),
        (describe_otherwise, r"data/dataset_info\.json: tiny: has changed since"),
        (describe_another, r"^$"),
    ],
)
def test_data_in_a_folder_and_its_description_may_not_change_on_resume(
    here, write_config, stopped_run, tmp_path, change, problem
):
    write_config()
    (tmp_path / "data" / "rows").mkdir()
    for name in ("a", "b"):
        text = f'{{"instruction": "{name}", "output": "{name}"}}'
        (tmp_path / "data" / "rows" / f"{name}.jsonl").write_text(text)
    write_json(tmp_path / "data" / "dataset_info.json", {"tiny": {"file_name": "rows"}})
    run_dir = stopped_run()
    change(tmp_path / "data")
    assert re.search(problem, here("--resume", run_dir, "--dry-run").stderr)


@pytest.mark.parametrize(
    "change",
    ["per_device_train_batch_size=8", "gradient_accumulation_steps=4", "global_batch_size=8"],
)
def test_resume_with_other_samples_per_step_is_refused(here, stopped_run, change):
    done = here("--resume", stopped_run(), change, "--dry-run")
    assert done.returncode == 2, done.stdout
    refused = r"(?s)4.*cannot change on resume; start a new run instead"
    says(done.stderr, rf"{refused}|global_batch_size: 4 cannot be split")


# accepted before, too


@pytest.mark.parametrize(
    ("override", "before"),
    [
        pytest.param("save_steps=2", {}, id="save-steps"),
        pytest.param("num_train_epochs=2", {}, id="more-epochs"),
        pytest.param(
            "per_device_train_batch_size=4 gradient_accumulation_steps=1",
            {},
            id="the-same-samples-per-step",
        ),
        pytest.param(
            f"deepspeed={json.dumps(ZERO2)}", {"deepspeed": OFFLOAD2}, id="offload-off"
        ),
        pytest.param(
            f"deepspeed={json.dumps(OFFLOAD3)}", {"deepspeed": ZERO3}, id="offload-on"
        ),
        pytest.param("mask_history=false", {}, id="a-default-that-is-spelled-out"),
        pytest.param("preprocessing_num_workers=2", {}, id="processes-that-pack-nothing"),
    ],
)
def test_resume_with_a_key_that_changes_no_result_is_accepted(
    here, stopped_run, override, before
):
    if "deepspeed" in before and not shutil.which("c++"):
        pytest.skip("offloading needs a C++ compiler")
    words = [override] if "{" in override else override.split()
    done = here("--resume", stopped_run(**before), *words, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


# --- 7: GPUs that torch would not see -------------------------------------------------------------


@pytest.fixture
def with_torch(
    launcher: Callable, write_config: Callable, tmp_path: Path
) -> Callable[..., SimpleNamespace]:
    """A dry run on fake GPUs with a torch that is built for `cuda` ("None": for the CPU only)."""

    def launch(
        cuda: str, gpus: list, driver: dict | None = None, *args: str, **changes: object
    ) -> SimpleNamespace:
        torch = tmp_path / "site" / "torch"
        (torch / "cuda").mkdir(parents=True)
        (torch / "__init__.py").write_text("raise ImportError('the launcher imports no torch')")
        (torch / "version.py").write_text(
            f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
        )
        (torch / "cuda" / "__init__.py").write_text(
            "PYTORCH_RELEASES_CODE_CC: dict[str, set[int]] = {\n"
            '    "12.6": {50, 60, 70, 80, 86, 90},\n'
            '    "12.8": {70, 80, 86, 90, 100, 120},\n'
            '    "13.0": {75, 80, 86, 90, 100, 110, 120},\n}\n'
        )
        env = {
            "PYTHONPATH": f"{tmp_path / 'site'}:{FAKES}",
            "FAKE_GPUS_DRIVER": json.dumps(driver or {}),
        }
        return launcher(
            write_config(use_cpu=None, **changes), *args, "--dry-run", env=env, gpus=gpus
        )

    return launch


OF_TORCH = ("torch", "torchvision", "torchaudio")
OLD_DRIVER = {"cuda": 12040, "driver": "550.54.14"}


def test_driver_too_old_for_torch_is_refused_with_both_versions(with_torch):
    done = with_torch("'13.0'", fake_gpus(2), OLD_DRIVER)
    assert done.returncode == 2, done.stdout
    says(done.stderr, r"driver.*12\.4.*13\.0")
    assert "580" in done.stderr


# PyTorch's RELEASE.md for 2.11: its builds for CUDA 12.6 know GPUs up to Hopper (9.0), those for
# 12.8 also Blackwell. Any driver for CUDA 12 runs both (NVIDIA's minor version compatibility).
@pytest.mark.parametrize(
    ("driver", "capability", "build"),
    [
        pytest.param(12040, [9, 0], "cu126", id="hopper"),
        pytest.param(12090, [7, 5], "cu126", id="turing"),
        pytest.param(12080, [10, 0], "cu128", id="blackwell"),
    ],
)
def test_driver_too_old_for_torch_gets_the_command_that_helps(
    with_torch, driver, capability, build
):
    done = with_torch("'13.0'", fake_gpus(1, capability=capability), {"cuda": driver})
    names = {name: metadata.version(name).partition("+")[0] for name in OF_TORCH}
    packages = " ".join(f"{name}=={version}+{build}" for name, version in names.items())
    url = f"https://download.pytorch.org/whl/{build}"
    assert f"or newer, or: pip install {packages} --index-url {url}\n" in done.stderr


def test_driver_below_cuda_12_can_only_be_updated(with_torch):
    done = with_torch("'13.0'", fake_gpus(1), {"cuda": 11080})
    assert re.search(r"driver.*11\.8.*install driver 580 or newer$", done.stderr, re.MULTILINE)


def test_torch_without_cuda_is_refused_where_gpus_are_planned(with_torch):
    """pip takes 2.11.0+cpu for the 2.11.0 of requirements.txt, so it has to go first."""
    done = with_torch("None", fake_gpus(2))
    assert done.returncode == 2, done.stdout
    says(done.stderr, r"torch.*CPU.*GPU")
    command = "pip uninstall -y torch torchvision torchaudio && pip install -r requirements.txt"
    assert command in done.stderr


def test_gpu_too_old_for_torch_is_refused_by_name(with_torch):
    gpus = [*fake_gpus(1), {"name": "Tesla V100", "total": 32, "capability": [7, 0]}]
    done = with_torch("'13.0'", gpus)
    assert done.returncode == 2, done.stdout
    says(done.stderr, r"GPU 1 \(Tesla V100\).*7\.0.*7\.5.*pip install torch==\S+\+cu126 ")


# accepted before, too


@pytest.mark.parametrize(
    ("cuda", "driver"),
    [
        pytest.param("'13.2'", {"cuda": 13000}, id="minor-version-compatibility"),
        pytest.param("'12.6'", {"cuda": 13000}, id="newer-driver"),
        pytest.param("'12.6'", {"cuda": 12000}, id="12.6-on-525"),
        pytest.param("'12.8'", {"cuda": 12040}, id="12.8-on-550"),
        pytest.param(
            "'13.0'",
            {"unsupported": ["nvmlSystemGetCudaDriverVersion_v2"]},
            id="version-not-told",
        ),
    ],
)
def test_driver_that_can_run_torch_is_accepted(with_torch, cuda, driver):
    done = with_torch(cuda, fake_gpus(1), driver)
    assert (done.returncode, done.stderr) == (0, "")


def test_old_gpu_is_accepted_by_a_torch_that_was_built_for_it(with_torch):
    done = with_torch("'12.6'", fake_gpus(1, capability=[7, 0]), OLD_DRIVER)
    assert (done.returncode, done.stderr) == (0, "")


def test_old_gpu_that_is_not_chosen_does_not_matter(with_torch):
    done = with_torch(
        "'13.0'", [*fake_gpus(1), *fake_gpus(1, capability=[7, 0])], cuda_visible_devices="0"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_torch_without_cuda_is_accepted_on_a_cpu(with_torch):
    done = with_torch("None", [], {}, "use_cpu=true")
    assert (done.returncode, done.stderr) == (0, "")


# --- 8: MIG ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others", [MIG[1], "0"], ids=["two-instances", "an-instance-and-a-gpu"]
)
def test_more_than_one_device_with_mig_is_refused_since_cuda_shows_one(said, others):
    text = said(use_cpu=None, cuda_visible_devices=f"{MIG[0]},{others}", gpus=fake_gpus(1))
    says(text, r"cuda_visible_devices: .*MIG.*one")


def test_two_mig_instances_of_the_environment_are_refused(said):
    text = said(use_cpu=None, env={"CUDA_VISIBLE_DEVICES": ",".join(MIG)}, gpus=fake_gpus(1))
    says(text, r"CUDA_VISIBLE_DEVICES.*MIG.*one")


# accepted before, too


def test_one_mig_instance_is_accepted(plan):
    assert MIG[0] in plan(use_cpu=None, cuda_visible_devices=MIG[0], gpus=fake_gpus(1))


# --- 9: mixed GPUs --------------------------------------------------------------------------------

MIXED = [{"name": "NVIDIA A100", "total": 80}, {"name": "NVIDIA L4", "total": 22.5}]


def test_plan_names_mixed_gpus_and_the_smallest_memory(plan):
    text = plan(use_cpu=None, gpus=MIXED)
    assert "NVIDIA A100" in text
    says(text, r"22\.5 GiB.*NVIDIA L4|NVIDIA L4.*22\.5 GiB")


# accepted before, too


def test_plan_does_not_repeat_the_name_of_equal_gpus(plan):
    assert plan(use_cpu=None, gpus=fake_gpus(4)).count("NVIDIA Test GPU") <= 1


# --- 10: models that are in the cache by half -----------------------------------------------------


@pytest.fixture
def cached_model(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An HF_HOME with a snapshot of a model: its config.json and `files`; returns the variable."""

    def snapshot(
        config: dict, name: str = "someone/some-model", **files: bytes
    ) -> dict[str, str]:
        repository = tmp_path / "hf" / "hub" / f"models--{name.replace('/', '--')}"
        write_json(repository / "snapshots" / "abc" / "config.json", config)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        for file, content in files.items():
            (repository / "snapshots" / "abc" / file).write_bytes(content)
        return {"HF_HOME": str(tmp_path / "hf")}

    return snapshot


SHARDS = {
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
    "model-00001-of-00002.safetensors": SAFETENSORS,
}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="only-its-config"),
        pytest.param(SHARDS, id="one-of-two-shards"),
        pytest.param({"tokenizer.json": b"{}"}, id="only-its-tokenizer"),
    ],
)
def test_hub_model_that_is_in_the_cache_by_half_is_downloaded(plan, cached_model, files):
    env = cached_model(TINY_MODEL, **files)
    text = plan(model_name_or_path="someone/some-model", train_from_scratch=None, env=env)
    says(text, r"^model .*someone/some-model.*not in the local cache, the rest is downloaded")


def test_disk_of_the_hub_s_cache_is_checked_for_the_download(said, tmp_path, monkeypatch):
    """The cache is on a disk of its own, with 10 GiB left; Qwen3-14B has 27.5."""

    def usage(path: object) -> SimpleNamespace:
        free = 10 << 30 if str(path).startswith(str(tmp_path / "hf")) else 10 << 40
        return SimpleNamespace(total=20 << 40, used=0, free=free)

    (tmp_path / "hf").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    text = said(
        model_name_or_path="Qwen/Qwen3-14B",
        train_from_scratch=None,
        use_cpu=None,
        finetuning_type="lora",
        env={"HF_HOME": str(tmp_path / "hf")},
        gpus=fake_gpus(8),
    )
    says(text, r"27\.5 GiB.*10\.0 GiB")


# accepted before, too


def test_hub_model_that_is_whole_is_not_downloaded(plan, cached_model):
    env = cached_model(TINY_MODEL, **{"model.safetensors": SAFETENSORS})
    assert "download" not in plan(
        model_name_or_path="someone/some-model", train_from_scratch=None, env=env
    )


def test_folder_without_weights_is_no_hub_model_and_refused(said):
    says(said(train_from_scratch=None), r"model_name_or_path: .*model\.safetensors missing")


# --- 13: NVML calls that are not supported --------------------------------------------------------


@pytest.mark.parametrize(
    "call", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUUID", "nvmlDeviceGetName"]
)
def test_gpu_is_there_though_one_call_is_not_supported(plan, call):
    text = plan(
        use_cpu=None,
        env={"FAKE_GPUS_DRIVER": json.dumps({"unsupported": [call]})},
        gpus=fake_gpus(2),
    )
    says(text, r"^devices +GPUs 0,1 ")


def test_gpu_of_unknown_memory_hides_no_other(said):
    gpus = [
        {"name": "NVIDIA GB10", "total": 0, "unsupported": ["nvmlDeviceGetMemoryInfo"]},
        *fake_gpus(1, total=0.1),
    ]
    text = said(use_cpu=None, gpus=gpus)
    says(text, r"memory: .*is needed.*102\.4 MiB|memory: .*102\.4 MiB")


def test_gpu_of_unknown_memory_is_planned_without_a_limit(here, write_config):
    gpus = fake_gpus(1, unsupported=["nvmlDeviceGetMemoryInfo"])
    done = here(write_config(use_cpu=None), "--dry-run", "--json", gpus=gpus)
    data = json.loads(done.stdout)
    assert (data["devices"], data["problems"]) == (["0"], [])
    assert data["memory_per_gpu"]


# accepted before, too


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlSystemGetDriverVersion",
    ],
)
def test_call_that_only_adds_to_the_checks_need_not_be_supported(plan, call):
    plan(
        use_cpu=None,
        env={"FAKE_GPUS_DRIVER": json.dumps({"unsupported": [call]})},
        gpus=fake_gpus(2),
    )


# --- 14: valid starts -----------------------------------------------------------------------------

BY_STEPS = {"val_size": 0.2, "eval_strategy": "steps", "load_best_model_at_end": True}


def good(name: str, **changes: object):
    """A row of the configurations in which nothing is wrong."""
    return pytest.param(changes, id=name)


@pytest.mark.parametrize(
    "changes",
    [
        good("best-model-of-the-best", **BY_STEPS, eval_steps=2, save_strategy="best"),
        good(
            "best-model-of-the-best-by-epochs",
            **{**BY_STEPS, "eval_strategy": "epoch"},
            save_strategy="best",
        ),
        good("fractions", **BY_STEPS, eval_steps=0.1, save_steps=0.3),
        good("fractions-of-a-sixth", **BY_STEPS, eval_steps=0.2, save_steps=0.6),
    ],
)
def test_best_model_is_accepted_as_transformers_takes_it(plan, changes):
    plan(**changes)


def test_leftover_pytorch_index_beside_whole_safetensors_is_accepted(
    here, write_config, tmp_path
):
    config = write_config(train_from_scratch=None)
    write_json(
        tmp_path / "model" / "pytorch_model.bin.index.json",
        {"weight_map": {"w": "pytorch_model-00001.bin"}},
    )
    (tmp_path / "model" / "model.safetensors").write_bytes(SAFETENSORS)
    done = here(config, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")
@pytest.mark.parametrize("place", ["variable"])
def test_login_at_a_wandb_of_one_s_own_is_accepted(plan, tmp_path, place):
    (tmp_path / "home" / ".netrc").write_text(
        "machine metrics.example.org\n  login user\n  password 0123456789\n"
    )
    (tmp_path / "home" / ".netrc").chmod(0o600)
    if place == "settings":
        (tmp_path / "home" / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / "home" / ".config" / "wandb" / "settings").write_text(
            "[default]\nbase_url = https://metrics.example.org\n"
        )
    env = {"WANDB_BASE_URL": "https://metrics.example.org"} if place == "variable" else {}
    plan(report_to="wandb", env=env)


# --- 15: folders of another user ------------------------------------------------------------------


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A folder that belongs to somebody else from lock() on: nothing below it can be seen.

    For root, who may see everything, the operating system's answers are made up.
    """
    folder = tmp_path / "theirs"
    folder.mkdir()

    def guarded(call: Callable) -> Callable:
        def answer(path: object = ".", *args: object, **options: object) -> object:
            inside = isinstance(path, (str, os.PathLike)) and f"{os.fspath(path)}/".startswith(
                f"{folder}/"
            )
            if inside and (
                Path(path) != folder or call.__name__ in ("listdir", "scandir", "mkdir")
            ):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **options)

        return answer

    def lock() -> Path:
        if os.geteuid() != 0:
            folder.chmod(0)
            return folder
        for module, names in (
            (os, ("stat", "lstat", "listdir", "scandir", "open", "mkdir", "statvfs")),
            (io, ("open",)),
            (builtins, ("open",)),
        ):
            for name in names:
                monkeypatch.setattr(module, name, guarded(getattr(module, name)))
        access = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, *args, **options: (
                not f"{os.fspath(path)}/".startswith(f"{folder}/")
                and access(path, *args, **options)
            ),
        )
        return folder

    folder_and_lock = SimpleNamespace(folder=folder, lock=lock)
    yield folder_and_lock
    monkeypatch.undo()
    folder.chmod(0o700)


@pytest.mark.parametrize(
    ("key", "below"),
    [
        ("model_name_or_path", "model"),
        ("dataset_dir", "data"),
        ("deepspeed", "zero.json"),
        ("output_dir", "runs/sql"),
        ("tokenized_path", "tokens"),
        ("resume_from_checkpoint", "checkpoint-4"),
        ("adapter_name_or_path", "adapter"),
        ("cache_dir", "cache"),
    ],
)
def test_folder_of_another_user_on_a_path_is_a_problem(here, write_config, locked, key, below):
    changes = {
        "cache_dir": {"model_name_or_path": "someone/some-model", "train_from_scratch": None},
        "adapter_name_or_path": {"finetuning_type": "lora"},
    }.get(key, {})
    config = write_config(**{key: str(locked.folder / below), **changes})
    locked.lock()
    done = here(config, "--dry-run")
    named = {
        "dataset_dir": "dataset(_dir)?",
        "cache_dir": "(cache_dir|model_name_or_path)",
    }.get(key, key)
    assert done.returncode == 2, done.stdout
    says(done.stderr, rf"config\.yaml:\d+: {named}: .*{locked.folder}")
    says(done.stderr, r"(?i)permission denied|cannot be (read|written)")


def test_data_file_that_cannot_be_read_is_one_problem(
    here, write_config, tmp_path, monkeypatch
):
    file, real = tmp_path / "data" / "tiny.json", io.open

    def guarded(path: object, *args: object, **options: object) -> object:
        if str(path) == str(file):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    config = write_config()
    for module in (io, builtins):
        monkeypatch.setattr(module, "open", guarded)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(file))
    done = here(config, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: .*dataset: tiny: {file}: permission denied\n", done.stderr)


def test_data_file_in_a_folder_of_another_user_is_a_problem(
    here, write_config, locked, tmp_path
):
    config = write_config()
    write_json(
        tmp_path / "data" / "dataset_info.json",
        {"tiny": {"file_name": str(locked.folder / "rows.json")}},
    )
    locked.lock()
    done = here(config, "--dry-run")
    assert done.returncode == 2, done.stdout
    says(done.stderr, rf"dataset: .*{locked.folder}")
    says(done.stderr, r"(?i)permission denied|cannot be read")


def test_configuration_of_another_user_is_a_problem(here, locked):
    locked.lock()
    done = here(locked.folder / "config.yaml", "--dry-run")
    assert done.returncode == 2
    says(done.stderr, rf"{locked.folder}/config\.yaml: (?i:permission denied)")


def test_run_of_another_user_cannot_be_resumed_and_is_a_problem(here, locked):
    locked.lock()
    done = here("--resume", locked.folder / "run", "--dry-run")
    assert done.returncode == 2
    says(done.stderr, rf"{locked.folder}/run.*(?i:permission denied)")


def test_hub_cache_of_another_user_is_a_problem(here, write_config, locked):
    config = write_config(model_name_or_path="someone/some-model", train_from_scratch=None)
    locked.lock()
    done = here(config, "--dry-run", env={"HF_HOME": str(locked.folder / "hf")})
    assert done.returncode == 2, done.stdout
    says(done.stderr, rf"(model_name_or_path|HF_HOME).*{locked.folder}.*(?i:permission denied)")


def test_all_folders_of_other_users_are_named_at_once(here, write_config, locked):
    config = write_config(
        dataset_dir=str(locked.folder / "data"),
        output_dir=str(locked.folder / "runs"),
        learning_rat=1,
    )
    locked.lock()
    done = here(config, "--dry-run")
    for key in ("dataset(_dir)?", "output_dir", "learning_rat"):
        says(done.stderr, rf"config\.yaml:\d+: {key}: ")


# --- 16: --resume without a directory, and beyond the end -----------------------------------------


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """The lock of a launcher that is still running."""
    with open(run / "logs" / "lock", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write("4711")
        file.flush()
        yield


def test_resume_without_a_directory_skips_runs_that_are_still_running(
    here, write_config, stopped_run
):
    older, newer = stopped_run("older"), stopped_run("newer")
    os.utime(older / "config.yaml", (1, 1))
    with held(newer):
        done = here(write_config(), "--resume", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(older) in done.stdout and str(newer) not in done.stdout


def test_resume_without_a_directory_says_so_where_every_run_is_still_running(
    here, write_config, stopped_run
):
    with held(stopped_run("only")):
        done = here(write_config(), "--resume", "--dry-run")
    assert done.returncode == 2
    says(done.stderr, r"still running")


@pytest.fixture
def finished_run(stopped_run: Callable) -> Path:
    """A run of 100 steps that trained to its end."""
    run = stopped_run(step=100, max_steps=100)
    write_json(run / "summary.json", {"state": "finished", "step": 100, "total_steps": 100})
    return run


def test_a_finished_run_trains_on_where_it_is_given_more_steps(here, finished_run):
    done = here("--resume", finished_run, "max_steps=200", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    says(done.stdout, r"^steps .*\b200\b")
    assert str(finished_run) in done.stdout


def test_a_finished_run_says_that_there_is_nothing_to_resume(here, finished_run):
    done = here("--resume", finished_run)
    assert done.returncode == 0
    assert (
        f"{finished_run}: this run is finished, there is nothing to resume; "
        f"to train its model further: python train_qwen3_ft.py model_name_or_path={finished_run}"
    ) in done.stdout


# --- 18: what fails after minutes of loading ------------------------------------------------------

EVAL = {"val_size": 0.2, "eval_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "save_strategy": "epoch", **EVAL}
NEAT = {"neat_packing": True, "flash_attn": "fa2"}
EACH = {"eval_dataset": "tiny", "eval_on_each_dataset": True, "eval_strategy": "epoch"}
PARAMS = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
ADAM = {**ZERO2, "optimizer": {"type": "AdamW", "params": PARAMS}}
AGREES = {"learning_rate": 1e-3, "adam_beta2": 0.95, "weight_decay": 0.1}


def bad(name: str, message: str, **changes: object):
    """A row: the keys that are laid over the valid configuration, and what must be said."""
    return pytest.param(changes, message, id=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # named in the issue
        bad(
            "zero3-that-keeps-its-shards",
            r"deepspeed: .*without a model.*stage3_gather_16bit_weights_on_model_save: true",
            deepspeed={"zero_optimization": {"stage": 3}},
        ),
        bad(
            "zero3-that-says-it-keeps-its-shards",
            r"deepspeed: .*stage3_gather_16bit_weights_on_model_save: true",
            deepspeed={
                "zero_optimization": {
                    "stage": 3,
                    "stage3_gather_16bit_weights_on_model_save": False,
                }
            },
        ),
        bad(
            "zero3-auto-gathers-nothing",
            r"deepspeed: .*stage3_gather_16bit_weights_on_model_save: true",
            deepspeed={
                "zero_optimization": {
                    "stage": 3,
                    "stage3_gather_16bit_weights_on_model_save": "auto",
                }
            },
        ),
        bad(
            "deepspeed-without-its-batch",
            r"deepspeed: .*train_micro_batch_size_per_gpu, gradient_accumulation_steps.*missing",
            deepspeed={"zero_optimization": {"stage": 2}},
        ),
        bad(
            "weights-only-and-the-best",
            r"save_only_model: .*load_best_model_at_end.*DeepSpeed",
            deepspeed=ZERO2,
            **BEST,
            save_only_model=True,
        ),
        bad(
            "batch-size-to-be-found-under-zero3",
            r"auto_find_batch_size: .*ZeRO-3",
            deepspeed=ZERO3,
            auto_find_batch_size=True,
        ),
        bad(
            "early-stopping-without-evaluation",
            r"early_stopping_steps: .*eval_strategy",
            early_stopping_steps=3,
            metric_for_best_model="loss",
        ),
        bad(
            "early-stopping-without-a-metric",
            r"early_stopping_steps: .*metric_for_best_model",
            early_stopping_steps=3,
            **EVAL,
        ),
        bad(
            "packed-micro-batch-with-flash-attention",
            r"neat_packing: takes one sequence at a time .*fa2; set per_device_train_batch_size",
            **NEAT,
        ),
        # the same kind
        bad(
            "packed-evaluation-with-flash-attention",
            r"neat_packing: takes one sequence at a time .*fa2; .* per_device_eval_batch_size to 1",
            **NEAT,
            **EVAL,
            per_device_train_batch_size=1,
        ),
        bad(
            "packed-evaluation-after-training",
            r"neat_packing: takes one sequence at a time",
            **NEAT,
            val_size=0.2,
            do_eval=True,
            per_device_train_batch_size=1,
        ),
        bad(
            "tokenized-data-without-a-name",
            r"dataset: no data to train on; name a data set",
            dataset=None,
            tokenized_path="tokens",
        ),
        bad(
            "prompt-masks-of-two-kinds",
            r"mask_history: cannot be combined with train_on_prompt; keep one",
            mask_history=True,
            train_on_prompt=True,
        ),
        *(
            bad(
                f"{key}-in-pretraining",
                rf"{key}: needs stage: sft",
                stage="pt",
                **{key: True},
                **EVAL,
            )
            for key in ("predict_with_generate", "neat_packing")
        ),
        bad(
            "generation-without-data",
            r"predict_with_generate: .*eval_dataset or val_size",
            predict_with_generate=True,
        ),
        bad(
            "generation-and-accuracy",
            r"predict_with_generate: cannot be combined with compute_accuracy",
            **EVAL,
            predict_with_generate=True,
            compute_accuracy=True,
        ),
        bad(
            "stage-0-with-bf16",
            r"deepspeed: stage 0 resumes no optimizer state with bf16; use ZeRO stage 1",
            deepspeed={**ZERO2, "zero_optimization": {"stage": 0}},
            bf16=True,
        ),
        bad(  # saved, but not loaded: the first step trains on the base model's fp32 weights
            "stage-0-with-bf16-and-fp32-gradients",
            r"deepspeed: stage 0 .*bf16",
            deepspeed={
                **ZERO2,
                "zero_optimization": {"stage": 0},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            bf16=True,
        ),
        bad(
            "clipping-that-is-missing",
            r"deepspeed: set gradient_clipping to",
            deepspeed={key: ZERO2[key] for key in ZERO2 if key != "gradient_clipping"},
        ),
        bad(
            "clipping-that-is-another",
            r"deepspeed: set gradient_clipping to",
            deepspeed={**ZERO2, "gradient_clipping": 0.5},
        ),
        bad(
            "optimizer-that-is-another",
            r"deepspeed: set optimizer\.params\.betas, optimizer\.params\.eps to",
            deepspeed=ADAM,
            **{**AGREES, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
        ),
        bad(
            "scheduler-that-is-another",
            r"deepspeed: set scheduler\.params\.warmup_max_lr, scheduler\.params\.total_num_steps"
            r", scheduler\.params\.warmup_num_steps to",
            deepspeed={
                **ZERO2,
                "scheduler": {
                    "params": {"warmup_max_lr": 1, "total_num_steps": 9, "warmup_num_steps": 9}
                },
            },
            max_steps=5,
            warmup_steps=2,
        ),
        bad(
            "metric-that-there-is-not",
            r"metric_for_best_model: evaluation does not give it; .*: loss",
            **BEST,
            metric_for_best_model="f1",
        ),
        bad(
            "metric-of-generation-without-it",
            r"metric_for_best_model: evaluation does not give it; .*: loss",
            **EVAL,
            metric_for_best_model="bleu-4",
        ),
        bad(
            "loss-where-each-data-set-has-its-own",
            r"metric_for_best_model: evaluation does not give it; .*: tiny_loss",
            **EACH,
            save_strategy="best",
            metric_for_best_model="eval_loss",
        ),
        bad(
            "best-by-the-loss-where-each-data-set-has-its-own",
            r"load_best_model_at_end: .*; .*metric_for_best_model: tiny_loss",
            **EACH,
            load_best_model_at_end=True,
            save_strategy="epoch",
        ),
        bad(
            "best-reward-model",
            r"load_best_model_at_end: .*stage: rm",
            **BEST,
            stage="rm",
        ),
        bad(
            "prediction-without-generation",
            r"do_predict: needs predict_with_generate: true",
            do_predict=True,
            val_size=0.2,
        ),
        bad(
            "prediction-without-data",
            r"do_predict: there is nothing to evaluate on",
            do_predict=True,
            predict_with_generate=True,
        ),
        *(
            bad(f"{key}-in-pretraining", rf"{key}: needs stage: sft", stage="pt", **{key: True})
            for key in ("mask_history", "train_on_prompt")
        ),
        bad(
            "pissa-under-zero3",
            r"pissa_init: cannot be used with ZeRO-3; .*pissa_init\.py",
            deepspeed=ZERO3,
            pissa_init=True,
            **LORA,
        ),
        bad(
            "adapter-without-lora",
            r"adapter_name_or_path: needs finetuning_type: lora",
            adapter_name_or_path="someone/adapter",
        ),
        *(
            bad(
                f"{key}-that-does-not-exist",
                rf"{key}: /nowhere/x/{file} does not exist",
                **{key: "/nowhere/x"},
                **LORA,
            )
            for key, file in {
                "adapter_name_or_path": "adapter_config.json",
                "ref_model": "config.json",
                "reward_model": "config.json",
            }.items()
        ),
        bad(
            "second-adapter-that-does-not-exist",
            r"adapter_name_or_path: /nowhere/adapter_config.json does not exist",
            adapter_name_or_path="someone/adapter,/nowhere",
            **LORA,
        ),
        bad(
            "resume-from-true",
            r"resume_from_checkpoint: True does not exist; .*to continue a run use --resume",
            resume_from_checkpoint=True,
        ),
        bad("pure-bf16-on-a-cpu", r"pure_bf16: .*CPU; use bf16", pure_bf16=True),
        bad("flash-attention-3", r"flash_attn: .*fa3.*use fa2 or auto", flash_attn="fa3"),
        bad(
            "best-without-a-metric",
            r"save_strategy: best needs evaluation and a metric.*metric_for_best_model",
            save_strategy="best",
            **EVAL,
        ),
        bad(
            "best-without-evaluation",
            r"save_strategy: best needs evaluation and a metric",
            save_strategy="best",
            metric_for_best_model="loss",
        ),
        bad(
            "accuracy-that-is-not-computed",
            r"metric_for_best_model: evaluation does not give it; .*: loss .*compute_accuracy",
            **BEST,
            metric_for_best_model="accuracy",
        ),
        bad(
            "lowest-rate-not-given",
            r'lr_scheduler_type: .*lr_scheduler_kwargs: \{"min_lr',
            lr_scheduler_type="cosine_with_min_lr",
        ),
        bad(
            "lora-and-galore",
            r"use_galore: needs finetuning_type: full or freeze",
            use_galore=True,
            **LORA,
        ),
        bad(
            "galore-under-deepspeed",
            r"use_galore: cannot be combined with deepspeed",
            use_galore=True,
            deepspeed=ZERO2,
        ),
        bad(
            "workers-to-prefetch",
            r"dataloader_prefetch_factor: needs dataloader_num_workers",
            dataloader_prefetch_factor=2,
        ),
        bad(
            "workers-that-persist",
            r"dataloader_persistent_workers: needs dataloader_num_workers",
            dataloader_persistent_workers=True,
        ),
        bad(
            "deepspeed-file-of-another-batch",
            r"deepspeed: .*train_micro_batch_size_per_gpu.*auto",
            deepspeed={**ZERO2, "train_micro_batch_size_per_gpu": 4},
        ),
        bad(
            "deepspeed-file-in-bf16",
            r"deepspeed: .*bf16\.enabled.*auto",
            deepspeed={**ZERO2, "bf16": {"enabled": True}},
        ),
        bad(
            "offloading-another-optimizer",
            r"deepspeed: offloading replaces it by Adam; set optim: adamw_torch",
            deepspeed=OFFLOAD2,
            optim="sgd",
        ),
    ],
)
def test_start_that_would_fail_after_loading_is_refused(said, changes, message):
    says(said(**changes), message)


@pytest.mark.parametrize(
    ("changes", "entry", "message"),
    [
        pytest.param(
            {**LORA, "stage": "dpo"},
            {},
            r"dataset: tiny holds no preferences.*ranking",
            id="dpo-on-plain-data",
        ),
        pytest.param(
            {**LORA, "stage": "rm"},
            {},
            r"dataset: tiny holds no preferences.*ranking",
            id="rm-on-plain-data",
        ),
        pytest.param(
            {**LORA, "stage": "kto"}, {}, r"dataset: tiny: .*kto_tag", id="kto-on-plain-data"
        ),
        pytest.param({}, {"columns": FEEDBACK}, r"dataset: tiny: .*kto", id="sft-on-feedback"),
        pytest.param(
            {**LORA, "stage": "dpo"},
            {"ranking": True},
            r"dataset: tiny holds no preferences.*chosen.*rejected",
            id="preferences-without-columns",
        ),
        pytest.param(
            {**LORA, "stage": "dpo"},
            {"ranking": True, "columns": {**PAIRS, "rejected": "worst"}},
            r"dataset: tiny: .*no column worst",
            id="preferences-in-another-column",
        ),
        pytest.param(
            {**LORA, "stage": "dpo", "train_sampling_strategy": "group_by_length"},
            {"ranking": True, "columns": PAIRS},
            r"train_sampling_strategy: .*pairs",
            id="pairs-by-length",
        ),
    ],
)
def test_stage_that_does_not_fit_is_refused(
    here, write_config, tmp_path, changes, entry, message
):
    config = write_config(**changes)
    describe_data(tmp_path, **entry)
    done = here(config, "--dry-run")
    assert done.returncode == 2, done.stdout
    says(done.stderr, message)


HIDE = """
import importlib.machinery, importlib.metadata, os
hidden, real = os.environ["HIDDEN"].split(","), importlib.machinery.PathFinder.find_spec
names = {name.replace("_", "-") for name in hidden}
real_name = importlib.metadata.Distribution.from_name.__func__
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else real(name, path, target)
def from_name(cls, name):
    if name.replace("_", "-").lower() in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return real_name(cls, name)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""
PACKAGES = [  # pip's name, the module, the keys that need it
    ("liger-kernel", "liger_kernel", {"enable_liger_kernel": True}),
    ("bitsandbytes", "bitsandbytes", {"quantization_bit": 4, **LORA}),
    ("bitsandbytes", "bitsandbytes", {"optim": "paged_adamw_8bit"}),
    ("bitsandbytes", "bitsandbytes", {"optim": "adamw_bnb_8bit"}),
    ("bitsandbytes", "bitsandbytes", {"optim": "lion_32bit"}),
    ("bitsandbytes", "bitsandbytes", {"optim": "ademamix"}),
    ("galore-torch", "galore_torch", {"use_galore": True, "optim": "adamw_torch"}),
    ("apollo-torch", "apollo_torch", {"use_apollo": True, "optim": "adamw_torch"}),
    ("badam", "badam", {"use_badam": True}),
    ("unsloth", "unsloth", {"use_unsloth": True, **LORA}),
    ("adam-mini", "adam_mini", {"use_adam_mini": True}),
    ("jieba", "jieba", {"predict_with_generate": True, "val_size": 0.2}),
    ("nltk", "nltk", {"predict_with_generate": True, "val_size": 0.2}),
    ("rouge-chinese", "rouge_chinese", {"predict_with_generate": True, "val_size": 0.2}),
    (
        "modelscope",
        "modelscope",
        {"model_name_or_path": "someone/some-model", "train_from_scratch": None},
    ),
    (
        "openmind",
        "openmind",
        {"model_name_or_path": "someone/some-model", "train_from_scratch": None},
    ),
]
ALL = sorted({module for _, module, _ in PACKAGES} | {name for name, _, _ in PACKAGES})


@pytest.fixture
def packages(
    launcher: Callable, write_config: Callable, tmp_path: Path
) -> Callable[..., SimpleNamespace]:
    """A dry run in a Python that has of PACKAGES those with `there` only."""

    def launch(
        there: dict[str, str],
        *args: str,
        env: dict | None = None,
        gpus: list | None = None,
        **changes: object,
    ) -> SimpleNamespace:
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(HIDE)
        for name, module in there.items():
            (site / module).mkdir()
            (site / module / "__init__.py").write_text("")
            info = site / f"{name.replace('-', '_')}-9.9.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n"
            )
        hidden = ",".join(
            name for name in ALL if name not in there and name not in there.values()
        )
        env = {"PYTHONPATH": f"{site}:{FAKES}", "HIDDEN": hidden, **(env or {})}
        return launcher(write_config(**changes), *args, "--dry-run", env=env, gpus=gpus)

    return launch


def hub_of(name: str) -> dict[str, str]:
    """The variable that makes LLaMA-Factory load from this package's hub, where it has one."""
    return {f"USE_{name.upper()}_HUB": "1"} if name in ("modelscope", "openmind") else {}


@pytest.mark.parametrize(
    ("name", "module", "changes"),
    [
        pytest.param(*row, id=f"{row[0]}-{next(iter(row[2]))}-{next(iter(row[2].values()))}")
        for row in PACKAGES
    ],
)
def test_package_behind_a_key_is_refused_by_name_where_it_is_missing(
    packages, name, module, changes
):
    done = packages({}, env=hub_of(name), **changes)
    key = next(iter(hub_of(name) or changes))
    assert done.returncode == 2, done.stdout
    says(done.stderr, rf"{key}.*pip install .*{name.replace('-', '[-_]')}")


def test_two_packages_behind_one_key_are_both_named(packages):
    done = packages({"jieba": "jieba"}, predict_with_generate=True, val_size=0.2)
    assert "nltk" in done.stderr and re.search("rouge[-_]chinese", done.stderr)
    assert "jieba" not in done.stderr


def test_ppo_with_the_trl_of_today_is_refused(said):
    text = said(stage="ppo", reward_model="someone/reward", **LORA)
    says(text, r"stage: .*ppo.*trl")


OLD_GPU = [{"name": "Tesla T4", "total": 16, "capability": [7, 5]}]


@pytest.mark.parametrize(("key", "value"), [("flash_attn", "fa2"), ("bf16", True)])
def test_what_a_gpu_cannot_do_is_refused_with_the_gpu_s_name(packages, key, value):
    there = {"flash-attn": "flash_attn", "torchao": "torchao"}
    changes = {"bf16": True, **({"fp8_backend": "torchao"} if key == "fp8" else {}), key: value}
    done = packages(there, use_cpu=None, gpus=OLD_GPU, **changes)
    assert done.returncode == 2, done.stdout
    says(done.stderr, rf"{key}: .*8\.[09].*Tesla T4.*7\.5|{key}: .*Tesla T4.*7\.5.*8\.[09]")


# accepted before, too


@pytest.mark.parametrize(
    ("name", "module", "changes"),
    [
        pytest.param(*row, id=f"{row[0]}-{next(iter(row[2]))}-{next(iter(row[2].values()))}")
        for row in PACKAGES
        if row[0] not in ("jieba", "nltk", "rouge-chinese", "unsloth", "badam")
    ],
)
def test_package_behind_a_key_is_accepted_where_it_is_there(packages, name, module, changes):
    done = packages({name: module}, env=hub_of(name), **changes)
    assert (done.returncode, done.stderr) == (0, "")


def test_generation_is_accepted_with_its_three_packages(packages):
    done = packages(
        {"jieba": "jieba", "nltk": "nltk", "rouge-chinese": "rouge_chinese"},
        predict_with_generate=True,
        val_size=0.2,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_modelscope_is_not_needed_for_a_local_model(packages):
    done = packages({}, env={"USE_MODELSCOPE_HUB": "1"})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("gpu", [[8, 0], [9, 0], [12, 0]])
def test_what_a_gpu_can_do_is_accepted(packages, gpu):
    done = packages(
        {"flash-attn": "flash_attn"},
        use_cpu=None,
        bf16=True,
        flash_attn="fa2",
        tf32=True,
        gpus=fake_gpus(1, capability=gpu),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_bf16_that_an_old_gpu_emulates_can_be_forced(packages):
    assert packages({}, "--force", use_cpu=None, bf16=True, gpus=OLD_GPU).returncode == 0


@pytest.mark.parametrize(
    "changes",
    [
        good("zero3-that-gathers", deepspeed=ZERO3),
        good("zero3-offloaded", deepspeed=OFFLOAD3),
        good(
            "lora-needs-no-gathering",
            deepspeed={**AUTO_BATCH, "zero_optimization": {"stage": 3}},
            **LORA,
        ),
        good("weights-only-and-the-best-without-deepspeed", **BEST, save_only_model=True),
        good("early-stopping", early_stopping_steps=3, **BEST),
        good(
            "early-stopping-by-a-metric",
            early_stopping_steps=3,
            metric_for_best_model="loss",
            **EVAL,
        ),
        good("accuracy", **BEST, metric_for_best_model="accuracy", compute_accuracy=True),
        good(
            "accuracy-with-its-prefix",
            **BEST,
            metric_for_best_model="eval_accuracy",
            compute_accuracy=True,
        ),
        good(
            "loss-of-one-data-set",
            load_best_model_at_end=True,
            save_strategy="epoch",
            eval_strategy="epoch",
            eval_dataset="tiny",
            eval_on_each_dataset=True,
            metric_for_best_model="eval_tiny_loss",
        ),
        good("packing-without-flash-attention", neat_packing=True),
        good("plateau", lr_scheduler_type="greedy", **EVAL),
        good(
            "lowest-rate",
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs='{"min_lr_rate": 0.1}',
        ),
        good("prefetching", dataloader_prefetch_factor=2, dataloader_num_workers=1),
        good(
            "persistent-workers-of-streamed-data",
            dataloader_persistent_workers=True,
            streaming=True,
            max_steps=5,
        ),
        good(
            "deepspeed-file-that-agrees",
            deepspeed={**ZERO2, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}},
            bf16=True,
        ),
        good(
            "deepspeed-file-of-autos",
            deepspeed={**ZERO2, "train_batch_size": "auto", "fp16": {"enabled": "auto"}},
        ),
        good("deepspeed-file-with-an-optimizer", deepspeed=ADAM, **AGREES),
        good(
            "deepspeed-file-without-clipping-where-none-is-wanted",
            deepspeed={key: ZERO2[key] for key in ZERO2 if key != "gradient_clipping"},
            max_grad_norm=0,
        ),
        good(
            "deepspeed-file-with-a-scheduler",
            deepspeed={
                **ZERO2,
                "scheduler": {
                    "params": {
                        "warmup_max_lr": 1e-3,
                        "total_num_steps": 5,
                        "warmup_num_steps": 2,
                    }
                },
            },
            max_steps=5,
            warmup_steps=2,
        ),
        good(
            "steps-that-only-the-tokenized-data-can-tell",
            deepspeed={
                **ZERO2,
                "scheduler": {"params": {"total_num_steps": 9, "warmup_num_steps": 1}},
            },
            warmup_ratio=0.3,
        ),
        good(
            "bf16-in-evaluation",
            deepspeed={**ZERO2, "bf16": {"enabled": True}},
            bf16_full_eval=True,
        ),
        good("stage-0", deepspeed={**ZERO2, "zero_optimization": {"stage": 0}}),
        good(
            "offload-of-nothing",
            deepspeed={
                **ZERO2,
                "zero_optimization": {"stage": 2, "offload_optimizer": None},
            },
        ),
        good("metric-that-nothing-asks-for", metric_for_best_model="f1"),
        good(
            "accuracy-of-one-data-set",
            **EACH,
            metric_for_best_model="tiny_accuracy",
            compute_accuracy=True,
        ),
        good("hub-adapters", adapter_name_or_path="someone/one,someone/two", **LORA),
        good("resume-from-false", resume_from_checkpoint=False),
        *(good(f"save-total-limit-{n}", save_total_limit=n) for n in (0, -1)),
        good("fsdp-true", fsdp=True),
        good("kubeflow", report_to="kubeflow"),
        good("dora", use_dora=True, **LORA),
        good("prompts", train_on_prompt=True),
        good("history", mask_history=True),
        good("sgd-on-the-device", deepspeed=ZERO2, optim="sgd"),
    ],
)
def test_start_that_works_is_accepted(plan, changes):
    if "deepspeed" in changes and not shutil.which("c++"):
        pytest.skip("DeepSpeed on a CPU needs a C++ compiler")
    plan(**changes)


@pytest.mark.parametrize(
    ("stage", "entry"),
    [
        ("dpo", {"ranking": True, "columns": PAIRS}),
        ("rm", {"ranking": True, "columns": PAIRS}),
        ("kto", {"columns": FEEDBACK}),
        ("sft", {}),
        ("pt", {}),
    ],
)
def test_data_of_the_stage_is_accepted(here, write_config, tmp_path, stage, entry):
    config = write_config(stage=stage, **LORA)
    describe_data(tmp_path, **entry)
    done = here(config, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_adapter_and_a_reference_model_that_exist_are_accepted(plan, tmp_path):
    adapter = write_json(tmp_path / "lora" / "adapter_config.json", {}).parent
    model = write_json(tmp_path / "other" / "config.json", TINY_MODEL).parent
    plan(adapter_name_or_path=str(adapter), ref_model=str(model), **LORA)


def test_packing_takes_a_batch_of_one_where_nothing_is_evaluated(said):
    assert "neat_packing" not in said(**NEAT, bf16=True, per_device_train_batch_size=1)


def test_a_list_that_is_empty_counts_as_off(plan):
    assert plan(fsdp=[], deepspeed=ZERO3)


# --- The table of rules ---------------------------------------------------------------------------


def test_every_rule_is_of_a_key_that_there_is_and_says_in_one_line_what_to_do():
    import train_qwen3_ft as ft

    fields = ft.known_fields()
    keys = [key for keys, _, _ in ft.RULES for key in keys.split()]
    assert [key for key in keys if key not in fields] == []
    assert [text for _, _, text in ft.RULES if "\n" in text or len(text) > 160] == []
