"""Packages, versions and compilers that a run needs."""

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import SCRIPT
from helpers.config import AUTO_BATCH
from helpers.launcher import FAKES, fake_gpus, says

ZERO2 = {**AUTO_BATCH, "zero_optimization": {"stage": 2}}
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
ZERO3 = {**AUTO_BATCH, "zero_optimization": {"stage": 3, **GATHERED}}
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
