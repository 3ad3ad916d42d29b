#!/usr/bin/env python3
"""Full-parameter fine-tuning of Qwen3 with LLaMA-Factory, DeepSpeed ZeRO-3 and SwanLab.

    python train_qwen3_ft.py configs/demo_cpu.yaml            # two minutes on any CPU, no download
    python train_qwen3_ft.py                                  # configs/qwen3_14b_ft.yaml, the GPUs it names
    CUDA_VISIBLE_DEVICES=0,1 python train_qwen3_ft.py         # two GPUs, whatever the YAML says
    python train_qwen3_ft.py my.yaml learning_rate=2e-5       # any YAML key can be overridden

Usage: python train_qwen3_ft.py [CONFIG.yaml] [key=value ...] [--dry-run [--json]] [--resume [RUN_DIR]]
                                [--force] [--verbose]

CONFIG is a LLaMA-Factory training YAML. Besides LLaMA-Factory's keys it takes the launcher's own:
cuda_visible_devices (GPU ids as nvidia-smi shows them; the environment's CUDA_VISIBLE_DEVICES wins),
global_batch_size (samples an optimizer step; gradient accumulation follows from the GPUs there are) and
max_restarts (default 3). The script starts torchrun on itself, one process per GPU; it also works when you
or Slurm start it through torchrun.

Before anything starts, all of this is checked at once: keys, types and choices against the installed
LLaMA-Factory; contradictions; model, data and DeepSpeed files; packages; GPUs; memory and disk against an
estimate. It cannot check what only a run can show: that a download works, that the data tokenizes, that
activations of an unknown architecture fit.

Everything of a run is in <output_dir>/<YYYYmmdd-HHMMSS> (run_name=NAME replaces the timestamp): config.yaml
(can be launched again), plan.json, logs/rank<R>.log, checkpoint-N/, trainer_log.jsonl, training_loss.png,
summary.json and the model. Beside it, <output_dir>/swanlog has the SwanLab records of all runs.

Ctrl-C, SIGTERM or a file STOP in the run directory: a checkpoint at the end of the step, then the end;
--resume goes on from there. A crash after a checkpoint restarts by itself.

Exit codes: 0 done; 1 training failed; 2 nothing was started (arguments, config or machine); 128+N stopped
by signal N after a checkpoint.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import errno
import fcntl
import gc
import hashlib
import itertools
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

try:
    import yaml
except ModuleNotFoundError:
    sys.stderr.write("error: package pyyaml is not installed; pip install -r requirements.txt\n")
    sys.exit(2)

# torch, transformers, llamafactory, deepspeed and swanlab are imported inside the worker's functions only:
# CUDA_VISIBLE_DEVICES must be set before torch looks at it, and the parent must start at once.

SCRIPT = Path(__file__).resolve()
DEFAULT_CONFIG = SCRIPT.parent / "configs" / "qwen3_14b_ft.yaml"
DEMO_COMMAND = f"python {SCRIPT.name} configs/demo_cpu.yaml"
RUN_DIR_VARIABLE = "QWEN3_FT_RUN_DIR"
SECRETS_VARIABLE = "QWEN3_FT_SECRETS"
STARTED_VARIABLE = "QWEN3_FT_STARTED"
LAUNCHER_VARIABLE = "QWEN3_FT_LAUNCHER"
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its workers
OVERRIDE = re.compile(r"[\w-]+=")
SECRET_KEY = re.compile(r"(^|[_-])(token|api[_-]key|secret|password|webhook_url)$")
# Read by the hub and tracker libraries themselves, so the value need not pass through pickled arguments.
SECRET_ENVIRONMENT = {
    "hf_hub_token": "HF_TOKEN",
    "hub_token": "HF_TOKEN",
    "swanlab_api_key": "SWANLAB_API_KEY",
}
INPUT_PATHS = (
    "deepspeed",
    "dataset_dir",
    "media_dir",
    "resume_from_checkpoint",
    "tokenized_path",
    "fsdp_config",
)
MODEL_PATHS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "reward_model")
OUTPUT_PATHS = ("output_dir", "cache_dir", "swanlab_logdir", "profiler_output_dir")
NODE_VARIABLES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what each of NNODES machines needs
MEETING_SECONDS = 900  # how long machines wait for one another
NAMES = ("run_name", *INPUT_PATHS, *MODEL_PATHS, *OUTPUT_PATHS)  # here 1.10 is a name, not a number


@dataclass(frozen=True)
class Problem:
    """What the user can mend: what is wrong, where, what was expected, how to mend it. --force may can_force it."""

    text: str
    can_force: bool = False


class LaunchError(Exception):
    """Nothing was started, and why: every problem that was found; exit code 2."""

    def __init__(self, *problems: str | Problem):
        self.problems = [
            problem if isinstance(problem, Problem) else Problem(problem) for problem in problems
        ]
        super().__init__("\n".join(problem.text for problem in self.problems))


@dataclass(frozen=True)
class Config:
    """A resolved configuration: absolute paths, no secrets in `values`, and where each key was given."""

    source: str
    values: dict
    lines: dict[str, int] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    refused: frozenset[str] = (
        frozenset()
    )  # keys that had a value that could not be cast; they are not in `values`

    def where(self, key: str) -> str:
        """The place to mend `key`, for a message: `file.yaml:12` or `command line`."""
        return f"{self.source}:{self.lines[key]}" if key in self.lines else "command line"


@dataclass(frozen=True)
class Field:
    """What a key takes: names of Python types (none: anything) and, for an enumeration, the words."""

    kinds: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = {
            "bool": "true or false",
            "int": "a whole number",
            "float": "a number",
            "str": "text",
            "list": "a list",
            "dict": "a mapping",
        }
        return (
            "one of " + ", ".join(self.choices)
            if self.choices
            else " or ".join(
                words[kind]
                for kind in words
                if kind in self.kinds and not (kind == "int" and "float" in self.kinds)
            )
        )


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML reports it; memory in bytes, `users` are the processes that hold memory on it."""

    index: int
    uuid: str
    name: str
    total: int
    used: int
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class Devices:
    """The GPUs of this machine that the run uses, why, and how many processes that makes.

    `ids` are the words of CUDA_VISIBLE_DEVICES, as nvidia-smi numbers them; none means CPU.
    """

    ids: tuple[str, ...]
    reason: str
    processes: int

    def __str__(self) -> str:
        what = f"GPU{'s' * (len(self.ids) > 1)} {','.join(self.ids)}" if self.ids else "CPU"
        return f"{what} ({self.reason}), {self.processes} process{'es' * (self.processes > 1)}"


@dataclass(frozen=True)
class Model:
    """What the plan needs of a model: the number of its parameters, and its config.json."""

    parameters: int
    shape: dict

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest weight matrix, the most that ZeRO-3 gathers for one module."""
        return self.shape["hidden_size"] * max(
            self.shape["vocab_size"], self.shape.get("intermediate_size") or 0
        )


@dataclass(frozen=True)
class Zero:
    """What the plan needs of a DeepSpeed file: the ZeRO stage (0: none) and what is offloaded to host memory."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    used: bool = False

    def __str__(self) -> str:
        moved = ["optimizer"] * self.offload_optimizer + ["parameters"] * self.offload_parameters
        name = f"ZeRO-{self.stage}" if self.used else "DDP"
        return name + (f" with {' and '.join(moved)} in host memory" if moved else "")


@dataclass(frozen=True)
class Steps:
    """The arithmetic of a run; None where it can only be known once the data is tokenized, with the reason."""

    samples: int | None
    per_epoch: int | None
    total: int | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run will take; None where it cannot be known. Memory and disk in bytes."""

    devices: Devices
    world_size: int
    zero: Zero
    values: dict  # the configuration over DEFAULTS
    steps: Steps
    model: Model | None
    device_bytes: int | None
    disk_free: int
    memory: dict[str, int] | None = None  # each device's parts
    host_memory: int | None = None
    checkpoint_bytes: int | None = None
    disk_bytes: int | None = None
    gathered: int | None = None

    @property
    def global_batch(self) -> int:
        """Samples an optimizer step over all ranks."""
        return (
            self.values["per_device_train_batch_size"]
            * self.world_size
            * self.values["gradient_accumulation_steps"]
        )

    def needs(self, zero: Zero, world_size: int, **changes: object) -> tuple[int, int]:
        """(bytes a device, bytes on the host) that this run would need with another ZeRO, ranks or keys."""
        memory = estimate_memory(
            self.model, zero, {**self.values, **changes}, world_size, self.devices.processes
        )
        host = memory.pop("host")
        return sum(memory.values()), host


@dataclass(frozen=True)
class Preflight:
    """A run that could start: its configuration with every value cast, its plan, and what speaks against it.

    `plan` is None where a value is so wrong that there is nothing to plan; `model` is what the plan says of the
    model; `run_dir` is the directory of the run that is resumed, None where a new one will be created.
    """

    config: Config
    plan: Plan | None
    model: str
    problems: list[Problem]
    run_dir: Path | None = None


@dataclass(frozen=True)
class Tracking:
    """How SwanLab records the run: its mode, why, and what is passed to swanlab.init."""

    mode: str
    reason: str
    init: dict

    def __str__(self) -> str:
        return f"SwanLab {self.mode} ({self.reason}), {self.init['log_dir']}"


# ====================================================================================================
# Launcher
# ====================================================================================================


def main(argv: list[str] | None = None) -> int:
    """Run the launcher, or a worker where torchrun started this process; returns the exit code."""
    open_standard_streams()
    try:
        options, env = parse_arguments(sys.argv[1:] if argv is None else argv), dict(os.environ)
        if options.tracker:
            return run_tracker()
        if UNDER_TORCHRUN in env:
            return run_rank(options, env)
        job = preflight_or_stop(options, env)
        return launch(job, env, options.verbose) if job else 0
    except LaunchError as error:
        for problem in error.problems:
            say(
                f"error: {problem.text}{' (--force overrules this)' if problem.can_force else ''}",
                sys.stderr,
            )
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # before the run began; from then on StopRequest takes Ctrl-C


def open_standard_streams() -> None:
    """Open what was closed of stdin, stdout and stderr, and print what a terminal cannot encode all the same."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # takes the lowest free number: this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Split the command line into `config` (path), `overrides` ({key: text}) and the options."""
    parser = ArgumentParser(
        prog=SCRIPT.name,
        description=__doc__,
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml, key=value", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, problems and command; start nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="with --dry-run: the plan as one JSON object"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_DIR",
        help="go on with RUN_DIR, or with the newest unfinished run under output_dir",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="start in spite of an estimate, a busy GPU or a version",
    )
    parser.add_argument("--verbose", action="store_true", help="show all that rank 0 prints")
    parser.add_argument("--tracker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    words, options.words = options.words, []
    if options.resume and (re.match(OVERRIDE, options.resume) or Path(options.resume).is_file()):
        words, options.resume = (
            [options.resume, *words],
            "",
        )  # --resume CONFIG.yaml key=value: no RUN_DIR was given
    options.overrides = dict(word.split("=", 1) for word in words if re.match(OVERRIDE, word))
    paths = [word for word in words if not re.match(OVERRIDE, word)]
    if len(paths) > 1:
        hint = "; write key=value without spaces" if "=" in paths else ""
        shown = re.sub(r"=\S+", "=...", " ".join(paths))
        raise LaunchError(f"one CONFIG.yaml is expected, got {len(paths)}: {shown}{hint}")
    if paths and options.resume:
        raise LaunchError(
            f"--resume {options.resume} goes on with the config.yaml of that run; leave out {paths[0]}, "
            "and write what is to change as key=value"
        )
    options.config = Path(paths[0]) if paths else DEFAULT_CONFIG
    if options.json and not options.dry_run:
        raise LaunchError("--json goes with --dry-run")
    return options


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are the launcher's."""

    def error(self, message: str):
        message = re.sub(r"=\S+", "=...", message)  # a mistyped secret is not repeated
        raise LaunchError(f"{message}; see python {SCRIPT.name} --help")


def preflight_or_stop(options: argparse.Namespace, env: dict[str, str]) -> Preflight | None:
    """The job to start; None after a dry run, and where the run to resume is finished.

    Raises LaunchError with all problems that --force does not can_force.
    """
    run_dir = find_run(options)
    if run_dir and is_finished(run_dir):
        say(
            f"{run_dir}: this run is finished; nothing to resume. To train its model further: python {SCRIPT.name} "
            f"model_name_or_path={run_dir}"
        )
        return None
    job = preflight(options, env, run_dir)
    if options.dry_run:
        dry_run(job, options.json, env)
    stopping = [problem for problem in job.problems if not (problem.can_force and options.force)]
    if stopping:
        raise LaunchError(*stopping)
    return None if options.dry_run else job


def find_run(options: argparse.Namespace) -> Path | None:
    """The run directory that --resume means: RUN_DIR, else the newest unfinished one, rather one with a checkpoint;
    None: a new run."""
    if options.resume is None:
        return None
    if options.resume:
        run_dir = Path(options.resume).expanduser().resolve()
        if not (run_dir / "config.yaml").is_file():
            raise LaunchError(
                f"--resume {options.resume}: {run_dir}/config.yaml does not exist; expected the "
                "directory of a run"
            )
        return run_dir
    output_dir = Path(load_config(options.config, options.overrides).values.get("output_dir", "."))
    runs = sorted(output_dir.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise LaunchError(
            f"--resume: there is no run under {output_dir}; start one without --resume"
        )
    unfinished = [path for path in runs if not is_finished(path.parent)]
    resumable = (path for path in reversed(unfinished) if newest_checkpoint(path.parent))
    return next(resumable, (unfinished or runs)[-1]).parent


def is_finished(run_dir: Path) -> bool:
    """Whether the run has trained to its end."""
    return read_summary(run_dir).get("state") == "finished"


def read_summary(run_dir: Path) -> dict:
    """summary.json, the account of how the run ended; {} while there is none."""
    return read_json_or_empty(run_dir / "summary.json")


def preflight(options: argparse.Namespace, env: dict[str, str], run_dir: Path | None) -> Preflight:
    """From the command line to a plan and all problems, writing nothing; `run_dir` is the run that is resumed.

    Raises LaunchError for unreadable input.
    """
    config = load_config(run_dir / "config.yaml" if run_dir else options.config, options.overrides)
    if run_dir:
        config = replace(
            config,
            values={**config.values, "output_dir": str(run_dir.parent), "run_name": run_dir.name},
        )
    fields = known_fields()
    config, problems = check_keys(config, fields) if fields else (config, [])
    out_of_range = check_ranges(config)
    problems, broken = problems + out_of_range, bool(out_of_range)
    devices, nodes, gpus, found = inspect_machine(config, env)
    zero, more = inspect_deepspeed(config)
    config, wrong = (
        (config, []) if broken else derive_accumulation(config, devices.processes * nodes)
    )
    problems += found + more + wrong + check_packages(config, zero, env) + check_output(config)
    problems += check_values(config, zero)
    model, name, wrong = inspect_model(config)
    rows, more = inspect_data(config, "dataset")
    problems += wrong + more + inspect_data(config, "eval_dataset")[1]
    plan = None if broken else make_plan(config, devices, zero, model, rows, gpus, nodes)
    problems += check_plan(plan, config, gpus) if plan and not found else []
    if plan and run_dir:
        problems += (check_alive(run_dir) if node_rank(env) == 0 else []) or check_resume(
            config, plan, run_dir
        )
    return Preflight(config, plan, name, problems, run_dir)


LAUNCHER_FIELDS = {
    "cuda_visible_devices": Field(),
    "global_batch_size": Field(frozenset({"int"})),
    "max_restarts": Field(frozenset({"int"})),
}


FIELD_SOURCES = (
    *(
        f"llamafactory/hparams/{name}_args.py"
        for name in ("model", "data", "training", "finetuning", "generating")
    ),
    "transformers/training_args.py",
    "transformers/training_args_seq2seq.py",
)


CHOICE_SOURCES = (
    "transformers/trainer_utils.py",
    "transformers/training_args.py",
    "llamafactory/extras/constants.py",
)


# Enumerations that the launcher widens: SwanLab's modes of today beside LLaMA-Factory's two.
SWANLAB_MODES = ("online", "cloud", "local", "offline", "disabled")


EXTRA_CHOICES = {"swanlab_mode": SWANLAB_MODES}


# Text that LLaMA-Factory splits at commas, so that a list does as well.
SPLIT_KEYS = {
    "dataset",
    "eval_dataset",
    "adapter_name_or_path",
    "interleave_probs",
    "lora_target",
    "oft_target",
    "galore_target",
    "apollo_target",
    "additional_target",
    "freeze_trainable_modules",
    "freeze_extra_modules",
}


def known_fields() -> dict[str, Field]:
    """Every key of the installed LLaMA-Factory and transformers with what it takes; {} where they are missing."""
    try:
        trees = {name: ast.parse(source_of(name)) for name in {*FIELD_SOURCES, *CHOICE_SOURCES}}
    except OSError:
        return {}
    choices = {
        node.name: tuple(enum_values(node))
        for name in CHOICE_SOURCES
        for node in trees[name].body
        if isinstance(node, ast.ClassDef)
        and any("Enum" in ast.unparse(base) for base in node.bases)
    }
    fields = dict(LAUNCHER_FIELDS)
    for name in FIELD_SOURCES:
        for line in (
            line
            for node in trees[name].body
            if isinstance(node, ast.ClassDef)
            for line in node.body
        ):
            if isinstance(line, ast.AnnAssign) and "init=False" not in ast.unparse(
                line.value or line.target
            ):
                found = read_annotation(line.annotation, choices)
                if found.choices:
                    found = replace(
                        found, choices=found.choices + EXTRA_CHOICES.get(line.target.id, ())
                    )
                if line.target.id in SPLIT_KEYS:
                    found = replace(found, kinds=found.kinds | {"list"})
                fields[line.target.id] = found
    return fields


def source_of(name: str) -> str:
    """The text of a file of an installed package, `package/path.py`. Raises OSError where it is missing."""
    package, _, path = name.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(name)
    return Path(spec.submodule_search_locations[0], path).read_text(encoding="utf-8")


def enum_values(node: ast.ClassDef) -> list[str]:
    """The string values of an Enum class."""
    return [
        line.value.value
        for line in node.body
        if isinstance(line, ast.Assign) and isinstance(getattr(line.value, "value", None), str)
    ]


def read_annotation(node: ast.expr, choices: dict[str, tuple[str, ...]]) -> Field:
    """Turn a field's annotation, such as `IntervalStrategy | str | None`, into a Field."""
    if isinstance(node, ast.BinOp):
        left, right = read_annotation(node.left, choices), read_annotation(node.right, choices)
        return Field(left.kinds | right.kinds, left.choices + right.choices)
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value)
        if name == "Literal":
            return Field(
                choices=tuple(ast.literal_eval(node.slice))
                if isinstance(node.slice, ast.Tuple)
                else (ast.literal_eval(node.slice),)
            )
        return read_annotation(node.slice if name == "Optional" else node.value, choices)
    name = ast.unparse(node)
    if name in choices:
        return Field(choices=choices[name])
    return Field(frozenset({name} & {"bool", "int", "float", "str", "list", "dict"}))


def check_keys(config: Config, fields: dict[str, Field]) -> tuple[Config, list[Problem]]:
    """The configuration with every value cast, and a problem for each key or value that cannot be."""
    problems, values = [], dict(config.values)
    for key, value in config.values.items():
        if key not in fields:
            hint = did_you_mean(key.replace("-", "_"), fields) or "; LLaMA-Factory has no such key"
            problems.append(Problem(f"{config.where(key)}: {key}: unknown key{hint}"))
            values.pop(key)
            continue
        try:
            values[key] = cast(value, fields[key])
        except (ValueError, OverflowError):
            problems.append(
                Problem(
                    f"{config.where(key)}: {key}: expected {fields[key]}, got {value!r}"
                    + did_you_mean(str(value), fields[key].choices)
                )
            )
            values.pop(key)
    problems += [
        Problem(
            f"{config.where(key)}: {key}: unknown key{did_you_mean(key.replace('-', '_'), fields)}"
        )
        for key in config.secrets
        if key not in fields
    ]
    return replace(
        config, values=values, refused=frozenset(set(config.values) & set(fields) - set(values))
    ), problems


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean WORD?` of the nearest of `words`; '' where none is near."""
    spelled = {other.lower(): other for other in words}
    near = difflib.get_close_matches(word.lower(), spelled, 1)
    return f"; did you mean {spelled[near[0]]}?" if near else ""


def cast(value: object, wanted: Field) -> object:
    """`value` as the type the key takes; LLaMA-Factory casts nothing that comes as a dict. Raises ValueError.

    A YAML 1.1 boolean word (yes, no, on, off) is a boolean where one is wanted, and false is the word `no`
    where the choices have it (save_strategy: false).
    """
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if wanted.choices:
        word = "no" if value is False and "no" in wanted.choices else value
        if word in wanted.choices or (isinstance(word, list) and "list" in wanted.kinds):
            return word
        raise ValueError
    kinds = wanted.kinds
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    if not kinds or type(value).__name__ in kinds:
        return value
    if isinstance(value, bool):
        raise ValueError
    if "bool" in kinds and str(value).lower() in words:
        return words[str(value).lower()]
    if "int" in kinds and isinstance(value, (str, float)) and float(value) == int(float(value)):
        return int(float(value))
    if "float" in kinds and isinstance(value, (str, int)):
        return float(value)
    if "str" in kinds and isinstance(value, (int, float)):
        return str(value)
    raise ValueError


AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "cutoff_len",
    "max_samples",
    "global_batch_size",
    "preprocessing_num_workers",
    "ddp_timeout",
    "preprocessing_batch_size",
    "save_total_limit",
    "buffer_size",
)


MORE_THAN_ZERO = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")


NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "warmup_ratio",
    "warmup_steps",
    "max_grad_norm",
    "val_size",
    "dataloader_num_workers",
    "max_restarts",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)


SHARE_OR_WHOLE = ("logging_steps", "save_steps", "eval_steps", "warmup_steps")


def check_ranges(config: Config) -> list[Problem]:
    """Numbers that cannot be: with one of them there is nothing to plan."""
    rules = (
        (AT_LEAST_ONE, lambda x: x >= 1, "1 or more"),
        (MORE_THAN_ZERO, lambda x: x > 0, "more than 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (("warmup_ratio",), lambda x: x <= 1, "a share up to 1"),
        (SHARE_OR_WHOLE, lambda x: x < 1 or x == int(x), "a whole number, or a share below 1"),
        (
            ("val_size",),
            lambda x: x < 1 or x == int(x) > 1,
            "a share below 1, or a whole number above 1",
        ),
        (("max_steps",), lambda x: x, "-1 (as many as the epochs have) or 1 or more"),
    )
    return [
        Problem(f"{config.where(key)}: {key}: expected {wanted}, got {config.values[key]}")
        for keys, fits, wanted in rules
        for key in keys
        if isinstance(config.values.get(key), (int, float)) and not fits(config.values[key])
    ]


def inspect_machine(
    config: Config, env: dict[str, str]
) -> tuple[Devices, int, list[Gpu], list[Problem]]:
    """(devices, number of machines, what NVML knows of the devices, problems)."""
    on_cpu = config.values.get("use_cpu") is True
    gpus, note = ([], "") if on_cpu else query_gpus()
    try:
        devices, nodes = resolve_devices(config, env, gpus), read_count(env, "NNODES", 1)
        problems = ([] if on_cpu else check_devices(devices, gpus, note)) + check_nodes(
            config, env, nodes
        )
    except LaunchError as error:
        return Devices((), "unknown", 1), 1, [], error.problems
    if gpus is None:
        devices = replace(devices, reason=f"{devices.reason}; {note}")
    return devices, nodes, chosen_gpus(devices, gpus), problems


def query_gpus() -> tuple[list[Gpu] | None, str]:
    """The machine's GPUs by NVML, in nvidia-smi's order, and a note; None where NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None, "not checked, since nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        return [read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())], ""
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers on this machine (NVML: {error})"


def read_gpu(pynvml, index: int) -> Gpu:
    """What NVML knows of GPU `index`."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        users = tuple(
            f"pid {process.pid} ({format_bytes(process.usedGpuMemory or 0)})"
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        )
    except pynvml.NVMLError:  # containers often hide other containers' processes
        users = ()
    uuid, name = (
        text.decode() if isinstance(text, bytes) else text
        for text in (pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
    )
    return Gpu(index, uuid, name, memory.total, memory.used, users)


def resolve_devices(config: Config, env: dict[str, str], gpus: list[Gpu] | None) -> Devices:
    """Choose the GPUs: CUDA_VISIBLE_DEVICES in the environment, else in the YAML, else all there are.

    Pure: `gpus` is what NVML found (None: unknown). Raises LaunchError.
    """
    if config.values.get("use_cpu") is True:
        return Devices((), "use_cpu: true", read_count(env, "NPROC_PER_NODE", 1))
    asked = config.values.get("cuda_visible_devices")
    if "CUDA_VISIBLE_DEVICES" in env:
        ids = parse_device_ids(
            env["CUDA_VISIBLE_DEVICES"], "environment variable CUDA_VISIBLE_DEVICES"
        )
        other = (
            ""
            if asked is None
            else ",".join(
                parse_device_ids(
                    asked, f"{config.where('cuda_visible_devices')}: cuda_visible_devices"
                )
            )
        )
        differs = asked is not None and other != ",".join(ids)
        wins = f", which wins over the config's {other or 'none'}" if differs else ""
        reason = f"from CUDA_VISIBLE_DEVICES{wins}"
    elif asked is not None:
        ids = parse_device_ids(
            asked, f"{config.where('cuda_visible_devices')}: cuda_visible_devices"
        )
        reason = f"from cuda_visible_devices, {config.where('cuda_visible_devices')}"
    else:
        ids, reason = tuple(str(gpu.index) for gpu in gpus or ()), "all GPUs of this machine"
    processes = read_count(env, "NPROC_PER_NODE", len(ids))
    if processes > len(ids) > 0:
        raise LaunchError(
            f"environment variable NPROC_PER_NODE: {processes} processes were asked for, but only "
            f"{len(ids)} GPUs ({','.join(ids)}; {reason}); one process needs one GPU"
        )
    return Devices(ids[:processes], reason, processes)


def parse_device_ids(value: object, source: str) -> tuple[str, ...]:
    """Read `0`, `"0,1"`, `[0, 1]`, `"GPU-uuid"` or MIG ids; "" and -1 mean no GPU. Raises LaunchError."""
    items = value if isinstance(value, list) else str(value).split(",")
    ids = tuple(str(item).strip() for item in items)
    if ids in (
        (),
        ("",),
        ("-1",),
        ("NoDevFiles",),
    ):  # the last is what Slurm sets for a job without GPUs
        return ()
    for device in ids:
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", device):
            raise LaunchError(
                f"{source}: {device!r} is not a GPU id; expected numbers as nvidia-smi shows them "
                'such as "0,1", or GPU-... or MIG-... ids'
            )
        if ids.count(device) > 1:
            raise LaunchError(f"{source}: GPU {device} is named twice; name each GPU once")
    return ids


def check_devices(devices: Devices, gpus: list[Gpu] | None, note: str) -> list[Problem]:
    """Problems with the chosen GPUs: there is none, some do not exist, or one is named twice."""
    demo = f" (to try the launcher on a CPU: {DEMO_COMMAND})"
    if not devices.ids:
        hint = (
            "name them in cuda_visible_devices"
            if gpus is None
            else "a machine with NVIDIA GPUs is needed"
        )
        return [Problem(f"no GPU to train on: {note or devices.reason}; {hint}{demo}")]
    if gpus is None:
        return []
    named = {
        device: matching(device, gpus) for device in devices.ids if not device.startswith("MIG-")
    }
    missing, found = [device for device in named if not named[device]], chosen_gpus(devices, gpus)
    there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in gpus) or f"none: {note}"
    problems = (
        [
            f"GPU {','.join(missing)} does not exist ({devices.reason}); this machine has {there}"
            + demo * (not gpus)
        ]
        if missing
        else []
    )
    problems += [
        f"GPU {device} is the beginning of several UUIDs ({devices.reason}); write more of it"
        for device, gpus_of in named.items()
        if len(gpus_of) > 1
    ]
    problems += [
        f"GPU {gpu.index} is named twice, also as {gpu.uuid} ({devices.reason}); name each GPU once"
        for gpu in set(found)
        if found.count(gpu) > 1
    ]
    return [Problem(text) for text in problems]


def matching(device: str, gpus: list[Gpu]) -> list[Gpu]:
    """The GPUs that an id names: by number, or by the beginning of a UUID. MIG ids are not looked up."""
    return [
        gpu
        for gpu in gpus
        if device == str(gpu.index) or (device.startswith("GPU-") and gpu.uuid.startswith(device))
    ]


def chosen_gpus(devices: Devices, gpus: list[Gpu] | None) -> list[Gpu]:
    """What NVML knows of the GPUs that the run uses."""
    return [gpu for device in devices.ids for gpu in matching(device, gpus or [])]


def check_nodes(config: Config, env: dict[str, str], nodes: int) -> list[Problem]:
    """What several machines, or a MASTER_PORT, need; nothing where a torchrun of the user's has seen to it."""
    problems = []
    if UNDER_TORCHRUN in env:
        return problems
    if nodes > 1:
        problems += [
            f"environment variable {name}: is needed with NNODES={nodes}"
            for name in NODE_VARIABLES
            if not env.get(name)
        ]
        if env.get("NODE_RANK") and not (
            env["NODE_RANK"].isdecimal() and int(env["NODE_RANK"]) < nodes
        ):
            problems.append(
                f"environment variable NODE_RANK: expected a number below NNODES={nodes}, got "
                f"{env['NODE_RANK']!r}"
            )
        if "run_name" not in config.values:
            problems.append(
                f"run_name: is needed with NNODES={nodes}, the same on each machine: "
                "all of them use one run directory"
            )
    port = env.get("MASTER_PORT", "").strip()
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        problems.append(
            f"environment variable MASTER_PORT: expected a number up to 65535, got {port!r}"
        )
    elif port and node_rank(env) == 0 and port_in_use(int(port)):
        problems.append(
            f"environment variable MASTER_PORT: port {port} is in use on this machine; choose another"
        )
    return [Problem(text) for text in problems]


def port_in_use(port: int) -> bool:
    """Whether a server of this machine listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def inspect_deepspeed(config: Config) -> tuple[Zero, list[Problem]]:
    """Read the DeepSpeed configuration, a JSON file or a mapping in the YAML."""
    given = config.values.get("deepspeed")
    if given is None:
        return Zero(), []
    name = given if isinstance(given, str) else "the mapping"
    hint = 'expected {"zero_optimization": {"stage": 0 to 3, ...}, ...} as in configs/deepspeed/ds_z3_config.json'
    try:
        section = (given if isinstance(given, dict) else read_json(Path(given), hint))[
            "zero_optimization"
        ]
        moved = [
            section.get(key, {}).get("device", "none") != "none"
            for key in ("offload_optimizer", "offload_param")
        ]
        if section["stage"] in (0, 1, 2, 3):
            return Zero(section["stage"], *moved, used=True), []
        fault = f"{name}: {hint}"
    except (KeyError, TypeError, AttributeError):
        fault = f"{name}: {hint}"
    except LookupError as error:
        fault = error.args[0]
    return Zero(), [Problem(f"{config.where('deepspeed')}: deepspeed: {fault}")]


def read_json(path: Path, hint: str) -> dict:
    """A JSON object. Raises LookupError that names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LookupError(f"{path}: {error.strerror.lower()}; {hint}") from None
    except ValueError as error:
        raise LookupError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LookupError(f"{path}: expected a JSON object; {hint}")
    return content


# The defaults of LLaMA-Factory and transformers for the keys that the plan and the checks read.
DEFAULTS = {
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset_dir": "data",
    "cutoff_len": 2048,
    "val_size": 0.0,
    "mix_strategy": "concat",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "logging_strategy": "steps",
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "output_dir": ".",
}


def derive_accumulation(config: Config, world_size: int) -> tuple[Config, list[Problem]]:
    """Turn `global_batch_size` (samples an optimizer step) into gradient_accumulation_steps for these ranks."""
    wanted, micro = (
        config.values.get("global_batch_size"),
        (DEFAULTS | config.values)["per_device_train_batch_size"],
    )
    if wanted is None:
        return config, []
    at_once, where = (
        micro * max(world_size, 1),
        f"{config.where('global_batch_size')}: global_batch_size",
    )
    arithmetic = f"{micro} per device x {plural(world_size, 'process')} = {at_once}"
    if wanted % at_once:
        near = [
            size for size in (wanted // at_once * at_once, -(-wanted // at_once) * at_once) if size
        ]
        return config, [
            Problem(
                f"{where}: {wanted} cannot be split into micro-batches of {arithmetic}; "
                f"the nearest that can: {' and '.join(map(str, near))}"
            )
        ]
    steps, given = wanted // at_once, config.values.get("gradient_accumulation_steps")
    if given not in (None, steps):
        return config, [
            Problem(
                f"{where}: {wanted} means gradient_accumulation_steps {steps} ({arithmetic}), but "
                f"{config.where('gradient_accumulation_steps')} says {given}; remove one of the two"
            )
        ]
    return replace(config, values={**config.values, "gradient_accumulation_steps": steps}), []


def plural(count: float, unit: str) -> str:
    """`1 GPU`, `2 GPUs`, `2 processes`, `0.5 epochs`."""
    number = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{number} {unit}" + ("" if count == 1 else "es" if unit.endswith("s") else "s")


# The packages behind each backend of report_to.
BACKENDS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "neptune": ("neptune",),
    "codecarbon": ("codecarbon",),
    "dvclive": ("dvclive",),
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "trackio": ("trackio",),
    "azure_ml": ("azureml",),
}


def check_packages(config: Config, zero: Zero, env: dict[str, str]) -> list[Problem]:
    """Packages and tools that the run needs and the machine lacks, or has in a version that does not work."""
    values, where = config.values, config.where
    needed = ["torch", "transformers", "llamafactory", *["deepspeed"] * zero.used]
    missing = [name for name in needed if find_spec(name) is None]
    problems = [
        f"package {', '.join(missing)} is not installed in {sys.prefix}; pip install -r requirements.txt"
    ]
    problems = problems if missing else []
    for name in tracking_backends(values):
        if name not in BACKENDS:
            problems.append(
                f"{where('report_to')}: report_to: {name} is unknown{did_you_mean(name, BACKENDS)}"
            )
        elif not any(map(find_spec, BACKENDS[name])):
            problems.append(
                f"{where('report_to')}: report_to: {name} needs a package that is not installed; "
                f"pip install {BACKENDS[name][0]}"
            )
    mode = env.get("SWANLAB_MODE") or "local"
    if "swanlab" in tracking_backends(values) and mode not in SWANLAB_MODES:
        problems.append(
            f"environment variable SWANLAB_MODE: expected one of {', '.join(SWANLAB_MODES)}, got {mode!r}"
        )
    if "wandb" in tracking_backends(values) and not wandb_login(env):
        problems.append(
            f"{where('report_to')}: report_to: wandb: no login was found and nobody is there to ask; run "
            "wandb login, or set WANDB_API_KEY or WANDB_MODE=offline"
        )
    if values.get("flash_attn") == "fa2" and find_spec("flash_attn") is None:
        problems.append(
            f"{where('flash_attn')}: flash_attn: fa2 needs the package flash-attn; install it, or use "
            "flash_attn: auto"
        )
    if zero.used and (values.get("use_cpu") or zero.offload_optimizer):
        problems += compiler_problems(env, cuda=not values.get("use_cpu"))
    versions = [
        Problem(text, can_force=True)
        for name in needed
        if not missing and (text := version_problem(name))
    ]
    return [Problem(text) for text in problems] + versions


def wandb_login(env: dict[str, str]) -> bool:
    """Whether wandb will start without asking: offline, a key in the environment, or a saved login."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    with contextlib.suppress(OSError):
        return "wandb" in Path(env.get("NETRC") or Path.home() / ".netrc").read_text(
            encoding="utf-8", errors="replace"
        )
    return False


def compiler_problems(env: dict[str, str], cuda: bool) -> list[str]:
    """What keeps DeepSpeed from compiling its operator when training starts: no C++ compiler, no nvcc of torch's CUDA.

    torch looks for nvcc in CUDA_HOME, on PATH and in /usr/local/cuda. DeepSpeed wants it to be of torch's CUDA
    version, or before CUDA 13 of the same major version.
    """
    path = env.get("PATH", "")
    troubles = []
    if not shutil.which(env.get("CXX", "c++"), path=path):
        troubles.append(
            "deepspeed compiles an operator when training starts and needs a C++ compiler; install g++"
        )
    if not cuda or "DS_SKIP_CUDA_CHECK" in env or find_spec("torch") is None:
        return troubles
    built = re.search(r"^cuda\b.*'((\d+)\.\d+)", source_of("torch/version.py"), re.MULTILINE)
    if not built:
        return troubles
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{path}:/usr/local/cuda/bin")
    if not nvcc:
        return [
            *troubles,
            "deepspeed compiles its CPU Adam with nvcc, which is not there; install the CUDA "
            f"{built[1]} toolkit and set CUDA_HOME to it",
        ]
    found = re.search(
        r"release ((\d+)\.\d+)", subprocess.run([nvcc, "-V"], capture_output=True, text=True).stdout
    )
    if found and found[1] != built[1] and (found[2] != built[2] or int(built[2]) > 12):
        troubles.append(
            f"{nvcc} is of CUDA {found[1]}, torch was built with CUDA {built[1]}: deepspeed will not "
            "compile its CPU Adam; set CUDA_HOME to a matching toolkit, or DS_SKIP_CUDA_CHECK=1"
        )
    return troubles


# From .. up to but not including: what LLaMA-Factory 0.9.5 works with. transformers 5.6 breaks flash attention.
WORKING_VERSIONS = {
    "torch": ((2, 4), (2, 12)),
    "transformers": ((4, 55), (5, 6)),
    "llamafactory": ((0, 9, 5), (0, 9, 6)),
    "deepspeed": ((0, 10), (0, 18, 5)),
}


def version_problem(name: str) -> str:
    """Why the installed version of a package does not work with the pinned LLaMA-Factory; '' where it does."""
    found = installed_version(name)
    if not found:
        return ""  # a source checkout on the path: nothing to judge by
    low, high = WORKING_VERSIONS[name]
    if low <= tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < high:
        return ""
    wanted = f">={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
    return f"{name} {found} is installed, {name}{wanted} is needed; pip install -r requirements.txt"


def installed_version(name: str) -> str:
    """The version of an installed package; '' where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return ""


def check_output(config: Config) -> list[Problem]:
    """output_dir must be a folder that can be written, or one that can be made."""
    folder = Path(config.values.get("output_dir", "."))
    while not (folder.exists() or folder.is_symlink()):
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK):
        return []
    fault = (
        "cannot be written"
        if folder.is_dir()
        else "is a file"
        if folder.exists()
        else "is a link that leads nowhere"
    )
    return [
        Problem(
            f"{config.where('output_dir')}: output_dir: {folder} {fault}; choose a folder of yours"
        )
    ]


def check_values(config: Config, zero: Zero) -> list[Problem]:
    """What is missing, and values that exclude each other; LLaMA-Factory would refuse them after loading torch."""
    missing = [
        f"{config.source}: {key}: is missing; {hint}"
        for key, hint in (
            ("model_name_or_path", "name a model, such as Qwen/Qwen3-14B"),
            ("output_dir", "name the folder that is to hold the runs"),
        )
        if not config.values.get(key) and key not in config.refused
    ]
    wrong = [
        f"{config.where(key)}: {key}: {text}"
        for key, is_wrong, text in contradictions(config.values, zero)
        if is_wrong and key not in config.refused
    ]
    names, template = known_templates(), config.values.get("template")
    if template and names and template not in names:
        wrong.append(
            f"{config.where('template')}: template: {template!r} is unknown to LLaMA-Factory"
            + did_you_mean(template, names)
        )
    return [Problem(text) for text in missing + wrong]


def contradictions(values: dict, zero: Zero) -> list[tuple[str, object, str]]:
    """(key, whether it is wrong, what to do) for each rule between keys."""
    given, get = values.get, (DEFAULTS | values).get
    evaluates = given("do_eval") or get("eval_strategy") != "no"
    half = [key for key in ("bf16", "fp16", "pure_bf16") if given(key)]
    best, resume = given("load_best_model_at_end"), given("resume_from_checkpoint")
    same = get("eval_strategy") == get("save_strategy")
    every = given("eval_steps", get("logging_steps")) or 1
    between = same and get("save_strategy") == "steps" and get("save_steps") % every
    return [
        ("do_train", not given("do_train"), "nothing would be trained; set do_train: true"),
        (
            "dataset",
            given("do_train") and not given("dataset") and not given("tokenized_path"),
            "no data to train on; name a data set of dataset_info.json",
        ),
        (
            half[-1] if half else "",
            len(half) > 1,
            f"{' and '.join(half)} exclude each other; keep one",
        ),
        ("fp16", given("use_cpu") and given("fp16"), "not for a CPU; use bf16, or neither"),
        ("pure_bf16", given("pure_bf16") and zero.stage == 3, "not with ZeRO-3; use bf16: true"),
        (
            "predict_with_generate",
            given("predict_with_generate") and zero.stage == 3,
            "not with ZeRO-3; use ZeRO-2, or generate after training",
        ),
        (
            "eval_strategy" if "eval_strategy" in values else "do_eval",
            evaluates and not given("eval_dataset") and not get("val_size"),
            "there is nothing to evaluate on; set eval_dataset or val_size, or turn evaluation off",
        ),
        (
            "val_size",
            given("eval_dataset") and get("val_size") > 0,
            "given together with eval_dataset; keep one",
        ),
        (
            "streaming",
            given("streaming") and get("max_steps") <= 0,
            "streamed data has no length; set max_steps",
        ),
        (
            "max_samples",
            given("streaming") and "max_samples" in values,
            "not with streaming: true; use max_steps",
        ),
        (
            "val_size",
            given("streaming") and 0 < get("val_size") < 1,
            "not a share with streaming: true; use a number",
        ),
        (
            "tokenized_path",
            is_torn_data(given("tokenized_path")),
            f"{given('tokenized_path')} is no whole tokenized data; remove it, and it is made anew",
        ),
        ("deepspeed", given("deepspeed") and given("fsdp"), "given together with fsdp; keep one"),
        (
            "quantization_bit",
            given("quantization_bit") and get("finetuning_type") == "full",
            "a quantized model takes LoRA only; remove it, or set finetuning_type: lora",
        ),
        (
            "load_best_model_at_end",
            best and not same,
            "needs the same save_strategy and eval_strategy",
        ),
        ("load_best_model_at_end", best and between, "save_steps must be a multiple of eval_steps"),
        (
            "reward_model",
            get("stage") == "ppo" and not given("reward_model"),
            "is missing; stage: ppo needs one",
        ),
        (
            "resume_from_checkpoint",
            isinstance(resume, str) and not Path(resume).is_dir(),
            f"{resume} does not exist; expected a checkpoint folder",
        ),
    ]


def is_torn_data(folder: str | None) -> bool:
    """Whether a folder of tokenized data holds something, but no set that was written to its end (state.json)."""
    files = (
        [path.name for path in Path(folder).rglob("*")] if folder and Path(folder).is_dir() else []
    )
    return bool(files) and "state.json" not in files


def known_templates() -> list[str]:
    """The chat templates of the installed LLaMA-Factory; [] where it is missing."""
    with contextlib.suppress(OSError):
        return re.findall(
            r'^    name="([^"]+)"', source_of("llamafactory/data/template.py"), re.MULTILINE
        )
    return []


def inspect_model(config: Config) -> tuple[Model | None, str, list[Problem]]:
    """(its shape, what the plan says of it, what is wrong with it); the shape is None where it is unknown."""
    name = config.values.get("model_name_or_path", "")
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, config.values)
    if not name:
        return None, "none", []  # check_values says that it is missing
    if folder is None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        shape = qwen3_config(name)
        size = f"{format_bytes(2 * count_parameters(shape))} to " if shape else "to "
        text = f"{name} (not in the local cache: {size}download)"
        return (shape and Model(count_parameters(shape), shape)), text, []
    where = f"{config.where('model_name_or_path')}: model_name_or_path"
    if folder is None:
        return (
            None,
            name,
            [
                Problem(
                    f"{where}: the folder {name} does not exist; expected a folder with a config.json, "
                    "or a hub id such as Qwen/Qwen3-14B"
                )
            ],
        )
    try:
        shape, parameters = read_model_folder(
            folder, config.values.get("train_from_scratch") is True
        )
        return (Model(parameters, shape) if parameters else None), name, []
    except (LookupError, ValueError, OSError) as error:
        return (
            None,
            name,
            [Problem(f"{where}: {error.args[0] if isinstance(error, LookupError) else error}")],
        )


def hub_folder(name: str, values: dict) -> Path | None:
    """The local snapshot of a hub model, where one is in the Hugging Face cache."""
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    cache = Path(values.get("cache_dir") or os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = repository / "refs" / values.get("model_revision", "main")
    folder = (
        repository / "snapshots" / (revision.read_text().strip() if revision.is_file() else "main")
    )
    return folder if (folder / "config.json").is_file() else None


# hidden, layers, heads, key-value heads, inner, tied embeddings: the config.json files of the Qwen3 releases,
# all with head_dim 128 and a vocabulary of 151,936, so that a plan needs no download.
QWEN3_SHAPES = {
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
    "14B": (5120, 40, 40, 8, 17408, False),
    "32B": (5120, 64, 64, 8, 25600, False),
}


SHAPE_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "tie_word_embeddings",
)


def qwen3_config(name: str) -> dict | None:
    """The config.json of a released Qwen3 model by its hub id, such as Qwen/Qwen3-14B."""
    shape = QWEN3_SHAPES.get(re.sub(r"^Qwen/Qwen3-(.+?)(-Base)?$", r"\1", name))
    fixed = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
    return shape and {**fixed, **dict(zip(SHAPE_KEYS, shape, strict=True))}


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def count_parameters(config: dict) -> int | None:
    """Parameters of a Llama-like decoder by its config.json; None for another architecture.

    Embedding and output matrix (once where tied); in each layer the attention projections with their biases
    and Qwen3's query and key norms, three MLP matrices for each expert with their router, two norms; a last norm.
    """
    kind = config.get("model_type")
    mixed = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    if kind not in LLAMA_LIKE or mixed:
        return None
    hidden, heads, inner = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
    )
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    attention = 2 * hidden * (queries + keys) + (2 * head if kind.startswith("qwen3") else 0)
    if kind == "qwen2" or config.get("attention_bias"):
        attention += queries + 2 * keys + (0 if kind == "qwen2" else hidden)
    mlp = 3 * hidden * inner + (2 * inner + hidden if config.get("mlp_bias") else 0)
    if kind == "qwen3_moe":
        mlp = config["num_experts"] * (3 * hidden * config["moe_intermediate_size"] + hidden)
    matrices = 1 if config.get("tie_word_embeddings") else 2
    return (
        matrices * config["vocab_size"] * hidden
        + hidden
        + config["num_hidden_layers"] * (attention + mlp + 2 * hidden)
    )


def read_model_folder(folder: Path, scratch: bool) -> tuple[dict, int | None]:
    """(config.json, parameters) of a model folder. Raises LookupError that says what is missing or broken."""
    shape = read_json(folder / "config.json", "a model folder has a config.json")
    lacking = [
        key for key in ("vocab_size", *SHAPE_KEYS[:3], "intermediate_size") if key not in shape
    ]
    if lacking and shape.get("model_type") in LLAMA_LIKE:
        raise LookupError(f"{folder}/config.json: has no {', '.join(lacking)}")
    missing = [] if scratch else missing_weights(folder)
    if missing:
        raise LookupError(
            f"{folder}: {', '.join(missing)} missing; copy the weights there, or set "
            "train_from_scratch: true to train without any"
        )
    stored = None if scratch else count_stored(folder)
    return shape, (None if lacking else count_parameters(shape) or stored)


def missing_weights(folder: Path) -> list[str]:
    """Weight files that a model folder should have and has not."""
    for index in folder.glob("*.index.json"):
        files = sorted(set(read_json(index, "copy it again").get("weight_map", {}).values()))
        return [file for file in files if not (folder / file).is_file()]
    return [] if [*folder.glob("*.safetensors"), *folder.glob("*.bin")] else ["model.safetensors"]


def count_stored(folder: Path) -> int | None:
    """Parameters by the headers of the safetensors files: 8 bytes of length, then JSON with shapes and places.

    Raises LookupError for a file that is not whole.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < path.stat().st_size else {}
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            whole = (
                8 + length + max(entry["data_offsets"][1] for entry in entries)
                == path.stat().st_size
            )
            total += sum(math.prod(entry["shape"]) for entry in entries)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise LookupError(
                f"{path}: not a whole safetensors file; copy it again (after git clone: git lfs pull)"
            )
    return total or None


def inspect_data(config: Config, key: str) -> tuple[list[int | None], list[Problem]]:
    """The rows of each data set that `key` (dataset or eval_dataset) names, and what is wrong with them."""
    names, (info, trouble) = name_list(config.values.get(key)), read_dataset_info(config.values)
    where = f"{config.where(key)}: {key}"
    if info is None or not names:
        return [None] * len(names), []
    if trouble:
        return [], [Problem(f"{where}: {trouble}")]
    rows, problems = [], []
    for name in names:
        try:
            path, count = inspect_data_set(name, info, config.values)
            rows.append(count)
            fault = column_problem(path, info[name]) if path else ""
            problems += [Problem(f"{where}: {name}: {fault}", can_force=True)] if fault else []
        except (LookupError, ValueError, OSError) as error:
            problems.append(
                Problem(f"{where}: {error.args[0] if isinstance(error, LookupError) else error}")
            )
    return rows, problems


def name_list(value: object) -> list[str]:
    """`a, b` or [a, b] as a list of words; None is []."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def read_dataset_info(values: dict) -> tuple[dict | None, str]:
    """(dataset_info.json of dataset_dir, what is wrong with it); None for data that is looked up on a hub."""
    folder = values.get("dataset_dir", DEFAULTS["dataset_dir"])
    if isinstance(folder, dict):
        return folder, ""
    if folder.startswith(("ONLINE", "REMOTE:")):
        return None, ""
    path = Path(folder, "dataset_info.json")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return (
            (info, "")
            if isinstance(info, dict)
            else ({}, f"{path}: expected a JSON object of data sets")
        )
    except OSError as error:
        return (
            {},
            f"{path}: {error.strerror.lower()}; dataset_dir is the folder that holds dataset_info.json",
        )
    except ValueError as error:
        return {}, f"{path}: not valid JSON: {error}"


DATA_FILES = ("json", "jsonl", "csv", "txt", "parquet", "arrow")


def inspect_data_set(name: str, info: dict, values: dict) -> tuple[Path | None, int | None]:
    """(file or folder, rows) of one data set; None: on a hub, unknown. Raises LookupError, ValueError or OSError
    that says what is wrong."""
    folder, entry = values.get("dataset_dir", DEFAULTS["dataset_dir"]), info.get(name)
    if not isinstance(entry, dict):
        raise LookupError(
            f"{name} is not in {folder}/dataset_info.json"
            + (did_you_mean(name, info) or f"; it has {', '.join(info)}")
        )
    if entry.get("ranking") and values.get("stage", DEFAULTS["stage"]) not in ("rm", "dpo"):
        raise LookupError(
            f"{name}: holds preferences (ranking: true), which stage: dpo or rm takes"
        )
    if {"hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"} & set(entry):
        return None, None
    if "file_name" not in entry:
        raise LookupError(f"{name}: has no file_name in {folder}/dataset_info.json")
    path, limit = (
        Path(folder if isinstance(folder, str) else ".", entry["file_name"]),
        values.get("max_samples"),
    )
    if not path.exists():
        raise LookupError(
            f"{name}: {path} does not exist; correct file_name in {folder}/dataset_info.json"
        )
    if path.is_file() and path.suffix[1:] not in DATA_FILES:
        raise LookupError(f"{name}: {path}: expected a file that ends in {', '.join(DATA_FILES)}")
    try:
        rows = capped(entry.get("num_samples"), limit) or count_rows(path, limit)
    except (ValueError, csv.Error) as error:
        raise LookupError(f"{name}: {path}: {error}") from None
    if rows == 0:
        raise LookupError(f"{name}: {path} is empty; expected at least one row")
    return path, rows


def capped(count: int | None, limit: int | None) -> int | None:
    """`count`, but no more than `limit`; None is unknown or no limit."""
    return count if count is None or limit is None else min(count, limit)


def count_rows(path: Path, limit: int | None) -> int | None:
    """Rows that LLaMA-Factory will read of a data file or folder, at most `limit`; None: unknown.

    Raises ValueError where the file is not what its name says. A JSON array over 64 MiB is not counted
    without a limit: that would cost more than it tells.
    """
    if path.is_dir():
        counts = [count_rows(file, limit) for file in sorted(path.iterdir())]
        return None if None in counts else capped(sum(counts), limit)
    kind = path.suffix[1:]
    if kind == "txt":
        return count_lines(path, limit, blank=True)
    if kind == "csv":
        csv.field_size_limit(sys.maxsize)
        with open(path, encoding="utf-8", newline="") as file:
            records = itertools.islice(
                filter(None, csv.reader(file)), None if limit is None else limit + 1
            )
            return max(sum(1 for _ in records) - 1, 0)
    if kind == "parquet":
        return capped(count_parquet(path), limit)
    return count_json(path, limit) if kind in ("json", "jsonl") else None


def count_lines(path: Path, limit: int | None, blank: bool = False) -> int:
    """Lines of a file; blank ones only where they are rows too."""
    with open(path, "rb") as file:
        return sum(
            1
            for _ in itertools.islice((line for line in file if blank or not line.isspace()), limit)
        )


def count_parquet(path: Path) -> int | None:
    """Rows by a Parquet file's footer; another process reads it, since pyarrow would triple ours."""
    script = "import sys, pyarrow.parquet as p; print(p.ParquetFile(sys.argv[1]).metadata.num_rows)"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", script, str(path)], capture_output=True, text=True
    )
    return int(answer.stdout) if answer.returncode == 0 else None


def count_json(path: Path, limit: int | None) -> int | None:
    """Rows of a JSON array or of JSON lines, whichever a .json or .jsonl file holds."""
    with open(path, "rb") as file:
        head = file.read(4096)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"[":
        if head.startswith(b"\xef\xbb\xbf"):
            raise ValueError(
                "begins with a byte order mark, which cannot be loaded; save it as UTF-8 without one"
            )
        return count_json_array(path, limit)
    if start[:1] == b"{":
        with contextlib.suppress(
            ValueError
        ):  # an object over several lines holds columns, not rows
            json.loads(start.split(b"\n")[0]) if b"\n" in start else None
            return count_lines(path, limit)
        return None
    if start:
        raise ValueError("expected a JSON array or a JSON object a line")
    return 0


def count_json_array(path: Path, limit: int | None) -> int | None:
    """Elements of a top-level JSON array."""
    if limit is None and path.stat().st_size > 64 << 20:
        return None
    return sum(1 for _ in itertools.islice(json_elements(path), limit))


def json_elements(path: Path, chunk: int = 1 << 20) -> Iterator[object]:
    """The elements of a top-level JSON array, decoded one after another so that memory stays small."""
    decoder, between, count, at = json.JSONDecoder(), re.compile(r"[\s,]*"), 0, 0
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(chunk).lstrip()[1:]
        while True:
            gap = between.match(text, at)
            at = gap.end()
            if text.startswith("]", at):
                if "," in gap[0]:
                    raise ValueError(
                        f"not valid JSON after element {count}: a comma before the end"
                    )
                return
            try:
                element, at = decoder.raw_decode(text, at)
            except ValueError as error:
                more = file.read(max(chunk, len(text)))
                if not more:
                    raise ValueError(f"not valid JSON after element {count}: {error.msg}") from None
                text, at = text[at:] + more, 0
            else:
                count += 1
                yield element


def column_problem(path: Path, entry: dict) -> str:
    """What is wrong with the columns of a data set: LLaMA-Factory stops at a row that lacks one it reads; '' if none.

    It reads what `columns` of dataset_info.json names or, without it, the columns of the format's own example.
    """
    alpaca, found = entry.get("formatting", "alpaca") == "alpaca", first_columns(path)
    own = (
        {"prompt": "instruction", "query": "input", "response": "output"}
        if alpaca
        else {"messages": "conversations"}
    )
    read = (
        ("prompt", "query", "response", "system", "tools", "history", "images", "videos", "audios")
        if alpaca
        else ("messages", "images", "videos", "audios")
    )
    wanted = {
        role: name
        for role, name in entry.get("columns", own).items()
        if name and role in read and not (role == "response" and entry.get("ranking"))
    }
    missing = [name for name in wanted.values() if name not in found]
    if not found or not missing:
        return ""
    if alpaca and "conversations" in found:
        hint = '"formatting": "sharegpt"'
    else:
        hint = '"columns": ' + json.dumps(
            {
                role: name if name in found else "..."
                for role, name in wanted.items()
                if name in found or role in ("prompt", "response", "messages")
            }
        )
    return (
        f"{path} has no column {', '.join(missing)}, only {', '.join(sorted(found))}; describe it in "
        f"dataset_info.json with {hint}"
    )


def first_columns(path: Path) -> set[str]:
    """The columns of a data file by its first 1,000 rows; none where they cannot be told."""
    kind, columns = path.suffix[1:], set()
    if kind == "txt":
        return {"text"}
    if path.is_dir() or kind not in ("csv", "json", "jsonl"):
        return columns
    with open(path, encoding="utf-8-sig", newline="") as file, contextlib.suppress(ValueError):
        if kind == "csv":
            return set(next(csv.reader(file), ()))
        array = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        for row in itertools.islice(
            json_elements(path) if array else map(json.loads, filter(str.strip, file)), 1000
        ):
            columns |= set(row if isinstance(row, dict) else ())
    return columns


def make_plan(
    config: Config,
    devices: Devices,
    zero: Zero,
    model: Model | None,
    rows: list[int | None],
    gpus: list[Gpu],
    nodes: int,
) -> Plan:
    """Work out the plan; pure but for asking the disk and the host's memory. `gpus` are the chosen ones."""
    values, world_size = DEFAULTS | config.values, max(devices.processes, 1) * nodes
    if values["finetuning_type"] != "full" or values.get("fsdp") or values.get("quantization_bit"):
        model = None  # the formulas are those of full fine-tuning
    room = (
        min((gpu.total for gpu in gpus), default=None)
        if devices.ids
        else host_bytes() // max(devices.processes, 1)
    )
    steps = plan_steps(rows, values, world_size)
    plan = Plan(
        devices,
        world_size,
        zero,
        values,
        steps,
        model,
        room,
        free_bytes(Path(values["output_dir"])),
    )
    if not model:
        return plan
    memory = estimate_memory(model, zero, values, world_size, devices.processes)
    host = memory.pop("host")
    return replace(
        plan,
        memory=memory,
        host_memory=host or None,
        checkpoint_bytes=estimate_checkpoint(model, zero, values)[0],
        disk_bytes=estimate_disk(model, zero, values, steps),
        gathered=gathered_bytes(model, zero, values, world_size),
    )


def host_bytes() -> int:
    """Memory of this machine in bytes, or of its container where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(limit).read_text()))
    return total


def plan_steps(rows: list[int | None], values: dict, world_size: int) -> Steps:
    """Optimizer steps as transformers' Trainer.set_initial_training_values counts them.

    `rows` are the data sets' rows after max_samples. Each rank gets ceil(ceil(samples / micro-batch) / ranks)
    batches (accelerate's BatchSamplerShard with even_batches); gradient accumulation groups them, the last
    group of an epoch may be short.
    """
    values = DEFAULTS | values
    samples, reason = count_samples(rows, values)
    if samples is None:
        return Steps(None, None, values["max_steps"] if values["max_steps"] > 0 else None, reason)
    divide = (
        (lambda a, b: a // b) if values.get("dataloader_drop_last") else (lambda a, b: -(-a // b))
    )
    batches = divide(divide(samples, values["per_device_train_batch_size"]), world_size)
    per_epoch = max(-(-batches // values["gradient_accumulation_steps"]), 1)
    by_epochs = math.ceil(values["num_train_epochs"] * per_epoch)
    return Steps(samples, per_epoch, values["max_steps"] if values["max_steps"] > 0 else by_epochs)


def count_samples(rows: list[int | None], values: dict) -> tuple[int | None, str]:
    """Training samples after the split, as LLaMA-Factory's split_dataset makes it, or why they are unknown."""
    if values.get("streaming"):
        return None, "the data is streamed"
    if values.get("packing", values["stage"] == "pt") or values.get("neat_packing"):
        return None, "packing joins samples"
    if values.get("tokenized_path") and Path(values["tokenized_path"]).is_dir():
        return None, "tokenized_path holds the samples"
    if None in rows or not rows:
        return None, "the rows of the data are counted when it is loaded"
    if values["mix_strategy"] != "concat" and len(rows) > 1:
        return None, "interleaving draws the samples"
    share = values["val_size"]
    held_out = int(share) if share > 1 else math.ceil(sum(rows) * share)
    return sum(rows) - held_out, ""


def free_bytes(folder: Path) -> int:
    """Free disk for `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def estimate_memory(
    model: Model, zero: Zero, values: dict, world_size: int, local_size: int
) -> dict:
    """Bytes on each device by part, and `host` bytes on each machine (of the offloaded states).

    Model states: DeepSpeed's estimate_zero3_model_states_mem_needs counts 18 bytes a parameter in mixed
    precision: 2 for the weights, 4 for the gradients (16-bit, and 32-bit in the step), 12 for Adam (32-bit
    weights and two moments; ZeRO, Rajbhandari et al. 2020, section 3.1); stages 1, 2 and 3 divide the
    optimizer, the gradients and the weights by the ranks; ZeRO-3 also holds the largest layer and its
    gradients; host memory gets its half for buffers. Without DeepSpeed LLaMA-Factory keeps 32-bit weights.
    Activations: Korthikanti et al. 2022, equation 1 without the attention scores, which flash and SDPA
    attention do not store: 34 bytes a token and hidden unit in a layer in 16 bit; with gradient
    checkpointing 2 bytes of each layer and one layer in full. Logits: the 16-bit ones, a 32-bit copy and
    its gradient. Buffers: prefetched weights or DDP's buckets, and 1 GiB for the CUDA context.
    """
    values = DEFAULTS | values
    half = precision(values) != "fp32"
    width, count = 2 if half else 4, model.parameters
    share = [1 / world_size if zero.stage >= stage else 1 for stage in (3, 2, 1)]
    weights = count * (2 if half and zero.used else 4) * share[0]
    gradients = count * 4 * share[1]
    optimizer = count * (12 if zero.used else 8) * share[2]
    on_host = zero.offload_optimizer * (optimizer + gradients) + zero.offload_parameters * weights
    tokens = values["per_device_train_batch_size"] * values["cutoff_len"]
    hidden, layers = model.shape["hidden_size"], model.shape["num_hidden_layers"]
    layer = 17 * width * tokens * hidden
    kept = (
        layer * layers
        if values.get("disable_gradient_checkpointing")
        else layer + width * tokens * hidden * layers
    )
    live = width * min(count, 10**9) if zero.stage == 3 else 0 if zero.used else gradients
    parts = {
        "parameters": weights * (not zero.offload_parameters)
        + 4 * model.largest_layer * (zero.stage == 3),
        "gradients": gradients * (not zero.offload_optimizer),
        "optimizer": optimizer * (not zero.offload_optimizer),
        "activations": kept,
        "logits": tokens * model.shape["vocab_size"] * (width + 8),
        "buffers": live + (0 if values.get("use_cpu") else 1 << 30),
        "host": 1.5 * on_host * local_size,
    }
    return {name: int(size) for name, size in parts.items()}


def precision(values: dict) -> str:
    """The training precision's name."""
    return next((key for key in ("pure_bf16", "bf16", "fp16") if values.get(key)), "fp32")


def estimate_checkpoint(model: Model, zero: Zero, values: dict) -> tuple[int, int]:
    """Bytes of one checkpoint and of the final model.

    The weights in the training precision; for resuming, DeepSpeed's 32-bit weights and Adam's two moments
    (12 bytes a parameter), or without DeepSpeed the moments alone (8).
    """
    weights = model.parameters * (2 if precision(values) != "fp32" and zero.used else 4)
    states = 0 if values.get("save_only_model") else model.parameters * (12 if zero.used else 8)
    return weights + states, weights


def estimate_disk(model: Model, zero: Zero, values: dict, steps: Steps) -> int | None:
    """Bytes the run may hold at once: the checkpoints it keeps, one being written, and the final model."""
    checkpoint, weights = estimate_checkpoint(model, zero, values)
    saves, limit = count_saves(values, steps), values.get("save_total_limit")
    kept = capped(saves, limit and limit + 1) if saves is not None else limit and limit + 1
    return None if kept is None else kept * checkpoint + weights


def count_saves(values: dict, steps: Steps) -> int | None:
    """How many checkpoints the run writes; None where the number of steps is unknown."""
    strategy, every = values["save_strategy"], values["save_steps"]
    if strategy == "no" or steps.total is None:
        return 0 if strategy == "no" else None
    if strategy == "epoch":
        return math.ceil(steps.total / steps.per_epoch) if steps.per_epoch else None
    return math.ceil(steps.total / max(every if every >= 1 else math.ceil(steps.total * every), 1))


def gathered_bytes(model: Model, zero: Zero, values: dict, world_size: int) -> int:
    """Bytes each rank receives for weights in one optimizer step under ZeRO-3.

    Every micro-batch gathers all weights twice, for forward and backward (Rajbhandari et al. 2020, section 7.2).
    """
    if zero.stage != 3:
        return 0
    width = 2 if precision(values) != "fp32" else 4
    return int(
        2
        * model.parameters
        * width
        * values["gradient_accumulation_steps"]
        * (world_size - 1)
        / world_size
    )


def check_plan(plan: Plan, config: Config, gpus: list[Gpu]) -> list[Problem]:
    """What would not fit: samples, device memory, host memory, disk; and GPUs that others use.

    The user may know better than an estimate: --force overrules all but the samples.
    """
    problems, need = [], sum((plan.memory or {}).values())
    if plan.device_bytes and need > plan.device_bytes:
        problems.append(
            f"{'memory' if plan.devices.ids else 'host memory'}: {format_bytes(need)} is needed on each "
            f"device, {format_bytes(plan.device_bytes)} is there{nearest_that_fits(plan)}"
        )
    if plan.host_memory and plan.host_memory > host_bytes():
        problems.append(
            f"host memory: offloading needs {format_bytes(plan.host_memory)}, this machine has "
            f"{format_bytes(host_bytes())}; use more GPUs without offload, or a smaller model"
        )
    if plan.disk_bytes and plan.disk_bytes > plan.disk_free:
        problems.append(
            f"{config.where('output_dir')}: output_dir: disk: {format_bytes(plan.disk_bytes)} is needed, "
            f"{format_bytes(plan.disk_free)} is free; lower save_total_limit or use another output_dir"
        )
    problems += [
        f"GPU {gpu.index} is busy: {format_bytes(gpu.used)} in use"
        + (f" by {', '.join(gpu.users)}" if gpu.users else "")
        + "; choose another, or wait"
        for gpu in gpus
        if gpu.used > 1 << 30
    ]
    estimates = [Problem(text, can_force=True) for text in problems]
    if plan.steps.samples is not None and plan.steps.samples < 1:
        estimates.append(
            Problem(
                f"{config.where('val_size')}: val_size: {plan.values['val_size']} leaves no sample to "
                "train on; use less"
            )
        )
    return estimates


def nearest_that_fits(plan: Plan) -> str:
    """The smallest change that fits: a smaller micro-batch, then offload, then more devices; '' if none is found."""
    micro, steps = (
        plan.values["per_device_train_batch_size"],
        plan.values["gradient_accumulation_steps"],
    )
    sizes = [size for size in range(micro, 0, -1) if micro % size == 0]
    tries = [
        (size, zero, plan.world_size, words)
        for zero, words in (
            (plan.zero, []),
            (Zero(3, True, True, True), ["deepspeed=configs/deepspeed/ds_z3_offload_config.json"]),
        )
        for size in sizes
    ]
    tries += [
        (micro, plan.zero, count, [f"{count} devices"]) for count in range(plan.world_size + 1, 65)
    ]
    for size, zero, world_size, words in tries:
        need, host = plan.needs(zero, world_size, per_device_train_batch_size=size)
        if need <= plan.device_bytes and host <= host_bytes():
            if size != micro:
                words = [
                    *words,
                    f"per_device_train_batch_size={size}",
                    f"gradient_accumulation_steps={steps * micro // size}",
                ]
            return f"; it fits with {' '.join(words)} ({format_bytes(need)})"
    return ""


def check_alive(run_dir: Path) -> list[Problem]:
    """A run that still runs cannot be resumed."""
    try:
        if (run_dir / "logs" / "lock").exists():
            lock_run(run_dir).close()
        return []
    except LaunchError as error:
        return error.problems


def lock_run(run_dir: Path) -> TextIO:
    """Hold the run directory for this process; raises LaunchError while another launcher lives in it."""
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        file = open(run_dir / "logs" / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{run_dir}: cannot be written: {error.strerror.lower()}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise LaunchError(
            f"{run_dir}: this run is alive (launcher pid {file.read().strip()}); stop it first, "
            "or wait"
        ) from None
    except OSError:  # some shared file systems have no locks: nothing to hold
        return file
    with contextlib.suppress(OSError):  # a full disk; the pid is for a message only
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), str(os.getpid()).encode())
    return file


MANIFEST = "manifest.json"


# What may not change under a run that goes on: the model would not load, the data would be another, or (the
# optimizer's) the checkpoint's would go on in silence.
FIXED_KEYS = (
    "model_name_or_path",
    "train_from_scratch",
    "finetuning_type",
    "stage",
    "template",
    "dataset",
    "dataset_dir",
    "max_samples",
    "val_size",
    "cutoff_len",
    "packing",
    "seed",
    "data_seed",
    "optim",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


def check_resume(config: Config, plan: Plan, run_dir: Path) -> list[Problem]:
    """Why the run in `run_dir` cannot go on like this: other ranks under ZeRO, another model, other data."""
    before = load_config(run_dir / "config.yaml", {}).values
    problems = [
        Problem(
            f"{config.where(key)}: {key}: was {before.get(key)} when the run began and cannot change now; "
            "start a new run for that"
        )
        for key in FIXED_KEYS
        if before.get(key) != config.values.get(key)
    ]
    recorded = read_plan(run_dir).get("data") or {}
    for path, content in data_files(config).items():
        if recorded.get(path, content) != content:
            problems.append(
                Problem(
                    f"{path}: has changed since the run began; put the old file back, or start a new "
                    "run",
                    can_force=True,
                )
            )
    good = newest_checkpoint(run_dir)
    if not good:
        faults = "; ".join(
            f"{folder.name}: {checkpoint_problem(folder)}" for folder in list_checkpoints(run_dir)
        )
        problems.append(
            Problem(
                f"{run_dir}: there is no checkpoint to resume from{f' ({faults})' if faults else ''}; "
                "start a new run, under another run_name or once this folder is removed"
            )
        )
    elif plan.zero.used:
        ranks = read_json_or_empty(good / MANIFEST)["world_size"]
        if ranks != plan.world_size:
            problems.append(
                Problem(
                    f"{good.name} was written by {ranks} ranks, now there are {plan.world_size}: "
                    "ZeRO's shards fit the same number only; use as many GPUs as then"
                )
            )
    return problems


def data_files(config: Config) -> dict[str, str]:
    """{path: fingerprint} of the data files; the fingerprint is the size, with a hash up to 64 MiB."""
    info, folder, files = (
        read_dataset_info(config.values)[0] or {},
        config.values.get("dataset_dir", "data"),
        {},
    )
    for name in name_list(config.values.get("dataset")) + name_list(
        config.values.get("eval_dataset")
    ):
        entry = info.get(name)
        path = Path(str(folder), entry.get("file_name", "")) if isinstance(entry, dict) else Path()
        if path.is_file():
            size = path.stat().st_size
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if size <= 64 << 20 else ""
            files[str(path)] = f"{size} {digest}".strip()
    return files


def checkpoint_problem(folder: Path) -> str:
    """Why a checkpoint cannot be trusted: no manifest, or a file that differs from it; '' where it can."""
    manifest = read_json_or_empty(folder / MANIFEST)
    if not manifest:
        return "it was not committed"
    for name, size in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    return "" if manifest["resumable"] else "save_only_model left out what resuming needs"


def dry_run(job: Preflight, as_json: bool, env: dict[str, str]) -> None:
    """Print the plan and the exact command; start nothing and write nothing."""
    if job.plan is None:
        say(
            json.dumps(plan_data(job, None, {}), indent=1) if as_json else "no plan: see the errors"
        )
        return
    try:
        run_dir = job.run_dir or Path(job.plan.values["output_dir"]) / run_name(
            job.config, time.time()
        )
    except LaunchError as error:
        job.problems.extend(error.problems)
        run_dir = Path(job.plan.values["output_dir"])
    command, _, data = commands(job, run_dir, env)
    if as_json:
        say(json.dumps(data, indent=1))
        return
    show_plan(job, run_dir, env)
    say(
        "command     "
        + " ".join(
            [
                *(f"{key}={shlex.quote(value)}" for key, value in data["environment"].items()),
                shlex.join(command),
            ]
        )
    )


PLAN_KEYS = (
    "devices",
    "devices_reason",
    "world_size",
    "global_batch_size",
    "samples",
    "steps_per_epoch",
    "total_steps",
    "parameters",
    "memory_per_gpu",
    "host_memory",
    "checkpoint_bytes",
    "disk_bytes",
    "gathered_bytes_per_step",
    "data",
)


def plan_data(job: Preflight, command: list[str] | None, environment: dict[str, str]) -> dict:
    """The plan as one JSON object; null where something cannot be known. Sizes in bytes."""
    plan = job.plan
    known = (
        {}
        if plan is None
        else {
            "devices": list(plan.devices.ids),
            "devices_reason": plan.devices.reason,
            "world_size": plan.world_size,
            "global_batch_size": plan.global_batch,
            "samples": plan.steps.samples,
            "steps_per_epoch": plan.steps.per_epoch,
            "total_steps": plan.steps.total,
            "parameters": plan.model and plan.model.parameters,
            "memory_per_gpu": plan.memory,
            "host_memory": plan.host_memory,
            "checkpoint_bytes": plan.checkpoint_bytes,
            "disk_bytes": plan.disk_bytes,
            "gathered_bytes_per_step": plan.gathered,
            "data": data_files(job.config),
        }
    )
    return {
        **dict.fromkeys(PLAN_KEYS),
        **known,
        "problems": [problem.text for problem in job.problems],
        "command": command,
        "environment": environment,
    }


def run_name(config: Config, now: float) -> str:
    """The run directory's name: `run_name`, else the local time as YYYYmmdd-HHMMSS. Raises LaunchError."""
    name = str(config.values.get("run_name", time.strftime("%Y%m%d-%H%M%S", time.localtime(now))))
    if not name.strip(". ") or name.startswith("-") or "/" in name or "\\" in name:
        raise LaunchError(
            f"{config.where('run_name')}: run_name: {name!r} cannot be a folder name; "
            "expected one word without slashes and without - in front"
        )
    return name


def commands(
    job: Preflight, run_dir: Path, env: dict[str, str]
) -> tuple[list[str], dict[str, str], dict]:
    """The torchrun command, the workers' environment, and the plan as data with what of both may be shown."""
    command = build_torchrun_command(job.plan.devices, run_dir / "config.yaml", env)
    worker_env = build_worker_environment(job.plan.devices, run_dir, job.config, env)
    hidden = (SECRETS_VARIABLE, STARTED_VARIABLE, *SECRET_ENVIRONMENT.values())
    shown = {
        key: value
        for key, value in worker_env.items()
        if key not in hidden and (env.get(key) != value or key == "CUDA_VISIBLE_DEVICES")
    }
    return command, worker_env, plan_data(job, command, shown)


def build_torchrun_command(devices: Devices, config_path: Path, env: dict[str, str]) -> list[str]:
    """The torchrun command that starts one worker a device on this machine. Starts nothing.

    One machine: torchrun takes a free port, unless MASTER_PORT is set, and no notice of MASTER_ADDR, which a
    scheduler may have left behind. Several: they meet at MASTER_ADDR, and wait MEETING_SECONDS for one that is
    down. torchrun handles no signal but SIGQUIT: on SIGTERM it would give a checkpoint 30 seconds and then kill it.
    """
    nodes = read_count(env, "NNODES", 1)
    host = env.get("MASTER_ADDR", "127.0.0.1") if nodes > 1 else "127.0.0.1"
    rendezvous = [
        "--nnodes",
        str(nodes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        config_path.parent.name,
        "--rdzv-endpoint",
        f"{host}:{env.get('MASTER_PORT', '0')}",
    ]
    if nodes > 1:
        rendezvous += [
            "--rdzv-conf",
            f"is_host={int(node_rank(env) == 0)},"
            f"join_timeout={MEETING_SECONDS},read_timeout={MEETING_SECONDS}",
            "--local-addr",
            own_address(host),
        ]
    # -P: a torch or random.py of the working directory must not be taken for the package.
    return [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(devices.processes),
        *rendezvous,
        "--signals-to-handle",
        "SIGQUIT",
        str(SCRIPT),
        str(config_path),
    ]


def own_address(other: str) -> str:
    """The address by which `other` reaches this machine; a host name need not resolve there. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def build_worker_environment(
    devices: Devices, run_dir: Path, config: Config, env: dict[str, str]
) -> dict[str, str]:
    """A copy of `env` for the workers: their devices, the run directory and the secrets."""
    worker = {
        **env,
        "FORCE_TORCHRUN": "1",
        RUN_DIR_VARIABLE: str(run_dir),
        STARTED_VARIABLE: str(time.time()),
        **device_environment(devices, env),
    }
    places = {
        "TORCH_EXTENSIONS_DIR": extensions_folder(),
        "TENSORBOARD_LOGGING_DIR": run_dir / "tensorboard",
    }
    if "wandb" in tracking_backends(config.values):
        places |= {"WANDB_DIR": run_dir, "WANDB_PROJECT": project(config.values)}
    if "mlflow" in tracking_backends(config.values):
        places |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{run_dir.parent / 'mlflow.db'}",
            "MLFLOW_EXPERIMENT_NAME": project(config.values),
        }
    worker = {**{key: str(value) for key, value in places.items()}, **worker}
    for key, value in config.secrets.items():
        if key in SECRET_ENVIRONMENT:
            worker[SECRET_ENVIRONMENT[key]] = value
    others = {key: value for key, value in config.secrets.items() if key not in SECRET_ENVIRONMENT}
    worker[SECRETS_VARIABLE] = json.dumps(others)
    return worker


def device_environment(devices: Devices, env: dict[str, str]) -> dict[str, str]:
    """What tells torch, DeepSpeed and NCCL the devices; PCI_BUS_ID makes ids mean what nvidia-smi shows."""
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(devices.ids), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if not devices.ids:
        # Threads that spin while they wait run fifty times slower on cores that another process uses too.
        return {
            **variables,
            "DS_ACCELERATOR": "cpu",
            "OMP_WAIT_POLICY": env.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
    # As llamafactory-cli does: fewer out-of-memory errors from fragmentation.
    return {
        **variables,
        "PYTORCH_CUDA_ALLOC_CONF": env.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }


def extensions_folder() -> Path:
    """Where DeepSpeed's compiled operators go: one folder a torch version, which torch itself does not separate."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return (
        Path.home() / ".cache" / "torch_extensions" / f"torch-{installed_version('torch')}-{python}"
    )


def project(values: dict) -> str:
    """The project's name on every tracker."""
    return str(values.get("swanlab_project") or values.get("project") or "qwen3-ft")


def show_plan(job: Preflight, run_dir: Path, env: dict[str, str]) -> None:
    """Print the plan, one screen."""
    tracking = setup_experiment_tracking(job.config, run_dir, env)
    trackers = [str(tracking)] * bool(tracking) + [
        name for name in tracking_backends(job.config.values) if name != "swanlab"
    ]
    lines = [
        *plan_lines(job.plan, job.model),
        ("tracking", ", ".join(trackers) or "none"),
        ("run", str(run_dir)),
    ]
    for label, text in lines:
        say(f"{label:<12}{text}")


def setup_experiment_tracking(
    config: Config, run_dir: Path, env: dict[str, str]
) -> Tracking | None:
    """Choose SwanLab's mode and settings; None where the run does not report to it. Starts nothing.

    The mode is SWANLAB_MODE, else `swanlab_mode`, else online where a key is found and local where not.
    """
    values = config.values
    if "swanlab" not in tracking_backends(values):
        return None
    key = find_swanlab_key(config, env)
    if env.get("SWANLAB_MODE"):
        mode, reason = env["SWANLAB_MODE"], "from SWANLAB_MODE"
    elif "swanlab_mode" in values:
        mode, reason = values["swanlab_mode"], f"from swanlab_mode, {config.where('swanlab_mode')}"
    else:
        mode, reason = (
            ("online", f"API key from {key}") if key else ("local", "no API key was found")
        )
    if mode in ("online", "cloud") and not key:
        mode, reason = "local", f"{reason}, but no API key was found"
    return Tracking(
        "online" if mode == "cloud" else mode,
        reason,
        {
            "project": re.sub(
                r"[^\w.+-]", "-", env.get("SWANLAB_PROJ_NAME") or project(values), flags=re.ASCII
            )[:100],
            "workspace": values.get("swanlab_workspace") or env.get("SWANLAB_WORKSPACE"),
            "name": values.get("swanlab_run_name") or run_dir.name,
            "log_dir": values.get("swanlab_logdir")
            or env.get("SWANLAB_LOG_DIR")
            or str(run_dir.parent / "swanlog"),
        },
    )


def find_swanlab_key(config: Config, env: dict[str, str]) -> str:
    """Where an API key for SwanLab is, without reading it out: YAML, environment or saved login; '' if nowhere."""
    if config.secrets.get("swanlab_api_key"):
        return "swanlab_api_key"
    if env.get("SWANLAB_API_KEY", "").strip():
        return "SWANLAB_API_KEY"
    home = Path(env.get("SWANLAB_ROOT") or env.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab")
    return next(
        (
            f"the login in {path}"
            for path in (Path(".swanlab/.netrc"), home / ".netrc")
            if path.is_file()
        ),
        "",
    )


def plan_lines(plan: Plan, model: str) -> list[tuple[str, str]]:
    """The plan for people: (label, text) a line."""
    values, unit = plan.values, "GPU" if plan.devices.ids else "process"
    lines = [
        (
            "model",
            model + (f": {format_count(plan.model.parameters)} parameters" if plan.model else ""),
        ),
        (
            "method",
            f"{values['stage']}, {values['finetuning_type']}, {plan.zero}, {precision(values)}",
        ),
        ("devices", str(plan.devices)),
        (
            "batch",
            f"{values['per_device_train_batch_size']} per device x {plural(plan.world_size, unit)} x "
            f"{values['gradient_accumulation_steps']} accumulation = {plan.global_batch} samples a step",
        ),
        ("steps", describe_steps(plan)),
        ("when", describe_when(values)),
    ]
    if plan.memory:
        room = f" of {format_bytes(plan.device_bytes)}" if plan.device_bytes else ""
        lines.append(
            (
                "memory",
                f"{format_bytes(sum(plan.memory.values()))}{room} a {unit}: "
                + ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.memory.items()),
            )
        )
        if plan.host_memory:
            lines.append(
                (
                    "host",
                    f"{format_bytes(plan.host_memory)} of {format_bytes(host_bytes())} for offloading",
                )
            )
        need = f", at most {format_bytes(plan.disk_bytes)} at once" if plan.disk_bytes else ""
        lines.append(
            (
                "disk",
                f"{format_bytes(plan.checkpoint_bytes)} a checkpoint{need}, of "
                f"{format_bytes(plan.disk_free)} free",
            )
        )
    if plan.gathered:
        lines.append(
            ("traffic", f"ZeRO-3 gathers {format_bytes(plan.gathered)} a step on each {unit}")
        )
        lines += [("faster", suggestion)] if (suggestion := suggest_split(plan)) else []
    if "tokenized_path" in values and Path(values["tokenized_path"]).is_dir():
        lines.append(
            (
                "data",
                f"as it was tokenized into {values['tokenized_path']}, whatever the data keys say now",
            )
        )
    elif (plan.steps.samples or 0) >= 100_000 and "tokenized_path" not in values:
        lines.append(
            ("data", "tokenized_path=FOLDER would keep the tokenized data for the next run")
        )
    return lines


def format_count(count: int) -> str:
    """14.8 B, 1.07 M."""
    return f"{count / 1e9:.3g} B" if count >= 1e8 else f"{count / 1e6:.3g} M"


def describe_steps(plan: Plan) -> str:
    """Samples, steps an epoch and in all, or why they are unknown."""
    steps, values = plan.steps, plan.values
    if steps.samples is None:
        return f"{steps.total or 'unknown'} in all ({steps.reason})"
    many = f"max_steps: {steps.total}"
    if values["max_steps"] <= 0:
        many = f"x {plural(values['num_train_epochs'], 'epoch')} = {steps.total}"
    return f"{plural(steps.samples, 'sample')}: {plural(steps.per_epoch, 'step')} an epoch, {many}"


def describe_when(values: dict) -> str:
    """When it logs, saves and evaluates."""

    def every(what: str, key: str) -> str:
        strategy, steps = (
            values[f"{key}_strategy"],
            values.get(f"{key}_steps", values["logging_steps"]),
        )
        often = f"{steps:g} of all steps" if steps < 1 else f"{plural(int(steps), 'step')}"
        return (
            f"never {what}"
            if strategy == "no"
            else f"{what} every {often if strategy == 'steps' else strategy}"
        )

    return ", ".join((every("logs", "logging"), every("saves", "save"), every("evaluates", "eval")))


def suggest_split(plan: Plan) -> str:
    """A larger micro-batch with less accumulation that does the same step within memory under ZeRO-3, or ''."""
    micro, steps = (
        plan.values["per_device_train_batch_size"],
        plan.values["gradient_accumulation_steps"],
    )
    if not plan.gathered or not plan.device_bytes:
        return ""
    for factor in (n for n in range(steps, 1, -1) if steps % n == 0):
        need = plan.needs(plan.zero, plan.world_size, per_device_train_batch_size=micro * factor)[0]
        if need <= 0.9 * plan.device_bytes:
            return (
                f"per_device_train_batch_size={micro * factor} gradient_accumulation_steps={steps // factor} is "
                f"the same step with {format_bytes(plan.gathered / factor)} gathered, in {format_bytes(need)}"
            )
    return ""


def launch(job: Preflight, env: dict[str, str], verbose: bool) -> int:
    """Start the run, watch it to its end and give the account; returns the exit code."""
    run_dir, first = new_or_resumed_run_dir(job, env), node_rank(env) == 0
    nothing, log = contextlib.nullcontext(), run_dir / "logs" / "rank0.log"
    with lock_run(run_dir) if first else nothing, follow(log) if verbose else nothing:
        command, worker_env = write_run_files(job, run_dir, env)
        clear_stale_locks(Path(worker_env["TORCH_EXTENSIONS_DIR"]))
        code = supervise(
            command, worker_env, run_dir, job.config.values.get("max_restarts", 3), first
        )
    if first:
        print_summary(run_dir, job.config, sys.stdout)
    return code


def new_or_resumed_run_dir(job: Preflight, env: dict[str, str]) -> Path:
    """The run directory: the old one of a run that goes on, else a new one, which the first machine creates."""
    return job.run_dir or (
        create_run_dir(job.config) if node_rank(env) == 0 else wait_for_run_dir(job.config)
    )


def create_run_dir(config: Config) -> Path:
    """Create `<output_dir>/<run name>` with logs/ in it. Raises LaunchError where it exists or cannot be."""
    while True:
        run_dir = Path(config.values["output_dir"]) / run_name(config, time.time())
        try:
            (run_dir.parent).mkdir(parents=True, exist_ok=True)
            run_dir.mkdir()
            (run_dir / "logs").mkdir()
            return run_dir
        except FileExistsError:
            if "run_name" in config.values or not run_dir.is_dir():
                raise LaunchError(
                    f"{run_dir}: exists already; choose another run_name, or go on with it: "
                    f"--resume {run_dir}"
                ) from None
            time.sleep(0.2)  # another run began in this very second; the next one is ours
        except OSError as error:
            raise LaunchError(
                f"{config.where('output_dir')}: output_dir: cannot create {run_dir}: "
                f"{error.strerror.lower()}"
            ) from None


def wait_for_run_dir(config: Config) -> Path:
    """On a machine that is not the first: wait for the run directory that the first one creates."""
    run_dir = Path(config.values["output_dir"]) / run_name(config, time.time())
    for waited in wait_for(f"the machine with NODE_RANK=0 to create {run_dir}"):
        if (run_dir / "config.yaml").exists():
            break
        if waited > MEETING_SECONDS:
            raise LaunchError(
                f"{run_dir}: the machine with NODE_RANK=0 has not created it within {MEETING_SECONDS} s; "
                "output_dir must be on a file system that all machines share, and run_name the same"
            )
    return run_dir


def wait_for(machines: str) -> Iterator[float]:
    """The seconds waited so far, five times a second; after 10 it is said once for which machines, where for any."""
    begun, said = time.time(), not machines
    while True:
        waited = time.time() - begun
        if waited > 10 and not said:
            said = True
            say(f"waiting for {machines}, for up to {MEETING_SECONDS // 60} minutes")
        yield waited
        time.sleep(0.2)


@contextlib.contextmanager
def follow(log: Path) -> Iterator[None]:
    """Show a growing log on the console while the block runs."""
    log.touch()
    tail = subprocess.Popen(
        ["tail", "-n", "0", "-s", "0.2", "-F", str(log)],
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        yield
    finally:
        time.sleep(1)  # it shows the last lines
        tail.terminate()


def write_run_files(
    job: Preflight, run_dir: Path, env: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Write config.yaml and plan.json (the first machine does) and show the plan; returns torchrun's command and
    the workers' environment."""
    command, worker_env, data = commands(job, run_dir, env)
    if node_rank(env) == 0:
        (run_dir / "STOP").unlink(missing_ok=True)  # an old one; from here on it is ours
        try:
            write_atomically(run_dir / "plan.json", json.dumps(data, indent=1) + "\n")
            write_atomically(run_dir / "config.yaml", launchable_config(job.config, job.plan.devices))
        except OSError as error:
            raise LaunchError(
                f"{error.filename}: cannot be written: {error.strerror.lower()}"
            ) from None
        show_plan(job, run_dir, env)
    return command, worker_env


def write_atomically(path: Path, text: str) -> None:
    """Write a text file wholly or, where that fails, leave the old one as it was."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def launchable_config(config: Config, devices: Devices) -> str:
    """The text of the run's config.yaml: resolved, without secrets, with the command that launches it again."""
    derived = {"gradient_accumulation_steps"} if "global_batch_size" in config.values else set()
    values = {
        key: value for key, value in config.values.items() if key not in {"run_name", *derived}
    }
    if devices.ids:
        values["cuda_visible_devices"] = ",".join(devices.ids)
    count = "" if devices.ids else f"NPROC_PER_NODE={devices.processes} "
    return (
        f"# Resolved from {config.source}. The same again, in a new run directory:\n"
        f"#   {count}python {SCRIPT} config.yaml\n"
        + "".join(f"# {key} was left out: give it again\n" for key in config.secrets)
        + yaml.dump(values, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)
    )


class ConfigDumper(yaml.SafeDumper):
    """Quotes whatever a YAML 1.1 reader or ConfigLoader would not read back as the text it is."""


def clear_stale_locks(folder: Path) -> None:
    """Remove build locks that no process holds open: torch would wait for them for ever."""
    for lock in folder.glob("*/lock"):
        held = set()
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # another user's process, or one that has just ended
                held.add(os.readlink(link))
        if str(lock.resolve()) not in held:
            lock.unlink(missing_ok=True)


def supervise(
    command: list[str], env: dict[str, str], run_dir: Path, max_restarts: int, first: bool
) -> int:
    """Run torchrun, and anew as long as it fails after progress; returns the launcher's exit code.

    The `first` of several machines looks after the run directory.
    """
    stop, log = (
        StopRequest(run_dir),
        run_dir / "logs" / f"torchrun{'' if first else node_rank(env)}.log",
    )
    for start in range(max_restarts + 1):
        begun, before = time.time(), checkpoint_step(newest_checkpoint(run_dir))
        if first:
            roll_back_to_checkpoint(run_dir)
        said = log.stat().st_size if log.exists() else 0
        status = run_torchrun(command, env, log, stop)
        if status == 0:
            return stop_code(run_dir) if read_summary(run_dir).get("state") == "stopped" else 0
        if status is None:
            if first:
                write_failed_summary(run_dir, "stopped", float(env[STARTED_VARIABLE]))
            return stop_code(run_dir)
        good = newest_checkpoint(run_dir)
        stop.heed()
        if stop.presses < 3:
            say(describe_failure(run_dir, log, read_from(log, said), status, begun))
        hopeless = disk_is_full(run_dir) or stop.asked()
        if checkpoint_step(good) <= before or start == max_restarts or hopeless:
            if first:
                write_failed_summary(run_dir, "failed", float(env[STARTED_VARIABLE]))
            return 1
        say(f"restart {start + 1} of at most {max_restarts}: resuming from {good.name}")
    return 1


class StopRequest:
    """What the launcher's signals ask for: the first for a checkpoint and the end, the third Ctrl-C for a kill.

    The handler only takes note, since a signal may arrive while a line is printed. A STOP file older than this
    launcher, which the first machine will remove, asks for nothing.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.arrived, self.presses, self.process = run_dir, [], 0, None
        self.old = modified(run_dir / "STOP")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP: the run goes on
                signal.signal(number, lambda number, frame: self.arrived.append(number))

    def heed(self) -> None:
        """Do what the signals since the last time ask for; only Ctrl-C counts, since schedulers repeat SIGTERM."""
        while self.arrived:
            number = self.arrived.pop(0)
            self.presses += number == signal.SIGINT
            if not self.asked():
                request_stop(self.run_dir, number)
                say(
                    f"{signal.Signals(number).name}: stopping"
                    + self.works()
                    * (" at the end of this step, after a checkpoint, which may take a while")
                )
            elif self.presses == 2:
                say(
                    "still stopping; press Ctrl-C once more to kill the run now, without a checkpoint"
                )
            elif self.presses == 3:
                self.kill()
                say("killed, without a checkpoint")

    def asked(self) -> bool:
        """Whether anybody, on any machine, has asked the run to stop."""
        return modified(self.run_dir / "STOP") not in (None, self.old)

    def kill(self) -> None:
        """Kill torchrun; the workers die with it."""
        self.process.kill()
        self.process.wait()

    def works(self) -> bool:
        """Whether torchrun has a worker."""
        return any(
            parent_of(int(path.name)) == self.process.pid for path in Path("/proc").glob("[0-9]*")
        )


def modified(path: Path) -> int | None:
    """When a file was written last, in nanoseconds; None where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def request_stop(run_dir: Path, number: int) -> None:
    """Create the STOP file, which every rank looks for at the end of a step; it names the signal."""
    with contextlib.suppress(OSError):  # on a full disk the file is created nevertheless
        (run_dir / "STOP").write_text(signal.Signals(number).name, encoding="utf-8")


def parent_of(pid: int) -> int:
    """The parent of a process; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def roll_back_to_checkpoint(run_dir: Path) -> None:
    """Before a start: nothing torn in the way, no log line beyond the checkpoint, no old account."""
    for line in quarantine_incomplete_checkpoints(run_dir):
        say(line)
    rewind_log(run_dir, checkpoint_step(newest_checkpoint(run_dir)))
    for name in ("summary.json", "training_loss.png"):
        (run_dir / name).unlink(missing_ok=True)


def quarantine_incomplete_checkpoints(run_dir: Path) -> list[str]:
    """Rename every checkpoint that is newer than the newest good one, so that nobody resumes from it; a line each."""
    good, lines = checkpoint_step(newest_checkpoint(run_dir)), []
    for folder in list_checkpoints(run_dir):
        if checkpoint_step(folder) > good:
            fault, aside = checkpoint_problem(folder), free_name(run_dir / f"torn-{folder.name}")
            folder.rename(aside)
            lines.append(f"{folder.name} is not resumed from: {fault}; moved to {aside.name}")
    return lines


def free_name(path: Path) -> Path:
    """`path`, or `path` with the first number behind it that is not taken."""
    names = (path.with_name(f"{path.name}{f'.{n}' if n else ''}") for n in range(1000))
    return next(name for name in names if not name.exists())


def rewind_log(run_dir: Path, step: int) -> None:
    """Drop the lines of trainer_log.jsonl beyond `step`: they are trained again."""
    path = run_dir / "trainer_log.jsonl"
    if path.exists():
        kept = [
            json.dumps(line) + "\n" for line in read_log(run_dir) if line["current_steps"] <= step
        ]
        write_atomically(path, "".join(kept))


def read_log(run_dir: Path) -> list[dict]:
    """The lines of trainer_log.jsonl that are whole."""
    lines = []
    with contextlib.suppress(OSError):
        for text in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def run_torchrun(
    command: list[str], env: dict[str, str], log: Path, stop: StopRequest
) -> int | None:
    """One torchrun from start to end; its own messages go to `log`. Returns its exit status; None where the run was
    asked to stop before a worker started."""
    with open(log, "ab") as messages:
        env = {**env, LAUNCHER_VARIABLE: str(os.getpid())}
        stop.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=messages,
            start_new_session=True,
            preexec_fn=partial(before_torchrun, os.getpid()),
        )
    if not wait_for_ranks(env, stop):
        return None
    heartbeat = NodeHeartbeat(stop.run_dir, env)
    while stop.process.poll() is None:
        stop.heed()
        if lost := heartbeat.lost():
            say(
                f"machine {', '.join(lost)} has not been heard of for {heartbeat.BEAT * heartbeat.MISSED} s"
            )
            stop.kill()
        time.sleep(0.2)
    heartbeat.exit_now()
    return stop.process.returncode


def before_torchrun(parent: int) -> None:
    """In torchrun's process before it starts: die with the launcher, and leave stopping to the STOP file."""
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def wait_for_ranks(env: dict[str, str], stop: StopRequest) -> bool:
    """Wait until torchrun has workers, which takes as long as another machine does not come, or has ended.

    False: the run was asked to stop before, and torchrun is gone.
    """
    several = read_count(env, "NNODES", 1) > 1
    for _ in wait_for(
        f"the other machines at {env['MASTER_ADDR']}:{env['MASTER_PORT']}" if several else ""
    ):
        if stop.process.poll() is not None or stop.works():
            break
        stop.heed()
        if stop.asked():
            stop.kill()
            return False
    return True


class NodeHeartbeat:
    """Notices a machine that is lost without a word: ranks would wait for it as long as ddp_timeout.

    While its torchrun runs each launcher touches a file of its own in logs/ every BEAT seconds. Another machine is
    lost whose file is there but was not touched between MISSED looks; looks, since a shared file system that hangs
    for a while must not count.
    """

    BEAT, MISSED = 10, 18

    def __init__(self, run_dir: Path, env: dict[str, str]):
        files = [
            run_dir / "logs" / f"machine{number}" for number in range(read_count(env, "NNODES", 1))
        ]
        self.own, self.next = files.pop(node_rank(env)), 0.0
        self.looks = {path: (None, 0) for path in files}

    def lost(self) -> list[str]:
        """The machines that are lost."""
        if self.looks and time.monotonic() > self.next:
            self.next = time.monotonic() + self.BEAT
            with contextlib.suppress(OSError):
                self.own.touch()
            for path, (before, count) in self.looks.items():
                now = modified(path)
                self.looks[path] = (now, count + 1 if now and now == before else 0)
        return [
            path.name.removeprefix("machine")
            for path, (_, count) in self.looks.items()
            if count >= self.MISSED
        ]

    def exit_now(self) -> None:
        """Torchrun has ended: the others need not wait for a sign of life."""
        with contextlib.suppress(OSError):
            self.own.unlink()


def stop_code(run_dir: Path) -> int:
    """The exit code of a run that was stopped: 128 + the signal that its STOP file names."""
    with contextlib.suppress(OSError, KeyError):
        return 128 + signal.Signals[(run_dir / "STOP").read_text(encoding="utf-8").strip()]
    return 128 + signal.SIGTERM  # a STOP file made by hand


def write_failed_summary(run_dir: Path, state: str, started: float) -> None:
    """Leave the account and the curve where no rank could; on a full disk there is no room for them."""
    with contextlib.suppress(OSError):
        draw_curve_apart(run_dir)
        write_summary(run_dir, summarize(run_dir, state, started))


def draw_curve_apart(run_dir: Path) -> None:
    """draw_curve in another process, since matplotlib would triple the launcher's memory."""
    if logged_losses(run_dir):
        script = "import sys, pathlib, train_qwen3_ft; train_qwen3_ft.draw_curve(pathlib.Path(sys.argv[1]))"
        subprocess.run(
            [sys.executable, "-c", script, str(run_dir)], cwd=SCRIPT.parent, capture_output=True
        )


def logged_losses(run_dir: Path) -> list[float]:
    """The training losses that were logged, in the order of their steps."""
    return [line["loss"] for line in read_log(run_dir) if "loss" in line]


def write_summary(run_dir: Path, summary: dict) -> None:
    """Write summary.json."""
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")


def summarize(run_dir: Path, state: str, started: float, **more: object) -> dict:
    """How the run ended, in numbers read from its own log; `started` is in seconds since 1970."""
    last, losses = (read_log(run_dir) or [{}])[-1], logged_losses(run_dir)
    good = [path for path in list_checkpoints(run_dir) if not checkpoint_problem(path)]
    return {
        "state": state,
        "model": str(run_dir) if state == "finished" else None,
        "steps": max(last.get("current_steps", 0), checkpoint_step(next(iter(good), None))),
        "total_steps": last.get("total_steps") or read_plan(run_dir).get("total_steps"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(time.time() - started, 1),
        "checkpoints": [path.name for path in good],
        "curve": str(run_dir / "training_loss.png")
        if (run_dir / "training_loss.png").exists()
        else None,
        "dashboard": read_swanlab_state(run_dir / "logs").get("dashboard"),
        **more,
    }


def read_swanlab_state(logs: Path) -> dict:
    """What is known of a run's SwanLab record: id, starts, dashboard; {} where it has none."""
    return read_json_or_empty(logs / "swanlab.json")


CAUSES = (
    (
        r"CUDA out of memory|OutOfMemoryError",
        "a GPU is out of memory: use a smaller per_device_train_batch_size or "
        "cutoff_len, or configs/deepspeed/ds_z3_offload_config.json",
    ),
    (
        r"No space left on device|Errno 28",
        "the disk is full: make room or lower save_total_limit, then resume",
    ),
    (
        r"Watchdog caught collective operation timeout|NCCL.*(timeout|timed out)|Timed out waiting",
        "a collective timed out: a rank was stuck or a link is broken; NCCL_DEBUG=INFO shows more",
    ),
    (
        r"Rendezvous\w*Error",
        "the machines did not meet: start the same command on each, and see that all of them reach "
        "MASTER_PORT of MASTER_ADDR",
    ),
    (
        r"killed by SIGKILL",
        "the kernel's out-of-memory killer, most often (dmesg shows it): use fewer "
        "preprocessing_num_workers or less offloading",
    ),
)


def describe_failure(run_dir: Path, log: Path, messages: str, status: int, since: float) -> str:
    """What went wrong: the first failing rank's own traceback, its cause where known, and where the log is.

    `log` is torchrun's, and `messages` what it has said there in this start.
    """
    errors = [
        path for path in (run_dir / "logs").glob("rank*.error") if path.stat().st_mtime >= since
    ]
    first = min(errors, key=lambda path: path.stat().st_mtime, default=None)
    killed = killed_rank(messages)
    if killed:
        text, rank = f"rank {killed[0]} was killed by {killed[1]}", killed[0]
    elif first:
        text, rank = first.read_text(encoding="utf-8").strip(), first.stem.removeprefix("rank")
    else:
        apart = (
            re.findall(r"Rendezvous\w*Error[^\n]*", messages)[-1:] or messages.splitlines()[-15:]
        )
        text, rank = "\n".join(apart) or f"torchrun ended with status {status}", ""
    if disk_is_full(run_dir):
        text += f"\nNo space left on device: {run_dir}"
    cause = next(
        (f"\nlikely cause: {hint}" for pattern, hint in CAUSES if re.search(pattern, text)), ""
    )
    own = run_dir / "logs" / f"rank{rank}.log"
    return f"training failed:\n{text}{cause}\nfull log: {own if own.exists() else log}"


def killed_rank(messages: str) -> tuple[str, str] | None:
    """(rank, signal name) where torchrun says that a rank was killed, other than by its own SIGTERM.

    Another rank's error is then a consequence, even where torchrun saw it first.
    """
    found = re.search(r"rank +: (\d+) [^\n]*\n *exitcode +: -(?!15 )(\d+) ", messages)
    return (found[1], signal.Signals(int(found[2])).name) if found else None


def disk_is_full(folder: Path) -> bool:
    """Whether hardly a byte is free; PyTorch does not tell why a file could not be written."""
    return shutil.disk_usage(folder).free < 16 << 20


def read_from(path: Path, position: int) -> str:
    """The text of a file from a byte on."""
    with open(path, "rb") as file:
        file.seek(position)
        return file.read().decode("utf-8", errors="replace")


def print_summary(run_dir: Path, config: Config, console: TextIO) -> None:
    """Print the final account, from summary.json."""
    summary = read_summary(run_dir) or summarize(run_dir, "failed", time.time())
    rate, peak, state, resume = (
        summary.get("tokens_per_second"),
        summary.get("peak_memory"),
        summary["state"],
        "",
    )
    losses = [
        f"{summary[key]:.4f} at {when}"
        for key, when in (("first_loss", "first"), ("last_loss", "last"))
        if summary[key] is not None
    ]
    if state != "finished":
        resume = (
            resume_command(run_dir)
            if summary["checkpoints"]
            else "there is no checkpoint to resume from"
        )
    for label, text in (
        (
            "state",
            f"{state} at step {summary['steps']} of {summary['total_steps'] or 'an unknown number'}",
        ),
        ("loss", ", ".join(losses)),
        ("time", format_seconds(summary["seconds"]) + (f", {rate:.0f} tokens/s" if rate else "")),
        ("memory", peak and f"{format_bytes(peak)} at the peak on rank 0"),
        ("checkpoints", ", ".join(summary["checkpoints"])),
        ("curve", summary["curve"]),
        ("dashboard", summary["dashboard"]),
        ("model", summary["model"]),
        ("chat", summary["model"] and chat_command(run_dir, DEFAULTS | config.values)),
        ("resume", resume),
    ):
        if text:
            say(f"{label:<12}{text}", console)


def resume_command(run_dir: Path) -> str:
    """What goes on with the run, with what no configuration holds: the machines and, on a CPU, the processes."""
    env, plan = dict(os.environ), read_plan(run_dir)
    nodes = read_count(env, "NNODES", 1)
    processes = (plan.get("world_size") or 1) // nodes
    given = {name: env[name] for name in ("NNODES", *NODE_VARIABLES) if nodes > 1 and name in env}
    if processes > 1 and not plan.get("devices"):
        given["NPROC_PER_NODE"] = str(processes)
    words = [
        *(f"{name}={value}" for name, value in given.items()),
        "python",
        str(SCRIPT),
        "--resume",
        str(run_dir),
    ]
    return " ".join(map(shlex.quote, words))


def format_seconds(seconds: float) -> str:
    """0:01:51."""
    return str(timedelta(seconds=int(seconds)))


def chat_command(run_dir: Path, values: dict) -> str:
    """What talks to the model, or to the base model with the adapter that was trained; '' for a reward model."""
    model = f"--model_name_or_path {shlex.quote(str(run_dir))}"
    if values["finetuning_type"] in ("lora", "oft"):
        base = shlex.quote(values["model_name_or_path"])
        model = f"--model_name_or_path {base} --adapter_name_or_path {shlex.quote(str(run_dir))}"
    thinking = " --enable_thinking false" * (values.get("enable_thinking") is False)
    return (
        ""
        if values["stage"] == "rm"
        else (
            f"llamafactory-cli chat {model} "
            f"--template {values.get('template', 'default')}{thinking}"
        )
    )


# ====================================================================================================
# Rank
# ====================================================================================================


def run_rank(options: argparse.Namespace, env: dict[str, str]) -> int:
    """Train as one rank: everything it prints goes to logs/rank<R>.log, rank 0 speaks on the console."""
    agent, rank = os.getppid(), env["RANK"]
    os.environ.setdefault(STARTED_VARIABLE, str(time.time()))
    die_with_parent(agent)
    if LAUNCHER_VARIABLE in env and parent_of(agent) != int(env[LAUNCHER_VARIABLE]):
        exit_now(1)  # torchrun died before this process could ask to die with it
    os.register_at_fork(after_in_child=init_forked_child)
    run_dir, config = join_run(options, env)
    # Our torchrun's SIGTERM means that another rank died; a torchrun of the user's passes on what it was sent.
    exit_on_sigterm_of(
        agent if LAUNCHER_VARIABLE in env else 0, partial(request_stop, run_dir, signal.SIGTERM)
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    console = redirect_output(run_dir / "logs" / f"rank{rank}.log")
    try:
        train(config, run_dir, console, env)
    except BaseException:
        write_rank_error(run_dir, rank, traceback.format_exc(), console)
        exit_now(1)
    exit_now(0)


def exit_now(code: int) -> None:
    """End this process now: no thread or hook of a library may keep a finished rank."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def init_forked_child() -> None:
    """In a process that a worker forks, to tokenize or to load data: die with it, and end at its SIGTERM only, since
    a scheduler's SIGTERM to everybody must cost neither the checkpoint nor a pool that the worker waits for."""
    parent = os.getppid()
    die_with_parent(parent)
    exit_on_sigterm_of(parent, lambda: None)


def exit_on_sigterm_of(boss: int, otherwise: Callable[[], None]) -> None:
    """End this process at the `boss` process's SIGTERM, and do `otherwise` at anybody else's.

    A thread waits for it, since a rank inside a collective runs no Python signal handler.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != boss:
            otherwise()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def join_run(options: argparse.Namespace, env: dict[str, str]) -> tuple[Path, Config]:
    """This rank's run directory and configuration: the parent's or, under a torchrun of the user's, rank 0's."""
    run_dir = Path(env[RUN_DIR_VARIABLE]) if RUN_DIR_VARIABLE in env else agree_on_run(options, env)
    secrets = json.loads(os.environ.pop(SECRETS_VARIABLE, "{}"))
    config = derive_accumulation(load_config(run_dir / "config.yaml", {}), int(env["WORLD_SIZE"]))[
        0
    ]
    return run_dir, replace(config, secrets=secrets)


def agree_on_run(options: argparse.Namespace, env: dict[str, str]) -> Path:
    """Rank 0 checks, plans and creates the run directory, and tells the others through torchrun's own store."""
    nodes = int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    env = {
        **env,
        "NPROC_PER_NODE": env["LOCAL_WORLD_SIZE"],
        "NNODES": str(nodes),
        "NODE_RANK": env["GROUP_RANK"],
    }
    config = load_config(
        Path(options.resume, "config.yaml") if options.resume else options.config, options.overrides
    )
    devices = resolve_devices(config, env, query_gpus()[0])
    os.environ.update(device_environment(devices, env))  # before torch is imported
    from torch.distributed import PrefixStore, rendezvous

    store, rank, _ = next(rendezvous("env://"))
    store = PrefixStore("qwen3_ft", store)
    if rank == 0:
        try:
            store.set("answer", str(open_run(options, env) or 0))
        except LaunchError:
            store.set("answer", "2")
            raise
    answer = store.get("answer").decode()  # the run directory, or the exit code of all ranks
    if answer.isdecimal():
        exit_now(int(answer))
    run_dir = Path(answer)
    os.environ.update(build_worker_environment(devices, run_dir, config, dict(os.environ)))
    return run_dir


def open_run(options: argparse.Namespace, env: dict[str, str]) -> Path | None:
    """The run directory, ready and held by this process until it ends; None where there is nothing to train."""
    job = preflight_or_stop(options, env)
    if not job:
        return None
    run_dir = new_or_resumed_run_dir(job, env)
    with lock_run(run_dir) as lock:
        os.dup(lock.fileno())  # holds the lock until this process ends
    write_run_files(job, run_dir, env)
    roll_back_to_checkpoint(run_dir)
    return run_dir


def redirect_output(log: Path | None) -> TextIO:
    """Send stdout and stderr, of C++ code too, to `log` (None: stdout to stderr); returns what was stdout."""
    console = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    if log is None:
        os.dup2(2, 1)
    else:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    return console


def train(config: Config, run_dir: Path, console: TextIO, env: dict[str, str]) -> None:
    """LLaMA-Factory's run_exp with our callbacks. Rank 0 records; the first process of the first machine speaks."""
    expected = int(env["LOCAL_WORLD_SIZE"]) * read_count(env, "NNODES", 1)
    if RUN_DIR_VARIABLE in env and int(env["WORLD_SIZE"]) != expected:
        raise RuntimeError(
            "the machines start different numbers of processes; give each the same number of GPUs"
        )
    run_exp = import_trainer(config)
    records, speaks = env["RANK"] == "0", env["LOCAL_RANK"] == "0" and node_rank(env) == 0
    console = console if speaks else sys.stdout
    reporter = Reporter(
        console, partial(open_tracker, config, run_dir, env, console) if records else lambda: None
    )
    callbacks = [Checkpoints(run_dir)] + [reporter] * (records or speaks)
    state = "finished"
    try:
        run_exp(build_training_args(config, run_dir), [as_callback(hooks) for hooks in callbacks])
    except Stopped:
        state = "stopped"
    reporter.close()
    if records:
        close_trackers(config, run_dir, state, reporter)
    if (
        speaks and RUN_DIR_VARIABLE not in env
    ):  # a torchrun of the user's: no launcher will give the account
        print_summary(run_dir, config, console)


def import_trainer(config: Config) -> Callable:
    """Import what a rank needs without Python's cycle collector, which would take a quarter of the import time."""
    gc.disable()
    from llamafactory.train.tuner import run_exp
    from torch.serialization import register_package

    # Several CPU ranks resume to the device cpu:0, which torch.load knows as cpu only.
    register_package(
        99,
        lambda storage: None,
        lambda storage, place: storage if place.startswith("cpu:") else None,
    )
    if config.values.get("deepspeed"):
        import deepspeed  # noqa: F401  run_exp would, with the collector on
    gc.enable()
    gc.freeze()
    return run_exp


class Reporter:
    """Trainer callback of rank 0: the console's bar or lines, and SwanLab."""

    LINES = 30

    def __init__(self, console: TextIO, open_tracker: Callable[[], Tracker | None]):
        self.console, self.open_tracker, self.tracker, self.bar, self.spoke = (
            console,
            open_tracker,
            None,
            None,
            0.0,
        )
        self.evaluated: set[tuple[int, str]] = set()  # the step and name of every evaluation number
        self.begun = self.mark = (
            0.0,
            0,
            0,
        )  # time, step and tokens at the beginning and at the last log

    def on_train_begin(self, args, state, control, **kwargs):
        self.tracker = self.open_tracker()
        self.begun = self.mark = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        if self.console.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self.console,
                unit="step",
                leave=False,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            metrics = {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "epoch": logs["epoch"],
                **self.speed(args, state),
            }
            self.show(metrics, state)
            self.track({f"train/{name}": value for name, value in metrics.items()}, state)
        # After training LLaMA-Factory evaluates again, though the last step may have been evaluated already.
        elif found := {
            name: value
            for name, value in logs.items()
            if name.startswith("eval_") and (state.global_step, name) not in self.evaluated
        }:
            self.evaluated |= {(state.global_step, name) for name in found}
            self.show_evaluation(found, state)
            self.track({name.replace("_", "/", 1): value for name, value in found.items()}, state)

    def speed(self, args, state) -> dict[str, float]:
        """Samples and tokens a second of the whole job since the last log."""
        now = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        seconds, steps, tokens = (new - old for new, old in zip(now, self.mark, strict=True))
        self.mark = now
        batch = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        return {
            "samples_per_second": steps * batch / seconds,
            "tokens_per_second": tokens / seconds,
        }

    def tokens_per_second(self) -> float | None:
        """Of the whole job from the beginning of this start to the last log."""
        seconds, _, tokens = (new - old for new, old in zip(self.mark, self.begun, strict=True))
        return tokens / seconds if tokens else None

    def track(self, metrics: dict, state) -> None:
        if self.tracker:
            numbers = {name: float(value) for name, value in metrics.items() if value is not None}
            self.tracker.log(numbers, state.global_step)

    def show(self, metrics: dict, state) -> None:
        """The bar's text in a terminal; else a line, though of many no more than LINES in all or one a minute."""
        text = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}"
        if self.bar is not None:
            self.bar.set_description_str(text)
            return
        now, number = time.monotonic(), state.global_step // max(state.logging_steps, 1)
        stride = math.ceil(state.max_steps / max(state.logging_steps, 1) / self.LINES)
        if number % stride and self.spoke and now - self.spoke < 60:
            return
        self.spoke, done = now, state.global_step - self.begun[1]
        left = (now - self.begun[0]) / max(done, 1) * (state.max_steps - state.global_step)
        say(
            f"step {state.global_step}/{state.max_steps}  {text}  {metrics['tokens_per_second']:.0f} tokens/s  "
            f"{format_seconds(left)} left",
            self.console,
        )

    def show_evaluation(self, found: dict, state) -> None:
        """A line for each evaluation loss; with eval_on_each_dataset its name holds the data set."""
        if self.bar is not None:
            self.bar.clear()
        for name in found:
            if name.endswith("_loss"):
                data = name[len("eval_") : -len("loss")].strip("_")
                say(
                    f"step {state.global_step}/{state.max_steps}  evaluation loss {found[name]:.4f}"
                    + f" on {data}" * bool(data),
                    self.console,
                )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Tracker:
    """SwanLab in a process of its own, watched by threads, so that it cannot raise into, delay or end training.

    The process has READY seconds to begin; where it does not, or ends early, another one records the whole run
    locally. finish() waits at most READY + END seconds. Where the worker dies, the record ends as crashed.
    """

    READY, END = 25, 25

    def __init__(
        self, tracking: Tracking, run_dir: Path, settings: dict, warn: Callable[[str], None]
    ):
        self.mode, self.warn, self.logs = tracking.mode, warn, run_dir / "logs"
        self.init = {**tracking.init, **next_segment(run_dir, tracking), "config": settings}
        self.lines, self.arrived, self.finished = [], threading.Condition(), threading.Event()
        self.place = self.trouble = ""
        self.thread = threading.Thread(target=self.keep, daemon=True)
        self.thread.start()

    def log(self, values: dict, step: int) -> None:
        """Record numbers at an optimizer step; returns at once."""
        self.put({"log": values, "step": step})

    def finish(self, state: str, error: str | None = None) -> None:
        """End the record as success, aborted or crashed."""
        self.put({"finish": state, "error": error})
        self.finished.set()
        self.thread.join(self.READY + self.END)

    def put(self, line: dict) -> None:
        with self.arrived:
            self.lines.append(json.dumps(line) + "\n")
            self.arrived.notify_all()

    def keep(self) -> None:
        """The thread that starts the process and, where that fails, another one in local mode."""
        if not self.run_process(self.mode):
            note = (
                f"SwanLab's process ended ({self.trouble}); it was started once more"
                if self.mode == "local"
                else f"SwanLab cannot be reached ({self.trouble}), but the run is recorded locally."
            )
            if not self.run_process("local", note):
                self.warn(
                    f"SwanLab does not record this run ({self.trouble}); see {self.logs}/swanlab.log"
                )

    def run_process(self, mode: str, note: str = "") -> bool:
        """One process from start to end; False where it did not begin or ended early. Says the note once it begins."""
        with open(self.logs / "swanlab.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--tracker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(
            target=self.feed, args=(process.stdin, {**self.init, "mode": mode}), daemon=True
        ).start()
        ready = select.select([process.stdout], [], [], self.READY)[0]
        answer = (
            json.loads(process.stdout.readline() or "{}")
            if ready
            else {"trouble": f"no answer in {self.READY} s"}
        )
        self.place, self.trouble = (
            answer.get("place", ""),
            answer.get("trouble", "its process ended"),
        )
        if self.place:
            update_swanlab_state(self.logs, dashboard=answer["dashboard"])
            if note:
                self.warn(note + self.later() * (mode != self.mode))
        while self.place and process.poll() is None and not self.finished.wait(1):
            pass
        if not self.place or not self.finished.is_set():
            process.kill()
            return False
        try:
            process.wait(self.END)
        except subprocess.TimeoutExpired:
            process.kill()
            self.warn(
                "SwanLab did not take the whole run in time, but it is recorded locally."
                + self.later()
            )
        return True

    def later(self) -> str:
        """How to bring a local record to the service."""
        return f" Later: swanlab sync {shlex.quote(self.place)} -i {self.init['id']}"

    def feed(self, pipe: TextIO, init: dict) -> None:
        """The thread that hands a process everything from the first line on, as it arrives."""
        with contextlib.suppress(OSError), pipe:
            pipe.write(json.dumps(init) + "\n")
            pipe.flush()
            for position in itertools.count():
                with self.arrived:
                    self.arrived.wait_for(lambda at=position: len(self.lines) > at)
                pipe.write(self.lines[position])
                pipe.flush()
                if self.lines[position].startswith('{"finish"'):
                    return


def next_segment(run_dir: Path, tracking: Tracking) -> dict:
    """The SwanLab id of this run, the same for every start (online they continue one experiment), and the name.

    Elsewhere each start is a record of its own, so its name tells which resume it is.
    """
    known = read_swanlab_state(run_dir / "logs")
    starts = known.get("starts", 0)
    name = known.get("id") or f"{re.sub(r'[^a-zA-Z0-9]', '-', run_dir.name)}-{os.urandom(4).hex()}"
    update_swanlab_state(run_dir / "logs", id=name, starts=starts + 1)
    again = f" (resume {starts})" if starts and tracking.mode != "online" else ""
    return {"id": name, "name": tracking.init["name"] + again}


def update_swanlab_state(logs: Path, **more: object) -> None:
    """Add to what is known of the run's SwanLab record."""
    with contextlib.suppress(OSError):  # a full disk
        write_atomically(logs / "swanlab.json", json.dumps({**read_swanlab_state(logs), **more}))


def open_tracker(
    config: Config, run_dir: Path, env: dict[str, str], console: TextIO
) -> Tracker | None:
    """Start SwanLab's process, once the data is tokenized; None where the run does not report to it."""
    tracking = setup_experiment_tracking(config, run_dir, env)
    if tracking and tracking.mode == "disabled":
        return None
    return (
        Tracker(tracking, run_dir, describe_run(config, run_dir), partial(say, stream=console))
        if tracking
        else None
    )


def describe_run(config: Config, run_dir: Path) -> dict:
    """What a tracker shows beside the curves: the resolved configuration without secrets, the plan's numbers, the
    GPU, the versions and the git commit of the working directory."""
    import torch

    return {
        **config.values,
        "plan": {key: value for key, value in read_plan(run_dir).items() if key in PLAN_KEYS[2:8]},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": git_commit(),
        "versions": {name: installed_version(name) for name in (*WORKING_VERSIONS, "swanlab")},
    }


def git_commit() -> str | None:
    """The git commit of the working directory; None where there is none, or no git."""
    with contextlib.suppress(OSError):
        return (
            subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            or None
        )
    return None


class Checkpoints:
    """Trainer callback of every rank: stop together at the end of a step, and commit each checkpoint."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.stopping, self.keep = run_dir, False, None

    def on_train_begin(self, args, state, control, **kwargs):
        # The trainer would remove old checkpoints before the new one is committed.
        self.keep, args.save_total_limit = args.save_total_limit, None
        state.compute_steps(
            args, state.max_steps
        )  # a resumed run would go by the checkpoint's save_steps and others
        if self.agreed_to_stop(args):
            raise Stopped

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and self.agreed_to_stop(args):
            self.stopping = control.should_save = control.should_training_stop = True

    def agreed_to_stop(self, args) -> bool:
        """Whether any rank sees the STOP file, agreed by one all-reduce so that all stop at the same step."""
        import torch

        seen = torch.tensor(int((self.run_dir / "STOP").exists()), device=args.device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return bool(seen.item())

    def on_save(self, args, state, control, **kwargs):
        import torch

        torch.distributed.barrier()  # every rank has written its part
        if state.is_world_process_zero:
            folder = self.run_dir / f"checkpoint-{state.global_step}"
            commit_checkpoint(folder, args.world_size, not args.save_only_model)
            best = Path(state.best_model_checkpoint or "").name
            rotate_checkpoints(self.run_dir, self.keep, best)

    def on_epoch_end(self, args, state, control, **kwargs):
        if (
            self.stopping
        ):  # the checkpoint is committed: end without what an epoch and a training end with
            control.should_save = control.should_evaluate = args.load_best_model_at_end = False

    def on_train_end(self, args, state, control, **kwargs):
        if self.stopping:
            raise Stopped  # after the other callbacks, which close what they report to


class Stopped(Exception):
    """Training ended early because a stop was asked for; its checkpoint is committed, there is no final model."""


def commit_checkpoint(folder: Path, world_size: int, resumable: bool) -> None:
    """Make a finished checkpoint durable, then say so: fsync every file, then write the manifest atomically."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }  # one is there where a step is saved twice
    folders = {folder, *((folder / name).parent for name in files)}
    for path in (*(folder / name for name in files), *folders):
        sync(path)
    content = {"world_size": world_size, "resumable": resumable, "files": files}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(draft)
    draft.replace(folder / MANIFEST)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a folder; some file systems cannot sync a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def rotate_checkpoints(run_dir: Path, keep: int | None, best: str) -> None:
    """Remove the oldest checkpoints, so that `keep` remain (None or 0: all); the newest and the `best` always do."""
    newest, *older = list_checkpoints(run_dir)
    older.sort(key=lambda path: path.name == best, reverse=True)  # the best counts first
    for folder in (
        older[max(keep - 1, best in [path.name for path in older]) :] if keep and keep > 0 else []
    ):
        (folder / MANIFEST).unlink(missing_ok=True)  # half removed, it cannot be trusted
        shutil.rmtree(folder, ignore_errors=True)


def build_training_args(config: Config, run_dir: Path) -> dict:
    """The dict for LLaMA-Factory's run_exp: without the launcher's keys, writing into `run_dir`, resuming its
    newest good checkpoint."""
    args = {key: value for key, value in config.values.items() if key not in LAUNCHER_FIELDS}
    args = {
        key: value
        for key, value in args.items()
        if not key.startswith("swanlab_") and key != "use_swanlab"
    }
    args |= {
        key: value
        for key, value in config.secrets.items()
        if key not in SECRET_ENVIRONMENT and "swanlab" not in key
    }
    args |= {"output_dir": str(run_dir), "run_name": run_dir.name}
    if args.get(
        "deepspeed"
    ):  # with use_cpu transformers would not initialize DeepSpeed; no GPU is visible anyway
        args.pop("use_cpu", None)
    args["report_to"] = [name for name in tracking_backends(config.values) if name != "swanlab"] or ["none"]
    args.setdefault("disable_tqdm", True)  # the console has a bar of ours; the logs need none
    # For tokens per second; neat_packing's attention mask is no count of tokens.
    args.setdefault(
        "include_num_input_tokens_seen", "all" if args.get("neat_packing") else "non_padding"
    )
    args.setdefault(
        "ddp_timeout", 7200
    )  # ranks wait for rank 0's tokenization; 30 minutes is short for that
    if args.get(
        "streaming"
    ):  # accelerate's default would join rank 0's batches, which differ in length
        args.setdefault("accelerator_config", {"dispatch_batches": False})
        # LLaMA-Factory cuts a file into as many shards as there are workers: with none there would be no data.
        args["dataloader_num_workers"] = args.get("dataloader_num_workers") or 1
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint:
        args["resume_from_checkpoint"] = str(checkpoint)
        total = (
            read_plan(run_dir).get("total_steps")
            or read_json_or_empty(checkpoint / "trainer_state.json")["max_steps"]
        )
        if checkpoint_step(checkpoint) >= total and not args.get("streaming"):
            # The last checkpoint was written, the model was not. The trainer would train a step more.
            args |= {"max_steps": -1, "num_train_epochs": 0.0}
    return args


def as_callback(hooks: object) -> object:
    """Give an object of ours the base class of transformers' callbacks, which the parent must not import."""
    from transformers import TrainerCallback

    hooks.__class__ = type(type(hooks).__name__, (type(hooks), TrainerCallback), {})
    return hooks


def close_trackers(config: Config, run_dir: Path, state: str, reporter: Reporter) -> None:
    """On rank 0, after training: end SwanLab's record, draw what LLaMA-Factory has not drawn, write summary.json."""
    if reporter.tracker:
        reporter.tracker.finish(
            *(("success", None) if state == "finished" else ("aborted", "stopped by the user"))
        )
    if "wandb" in tracking_backends(config.values):
        finish_wandb()
    if state == "stopped" and config.values.get("plot_loss") and logged_losses(run_dir):
        draw_curve(run_dir)
    write_summary(
        run_dir,
        summarize(
            run_dir,
            state,
            float(os.environ[STARTED_VARIABLE]),
            peak_memory=peak_memory(),
            tokens_per_second=reporter.tokens_per_second(),
        ),
    )


def finish_wandb(seconds: float = 60) -> None:
    """End wandb's run, which it does at Python's exit and this process ends without; it waits without limit for its
    service, so not for longer than `seconds`."""
    import wandb

    thread = threading.Thread(target=wandb.finish, daemon=True)
    thread.start()
    thread.join(seconds)


def draw_curve(run_dir: Path) -> None:
    """Draw training_loss.png from trainer_log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, (figure, axes) = read_log(run_dir), pyplot.subplots(figsize=(8, 5))
    for key, label in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        points = [(line["current_steps"], line[key]) for line in log if key in line]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None
            )
    axes.set(xlabel="optimizer step", ylabel="loss", title=run_dir.name)
    axes.legend()
    figure.savefig(run_dir / "training_loss.png", dpi=120)


def peak_memory() -> int:
    """The most memory this rank used, in bytes: of its GPU, or resident on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_rank_error(run_dir: Path, rank: str, text: str, console: TextIO) -> None:
    """Leave a rank's traceback in its log and, for the launcher, in rank<R>.error; on a full disk on the console."""
    say(text, sys.stderr)
    path = run_dir / "logs" / f"rank{rank}.error"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        say(f"rank {rank}: {text}", console)
        with contextlib.suppress(OSError):
            path.unlink()


# ====================================================================================================
# Tracker
# ====================================================================================================


def run_tracker() -> int:
    """The tracker process: swanlab.init as the first line says, then log and finish as the lines say.

    Where the lines end without a finish, the worker has died, and the record ends as crashed.
    """
    answers = redirect_output(None)
    init = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(
        os.getppid()
    )  # without a network it would wait for longer than a dead run may leave anything
    try:
        import swanlab

        quiet = swanlab.Settings(
            interactive=False,
            terminal={"proxy_type": "none"},
            probe={"git": False, "runtime": False, "requirements": False, "swanlab": False},
        )
        run = swanlab.init(**init, resume="allow", settings=quiet)
    except BaseException as error:  # whatever it is, training goes on
        say(json.dumps({"trouble": f"{type(error).__name__}: {error}"[:300]}), answers)
        os._exit(1)
    outlive_parent()  # to mark the record as crashed
    dashboards = {"local": f"swanlab watch {run.dir.parent}", "offline": f"swanlab sync {run.dir}"}
    say(
        json.dumps({"place": str(run.dir), "dashboard": dashboards.get(init["mode"]) or run.url}),
        answers,
    )
    for line in map(json.loads, sys.stdin):
        if "finish" in line:
            run.finish(state=line["finish"], error=line["error"])
            os._exit(0)
        run.log(line["log"], step=line["step"])
    threading.Timer(6, os._exit, (1,)).start()  # in an outage finish() has no end
    run.finish(state="crashed", error="the training process died")
    os._exit(0)


def outlive_parent() -> None:
    """Take die_with_parent back."""
    import ctypes

    ctypes.CDLL(None).prctl(1, 0)


# ====================================================================================================
# Helpers used everywhere
# ====================================================================================================


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line for the user; a closed terminal must not end the run."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(
            OSError, ValueError
        ):  # what is left in the buffer must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class ConfigLoader(yaml.SafeLoader):
    """A safe YAML loader with the scalars of YAML 1.2, where `no` is a word and `1e-5` a number."""

    yaml_implicit_resolvers = {}

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """`1_000`, `0x1F` and `0o17` are integers; everything else that was matched is a float."""
        text = node.value.lower().replace(".inf", "inf").replace(".nan", "nan")
        try:
            return int(text, 0)
        except ValueError:
            return float(text)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (
        "float",
        r"[-+]?(0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+|\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        r"|[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _class in (ConfigLoader, ConfigDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
        )


ConfigLoader.add_constructor("tag:yaml.org,2002:float", ConfigLoader.construct_number)


def parse_yaml(text: str, source: str, key: str = "") -> tuple[object, dict[str, int]]:
    """Parse one YAML document, which is the value of `key` where one is named.

    Returns the value and, where it is a mapping, the line of each top-level key.
    Raises LaunchError with `source:line` for a syntax error, a duplicate key or an unusable key.
    """
    try:
        loader = ConfigLoader(text)
        node = loader.get_single_node()
        lines = key_lines(node, source)
        keep_names(node, key)
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise LaunchError(f"{source}{line}: not valid YAML: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise LaunchError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def keep_names(node: yaml.Node | None, key: str) -> None:
    """Let a number stay text as it is written where NAMES has its key; `key` is that of the whole document."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for name, value in [(key, node), *((name.value, value) for name, value in pairs)]:
        if name in NAMES and value and value.tag == "tag:yaml.org,2002:float":
            value.tag = "tag:yaml.org,2002:str"


def key_lines(node: yaml.Node | None, source: str) -> dict[str, int]:
    """The line (from 1) of each top-level key; refuses a key that stands twice at any depth."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise LaunchError(
                    f"{source}:{line}: expected a key that is a word, found a {key.id}"
                )
            if key.value in lines and key.value != "<<":
                raise LaunchError(
                    f"{source}:{line}: {key.value}: duplicate key, first on line {lines[key.value]}; "
                    "keep one of them"
                )
            lines[str(key.value)] = line
            key_lines(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            key_lines(item, source)
    return lines


def read_text(path: Path) -> str:
    """Read a UTF-8 file (a byte order mark is allowed); a LaunchError names what is wrong with it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise LaunchError(
            f"{path}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); "
            "save the file as UTF-8"
        ) from None
    except OSError as error:
        hint = f"; the demo is {DEMO_COMMAND}" if isinstance(error, FileNotFoundError) else ""
        raise LaunchError(f"{path}: {error.strerror.lower()}: expected a YAML file{hint}") from None


def load_config(path: Path, overrides: dict[str, str]) -> Config:
    """Read CONFIG, lay the overrides over it, take the secrets out and make the paths absolute.

    A key whose value is empty or null counts as not given. Raises LaunchError.
    """
    path = path if path.exists() else find_input(str(path), Path.cwd()) or path
    values, lines = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict) or not values:
        found = (
            "it is empty"
            if not values
            else f"found a {'list' if isinstance(values, list) else 'plain text'}"
        )
        raise LaunchError(f"{path}:1: expected lines of `key: value` at the top level, {found}")
    odd = [key for key in values if not isinstance(key, str)]
    if odd:
        raise LaunchError(
            f"{path}:{lines.get(str(odd[0]), 1)}: {odd[0]!r}: expected a key that is a word"
        )
    for key, text in overrides.items():
        values[key] = parse_yaml(text, f"command line, {key}", key)[0]
        lines.pop(key, None)
    values = {key: value for key, value in values.items() if value is not None}
    secrets = {key: str(values.pop(key)) for key in list(values) if SECRET_KEY.search(key)}
    return Config(str(path), resolve_paths(values, Path.cwd()), lines, secrets)


def find_input(text: str, cwd: Path) -> Path | None:
    """Where an input path is: under the working directory, else under the script's folder; None: in neither."""
    return next((base / text for base in (cwd, SCRIPT.parent) if (base / text).exists()), None)


def resolve_paths(values: dict, cwd: Path) -> dict:
    """Absolute paths: inputs from the working directory, else the script's folder; outputs from `cwd`.

    A model that is no folder in either place stays as it is: it is a hub id.
    """
    resolved = dict(values)
    for key in (*INPUT_PATHS, *MODEL_PATHS, *OUTPUT_PATHS):
        if not isinstance(values.get(key), str) or values[key].startswith(("ONLINE", "REMOTE:")):
            continue
        text = os.path.expanduser(values[key])
        if key in OUTPUT_PATHS:
            resolved[key] = str(cwd / text)
        else:
            resolved[key] = str(
                find_input(text, cwd) or (text if key in MODEL_PATHS else cwd / text)
            )
    return resolved


def read_count(env: dict[str, str], name: str, default: int) -> int:
    """A number of processes or machines in the environment, as llamafactory-cli reads it. Raises LaunchError."""
    text = env.get(name, str(default)).strip()
    if not text.isdecimal() or (int(text) == 0 and default):
        raise LaunchError(
            f"environment variable {name}: expected a whole number of 1 or more, got {text!r}"
        )
    return int(text)


def node_rank(env: dict[str, str]) -> int:
    """This machine's number among the machines; 0 where there is one, whatever else left NODE_RANK behind."""
    return (
        int(env["NODE_RANK"])
        if env.get("NNODES", "1") != "1" and env.get("NODE_RANK", "").isdecimal()
        else 0
    )


def format_bytes(count: float) -> str:
    """Bytes for people: 30.1 GiB, 512.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def tracking_backends(values: dict) -> list[str]:
    """The backends of `report_to` as a list; none is []. `use_swanlab` is LLaMA-Factory's older spelling."""
    names = [name for name in name_list(values.get("report_to")) if name != "none"]
    if "all" in names:
        names = [name for name, packages in BACKENDS.items() if any(map(find_spec, packages))]
    return names + ["swanlab"] * (values.get("use_swanlab") is True and "swanlab" not in names)


def read_json_or_empty(path: Path) -> dict:
    """A JSON object of ours; {} where the file is missing or broken."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def read_plan(run_dir: Path) -> dict:
    """plan.json, the plan with which the run was started last; {} where it is gone."""
    return read_json_or_empty(run_dir / "plan.json")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    found = [
        path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(folder: Path | None) -> int:
    """The optimizer step of a checkpoint folder; 0 for none."""
    return int(folder.name.rpartition("-")[2]) if folder else 0


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that can be trusted; None: there is none."""
    return next((path for path in list_checkpoints(run_dir) if not checkpoint_problem(path)), None)


def die_with_parent(parent: int) -> None:
    """Ask Linux to SIGKILL this process when the thread that started it is gone (prctl PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main())
