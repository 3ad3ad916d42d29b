"""What is installed is what the requirements files pin, and they are what the resolver wrote."""

import sysconfig
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import ROOT
from tools.refresh_requirements import (
    CHECKSUM,
    FILES,
    changes,
    checksum,
    first_part,
    installed_lines,
    pins_of,
    second_part,
    with_second_part,
)
from tools.three_pythons import downloads

REFRESH = "python tests/tools/refresh_requirements.py"
TEXTS = {name: (ROOT / name).read_text() for name in FILES}
# What makes a virtual environment puts them there.
OF_THE_ENVIRONMENT = {"pip", "wheel"}


def versions(lines: list[str]) -> dict[str, str]:
    """name -> version of the pins that hold for this Python."""
    found = [Requirement(line) for line in lines]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in found
        if pin.marker is None or pin.marker.evaluate()
    }


def pinned() -> dict[str, str]:
    """name -> version in both files."""
    return versions([line for text in TEXTS.values() for line in second_part(text)])


def installed() -> dict[str, str]:
    """name -> version in this environment, without the local part (2.11.0+cu126)."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return {
        canonicalize_name(found.metadata["Name"]): found.version.partition("+")[0]
        for found in metadata.distributions(path=list(folders))
    }


def needed(parent: Requirement) -> list[Requirement]:
    """What an installed package asks for here, with the extras that `parent` names."""
    try:
        asked = [Requirement(line) for line in metadata.requires(parent.name) or []]
    except metadata.PackageNotFoundError:
        return []
    extras = parent.extras or {""}
    return [
        each
        for each in asked
        if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def for_cuda() -> list[Requirement]:
    """What the installed torch asks for on Linux only."""
    return [each for each in needed(Requirement("torch")) if "platform_" in str(each.marker)]


def brought_by_torch() -> set[str]:
    """The packages of its CUDA, and what only these bring."""
    found, new = set(), for_cuda()
    while new:
        found |= {canonicalize_name(each.name) for each in new}
        more = [child for parent in new for child in needed(parent)]
        new = [each for each in more if canonicalize_name(each.name) not in found]
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_direct_packages_are_pinned_as_they_were_resolved(name):
    direct = versions(pins_of(first_part(TEXTS[name])))
    assert direct.items() <= pinned().items(), f"a direct package was changed; {REFRESH}"


@pytest.mark.parametrize("name", FILES)
def test_no_pin_was_edited_by_hand(name):
    above = "" if name == FILES[0] else TEXTS[FILES[0]]
    text, _, stated = TEXTS[name].partition(CHECKSUM)
    assert stated.strip() == checksum(above + text), f"{name} was edited by hand; {REFRESH}"


def test_every_installed_package_is_pinned_at_its_version():
    known = pinned()
    unpinned = {
        name: f"{version} is installed, {known.get(name, 'none')} is pinned"
        for name, version in installed().items()
        if known.get(name) != version
    }
    for name in OF_THE_ENVIRONMENT | (brought_by_torch() - set(known)):
        unpinned.pop(name, None)
    assert not unpinned


def test_a_torch_for_another_cuda_can_take_the_place_of_the_pinned_one():
    assert not {canonicalize_name(each.name) for each in for_cuda()} & set(pinned())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace("gradio==5", "gradio==4"), id="a-version"),
        pytest.param(
            lambda text: text.replace("pydantic==", "# pydantic=="), id="a-line-left-out"
        ),
        pytest.param(
            lambda text: text.replace(CHECKSUM, f"left-pad==1.0\n{CHECKSUM}"), id="added"
        ),
    ],
)
def test_a_pin_that_is_edited_changes_the_checksum(change):
    text = TEXTS[FILES[0]]
    assert checksum(change(text)) != checksum(text)


RESOLVED = """\
audioop-lts==0.2.2 ; python_full_version >= '3.13'    # via gradio
colorama==0.4.6 ; sys_platform == 'win32'    # via click
cuda-toolkit==13.0.2 ; sys_platform == 'linux'    # via -c known.txt, torch
hf-xet==1.8.0 ; platform_machine == 'aarch64' or platform_machine == 'x86_64'    # via transformers
networkx==3.6.1 ; python_full_version < '3.12'    # via torch
networkx==3.7 ; python_full_version >= '3.12'    # via torch
nvidia-cublas==13.1.0.3 ; sys_platform == 'linux'    # via cuda-toolkit, nvidia-cudnn-cu13
nvidia-cudnn-cu13==9.19.0.56 ; sys_platform == 'linux'    # via torch
nvidia-ml-py==13.615.71    # via swanlab
pyroaring==1.0.3 ; python_full_version < '3.14'    # via modelscope
torch==2.11.0    # via -r in.txt, llamafactory
uvloop==1.0 ; sys_platform == 'linux'    # via cuda-toolkit, gradio
"""


def test_the_set_is_for_linux_and_three_pythons_without_the_cuda_of_torch():
    assert list(installed_lines(RESOLVED)) == [
        "audioop-lts==0.2.2 ; python_version >= '3.13'",
        "hf-xet==1.8.0",
        "networkx==3.6.1 ; python_version <= '3.11'",
        "networkx==3.7 ; python_version >= '3.12'",
        "nvidia-ml-py==13.615.71",
        "pyroaring==1.0.3",
        "torch==2.11.0",
        "uvloop==1.0",
    ]


def test_the_refresh_says_what_changed():
    before = with_second_part(
        "a==1", ["a==1", "b==1", "c==1 ; python_version <= '3.11'", "d==1"]
    )
    after = with_second_part("a==1", ["a==1", "b==2", "e==1"])
    assert changes(before, after) == [
        "  b 1 -> 2",
        "  c 1 ; python_version <= '3.11' -> (none)",
        "  d 1 -> (none)",
        "  e (none) -> 1",
    ]


def test_a_package_that_pip_reads_in_several_versions_is_named():
    once = """\
Collecting gradio==5.50.0 (from -r requirements.txt (line 53))
  Downloading gradio-5.50.0-py3-none-any.whl.metadata (16 kB)
  Downloading gradio-5.50.0-py3-none-any.whl (63.5 MB)
  Downloading pwinput-1.0.3.tar.gz (500 kB)
"""
    again = "  Downloading gradio-5.49.1-py3-none-any.whl (63.0 MB)\n"
    assert downloads(once) == (64, "")
    assert downloads(once + again)[1] == "downloaded more than once: gradio"
