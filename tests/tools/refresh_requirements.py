"""Resolve requirements.txt and tests/requirements.txt anew, and say what changed.

    pip install uv
    python tests/tools/refresh_requirements.py            # after a change of a direct package
    python tests/tools/refresh_requirements.py --upgrade  # the newest of what these bring

Each file has two parts. The first is written by hand: the direct packages, each with its reason.
The second is written here: what pip installs, the direct packages included, in one set for Linux
(x86_64 and aarch64) and Python 3.11 to 3.13. Without --upgrade, what still fits keeps its version.

Both files are resolved together, since a tracker of the tests may allow only older versions of what
the trainer brings (mlflow: pyarrow); requirements.txt alone then holds its share of that set.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("requirements.txt", "tests/requirements.txt")
SECOND_PART = (
    "# --- What pip installs, for Linux and Python 3.11 to 3.13; never edited by hand ---\n"
)
EXPLAINED = """\
# Written by tests/tools/refresh_requirements.py. What torch itself brings for its CUDA (cuda-*,
# nvidia-*, triton) stays out, so that a torch for another CUDA can take its place."""
CHECKSUM = "# All pins up to here, sha256: "
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
COMPILE = """
uv pip compile --universal --python-version 3.11 --no-header --annotation-style line
--no-emit-index-url --no-emit-find-links
""".split()


@dataclass(frozen=True)
class Pin:
    """One line of the resolver: a version, where it holds, and which packages asked for it."""

    name: str
    version: str
    marker: str
    parents: frozenset[str]

    def holds(self, python: str, machine: str, system: str = "Linux") -> bool:
        """Whether it is installed there."""
        environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": machine,
            "platform_system": system,
            "sys_platform": {"Linux": "linux", "Windows": "win32"}[system],
        }
        return not self.marker or Marker(self.marker).evaluate(environment)

    def line(self) -> str:
        """For a file that speaks of Linux and PYTHONS only; '' where it is not installed there."""
        places = [(python, machine) for python in PYTHONS for machine in MACHINES]
        holding = [place for place in places if self.holds(*place)]
        if not holding:
            return ""
        if holding == places:
            return f"{self.name}=={self.version}"
        pythons = sorted({python for python, _ in holding}, key=PYTHONS.index)
        if len(holding) < len(pythons) * len(MACHINES):
            return f"{self.name}=={self.version} ; {self.marker}"  # differs between machines
        bounds = []
        if pythons[0] != PYTHONS[0]:
            bounds.append(f"python_version >= '{pythons[0]}'")
        if pythons[-1] != PYTHONS[-1]:
            bounds.append(f"python_version <= '{pythons[-1]}'")
        return f"{self.name}=={self.version} ; {' and '.join(bounds)}"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="the newest of what these bring")
    options = parser.parse_args()
    before = {name: (ROOT / name).read_text() for name in FILES}
    after = refresh(before, options.upgrade)
    for name in FILES:
        (ROOT / name).write_text(after[name])
        print("\n".join([f"{name}:", *changes(before[name], after[name])]))


def refresh(texts: dict[str, str], upgrade: bool) -> dict[str, str]:
    """The text of each file, by its name, with a second part that follows from the first ones."""
    direct = {name: first_part(text) for name, text in texts.items()}
    known = "\n".join(line for text in texts.values() for line in second_part(text))
    together = resolve("\n".join(direct.values()), known, ["--upgrade"] if upgrade else [])
    runtime = resolve(direct[FILES[0]], together, ["--constraints", "known.txt"])
    lines = list(installed_lines(runtime))
    rest = [line for line in installed_lines(together) if line not in lines]
    first = with_second_part(direct[FILES[0]], lines)
    return {FILES[0]: first, FILES[1]: with_second_part(direct[FILES[1]], rest, first)}


def resolve(packages: str, known: str, options: list[str]) -> str:
    """What uv finds for `packages`, where versions of `known` stay if they fit."""
    with TemporaryDirectory() as folder:
        for name, text in (("in", packages), ("known", known), ("out", known)):
            Path(folder, f"{name}.txt").write_text(text)
        command = [*COMPILE, *options, "in.txt", "--output-file", "out.txt"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            sys.exit("uv is not installed; pip install uv")
        if done.returncode:
            sys.exit(done.stderr)
        return Path(folder, "out.txt").read_text()


def installed_lines(resolved: str) -> Iterator[str]:
    """The lines of a second part."""
    found = re.findall(r"^(\S+)==(\S+)(?: ; (.+?))?\s+# via (.+)$", resolved, re.MULTILINE)
    pins = [
        Pin(*fields, frozenset(re.findall(r"(?:^|, )([^-,][^,]*)", parents)))
        for *fields, parents in found
    ]
    for_cuda = brought_for_cuda(pins)
    for pin in pins:
        line = pin.line()
        if line and pin.name not in for_cuda:
            yield line


def brought_for_cuda(pins: list[Pin]) -> set[str]:
    """What torch, and only torch, brings on Linux and not on other systems."""
    places = [(python, "x86_64", "Windows") for python in PYTHONS]
    elsewhere = {pin.name for pin in pins for place in places if pin.holds(*place)}
    on_linux = [pin for pin in pins if pin.name not in elsewhere]
    found: set[str] = set()
    while more := {pin.name for pin in on_linux if pin.parents <= found | {"torch"}} - found:
        found |= more
    return found


def first_part(text: str) -> str:
    """The direct packages with their reasons."""
    return text.partition(SECOND_PART)[0].rstrip() + "\n"


def second_part(text: str) -> list[str]:
    """The pins of all that is installed."""
    return pins_of(text.partition(SECOND_PART)[2])


def pins_of(text: str) -> list[str]:
    """Lines that pip reads."""
    return re.findall(r"^[^#\s].*$", text, re.MULTILINE)


def with_second_part(direct: str, lines: list[str], other: str = "") -> str:
    """The text of a file. Its checksum also covers `other`, a file that it goes with."""
    text = "\n".join([f"{direct}\n{SECOND_PART}{EXPLAINED}", *lines, CHECKSUM])
    return f"{text}{checksum(other + text)}\n"


def checksum(text: str) -> str:
    """What changes when any pin does."""
    return hashlib.sha256("\n".join(pins_of(text)).encode()).hexdigest()[:16]


def changes(before: str, after: str) -> list[str]:
    """`name old -> new` for each package that is not what it was."""
    old, new = versions(before), versions(after)
    lines = [
        f"  {name} {old.get(name, '(none)')} -> {new.get(name, '(none)')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    return lines or ["  unchanged"]


def versions(text: str) -> dict[str, str]:
    """name -> version, all of them where Pythons differ."""
    found: dict[str, str] = {}
    for line in second_part(text):
        name, version = line.split("==", 1)
        found[name] = f"{found[name]}, {version}" if name in found else version
    return found


if __name__ == "__main__":
    main()
