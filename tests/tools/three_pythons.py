"""Install and run everything on several Pythons, each in a fresh virtual environment.

    python tests/tools/three_pythons.py python3.11 python3.12 python3.13
    python tests/tools/three_pythons.py --installer uv --tests tests/test_install.py python3.13

For each: the installation from an empty cache (seconds, MB, each package downloaded once), `pip
check`, the demo, two ranks under ZeRO-3, a resume, --preview and the light tests. A line per step;
the end of its output where it failed, and exit code 1. About 10 minutes and 12 GB of disk at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = "python train_qwen3_ft.py configs/demo_cpu.yaml report_to=none output_dir={folder}/saves"
STEPS = {
    "pip check": "python -m pip check",
    "demo": f"{RUN} max_steps=20",
    "two ranks under ZeRO-3": f"{RUN} run_name=two max_steps=20 save_steps=10 "
    "deepspeed=configs/deepspeed/ds_z3_config.json",
    "resume": "python train_qwen3_ft.py --resume {folder}/saves/two max_steps=30",
    "preview": f"{RUN} --preview",
    "light tests": "python -m pytest -q -n 2 {tests}",
}
VARIABLES = {
    "two ranks under ZeRO-3": {"NPROC_PER_NODE": "2"},
    "resume": {"NPROC_PER_NODE": "2"},
}
INSTALLERS = {"pip": "python -m pip install", "uv": "uv pip install"}
FILES = ("-r requirements.txt", "-r tests/requirements.txt")


def main() -> int:
    """0 where every step passed on every Python."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("interpreters", nargs="+", help="such as python3.12")
    parser.add_argument("--installer", choices=INSTALLERS, default="pip")
    parser.add_argument("--tests", default="-m 'not real'", help="what pytest is to run")
    options = parser.parse_args()
    passed = True
    for interpreter in options.interpreters:
        with TemporaryDirectory() as folder:
            for name, problem in check(interpreter, options, Path(folder)):
                print(f"{interpreter}: {name}{problem and ' FAILED'}", flush=True)
                if problem:
                    print(problem, file=sys.stderr, flush=True)
                    passed = False
    return 0 if passed else 1


def check(
    interpreter: str, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, str]]:
    """(what was done and how long it took, '' or what went wrong) for each step."""
    venv = folder / "venv"
    subprocess.run([interpreter, "-m", "venv", str(venv)], check=True)
    env = os.environ | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(venv),
        "PIP_CACHE_DIR": str(folder / "cache"),
        "UV_CACHE_DIR": str(folder / "cache"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    for files in (FILES[0], " ".join(FILES)):
        command = f"{INSTALLERS[options.installer]} {files}"
        seconds, code, output = run(command, env)
        read, again = downloads(output)
        said = f"{command}: {seconds:.0f} s"
        yield said + (f", {read:.0f} MB" if read else ""), output if code else again
        if code:
            return
    for name, command in STEPS.items():
        changes = VARIABLES.get(name, {})
        seconds, code, output = run(
            command.format(folder=folder, tests=options.tests), env | changes
        )
        yield f"{name}: {seconds:.0f} s{last_figure(output)}", output if code else ""


def run(command: str, env: dict[str, str]) -> tuple[float, int, str]:
    """Seconds, exit code and all output of a command that runs beside the script."""
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return time.monotonic() - began, done.returncode, done.stdout


def downloads(output: str) -> tuple[float, str]:
    """MB that pip read for the packages, and a problem where one was read in several versions."""
    found = re.findall(
        r"^ +Downloading (\S+?)-(\d\S*)(?<!metadata) \(([\d.]+) (kB|MB|GB|bytes)\)",
        output,
        re.MULTILINE,
    )
    sizes = {"bytes": 1e-6, "kB": 1e-3, "MB": 1, "GB": 1e3}
    read = sum(float(size) * sizes[unit] for _, _, size, unit in found)
    several = [name for name, count in Counter(name for name, *_ in found).items() if count > 1]
    return read, f"downloaded more than once: {', '.join(several)}" if several else ""


def last_figure(output: str) -> str:
    """What a run or the tests say at their end."""
    found = re.findall(r"^(?:state|loss) .*|^\d+ passed.*", output, re.MULTILINE)
    return "".join(f"; {' '.join(line.split())}" for line in found[-2:])


if __name__ == "__main__":
    sys.exit(main())
