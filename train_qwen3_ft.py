#!/usr/bin/env python3
"""Full-parameter fine-tuning of Qwen3 with LLaMA-Factory, DeepSpeed ZeRO-3 and SwanLab.

    python train_qwen3_ft.py configs/demo_cpu.yaml       # a few minutes on any CPU
    python train_qwen3_ft.py                             # configs/qwen3_14b_ft.yaml, its GPUs
    CUDA_VISIBLE_DEVICES=0,1 python train_qwen3_ft.py    # two GPUs, whatever the YAML says
    python train_qwen3_ft.py my.yaml learning_rate=2e-5  # override any YAML key

Usage: python train_qwen3_ft.py [CONFIG.yaml] [key=value ...] [option ...]

    --dry-run           print plan, problems and command; start nothing
    --preview [N]       N samples (default 2) as the model will see them, and the data's figures
    --rehearse          a few steps of the run on its devices, measured, then removed
    --resume [RUN_DIR]  continue RUN_DIR, or the newest unfinished run under output_dir
    --score [MODEL]     score a run, a checkpoint or a model folder (default: the configuration's
                        own model) on the evaluation data; trains nothing
    --json              with --dry-run or --rehearse: the same as one JSON object
    --force             start anyway: an estimate, a busy GPU or an untested version stops nothing,
                        and what the run proves of itself is only said

CONFIG is a LLaMA-Factory training YAML. The launcher adds keys of its own: cuda_visible_devices
(GPU ids as nvidia-smi shows them; CUDA_VISIBLE_DEVICES in the environment wins),
global_batch_size (samples per optimizer step; gradient accumulation follows from the number of
GPUs; with per_device_train_batch_size: auto the launcher splits the step, by the lengths of the
samples, the memory and the links), max_restarts (default 3), hang_timeout (seconds, default
600), notify (a URL that gets the summary as JSON when the run ends) and the three of the scores:
score, score_samples and score_database. The script starts torchrun on itself, one process per GPU.

The preflight checks before anything starts, and reports all problems at once: keys, types and
choices against the installed LLaMA-Factory; keys that exclude each other; model, data and
DeepSpeed files; packages; driver and GPUs; memory and disk against an estimate. It cannot check
what only a run can show: that a download works, that the data tokenizes (--preview shows it),
that an unknown architecture fits in memory. --rehearse runs a few steps of the real run, that of
the longest samples first, and one checkpoint, says what they took, and leaves nothing behind but
<output_dir>/rehearsal.json, with which the end of the real run compares, and data.json, by which
the next plan knows how long the samples are (a preview leaves it, too). With auto it tries three
splits, and the run takes the fastest.

Everything of a run is in <output_dir>/<YYYYmmdd-HHMMSS> (run_name=NAME replaces the timestamp):
config.yaml (can be launched again), plan.json, data.json, metrics.jsonl, logs/rank<R>.log,
scores/, checkpoint-N/, training_loss.png, summary.json and the model. Beside it,
<output_dir>/swanlog has the SwanLab records of all runs.

Ctrl-C, SIGTERM or a file STOP in the run directory: the run saves a checkpoint at the end of
the step and stops; --resume continues it, on any number of GPUs. A file SAVE: it saves one and
goes on. After a crash or a hang the launcher restarts from the last checkpoint; a run that
diverges ends, with its good checkpoints.

Is it any good? With score: exact, sql (needs score_database: an SQLite file or a .sql script) or
my_scores.py (has score(answer, reference, prompt)) each evaluation lets the model answer
score_samples prompts (default 100) of the evaluation data, under any ZeRO stage, and counts what is
right: eval_exact, eval_execution, eval_NAME. metric_for_best_model may name them.

The run proves itself. Before its first step the ranks compare what trainer and engine will do with
what was asked, themselves with one another, and after a resume what was loaded with what was
saved: a difference ends the run there, with both numbers.

Exit codes: 0 done; 1 training failed or diverged; 2 nothing was started (arguments, config,
machine, or data with nothing to learn); 128+N stopped by signal N after a checkpoint.

Map of this file. Ranks write files in the run directory, the launcher watches them. Each
chapter reads top-down: what calls stands above what it calls, each check with its subject.

    types      what a run is made of: problems, Values, Config, Devices, Model, Plan, Preflight
    LAUNCHER   main; command line; preflight; configuration; keys (also the launcher's own);
               devices and nodes; packages; model and DeepSpeed; data, and how long its samples
               are; scores; plan; the split of a step; rules between keys; resume; the plan for
               people and as data; settings of the trackers; rehearsal; launch; supervision (stop,
               hang watch); console; children beside the ranks; why a run failed; scores for
               people; summary
    RANK       one process per device, started by torchrun: training arguments, the callback
               (stop, commit, metrics, divergence); scores; the proofs; resume on another number
               of ranks; the data as the model sees it
    TRACKER    one process per launch: metrics.jsonl -> SwanLab
    SHARED     the run directory, checkpoints, files and processes
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import difflib
import errno
import faulthandler
import fcntl
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple, TextIO

try:
    import yaml
except ModuleNotFoundError:
    sys.stderr.write(
        "error: package pyyaml is not installed; pip install -r requirements.txt\n"
    )
    sys.exit(2)

# torch, transformers, llamafactory, deepspeed and swanlab are imported inside functions of Rank and
# Tracker only: CUDA_VISIBLE_DEVICES must be set before torch looks at it, and the launcher must
# start at once.

SCRIPT = Path(__file__).resolve()
DEFAULT_CONFIG = SCRIPT.parent / "configs" / "qwen3_14b_ft.yaml"
INSTALL = "pip install -r requirements.txt"
DEMO_COMMAND = f"python {SCRIPT.name} configs/demo_cpu.yaml"
HANDOVER_VARIABLE = "QWEN3_FT_HANDOVER"  # JSON for the ranks: secrets, force, data
LAUNCHER_VARIABLE = "QWEN3_FT_LAUNCHER"
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its processes
NODE_VARIABLES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what each of NNODES nodes needs
RENDEZVOUS_SECONDS = 900  # how long nodes wait for one another
MANIFEST = "manifest.json"  # in a checkpoint, written last
ACCUMULATION = "gradient_accumulation_steps"
SPLIT = ("per_device_train_batch_size", ACCUMULATION)  # of a step
OUT_OF_MEMORY = "a GPU is out of memory"
DATA_FILE = "data.json"  # in a run, and beside the runs from a preview or a rehearsal
PADDED_TO = 8  # LLaMA-Factory pads a batch to a multiple of it
SCORES = {"exact": ("exact",), "sql": ("exact", "execution")}  # what `score` gives; or a script

Environment = dict[str, str]  # the environment variables of a process

# Keys without a default that are read by name: a name that is in none of the two tables is a typo.
OPTIONAL = """
    adam_beta1 adam_beta2 adam_epsilon bf16 bf16_full_eval cache_dir compute_accuracy
    dataloader_drop_last dataloader_num_workers deepspeed disable_gradient_checkpointing
    disable_shuffling do_eval do_predict enable_liger_kernel eval_dataset eval_on_each_dataset
    eval_on_start eval_steps flash_attn fp16 fp16_full_eval fsdp learning_rate
    load_best_model_at_end lr_scheduler_kwargs lr_scheduler_type max_samples
    metric_for_best_model model_name_or_path model_revision neat_packing packing plot_loss
    predict_with_generate pref_loss project pure_bf16 report_to resize_vocab
    resume_from_checkpoint save_only_model save_total_limit streaming swanlab_logdir
    swanlab_project swanlab_run_name swanlab_workspace template tokenized_path
    train_from_scratch train_sampling_strategy use_cpu use_swanlab warmup_ratio warmup_steps
    weight_decay
""".split()
# The defaults of LLaMA-Factory and transformers for the keys that the plan and the rules read;
# LAUNCHER_FIELDS adds those of the launcher's own.
DEFAULTS = dict.fromkeys(OPTIONAL) | {
    "do_train": True,
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset_dir": "data",
    "cutoff_len": 2048,
    "val_size": 0.0,
    "mix_strategy": "concat",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch_fused",
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "logging_strategy": "steps",
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "enable_thinking": True,
    "output_dir": ".",
}


class Forceable(str):
    """A problem that --force starts anyway."""


class LaunchError(Exception):
    """Nothing was started, and why: each argument is a problem; exit code 2.

    A problem is what the user can fix: where, what was seen, what was expected, what to do.
    """


class Problems(list):
    """Problems that were found so far: they are gathered, so that all are shown at once."""

    def attempt(self, function: Callable, *arguments: object, where: str = ""):
        """What the function returns; None where it raised LaunchError or OSError, now gathered."""
        try:
            return function(*arguments)
        except LaunchError as error:
            found = error.args
        except OSError as error:
            found = [describe_os_error(error)]
        for problem in found:
            text = f"{where}: {problem}" if where else problem
            self.append(Forceable(text) if isinstance(problem, Forceable) else text)
        return None


def describe_os_error(error: OSError) -> str:
    """Which file, and what is wrong with it."""
    return f"{error.filename}: {str(error.strerror).lower()}"


class Values(dict):
    """A configuration whose keys are attributes too; one that is not given has its default, or is
    None. `get` and `in` know only what is given; an attribute that no table names is an error.
    """

    def __getattr__(self, key: str) -> object:
        if key not in self and key not in DEFAULTS:
            raise AttributeError(f"no key {key} in DEFAULTS and OPTIONAL")
        return self[key]

    def __missing__(self, key: str) -> object:
        return DEFAULTS.get(key)


@dataclass(frozen=True)
class Config:
    """A resolved configuration: absolute paths, and no secrets in `values`.

    `lines` are the lines of the keys in the file, `overridden` the keys of the command line;
    `refused` are keys whose value was wrong: they are not in `values` any more.
    """

    source: str
    values: Values
    lines: dict[str, int] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()

    def place(self, key: str) -> str:
        """Where `key` was given: `file.yaml:12` or `command line`; the file where it was not."""
        if key in self.overridden:
            return "command line"
        return f"{self.source}:{self.lines[key]}" if key in self.lines else self.source

    def where(self, key: str) -> str:
        """The place where to fix `key`, for a message: `file.yaml:12: key`."""
        return f"{self.place(key)}: {key}"

    def update(self, **values: object) -> Config:
        """A copy with other values; None takes a key out."""
        changed = self.values | values
        given = {key: value for key, value in changed.items() if value is not None}
        return replace(self, values=Values(given))


@dataclass(frozen=True)
class Devices:
    """The GPUs of this node that the run uses, why, and how many processes that makes.

    `ids` are the words of CUDA_VISIBLE_DEVICES, as nvidia-smi numbers them; none means CPU.
    `where` is the place where the user chose them.
    """

    ids: tuple[str, ...]
    reason: str
    processes: int
    where: str = "cuda_visible_devices"


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML reports it, None where it cannot tell.

    Memory in bytes; `users` are the processes that hold memory on it; `capability` is CUDA's
    compute capability; `driver_cuda` is the CUDA version that the driver supports, 13000 for
    13.0; `linked` are the GPUs that it reaches by NVLink.
    """

    index: int
    uuid: str
    name: str
    total: int | None
    used: int | None
    users: tuple[str, ...]
    capability: tuple[int, int] | None
    driver_cuda: int | None
    linked: frozenset[int] = frozenset()

    def is_named(self, device: str) -> bool:
        """Whether an id means this GPU: its number, or the beginning of its UUID."""
        return device == str(self.index) or (
            device.startswith("GPU-") and self.uuid.startswith(device)
        )


@dataclass(frozen=True)
class Model:
    """What the plan knows of a model: what to call it, its parameters (None: unknown), config.json.

    `download` is the part of it, in bytes, that is not in the local cache.
    """

    label: str
    parameters: int | None = None
    shape: dict = field(default_factory=dict)
    download: int = 0

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest weight matrix, the most that ZeRO-3 gathers for one module."""
        widest = max(self.shape["vocab_size"], self.shape.get("intermediate_size") or 0)
        return self.shape["hidden_size"] * widest


@dataclass(frozen=True)
class Zero:
    """What the plan needs of a DeepSpeed file: the ZeRO stage (0: none) and what is offloaded."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    used: bool = False
    saves_weights: bool = True  # ZeRO-3 gathers the weights for the final model
    settings: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """How the optimizer's state is stored: `ZeRO-3`, or `DDP` without DeepSpeed."""
        return f"ZeRO-{self.stage}" if self.used else "DDP"

    def __str__(self) -> str:
        parts = {"optimizer": self.offload_optimizer, "parameters": self.offload_parameters}
        moved = " and ".join(part for part, is_moved in parts.items() if is_moved)
        return self.kind + (f" with {moved} in host memory" if moved else "")


@dataclass(frozen=True)
class Steps:
    """The arithmetic of a run; None where only the tokenized data can tell, with the reason."""

    samples: int | None
    per_epoch: int | None
    total: int | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run will take; None where it cannot be known. Memory and disk in bytes."""

    devices: Devices
    gpus: list[Gpu]
    world_size: int
    zero: Zero
    values: Values
    steps: Steps
    model: Model
    device_bytes: int | None
    disk_free: int
    data: dict[str, str]  # the data files, and by what a change of them is noticed
    rows: tuple[list, list] = ([], [])  # of each data set, and of those of evaluation
    phase: str = ""  # the one that takes the most memory
    memory: dict[str, int] | None = None  # by part in that phase, on each device
    host_memory: int | None = None
    checkpoint_bytes: int | None = None
    disk_bytes: int | None = None
    figures: dict = field(default_factory=dict)  # data.json of the same samples, where known
    auto: bool = False  # whether the launcher chooses the micro-batch
    provisional: bool = False  # it has, but the lengths of the samples are not known yet

    @property
    def micro(self) -> int:
        """Samples that a rank has at once."""
        return self.values.per_device_train_batch_size

    @property
    def per_rank(self) -> int:
        """Samples per optimizer step on each rank."""
        return self.micro * self.values.gradient_accumulation_steps

    @property
    def fixed_work(self) -> str:
        """What there is once for each micro-batch."""
        return "gathers" if self.zero.stage == 3 else "micro-batches"

    @property
    def sequences(self) -> int:
        """Sequences of a sample: preferences are pairs."""
        return 2 if self.values.stage in ("dpo", "rm") else 1

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.per_rank * self.world_size

    @property
    def lengths(self) -> list:
        """[tokens with their padding, how many samples have them], shortest first; all have
        cutoff_len where that is unknown.
        """
        return self.figures.get("lengths") or [[self.values.cutoff_len, 1]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self.lengths[-1][0]

    @property
    def needed(self) -> int:
        """Bytes that the run takes on each device; 0 where that is unknown."""
        return sum((self.memory or {}).values())

    @property
    def unit(self) -> str:
        """What a rank runs on."""
        return "GPU" if self.devices.ids else "process"


@dataclass(frozen=True)
class Preflight:
    """A run that could start: its configuration, its plan and its problems.

    `run` is the run that is resumed, None where a new one will be created.
    """

    config: Config
    plan: Plan
    problems: Problems
    run: Run | None = None
    force: bool = False


# ================================================================================================
# LAUNCHER
# ================================================================================================


def main(argv: list[str] | None = None) -> int:
    """Run the launcher, or the rank or tracker that it started; returns the exit code."""
    open_standard_streams()
    try:
        options = parse_arguments(argv)
        env = dict(os.environ)
        if not (options.tracker or options.tokenize or UNDER_TORCHRUN in env):
            return check_and_launch(options, env)
        if UNDER_TORCHRUN in env:
            return run_rank(Run(options.config.parent), env)
        if options.tokenize:
            return run_tokenizer(Run(options.tokenize), options.preview)
        return run_tracker(Run(options.tracker))
    except LaunchError as error:
        for problem in error.args:
            hint = " (use --force to start anyway)" if isinstance(problem, Forceable) else ""
            say(f"error: {problem}{hint}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the run began; from then on StopRequest takes Ctrl-C
        return 128 + signal.SIGINT


def open_standard_streams() -> None:
    """Open what was closed of stdin, stdout and stderr: else the next file gets its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line for the user; a closed terminal must not end the run."""
    stream = stream or sys.stdout
    try:
        if "tqdm" in sys.modules:  # there may be a bar, which is drawn again below the line
            sys.modules["tqdm"].tqdm.write(text, file=stream)
        else:
            print(text, file=stream)
        if stream:
            stream.flush()
    except (OSError, ValueError):
        # The rest of the buffer must not fail at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- command line -------------------------------------------------------------------------------

OVERRIDE = re.compile(r"[\w-]+=")


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are the launcher's, and whose help is the manual."""

    def error(self, message: str):
        raise LaunchError(f"{hide_values(message)}; see python {SCRIPT.name} --help")

    def format_help(self) -> str:
        return __doc__


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Split the command line into `config` (path), `overrides` ({key: text}) and the options."""
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--preview", nargs="?", const="2")
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("--score", nargs="?", const="")
    for name in ("--dry-run", "--rehearse", "--json", "--force"):
        parser.add_argument(name, action="store_true")
    for name in ("--tracker", "--tokenize"):  # processes that the launcher has started
        parser.add_argument(name, type=Path)
    options = parser.parse_intermixed_args(argv)
    if options.json and not (options.dry_run or options.rehearse):
        raise LaunchError("--json goes with --dry-run or --rehearse")
    own = options.rehearse, options.score is not None, options.resume is not None
    if sum(own) > 1 or options.rehearse and (options.dry_run or options.preview):
        raise LaunchError(
            "--rehearse begins a run of its own, as --score does; leave out the other option"
        )
    return argparse.Namespace(**vars(options) | sorted_words(options))


def sorted_words(options: argparse.Namespace) -> dict:
    """`config`, `overrides`, `preview`, `resume` and `score`: what follows one of the last three
    options may not be meant for it.
    """
    words = options.words
    samples = options.preview
    run_dir = options.resume
    scored = options.score
    if samples and not samples.isdecimal():
        words, samples = [samples, *words], "2"  # --preview CONFIG.yaml: no N was given
    if run_dir and (OVERRIDE.match(run_dir) or os.path.isfile(run_dir)):
        words, run_dir = [run_dir, *words], ""  # --resume CONFIG.yaml key=value: no RUN_DIR
    if scored and (OVERRIDE.match(scored) or os.path.isfile(scored)):
        words, scored = [scored, *words], ""  # --score CONFIG.yaml: no MODEL was given
    paths = [word for word in words if not OVERRIDE.match(word)]
    if scored and not paths:
        paths = own_configuration(scored)
    if len(paths) > 1:
        hint = "; write key=value without spaces" if "=" in paths else ""
        shown = hide_values(" ".join(words))
        raise LaunchError(f"expected one CONFIG.yaml, got {len(paths)}: {shown}{hint}")
    if paths and run_dir:
        raise LaunchError(
            f"--resume {run_dir} uses that run's own config.yaml; leave out {paths[0]}, and "
            "write changes as key=value"
        )
    return {
        "config": Path(*paths) if paths else DEFAULT_CONFIG,
        "overrides": dict(word.split("=", 1) for word in words if OVERRIDE.match(word)),
        "preview": samples,
        "resume": run_dir,
        "score": scored,
    }


def own_configuration(model: str) -> list[str]:
    """The configuration that a run or a checkpoint was trained with, where it is there."""
    places = (Path(model, "config.yaml"), Path(model).parent / "config.yaml")
    return [str(path) for path in places if path.is_file()][:1]


def hide_values(text: str) -> str:
    """A command line for a message: a mistyped secret must not be repeated."""
    return re.sub(r"=\s*\S+", "=...", text)


# --- preflight ----------------------------------------------------------------------------------


def check_and_launch(options: argparse.Namespace, env: Environment) -> int:
    """The launcher from the preflight to the end of the run; returns the exit code."""
    found = preflight_or_stop(options, env)
    if not found:
        return 0
    if options.preview:
        return tokenize(found, options.preview, env)
    if found.plan.provisional and node_rank(env) == 0:
        say("tokenizing first: the micro-batch goes by the lengths of the samples", sys.stderr)
        if tokenize(found, "", env):
            return 2
        found = preflight_or_stop(options, env)
        # The ranks take what is in the cache since now.
        found = replace(found, config=found.config.update(overwrite_cache=None))
    if options.rehearse:
        return rehearse(found, options.json, env)
    return launch(found, env)


def preflight_or_stop(options: argparse.Namespace, env: Environment) -> Preflight | None:
    """The preflight of a run to start; None after a dry run, and where there is nothing to do.

    Raises LaunchError with all problems that --force does not start anyway.
    """
    try:
        run = find_run(options)
        longer = {"max_steps", "num_train_epochs"} & options.overrides.keys()
        if run and run.is_finished() and not longer:
            say(
                f"{run.path}: this run is finished, there is nothing to resume; to train its "
                f"model further: python {SCRIPT.name} model_name_or_path={run.path}"
            )
            return None
        found = preflight(options, env, run)
    except OSError as error:
        raise LaunchError(describe_os_error(error)) from None
    if options.dry_run:
        dry_run(found, options.json, env)
    stopping = found.problems
    if options.force or options.preview:
        stopping = [problem for problem in stopping if not isinstance(problem, Forceable)]
    if stopping:
        raise LaunchError(*stopping)
    return None if options.dry_run else found


def preflight(options: argparse.Namespace, env: Environment, run: Run | None) -> Preflight:
    """From the command line to a plan and all problems; writes nothing.

    Raises LaunchError for input that cannot be read at all.
    """
    problems = Problems()
    config = chosen_config(options, run)
    require_packages("torch", "transformers", "llamafactory")  # nothing can be checked without
    config = check_keys(config, problems)
    for check in (check_webhooks, check_access, check_output):
        problems += check(config)
    of_devices = Problems()
    devices, gpus = inspect_devices(config, env, of_devices)
    nodes = of_devices.attempt(read_count, env, "NNODES", 1) or 1
    of_devices += check_nodes(config, nodes, env)
    problems += of_devices
    ranks = max(devices.processes, 1) * nodes
    config, is_auto, is_open = open_split(config, run, ranks, problems)
    where = config.where("deepspeed")
    zero = problems.attempt(read_deepspeed, config.values, where=where) or Zero()
    if zero.used:
        problems.attempt(require_packages, "deepspeed")
    problems += check_packages(config, zero, env)
    problems += check_other_models(config)
    problems += check_scores(config)
    where = config.where("model_name_or_path")
    model = problems.attempt(read_model, config.values, where=where) or Model("unknown")
    data = inspect_data(config, "dataset", problems)
    eval_data = inspect_data(config, "eval_dataset", problems)
    plan = make_plan(config, devices, gpus, zero, model, data, eval_data, ranks)
    plan = replace(choose_split(plan) if is_open else plan, auto=is_auto)
    config = replace(config, values=plan.values)
    problems += check_rules(config, plan)
    if all(isinstance(problem, Forceable) for problem in of_devices):
        problems += check_plan(plan, config, run)
    problems += check_run(config, plan, run, env)
    return Preflight(config, plan, problems, run, options.force)


def check_run(config: Config, plan: Plan, run: Run | None, env: Environment) -> list[str]:
    """Why a new run cannot begin, or `run` cannot be resumed."""
    problems = Problems()
    if run is None:
        problems.attempt(new_run, config)  # which reads run_name
    elif node_rank(env) == 0 and run.is_running():
        problems.attempt(run.lock)  # which says who runs it
    else:
        problems += check_resume(config, plan, run)
    return problems


def open_split(
    config: Config, run: Run | None, ranks: int, problems: Problems
) -> tuple[Config, bool, bool]:
    """The configuration with its accumulation; whether the launcher chooses the split of a step in
    this run, and whether now, where it is one sample at a time until then. A resume on as many
    ranks goes on as it was.
    """
    key = "per_device_train_batch_size"
    recorded = run.read("plan.json") if run else {}
    is_open = config.values[key] == "auto"
    is_auto = is_open or (recorded.get("auto", False) and key not in config.overridden)
    if is_open or (is_auto and recorded["world_size"] != ranks):
        is_open = True
        config = config.update(per_device_train_batch_size=1)
    return problems.attempt(derive_accumulation, config, ranks) or config, is_auto, is_open


def chosen_config(options: argparse.Namespace, run: Run | None) -> Config:
    """The configuration of the run that the command line asks for. Raises LaunchError."""
    config = load_config(run.config_file if run else options.config, options.overrides)
    if run:
        config = resumed_config(config, run)
    if options.score is not None:
        config = score_config(config, options.score)
    return preview_config(config) if options.preview else config


def resumed_config(config: Config, run: Run) -> Config:
    """The configuration to resume with: the same samples per step on any number of GPUs."""
    config = config.update(output_dir=str(run.path.parent), run_name=run.path.name)
    batch = run.read("plan.json").get("global_batch_size")
    if batch and not {"global_batch_size", ACCUMULATION} & config.overridden:
        config = config.update(global_batch_size=batch, gradient_accumulation_steps=None)
    return config


PREVIEW_ROWS = 10_000  # a preview tokenizes the first rows of each data set
# What says how to train, not on which data.
NOT_TOKENIZED = (
    "deepspeed fsdp fsdp_config bf16 fp16 pure_bf16 flash_attn quantization_bit report_to run_name "
    "cuda_visible_devices"
).split()


def preview_config(config: Config) -> Config:
    """What a preview needs of a configuration: data, template and tokenizer, on the CPU."""
    changes = dict.fromkeys(("tokenized_path", "preprocessing_num_workers"))
    if not config.values.streaming:
        most = config.values.max_samples or PREVIEW_ROWS
        changes["max_samples"] = min(most, PREVIEW_ROWS)
    return without_model(config.update(**changes))


def without_model(config: Config) -> Config:
    """What tokenizing needs of a configuration."""
    on_cpu = {"use_cpu": True, "train_from_scratch": True, "report_to": "none"}
    return config.update(**dict.fromkeys(NOT_TOKENIZED) | on_cpu)


# --- configuration ------------------------------------------------------------------------------

SECRET_KEY = re.compile(r"(^|[_-])(token|api[_-]key|secret|password|webhook_url)$|^notify$")
# The hub and tracker libraries read these themselves, so the value need not pass through arguments.
SECRET_ENVIRONMENT = {
    "hf_hub_token": "HF_TOKEN",
    "hub_token": "HF_TOKEN",
    "swanlab_api_key": "SWANLAB_API_KEY",
}
# The file that each of them has.
OTHER_MODELS = {
    "adapter_name_or_path": "adapter_config.json",
    "ref_model": "config.json",
    "reward_model": "config.json",
}
MODEL_PATHS = ("model_name_or_path", *OTHER_MODELS)
OUTPUT_PATHS = ("output_dir", "cache_dir", "swanlab_logdir", "profiler_output_dir")
PATHS = (
    *"deepspeed dataset_dir media_dir resume_from_checkpoint tokenized_path fsdp_config".split(),
    *("score", "score_database"),
    *MODEL_PATHS,
    *OUTPUT_PATHS,
)
NAMES = ("run_name", *PATHS)  # here 1.10 is a name, not a number


def load_config(path: Path, overrides: dict[str, str]) -> Config:
    """Read CONFIG, apply the overrides, take the secrets out and make the paths absolute.

    A key whose value is empty or null counts as not given. Raises LaunchError.
    """
    path = find_input(path)
    values, lines = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict) or not values:
        found = {list: "found a list", str: "found plain text"}.get(type(values), "it is empty")
        raise LaunchError(f"{path}:1: expected lines of `key: value` at the top level, {found}")
    for key in values:
        if not isinstance(key, str):
            line = lines.get(str(key), 1)
            raise LaunchError(f"{path}:{line}: {key!r}: expected a key that is a word")
    for key, text in overrides.items():
        value, _ = parse_yaml(text, f"command line: {key}")
        is_name = key in NAMES and type(value) in (int, float)
        values[key] = text if is_name else value
    values = {key: value for key, value in values.items() if value is not None}
    secrets = {key: str(value) for key, value in values.items() if SECRET_KEY.search(key)}
    values = Values(resolve_paths(without(values, *secrets)))
    return Config(str(path), values, lines, secrets, frozenset(overrides))


def read_text(path: Path) -> str:
    """Read a UTF-8 file (a byte order mark is allowed). Raises LaunchError."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        text = f"{path}:{line}: not UTF-8 text; save the file as UTF-8"
    except OSError as error:
        text = f"{describe_os_error(error)}: expected a YAML file; the demo is {DEMO_COMMAND}"
    raise LaunchError(text)


class ConfigLoader(yaml.SafeLoader):
    """A safe YAML loader with the scalars of YAML 1.2: `no` is a word and `1e-5` a number."""

    yaml_implicit_resolvers = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping in which no key is given twice and names are text."""
        node = super().compose_mapping_node(anchor)
        for key, value in node.value:
            if key.value in NAMES and value.tag.endswith((":int", ":float")):
                value.tag = "tag:yaml.org,2002:str"
        return self.refuse_duplicates(node)

    def refuse_duplicates(self, node: yaml.MappingNode) -> yaml.MappingNode:
        """The node; raises MarkedYAMLError where a key is given twice."""
        first = {}
        for key, _ in node.value:
            old = first.setdefault(str(key.value), key)
            if old is not key and key.value != "<<":
                line = old.start_mark.line + 1
                text = f"{key.value}: duplicate key, first on line {line}; keep one of them"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
        return node


SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)",
    "float": r"[-+]?(\.(inf|Inf|INF)|\.(nan|NaN|NAN)|[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?"
    r"|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
    "merge": r"<<",
}
for _name, _pattern in SCALARS.items():
    _expression = re.compile(f"^(?:{_pattern})$")
    ConfigLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, None)


def parse_yaml(text: str, source: str) -> tuple[object, dict[str, int]]:
    """Parse one YAML document.

    Returns the value and, where it is a mapping, the line of each top-level key. Raises
    LaunchError with `source:line` for a syntax error, a duplicate key or an unusable key.
    """
    try:
        loader = ConfigLoader(text)
        node = loader.get_single_node()
        lines = {}
        if node is None:
            return None, lines
        if isinstance(node, yaml.MappingNode):
            lines = {str(name.value): name.start_mark.line + 1 for name, _ in node.value}
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        place = f"{source}:{error.problem_mark.line + 1}"
        hint = "; indent with spaces, not tabs" if "\\t" in error.problem else ""
        raise LaunchError(f"{place}: not valid YAML: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise LaunchError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def resolve_paths(values: dict) -> dict:
    """Absolute paths: inputs as find_input looks for them, outputs in the working directory.

    A model that is no folder in either place stays as it is: it is a hub id.
    """
    resolved = dict(values)
    for key in PATHS:
        text = values.get(key)
        if not isinstance(text, str) or text.startswith(("ONLINE", "REMOTE:")):
            continue
        if key == "score" and not text.endswith(".py"):
            continue
        text = os.path.expanduser(text)
        path = text if key in OUTPUT_PATHS else find_input(text)
        is_hub_id = key in MODEL_PATHS and not os.path.exists(path)
        resolved[key] = text if is_hub_id else str(Path.cwd() / path)
    return resolved


def find_input(path: str | Path) -> Path:
    """Where an input is: under the working directory, else beside the script."""
    beside = SCRIPT.parent / path
    if os.path.exists(beside) and not os.path.exists(path):
        return beside
    return Path(path)


def without(values: dict, *keys: str) -> dict:
    """A copy of a dict without some keys."""
    return {key: value for key, value in values.items() if key not in keys}


def check_webhooks(config: Config) -> Iterator[str]:
    """Addresses that could not be posted to at the end."""
    if not config.secrets.get("notify", "http://").startswith(("http://", "https://")):
        yield f"{config.where('notify')}: expected a URL that begins with https://"
    for key in config.secrets:
        if key.startswith("swanlab_lark"):
            yield (
                f"{config.where(key)}: the launcher sends no Lark message; use notify: URL, or "
                "a notification plugin of SwanLab"
            )


def check_access(config: Config) -> Iterator[str]:
    """Paths that lead through a folder of another user."""
    for key in PATHS:
        path = str(config.values.get(key))
        try:
            os.stat(path)
        except PermissionError:
            yield f"{config.where(key)}: {path}: permission denied; use a path of yours"
        except OSError:
            pass  # what must exist is checked with its subject


def check_output(config: Config) -> Iterator[str]:
    """output_dir must be a folder that can be written, or one that can be made."""
    folder = Path(config.values.get("output_dir", "."))
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.exists():
        problem = "is a link that leads nowhere"
    elif not folder.is_dir():
        problem = "is a file"
    elif not os.access(folder, os.W_OK):
        problem = "cannot be written"
    else:
        return
    yield f"{config.where('output_dir')}: {folder} {problem}; choose a folder of yours"


# --- keys ---------------------------------------------------------------------------------------


# Python's types as messages call them.
KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


@dataclass(frozen=True)
class Field:
    """What a key takes: names of Python types (none: anything), or an enumeration's words; of the
    launcher's own keys also the default and the least number.
    """

    kinds: Set[str] = frozenset()
    choices: tuple[str, ...] = ()
    default: object = None
    least: float = -math.inf

    def __str__(self) -> str:
        kinds = [text for kind, text in KINDS.items() if kind in self.kinds]
        if self.choices and "int" not in self.kinds:
            return "one of " + ", ".join(self.choices)
        return " or ".join([*kinds, *self.choices])


# SwanLab's modes of today; LLaMA-Factory's enumeration has two of them.
SWANLAB_MODES = ("online", "cloud", "local", "offline", "disabled")
LAUNCHER_FIELDS = {
    "swanlab_mode": Field(choices=SWANLAB_MODES),
    "cuda_visible_devices": Field(),
    "global_batch_size": Field({"int"}, least=1),
    "max_restarts": Field({"int"}, default=3, least=0),
    "hang_timeout": Field({"int"}, default=600, least=1),  # seconds
    "notify": Field({"str"}),
    "score": Field({"str"}),
    "score_samples": Field({"int"}, default=100, least=1),
    "score_database": Field({"str"}),
}
DEFAULTS |= {key: own.default for key, own in LAUNCHER_FIELDS.items()}
# Enumerations stand before the fields that name them.
SOURCES = """
    transformers/trainer_utils.py llamafactory/extras/constants.py transformers/training_args.py
    transformers/training_args_seq2seq.py llamafactory/hparams/model_args.py
    llamafactory/hparams/data_args.py llamafactory/hparams/training_args.py
    llamafactory/hparams/finetuning_args.py llamafactory/hparams/generating_args.py
""".split()
ENUMERATION = r"(?ms)^class (\w+)\(\w*Enum\):\n(.*?)(?=^\S)"
FIELD = r'(?m)^    (\w+): (.+) = field\((?![^"]*init=False)'
# Text that LLaMA-Factory splits at commas, so that a list does as well.
SPLIT_KEYS = """
    dataset eval_dataset adapter_name_or_path interleave_probs lora_target oft_target
    galore_target apollo_target additional_target freeze_trainable_modules freeze_extra_modules
""".split()


def known_fields() -> dict[str, Field]:
    """Every key of the installed LLaMA-Factory and transformers, as their sources declare it."""
    source = "\n".join(map(source_of, SOURCES))
    fields = {}
    choices = {
        name: re.findall(r'(?m)^    \w+ = "(.+)"', body)
        for name, body in re.findall(ENUMERATION, source)
    }
    for key, annotation in re.findall(FIELD, source):
        if key in SPLIT_KEYS:
            annotation += " | list"
        if key in ("fsdp", "resume_from_checkpoint"):
            annotation += " | bool"
        fields[key] = read_annotation(annotation, choices)
    return fields | LAUNCHER_FIELDS | {"per_device_train_batch_size": Field({"int"}, ("auto",))}


def source_of(name: str) -> str:
    """The text of a file of an installed package, `package/path.py`."""
    package, _, path = name.partition("/")
    [folder] = find_spec(package).submodule_search_locations
    return Path(folder, path).read_text(encoding="utf-8")


def read_annotation(text: str, choices: dict[str, list[str]]) -> Field:
    """Turn an annotation, such as `IntervalStrategy | Literal["no"] | None`, into a Field."""
    text = re.sub(r"\b(list|dict)\[[^|\]]*\]", r"\1", text)  # of a list any elements will do
    words = re.findall(r'"(.*?)"', text)
    names = re.findall(r"\w+", text)
    for name in names:
        words += choices.get(name, ())
    return Field(KINDS.keys() & names, tuple(words))


# (what fits, what is expected, keys)
RANGES = (
    (
        lambda number: number >= 1,
        "1 or more",
        """
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        cutoff_len max_samples buffer_size preprocessing_num_workers preprocessing_batch_size
        ddp_timeout
        """,
    ),
    (
        lambda number: number > 0,
        "more than 0",
        "num_train_epochs logging_steps save_steps eval_steps",
    ),
    (
        lambda number: number >= 0,
        "0 or more",
        """
        learning_rate weight_decay warmup_ratio warmup_steps max_grad_norm val_size
        dataloader_num_workers label_smoothing_factor neftune_noise_alpha
        """,
    ),
    (lambda number: number <= 1, "a share up to 1", "warmup_ratio"),
    (
        lambda number: number < 1 or number == int(number),
        "a whole number, or a share below 1",
        "logging_steps save_steps eval_steps warmup_steps val_size",
    ),
    (lambda number: number != 1, "a share below 1, or a whole number above 1", "val_size"),
    (lambda number: number != 0, "-1 (as many as the epochs have) or 1 or more", "max_steps"),
)


def check_keys(config: Config, problems: Problems) -> Config:
    """The configuration with every value cast to its type; a wrong one is reported and left out."""
    fields = known_fields()
    values = Values()
    refused = set()
    for key in [*config.values, *config.secrets]:
        try:
            if key not in fields:
                hint = did_you_mean(key, fields) or "; LLaMA-Factory has no such key"
                raise ValueError(f"unknown key{hint}")
            if key in config.values:
                values[key] = checked_value(key, config.values[key], fields[key])
        except ValueError as error:
            problems.append(f"{config.where(key)}: {error}")
            refused.add(key)
    return replace(config, values=values, refused=frozenset(refused))


def checked_value(key: str, value: object, wanted: Field) -> object:
    """`value` as the type that `key` takes. Raises ValueError where it cannot be."""
    value = cast(value, wanted)
    own = (lambda number: number >= wanted.least, f"{wanted.least} or more", key)
    for fits, expected, keys in (*RANGES, own):
        if key in keys.split() and isinstance(value, (int, float)) and not fits(value):
            raise ValueError(f"expected {expected}, got {value}")
    return value


def cast(value: object, wanted: Field) -> object:
    """`value` as the type the key takes; LLaMA-Factory casts nothing that comes as a dict.

    The words yes, no, on, off of YAML 1.1 are booleans here; where there is the choice `no`,
    false means that (save_strategy: false). Raises ValueError that says what was expected.
    """
    kinds = wanted.kinds
    word = str(value).lower()
    booleans = ConfigLoader.bool_values
    choice = "no" if value is False else value
    if choice in wanted.choices:
        return choice
    if wanted.choices and "int" not in kinds:
        pass  # it must be one of them
    elif not kinds or (type(value).__name__ in kinds and not isinstance(value, float)):
        return value  # of floats the number below must be finite
    elif "bool" in kinds and word in booleans:
        return booleans[word]
    elif type(value) in (str, int, float):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if "int" in kinds and number.is_integer():
                return int(number)
            if "float" in kinds and math.isfinite(number):
                return number
        if "str" in kinds:
            return str(value)
    hint = did_you_mean(str(value), wanted.choices)
    raise ValueError(f"expected {wanted}, got {value!r}{hint}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean WORD?` with the closest of `words`; '' where none is close."""
    word = word.replace("-", "_").lower()
    if "eval" not in word:  # per_device_batch_size is the training one
        words = [other for other in words if "_eval_" not in other]
    spelled = {other.lower(): other for other in words}
    found = difflib.get_close_matches(word, spelled, 1)
    return f"; did you mean {spelled[found[0]]}?" if found else ""


# --- devices and nodes --------------------------------------------------------------------------


def inspect_devices(
    config: Config, env: Environment, problems: Problems
) -> tuple[Devices, list[Gpu]]:
    """The devices to train on, and what NVML knows of them; their problems are gathered."""
    on_cpu = config.values.use_cpu is True
    gpus, note = ([], "") if on_cpu else query_gpus()
    devices = problems.attempt(resolve_devices, config, env, gpus)
    if devices is None or on_cpu:
        return devices or Devices((), "unknown", 0), []
    problems += check_devices(devices, gpus, note)
    if note:
        devices = replace(devices, reason=f"{devices.reason}; {note}")
    chosen = [gpu for device in devices.ids for gpu in gpus or () if gpu.is_named(device)]
    problems += check_cuda(config, devices, chosen)
    problems += check_busy(devices, chosen)
    return devices, chosen


def query_gpus() -> tuple[list[Gpu] | None, str]:
    """The node's GPUs in nvidia-smi's order, and which are not usable; None: cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return None, "not checked, since nvidia-ml-py is not installed"
    gpus = []
    lost = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                gpus.append(read_gpu(pynvml, index))
            except pynvml.NVMLError as error:  # GPU is lost
                lost.append(f"GPU {index} is left out (NVML: {error})")
    except pynvml.NVMLError as error:
        lost.append(f"no NVIDIA driver answers on this node (NVML: {error})")
    return gpus, ", ".join(lost)


def format_bytes(count: float) -> str:
    """Bytes for people: 30.1 GiB, 512.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK


def read_gpu(pynvml, index: int) -> Gpu:
    """What NVML knows of GPU `index`; in containers some of it is unsupported."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(name: str, *arguments: object):
        with contextlib.suppress(pynvml.NVMLError, AttributeError):
            return getattr(pynvml, name)(*arguments)

    def is_linked(other: int) -> bool:
        other = ask("nvmlDeviceGetHandleByIndex", other)
        return ask("nvmlDeviceGetP2PStatus", handle, other, NVLINK) == 0  # NVML_P2P_STATUS_OK

    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    users = tuple(
        f"pid {process.pid} ({format_bytes(process.usedGpuMemory or 0)})"
        for process in ask("nvmlDeviceGetComputeRunningProcesses", handle) or ()
    )
    return Gpu(
        index=index,
        uuid=ask("nvmlDeviceGetUUID", handle) or "",
        name=ask("nvmlDeviceGetName", handle) or "unknown GPU",
        total=getattr(memory, "total", None),
        used=getattr(memory, "used", None),
        users=users,
        capability=ask("nvmlDeviceGetCudaComputeCapability", handle),
        driver_cuda=ask("nvmlSystemGetCudaDriverVersion_v2"),
        linked=frozenset(filter(is_linked, range(pynvml.nvmlDeviceGetCount()))),
    )


def resolve_devices(config: Config, env: Environment, gpus: list[Gpu] | None) -> Devices:
    """Choose the GPUs: CUDA_VISIBLE_DEVICES in the environment, else in the YAML, else all
    there are.

    Pure: `gpus` is what NVML found (None: unknown). Raises LaunchError.
    """
    if config.values.use_cpu is True:
        return Devices((), "use_cpu: true", read_count(env, "NPROC_PER_NODE", 1))
    key = "cuda_visible_devices"
    variable = "CUDA_VISIBLE_DEVICES"
    ids = None
    where = config.where(key)
    reason = f"from {key}, {config.place(key)}"
    if key in config.values:
        ids = parse_device_ids(config.values[key], where)
    if variable in env:
        asked = ids
        where = f"environment variable {variable}"
        reason = f"from {variable}"
        ids = parse_device_ids(env[variable], where)
        if asked not in (None, ids):
            reason += f", which wins over the config's {','.join(asked) or 'none'}"
    elif ids is None:
        ids = tuple(str(gpu.index) for gpu in gpus or ())
        where = key
        reason = "all GPUs of this node"
    processes = read_count(env, "NPROC_PER_NODE", len(ids))
    if processes > len(ids) > 0:
        raise LaunchError(
            f"environment variable NPROC_PER_NODE: {processes} processes need {processes} "
            f"GPUs, but there are {plural(len(ids), 'GPU')} ({','.join(ids)}; {reason}); lower "
            "it"
        )
    return Devices(ids[:processes], reason, processes, where)


def parse_device_ids(value: object, where: str) -> tuple[str, ...]:
    """Read `0`, `"0,1"`, `[0, 1]`, `"GPU-uuid"` or a MIG id; "" and -1 mean no GPU.

    Raises LaunchError.
    """
    items = value if isinstance(value, list) else str(value).split(",")
    ids = tuple(str(item).strip() for item in items)
    if ",".join(ids) in ("", "-1", "NoDevFiles"):  # the last is Slurm's for a job without GPUs
        return ()
    for device in ids:
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", device):
            raise LaunchError(
                f"{where}: {device!r} is not a GPU id; expected numbers as nvidia-smi shows them "
                'such as "0,1", or GPU-... or MIG-... ids'
            )
        if ids.count(device) > 1:
            raise LaunchError(f"{where}: GPU {device} is named twice; name each GPU once")
    return ids


def plural(count: float, unit: str) -> str:
    """`1 GPU`, `2 GPUs`, `2 processes`, `0.5 epochs`."""
    number = f"{count:g}" if isinstance(count, float) else str(count)
    if count == 1:
        return f"{number} {unit}"
    return f"{number} {unit}{'es' if unit.endswith('s') else 's'}"


def read_count(env: Environment, name: str, default: int) -> int:
    """A number of processes or nodes in the environment. Raises LaunchError."""
    text = env.get(name, str(default)).strip()
    if not text.isdecimal() or (int(text) == 0 and default):
        raise LaunchError(
            f"environment variable {name}: expected a whole number of 1 or more, got {text!r}"
        )
    return int(text)


SHARED_MEMORY = 256 << 20  # bytes; containers get 64 MiB where nobody asks for more
TRY_DEMO = f" (to try the launcher on a CPU: {DEMO_COMMAND})"


def check_devices(devices: Devices, gpus: list[Gpu] | None, note: str) -> Iterator[str]:
    """GPUs that do not exist, are named twice, or cannot be used together."""
    where = devices.where
    is_several = len(devices.ids) > 1
    if not devices.ids:
        hint = "use a node with NVIDIA GPUs"
        if gpus is None:
            hint = "name them in cuda_visible_devices"
        elif gpus:
            note = "none is named"
            hint = "name one"
        yield f"{where}: no GPU to train on: {note or 'NVML finds none'}; {hint}{TRY_DEMO}"
    if is_several and any(device.startswith("MIG-") for device in devices.ids):
        yield f"{where}: CUDA shows a process one MIG instance only; name one"
    if is_several and shutil.disk_usage("/dev/shm").total < SHARED_MEMORY:
        yield Forceable(
            "/dev/shm: too small for NCCL and data loading on several GPUs; start the "
            "container with --shm-size=16g or --ipc=host"
        )
    if gpus is not None:
        yield from check_ids(devices, gpus, note)


def check_ids(devices: Devices, gpus: list[Gpu], note: str) -> Iterator[str]:
    """Each id must name one GPU of the node, and another than the other ids."""
    where = devices.where
    seen = set()
    missing = []
    for device in devices.ids:
        named = {gpu for gpu in gpus if gpu.is_named(device)}
        if len(named) > 1:
            yield f"{where}: {device} is the beginning of several UUIDs; write more of it"
        for gpu in named & seen:
            yield f"{where}: GPU {gpu.index} is also named as {gpu.uuid}; name it once"
        seen |= named
        if not named and not device.startswith("MIG-"):
            missing.append(device)
    if missing:
        there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in gpus) or "none"
        if note:
            there += f": {note}{TRY_DEMO}"
        yield f"{where}: GPU {','.join(missing)} does not exist; this node has {there}"


# The oldest driver for each major version of CUDA (NVIDIA's minor version compatibility).
OLDEST_DRIVERS = {"13": "580", "12": "525"}
OF_TORCH = ("torch", "torchvision", "torchaudio")  # their builds go together
# Keys that need compute capability 8.0, with which value, and what to use instead. torch emulates
# bf16 on older GPUs, slowly, so that can be forced.
KEY_CAPABILITY = {
    "flash_attn": ("fa2", "use sdpa"),
    "bf16": (True, "use fp16: true"),
    "pure_bf16": (True, "use fp16: true"),
}


def check_cuda(config: Config, devices: Devices, gpus: list[Gpu]) -> Iterator[str]:
    """A torch, driver or GPU with which torch would see no GPU: it would train on the CPU."""
    where = devices.where
    built = torch_cuda()
    if devices.ids and built is None:
        yield (
            f"{where}: the installed torch is a CPU build and cannot use a GPU; pip uninstall -y "
            f"{' '.join(OF_TORCH)} && {INSTALL}"
        )
    driver = max((gpu.driver_cuda or 0 for gpu in gpus), default=0)
    major = (built or "0").split(".")[0]
    other = torch_for_cuda_12(gpus)
    if driver and driver // 1000 < int(major):
        other_build = f", or: {other}" if driver >= 12000 else ""
        yield (
            f"{where}: the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"but torch was built for CUDA {built} and would see no GPU; install driver "
            f"{OLDEST_DRIVERS.get(major, 'for it')} or newer{other_build}"
        )
    for gpu in gpus:
        has = tuple(gpu.capability or (99, 0))
        shown = f"GPU {gpu.index} ({gpu.name}) has compute capability {has[0]}.{has[1]}"
        if major == "13" and has < (7, 5):
            yield (
                f"{where}: {shown}, torch for CUDA {built} needs 7.5; use other GPUs, or: {other}"
            )
        for key, (value, advice) in KEY_CAPABILITY.items():
            if config.values[key] == value and has < (8, 0):
                text = f"{config.where(key)}: {shown}, {key} needs 8.0; {advice}"
                yield text if key == "flash_attn" else Forceable(text)


def torch_for_cuda_12(gpus: list[Gpu]) -> str:
    """The command for the same torch from PyTorch's index, which any driver from 525 on can run.

    Its build for CUDA 12.6 knows GPUs up to Hopper, that for 12.8 also Blackwell.
    """
    is_blackwell = any(tuple(gpu.capability or ()) >= (10, 0) for gpu in gpus)
    cuda = "cu128" if is_blackwell else "cu126"
    builds = (f"{name}=={installed_version(name).split('+')[0]}+{cuda}" for name in OF_TORCH)
    return f"pip install {' '.join(builds)} --index-url https://download.pytorch.org/whl/{cuda}"


def check_busy(devices: Devices, gpus: list[Gpu]) -> Iterator[str]:
    """GPUs that others use."""
    for gpu in gpus:
        if gpu.used and gpu.used > 1 << 30:
            users = f" by {', '.join(gpu.users)}" if gpu.users else ""
            yield Forceable(
                f"{devices.where}: GPU {gpu.index} is busy: {format_bytes(gpu.used)} in "
                f"use{users}; choose another, or wait"
            )


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for; None for a CPU build."""
    found = re.search(r"^cuda\b.*= *'(.+)'", source_of("torch/version.py"), re.MULTILINE)
    return found and found[1]


def check_nodes(config: Config, nodes: int, env: Environment) -> Iterator[str]:
    """What several nodes, or a MASTER_PORT, need."""
    numbers = {"MASTER_PORT": range(1, 65536)}
    if nodes > 1:
        numbers["NODE_RANK"] = range(nodes)
        for name in NODE_VARIABLES:
            if not env.get(name):
                yield f"environment variable {name}: is needed with NNODES={nodes}"
        if "run_name" not in config.values:
            yield (
                f"run_name: is needed with NNODES={nodes}, the same on each node: they share "
                "one run directory"
            )
    for name, allowed in numbers.items():
        text = env.get(name)
        where = f"environment variable {name}"
        if text and not (text.isdecimal() and int(text) in allowed):
            yield f"{where}: expected a number up to {allowed[-1]}, got {text!r}"
        elif text and name == "MASTER_PORT" and node_rank(env) == 0 and port_in_use(int(text)):
            yield f"{where}: port {text} is in use on this node; choose another"


def node_rank(env: Environment) -> int:
    """This node's number; 0 where there is one node, whatever else left NODE_RANK behind."""
    if env.get("NNODES", "1") != "1" and env.get("NODE_RANK", "").isdecimal():
        return int(env["NODE_RANK"])
    return 0


def port_in_use(port: int) -> bool:
    """Whether a server of this node listens on `port`."""
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return True
    return False


# --- packages -----------------------------------------------------------------------------------

# What a run depends on most; requirements.txt says which versions were tested.
TESTED = ("torch", "transformers", "llamafactory", "deepspeed")
# The package behind each backend of report_to.
BACKENDS = {
    name: name
    for name in """
    tensorboard wandb mlflow swanlab comet_ml clearml neptune codecarbon dvclive dagshub trackio
    """.split()
} | {"flyte": "flytekit", "azure_ml": "azureml", "kubeflow": "transformers"}
# (key, the values that need the package, the name for pip)
PACKAGES = (
    ("flash_attn", "fa2", "flash-attn"),
    ("enable_liger_kernel", "True", "liger-kernel"),
    ("use_unsloth", "True", "unsloth"),
    ("use_galore", "True", "galore-torch"),
    ("use_apollo", "True", "apollo-torch"),
    ("use_badam", "True", "badam"),
    ("use_adam_mini", "True", "adam-mini"),
    ("quantization_bit", r"\d", "bitsandbytes"),
    ("optim", r"bnb|paged_|lion|ademamix|^(?!adamw_torch).*8bit", "bitsandbytes"),
    ("predict_with_generate", "True", "jieba"),
    ("predict_with_generate", "True", "nltk"),
    ("predict_with_generate", "True", "rouge-chinese"),
)


def require_packages(*names: str) -> None:
    """Raises LaunchError where one of them is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"package {', '.join(missing)} is not installed in {sys.prefix}; {INSTALL}"
        )


def check_packages(config: Config, zero: Zero, env: Environment) -> Iterator[str]:
    """Packages and tools that the run needs and the node lacks, or has in a wrong version."""
    for name, tested, release in tested_versions():
        found = installed_version(name)
        is_used = zero.used or name != "deepspeed"
        if is_used and found and not re.match(rf"{release}\b", found):
            yield Forceable(
                f"{name} {found} is installed, but this launcher was tested with {name} "
                f"{tested}; {INSTALL}"
            )
    yield from check_keyed_packages(config, env)
    yield from check_backends(config, env)
    adam = "optimizer" in zero.settings and "torch_adam" not in str(zero.settings)
    if zero.used and (config.values.use_cpu or zero.offload_optimizer or adam):
        yield from check_compilers(env, not config.values.use_cpu)


def installed_version(name: str) -> str:
    """The version of an installed package; '' where it has none, such as a source checkout."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return ""


def tested_versions() -> Iterable[tuple[str, str, str]]:
    """Name, pin and what patches and local builds share (2.11 of 2.11.0, but 0.18.4 of 0.18.4).

    None where requirements.txt is not beside the script.
    """
    pin = rf"^({'|'.join(TESTED)})==(((?:0\.)*\d+\.\d+)\S*)"
    with contextlib.suppress(OSError):
        text = SCRIPT.with_name("requirements.txt").read_text(encoding="utf-8")
        return sorted(set(re.findall(pin, text, re.MULTILINE)))
    return ()


def check_keyed_packages(config: Config, env: Environment) -> Iterator[str]:
    """Packages that only some keys need; LLaMA-Factory looks for them after its imports."""
    for key, needing, package in PACKAGES:
        is_needed = re.search(needing, str(config.values[key]))
        if is_needed and find_spec(package.replace("-", "_")) is None:
            yield (
                f"{config.where(key)}: needs the package {package}, which is not installed; "
                f"pip install {package}"
            )
    for hub in ("modelscope", "openmind"):
        variable = f"USE_{hub.upper()}_HUB"
        is_on = env.get(variable, "0").lower() in ("true", "y", "1")
        is_local = os.path.isdir(config.values.model_name_or_path or "")
        if is_on and not is_local and find_spec(hub) is None:
            yield f"environment variable {variable}: needs a package; pip install {hub}"


def check_backends(config: Config, env: Environment) -> Iterator[str]:
    """Trackers of report_to that are unknown, not installed, or would ask for a login."""
    where = config.where("report_to")
    names = tracking_backends(config.values)
    for name in names:
        if name not in BACKENDS:
            yield f"{where}: {name} is unknown{did_you_mean(name, BACKENDS)}"
        elif not find_spec(BACKENDS[name]):
            yield (
                f"{where}: {name} needs a package that is not installed; pip install "
                f"{BACKENDS[name]}"
            )
    mode = env.get("SWANLAB_MODE") or "local"
    if "swanlab" in names and mode not in SWANLAB_MODES:
        expected = ", ".join(SWANLAB_MODES)
        yield f"environment variable SWANLAB_MODE: expected one of {expected}, got {mode!r}"
    if "wandb" in names and not has_wandb_login(env):
        yield (
            f"{where}: wandb: no login was found and nobody is there to ask; run wandb login, "
            "or set WANDB_API_KEY or WANDB_MODE=offline"
        )


def tracking_backends(values: Values) -> list[str]:
    """The backends of `report_to`; none is []. `use_swanlab` is LLaMA-Factory's older spelling."""
    names = [name for name in name_list(values.report_to) if name != "none"]
    if "all" in names:
        names = [name for name, package in BACKENDS.items() if find_spec(package)]
    if values.use_swanlab is True and "swanlab" not in names:
        names.append("swanlab")
    return names


def name_list(value: object) -> list[str]:
    """`a, b` or [a, b] as a list of words; None is []."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def has_wandb_login(env: Environment) -> bool:
    """Whether wandb will start without asking: offline, with a key, or with a saved login."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = re.sub(r"^https?://|[:/].*$", "", env.get("WANDB_BASE_URL", "")) or "wandb"
    with contextlib.suppress(OSError):
        netrc = Path(env.get("NETRC") or Path.home() / ".netrc")
        return host in netrc.read_text(encoding="utf-8", errors="replace")
    return False


def check_compilers(env: Environment, cuda: bool) -> Iterator[str]:
    """What keeps DeepSpeed from compiling its operator when training starts.

    torch looks for nvcc in CUDA_HOME, on PATH and in /usr/local/cuda. DeepSpeed wants it to be of
    torch's CUDA version, or before CUDA 13 of the same major version.
    """
    path = env.get("PATH", "")
    built = torch_cuda()
    if not shutil.which(env.get("CXX", "c++"), path=path):
        yield (
            "deepspeed compiles an operator when training starts and needs a C++ compiler; "
            "install g++"
        )
    if not cuda or "DS_SKIP_CUDA_CHECK" in env or not built:
        return
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{path}:/usr/local/cuda/bin")
    if not nvcc:
        yield (
            "deepspeed compiles its Adam with nvcc, which was not found; install the CUDA "
            f"{built} toolkit and set CUDA_HOME to it"
        )
        return
    answer = subprocess.run([nvcc, "-V"], capture_output=True, text=True).stdout
    found = re.search(r"release ((\d+)\.\d+)", answer)
    major = built.split(".")[0]
    if found and found[1] != built and (found[2] != major or int(major) > 12):
        yield (
            f"{nvcc} is CUDA {found[1]}, torch was built for CUDA {built}: deepspeed will not "
            "compile its Adam; set CUDA_HOME to a matching toolkit, or "
            "DS_SKIP_CUDA_CHECK=1"
        )


# --- model and DeepSpeed ------------------------------------------------------------------------

# hidden, layers, heads, key-value heads, inner, tied embeddings: the config.json files of the Qwen3
# releases, all with head_dim 128 and a vocabulary of 151,936, so that a plan needs no download.
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
NEEDED_SHAPE_KEYS = {"vocab_size", *SHAPE_KEYS} - {"num_key_value_heads", "tie_word_embeddings"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def read_model(values: Values) -> Model:
    """The model's size from its files, or from what is known of Qwen3. Raises LaunchError."""
    name = values.model_name_or_path
    from_scratch = values.train_from_scratch is True
    if not name:
        return Model("none")  # a rule says that it is missing
    if Path(name).is_dir():
        return read_model_folder(Path(name), name, from_scratch)
    if not HUB_ID.fullmatch(name):
        raise LaunchError(
            f"the folder {name} does not exist; expected a folder with a config.json, or a hub "
            "id such as Qwen/Qwen3-14B"
        )
    shape = qwen3_config(name)
    snapshot = hub_snapshot(name, values)
    if snapshot:
        if from_scratch or not missing_weights(snapshot):
            return read_model_folder(snapshot, name, from_scratch)
        shape = read_json(snapshot / "config.json")
    parameters = count_parameters(shape)
    size = 2 * (parameters or 0)
    note = ", the rest is downloaded"
    if not snapshot:
        note = f": {format_bytes(size)} to download" if size else ": to download"
    return Model(f"{name} (not in the local cache{note})", parameters, shape, size)


def check_other_models(config: Config) -> Iterator[str]:
    """Adapters, and models beside the one that is trained, that do not exist."""
    for key, file in OTHER_MODELS.items():
        for name in name_list(config.values[key]):
            if not (HUB_ID.fullmatch(name) or os.path.isfile(f"{name}/{file}")):
                yield f"{config.where(key)}: {name}/{file} does not exist; expected it, or a hub id"


def read_model_folder(folder: Path, label: str, from_scratch: bool) -> Model:
    """A model that is on the disk. Raises LaunchError that says what is missing or broken."""
    shape = read_json(folder / "config.json", "a model folder has a config.json")
    lacking = sorted(NEEDED_SHAPE_KEYS - shape.keys())
    if lacking and shape.get("model_type") == "qwen3":
        raise LaunchError(f"{folder}/config.json: has no {', '.join(lacking)}")
    missing = [] if from_scratch else missing_weights(folder)
    if missing:
        raise LaunchError(
            f"{folder}: {', '.join(missing)} missing; copy the weights there, or set "
            "train_from_scratch: true to train without any"
        )
    stored = None if from_scratch else count_stored(folder)
    if lacking:
        return Model(label)
    return Model(label, count_parameters(shape) or stored, shape)


def hub_snapshot(name: str, values: Values) -> Path | None:
    """The local snapshot of a hub model, where its config.json is in the Hugging Face cache."""
    repository = hub_cache(values) / f"models--{name.replace('/', '--')}"
    revision = values.model_revision or "main"  # a commit has no file in refs
    commit = read_from(repository / "refs" / revision).strip() or revision
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def hub_cache(values: Values) -> Path:
    """The folder into which models are downloaded."""
    home = os.environ.get("HF_HOME") or user_cache() / "huggingface"
    return Path(values.cache_dir or os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))


def user_cache() -> Path:
    """The folder for whatever can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def qwen3_config(name: str) -> dict:
    """The config.json of a released Qwen3 model by its hub id, such as Qwen/Qwen3-14B; else {}."""
    shape = QWEN3_SHAPES.get(re.sub(r"^Qwen/Qwen3-(.+?)(-Base)?$", r"\1", name))
    if shape is None:
        return {}
    fixed = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
    return fixed | dict(zip(SHAPE_KEYS, shape, strict=True))


def count_parameters(config: dict) -> int | None:
    """Parameters of a dense Qwen3 by its config.json; None for another architecture.

    Embedding and output matrix (once where tied); in each layer the attention projections, the
    query and key norms, three MLP matrices, two norms; a last norm.
    """
    if config.get("model_type") != "qwen3" or config.get("attention_bias"):
        return None
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    width = head * (heads + (config.get("num_key_value_heads") or heads))
    layer = 2 * hidden * width + 3 * hidden * config["intermediate_size"] + 2 * (hidden + head)
    matrices = 1 if config.get("tie_word_embeddings") else 2
    layers = config["num_hidden_layers"] * layer
    return matrices * config["vocab_size"] * hidden + layers + hidden


def missing_weights(folder: Path) -> list[str]:
    """Weight files that a model folder lacks; safetensors count before pytorch's."""
    for kind in ("safetensors", "bin"):
        for index in folder.glob(f"*.{kind}.index.json"):
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            return [file for file in files if not (folder / file).is_file()]
        if next(folder.glob(f"*.{kind}"), None):
            return []
    return ["model.safetensors"]


def count_stored(folder: Path) -> int | None:
    """Parameters by the headers of the safetensors files; None where there are none.

    Raises LaunchError for a file that is incomplete.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    total += math.prod(file.get_slice(name).get_shape())
        except SafetensorError:
            raise LaunchError(
                f"{path}: incomplete safetensors file; copy it again (after git clone: git lfs "
                "pull)"
            ) from None
    return total or None


def read_deepspeed(values: Values) -> Zero:
    """Read the DeepSpeed configuration, a file or a mapping. Raises LaunchError."""
    content = values.deepspeed
    if content is None:
        return Zero()
    hint = (
        'expected {"zero_optimization": {"stage": 0 to 3, ...}, ...} as in '
        "configs/deepspeed/ds_z3_config.json"
    )
    name = "the mapping"
    if isinstance(content, str):
        name = content
        content = read_json(Path(content), hint)
    try:
        section = content["zero_optimization"]
        stage = (0, 1, 2, 3).index(section["stage"])
        moved = [
            (section.get(key) or {}).get("device", "none") != "none"
            for key in ("offload_optimizer", "offload_param")
        ]
        saves = section.get("stage3_gather_16bit_weights_on_model_save") is True
    except (KeyError, TypeError, AttributeError, ValueError):
        raise LaunchError(f"{name}: {hint}") from None
    return Zero(stage, *moved, used=True, saves_weights=saves or stage < 3, settings=content)


def read_json(path: Path, hint: str = "copy it again") -> dict:
    """A JSON object. Raises LaunchError that names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{describe_os_error(error)}; {hint}") from None
    except ValueError as error:
        raise LaunchError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LaunchError(f"{path}: expected a JSON object; {hint}")
    return content


# --- data ---------------------------------------------------------------------------------------

TEXT_FILES = ("json", "jsonl", "csv", "txt")
DATA_FILES = (*TEXT_FILES, "parquet", "arrow")
COUNTED_ARRAY = 64 << 20  # bytes: a larger JSON array is not counted without a limit
COUNTED_TEXT = 1 << 30  # and no larger text file of another kind


def inspect_data(config: Config, key: str, problems: Problems) -> list[tuple]:
    """(path, rows, {place: description}) of each data set that `key` (dataset or eval_dataset)
    names; None: unknown.
    """
    names = [*dict.fromkeys(name_list(config.values.get(key)))]  # each is loaded once
    where = config.where(key)
    info = None
    if names:
        info = problems.attempt(read_dataset_info, config.values, where=where)
    if info is None:
        return [(None, None, {})] * len(names)
    found = []
    for name in names:
        path = problems.attempt(find_data, name, info, config.values, where=where)
        count = None
        if path:
            entry = info[name]
            place = f"{where}: {name}"
            limit = config.values.max_samples
            count = problems.attempt(count_data, path, entry, limit, where=place)
            problems.attempt(check_columns, path, entry, where=place)
        described = f"{config.values.dataset_dir}/dataset_info.json: {name}"
        found.append((path, count, {described: json.dumps(info.get(name))}))
    return found


def read_dataset_info(values: Values) -> dict | None:
    """dataset_info.json of dataset_dir; None for data that is looked up on a hub.

    Raises LaunchError.
    """
    folder = values.dataset_dir
    if folder.startswith(("ONLINE", "REMOTE:")):
        return None
    hint = "dataset_dir is the folder that holds dataset_info.json"
    return read_json(Path(folder, "dataset_info.json"), hint)


def find_data(name: str, info: dict, values: Values) -> Path | None:
    """The file or folder of a data set; None: on a hub. Raises LaunchError."""
    entry = info.get(name)
    folder = values.dataset_dir
    if not isinstance(entry, dict):
        hint = did_you_mean(name, info) or f"; it has {', '.join(info)}"
        raise LaunchError(f"{name} is not in {folder}/dataset_info.json{hint}")
    check_preferences(name, entry, values.stage)
    if {"hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"} & set(entry):
        return None
    if "file_name" not in entry:
        raise LaunchError(f"{name} has no file_name in {folder}/dataset_info.json")
    path = Path(folder, entry["file_name"])
    if not path.exists():
        raise LaunchError(
            f"{name}: {path} does not exist; correct file_name in {folder}/dataset_info.json"
        )
    if path.is_file() and path.suffix[1:] not in DATA_FILES:
        kinds = ", ".join(DATA_FILES)
        raise LaunchError(f"{name}: {path}: expected a file that ends in {kinds}")
    return path


def check_preferences(name: str, entry: dict, stage: str) -> None:
    """Raises LaunchError where the data are not of the kind that the stage takes."""
    wanted = stage in ("rm", "dpo")
    columns = entry.get("columns", {})
    if entry.get("ranking") and not wanted:
        raise LaunchError(
            f"{name} holds preferences (ranking: true), which stage: dpo or rm takes"
        )
    if wanted and not (entry.get("ranking") and {"chosen", "rejected"} <= columns.keys()):
        raise LaunchError(
            f'{name} holds no preferences, which stage: {stage} needs: "ranking": true and the '
            "columns chosen and rejected in dataset_info.json"
        )
    if (stage == "kto") != ("kto_tag" in columns) and stage in ("kto", "sft"):
        raise LaunchError(
            f"{name}: kto_tag in its columns goes with stage: kto only, and is needed"
        )


def count_data(path: Path, entry: dict, limit: int | None) -> int | None:
    """Rows that will be used of a data set, at least one. Raises LaunchError."""
    try:
        rows = at_most(limit, entry.get("num_samples")) or count_rows(path, limit)
    except (ValueError, csv.Error) as error:
        raise LaunchError(f"{path}: {error}") from None
    if rows == 0:
        raise LaunchError(f"{path} is empty; expected at least one row")
    return rows


def at_most(limit: int | None, count: int | None) -> int | None:
    """`count`, but no more than `limit`; None is unknown, or no limit."""
    if count is None or limit is None:
        return count
    return min(count, limit)


def count_rows(path: Path, limit: int | None) -> int | None:
    """Rows of a data file or folder, at most `limit`; None: unknown.

    Raises ValueError where the file is not what its name says.
    """
    kind = path.suffix[1:]
    parquet = [path] if kind == "parquet" else [*path.glob("*.parquet")]
    if parquet:
        return at_most(limit, count_parquet(parquet))
    if path.is_dir():
        counts = [count_rows(file, limit) for file in sorted(path.iterdir())]
        return None if None in counts else at_most(limit, sum(counts))
    counted = COUNTED_ARRAY if kind == "json" else COUNTED_TEXT
    too_long = limit is None and path.stat().st_size > counted
    if too_long or kind not in TEXT_FILES:
        return None
    return sum(1 for _ in itertools.islice(read_rows(path), limit))


def read_rows(path: Path) -> Iterator[object]:
    """The rows of a text file by its name; of JSON lines the text. Raises ValueError, csv.Error."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".txt":
            yield from ({"text": line} for line in file)
        elif path.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            yield from csv.DictReader(file)
        else:
            yield from read_json_rows(file)


def read_json_rows(file: TextIO) -> Iterator[object]:
    """The rows of a JSON array or of JSON lines, whichever a .json or .jsonl file holds."""
    start = file.read(4096).lstrip()[:1]
    file.seek(0)
    if start == "[":
        if file.buffer.peek(3).startswith(b"\xef\xbb\xbf"):
            raise ValueError(
                "begins with a byte order mark, which cannot be loaded; save it as UTF-8 "
                "without one"
            )
        yield from json_elements(file)
    elif start in ("{", ""):
        yield from filter(str.strip, file)
    else:
        raise ValueError("expected a JSON array, or one JSON object per line")


def json_elements(file: TextIO, chunk: int = 1 << 20) -> Iterator[object]:
    """The elements of a top-level JSON array, decoded one by one so that memory stays small."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    count = 0
    at = 0
    text = file.read(chunk).lstrip()[1:]
    while True:
        gap = between.match(text, at)
        at = gap.end()
        ends = text.startswith("]", at)
        if ends and "," not in gap[0]:
            return
        try:
            element, at = decoder.raw_decode(text, at)
        except ValueError as error:
            more = file.read(max(chunk, len(text)))
            if ends or not more:
                reason = "a comma before the end" if ends else error.msg
                raise ValueError(f"not valid JSON after element {count}: {reason}") from None
            text = text[at:] + more
            at = 0
        else:
            count += 1
            yield element


def count_parquet(paths: list[Path]) -> int | None:
    """Rows by the footers of Parquet files; None where one cannot be read."""
    code = (
        "import sys, pyarrow.parquet as p; "
        "print(sum(p.ParquetFile(path).metadata.num_rows for path in sys.argv[1:]))"
    )
    return ask_pyarrow(code, *paths)


def ask_pyarrow(code: str, *arguments: object):
    """What `code` prints as JSON, in another process, since pyarrow is large; None if it fails."""
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


# What LLaMA-Factory reads of a row where `columns` is not given: role -> column.
EXAMPLE_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}


def check_columns(path: Path, entry: dict) -> None:
    """Raises LaunchError where the rows lack a column that LLaMA-Factory reads.

    It reads what `columns` of dataset_info.json names or, without it, those of the format's
    example.
    """
    found = first_columns(path)
    style = entry.get("formatting", "alpaca")
    columns = entry.get("columns", EXAMPLE_COLUMNS.get(style, {}))
    optional = ("system", "tools") if style == "openai" else ()
    wanted = {role: name for role, name in columns.items() if role not in optional}
    missing = [name for name in wanted.values() if name and name not in found]
    if not found or not missing:
        return
    hint = '"formatting": "sharegpt"'
    if style != "alpaca" or "conversations" not in found:
        shown = {
            role: name if name in found else "..."
            for role, name in wanted.items()
            if name in found or role != "query"  # which may be left out
        }
        hint = f'"columns": {json.dumps(shown)}'
    raise LaunchError(
        Forceable(
            f"{path} has no column {', '.join(missing)}, only {', '.join(sorted(found))}; "
            f"describe it in dataset_info.json with {hint}"
        )
    )


def first_columns(path: Path) -> set[str]:
    """The columns of a data file by its first 1,000 rows; none where they cannot be told."""
    columns = set()
    if path.suffix[1:] in TEXT_FILES and path.is_file():
        with contextlib.suppress(OSError, ValueError, csv.Error):
            for row in itertools.islice(read_rows(path), 1000):
                names = json.loads(row) if isinstance(row, str) else row
                columns.update(names if isinstance(names, dict) else ())
    return columns - {None}  # under which csv puts fields without a name


def fingerprints(data: list[tuple]) -> dict[str, str]:
    """By what changed data are noticed: {path: size and, up to 64 MiB, hash} of files and folders,
    and the descriptions of the data sets.
    """
    found = {}
    for path, _, described in data:
        found |= described
        parts = path and (sorted(path.rglob("*")) or [path])
        files = [part for part in parts or () if part.is_file() and os.access(part, os.R_OK)]
        size = sum(map(file_size, files))
        if files:
            found[str(path)] = str(size)
        if files and size <= COUNTED_ARRAY:
            content = b"".join(file.read_bytes() for file in files)
            found[str(path)] += f" {hashlib.sha256(content).hexdigest()[:16]}"
    return found


# --- how long the samples are -------------------------------------------------------------------
#
# data.json tells, of an earlier run, a rehearsal or a preview of the same samples.

# What decides, with the data files, what the samples are.
TOKENIZED = """
    model_name_or_path model_revision use_fast_tokenizer split_special_tokens add_tokens
    add_special_tokens stage template default_system tool_format enable_thinking
    preserve_thinking train_on_prompt mask_history dataset eval_dataset mix_strategy
    interleave_probs val_size seed cutoff_len preprocessing_batch_size predict_with_generate
    image_max_pixels image_min_pixels video_max_pixels video_fps video_maxlen audio_sampling_rate
""".split()


def data_key(plan: Plan) -> str:
    """By what two plans are known to have the same samples.

    Which rows max_samples leaves is known by their number, where that is.
    """
    values = plan.values
    rows = plan.rows
    most = values.max_samples if None in rows[0] + rows[1] else None
    tokenizer = file_size(Path(values.model_name_or_path or "", "tokenizer.json"))
    code = installed_version("llamafactory")
    parts = [rows, most, plan.data, tokenizer, code, *(values[key] for key in TOKENIZED)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def earlier_figures(plan: Plan) -> dict:
    """What is known of the plan's samples: data.json, its own path under `source`; {} for nothing,
    and where samples are packed or streamed, since batches are as long as cutoff_len then.
    """
    values = plan.values
    tokenized = plan.values.tokenized_path
    if packs(values) or values.streaming:
        return {}
    with contextlib.suppress(OSError):
        if tokenized and any(Path(tokenized).rglob("state.json")):
            return ask_lengths(tokenized)
        folder = Path(values.output_dir)
        key = data_key(plan)
        files = [*folder.glob(DATA_FILE), *folder.glob(f"*/{DATA_FILE}")]
        for path in sorted(files, key=os.path.getmtime, reverse=True):
            figures = read_json_or_empty(path)
            if figures.get("key") == key:
                return figures | {"source": str(path)}
    return {}


def ask_lengths(folder: str) -> dict:
    """The lengths of what tokenized_path holds; {} where it cannot be read."""
    figures = ask_pyarrow(LENGTHS, folder, PADDED_TO)
    return figures | {"source": folder} if figures else {}


# The same as count_lengths and write_figures.
LENGTHS = """
import collections, json, math, pathlib, sys
import pyarrow, pyarrow.compute

folder, unit, count, evaluated = pathlib.Path(sys.argv[1]), int(sys.argv[2]), {}, 0
for file in folder.rglob("data-*.arrow"):
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    ids = [table.column(name) for name in table.column_names if name.endswith("input_ids")]
    lengths = zip(*(pyarrow.compute.list_value_length(column).to_pylist() for column in ids))
    tokens = collections.Counter(math.ceil(max(sizes) / unit) * unit for sizes in lengths)
    if file.parent.name.startswith("validation"):
        evaluated = max(evaluated, *tokens)
    else:
        count = tokens + collections.Counter(count)
found = {"lengths": sorted(count.items())}
print(json.dumps(found | ({"evaluated": evaluated} if evaluated else {})))
"""


# --- scores, before the start -------------------------------------------------------------------

# What an evaluation alone does not need.
NOT_SCORED = """
    eval_on_start load_best_model_at_end metric_for_best_model early_stopping_steps do_predict
    resume_from_checkpoint global_batch_size run_name
""".split()


def only_scores(values: Values) -> bool:
    """Whether a model is scored and not trained."""
    return bool(values.score and values.do_eval and not values.do_train)


def score_config(config: Config, model: str) -> Config:
    """What --score changes: one evaluation of `model` ('': the configuration's own), no training.

    DeepSpeed evaluates without an optimizer under ZeRO-3 alone; below it the weights fit anyway.
    """
    values = config.values
    changes = dict.fromkeys({*NOT_SCORED} - config.overridden)
    changes |= {"do_train": False, "do_eval": True}
    changes |= {"eval_strategy": "no", "save_strategy": "no", "score": values.score or "exact"}
    if values.eval_dataset:
        changes["dataset"] = None
    if (Problems().attempt(read_deepspeed, values) or Zero()).stage < 3:
        changes["deepspeed"] = None
    if model:
        name = str(Path(model).resolve()) if os.path.isdir(model) else model
        changes |= {"train_from_scratch": None, "adapter_name_or_path": None}
        key = "model_name_or_path"
        if os.path.isfile(f"{name}/adapter_config.json"):
            key = "adapter_name_or_path"
            changes["finetuning_type"] = "lora"
        changes[key] = name
    return config.update(**changes)


def check_scores(config: Config) -> list[str]:
    """What is wrong with the database or the script of the scores."""
    problems = Problems()
    path = config.values.score_database
    script = str(config.values.score)
    if path and config.values.score == "sql":
        problems.attempt(Database, Path(path), where=config.where("score_database"))
    if script.endswith(".py"):
        problems.attempt(check_script, Path(script), where=config.where("score"))
    return problems


def check_script(path: Path) -> None:
    """Raises LaunchError where a script has no function score()."""
    try:
        names = [getattr(node, "name", "") for node in ast.parse(path.read_bytes()).body]
        problem = "" if "score" in names else "has no function score"
    except (SyntaxError, ValueError) as error:
        problem = str(error)
    if problem:
        wanted = "a Python file with def score(answer, reference, prompt)"
        raise LaunchError(f"{path}: {problem}; expected {wanted}")


# --- judging answers ----------------------------------------------------------------------------
#
# Foreign SQL runs in a copy of the database in memory, where it can read and change tables and do
# nothing else, for a second of processor time.

SQL_SECONDS = 1.0
COPIED = 1 << 30  # bytes; a larger database is opened read-only: what writes is not judged
RESULT_BYTES = 64 << 20
SQL_LIMITS = {  # of values and statements in bytes, and of what nests or is repeated
    "LENGTH": 100_000,
    "SQL_LENGTH": 100_000,
    "EXPR_DEPTH": 200,
    "LIKE_PATTERN_LENGTH": 100,
    "ATTACHED": 0,
    "WORKER_THREADS": 0,
}


def plain_answer(text: str) -> str:
    """An answer without its thought, a code fence, outer white space and a last semicolon."""
    text = text.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:\w*\n)?(.*?)```", text, re.DOTALL)
    return (fenced[1] if fenced else text).strip().removesuffix(";").rstrip()


class Judge:
    """Judges answers as `score` says; a user's script has score(answer, reference, prompt)."""

    def __init__(self, values: Values):
        self.database = Database(Path(values.score_database)) if values.score == "sql" else None
        self.script = None
        if values.score not in SCORES:
            self.script = load_script(Path(values.score)).score

    def judge(self, answer: str, reference: str, prompt: str) -> dict:
        """{"exact": 1.0, "execution": 0.0, ..., "error": text}; without a score that has none."""
        answer = plain_answer(answer)
        reference = plain_answer(reference)
        row = {"exact": float(answer == reference), "error": ""}
        try:
            if self.database:
                row["execution"] = float(self.database.same(answer, reference))
            if self.script:
                row |= named_scores(self.script(answer, reference, prompt))
        except UnjudgedError as error:
            row["error"] = f"{UNJUDGED}: {error}"
        except Exception as error:  # whatever the answer, or the user's script, makes of it
            row["error"] = f"{type(error).__name__}: {error}"
            if self.database:
                row["execution"] = 0.0
        return row

    def describe(self, reference: str, prompt: str) -> tuple[str, dict]:
        """Why a reference is a poor judge, '' for no reason, and its scores as its own answer."""
        row = self.judge(reference, reference, prompt)
        if row["error"]:
            return f"cannot judge ({row['error']})", row
        if not self.database:
            return "", row
        return self.database.describe(plain_answer(reference)), row


def load_script(path: Path):
    """The user's module, which may import what lies beside it."""
    from importlib import util

    sys.path.append(str(path.parent))
    spec = util.spec_from_file_location("scores_of_the_user", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_scores(scores: object) -> dict[str, float]:
    """What a script's score() gave: a number is called `score`. Raises where it is no number."""
    if not isinstance(scores, dict):
        scores = {"score": scores}
    numbers = {name: float(number) for name, number in scores.items()}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError(f"expected finite numbers, got {numbers}")
    return numbers


UNJUDGED = "not judged"
UNSCORED = ("prompt", "answer", "reference", "error")  # of a row of scores/, no score


class UnjudgedError(Exception):
    """The reference itself cannot be run."""


class Database:
    """An SQLite file, or a .sql script, on which a statement is tried and undone.

    Raises LaunchError where it cannot be read.
    """

    def __init__(self, path: Path):
        import sqlite3

        self.sqlite = sqlite3
        self.is_trusted = True
        self.written = set()
        self.ends = math.inf
        self.writes = path.suffix == ".sql" or file_size(path) <= COPIED
        try:
            self.connection = self.load(path)
            if not self.fetch("SELECT name FROM sqlite_master WHERE type = 'table'"):
                raise LaunchError(f"{path}: has no tables; expected a schema, and rows")
        except (sqlite3.Error, sqlite3.Warning, OSError) as error:
            hint = "expected an SQLite file, or a .sql script in SQLite's words"
            raise LaunchError(f"{path}: {error}; {hint}") from None
        self.connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        for name, limit in SQL_LIMITS.items():
            self.connection.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), limit)
        self.connection.set_authorizer(self.permit)
        self.connection.set_progress_handler(lambda: time.thread_time() > self.ends, 1000)

    def load(self, path: Path):
        """A connection to a copy in memory, or to a file that is too large for one."""
        # Nothing is cached, since a statement is authorized only when it is prepared.
        connect = partial(self.sqlite.connect, isolation_level=None, cached_statements=0)
        memory = connect(":memory:")
        if path.suffix == ".sql":
            memory.setlimit(self.sqlite.SQLITE_LIMIT_ATTACHED, 0)
            memory.executescript(read_text(path))
            memory.commit()
            return memory
        # Read-only alone would write a -shm file beside a database that has a write-ahead log.
        option = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
        file = connect(f"{path.absolute().as_uri()}?{option}", uri=True)
        if not self.writes:
            return file
        file.backup(memory)
        file.close()
        return memory

    def permit(self, action: int, name: str, detail: str, database: str, trigger: str) -> int:
        """Whether SQLite may do what a statement asks for: its authorizer."""
        sql = self.sqlite
        reads = (sql.SQLITE_SELECT, sql.SQLITE_READ, sql.SQLITE_RECURSIVE, sql.SQLITE_FUNCTION)
        writes = (sql.SQLITE_INSERT, sql.SQLITE_UPDATE, sql.SQLITE_DELETE)
        if self.is_trusted or action in reads and detail != "load_extension":
            return sql.SQLITE_OK
        if action in writes and database == "main" and not name.startswith("sqlite_"):
            self.written.add(name)
            return sql.SQLITE_OK
        return sql.SQLITE_DENY

    def own(self, statement: str) -> None:
        """Run a statement of ours, which nothing limits."""
        self.is_trusted = True
        self.ends = math.inf
        self.connection.execute(statement)
        self.is_trusted = False
        self.ends = time.thread_time() + SQL_SECONDS

    def fetch(self, statement: str) -> list[tuple]:
        """All rows of a statement. Raises ValueError where they are too many."""
        rows = []
        size = 0
        for row in self.connection.execute(statement):
            texts = (cell for cell in row if isinstance(cell, (str, bytes)))
            size += 64 * len(row) + sum(map(len, texts))
            if size > RESULT_BYTES:
                raise ValueError("the result is too large")
            rows.append(row)
        return rows

    def outcome(self, statement: str, tables: Set[str] = frozenset()) -> tuple[list, dict]:
        """The rows of a statement, and {table: its rows then} of those that it writes and `tables`;
        all of it is undone.
        """
        self.written = set()
        self.own("BEGIN")
        try:
            rows = self.fetch(statement)
            names = sorted(self.written | tables)
            return rows, {name: self.fetch(f'SELECT * FROM "{name}"') for name in names}
        finally:
            if self.connection.in_transaction:  # an error may have ended it
                self.own("ROLLBACK")

    def same(self, answer: str, reference: str) -> bool:
        """Whether two statements give the same rows and change the tables alike.

        Raises UnjudgedError where the reference fails, what SQLite raises where the answer does.
        """
        try:
            wanted = self.outcome(reference)
        except Exception as error:
            raise UnjudgedError(f"the reference fails: {error}") from None
        given = self.outcome(answer, wanted[1].keys())
        if bool(wanted[1]) != bool(self.written):  # one reads, the other writes
            return False
        return self.alike(wanted, given, has_order(reference))

    def alike(self, wanted: tuple, given: tuple, in_order: bool) -> bool:
        """Whether two outcomes are the same; `given` has all tables that `wanted` has."""
        others = given[1].keys() - wanted[1].keys()
        tables = wanted[1] | self.outcome("SELECT 1", others)[1]
        return same_rows(wanted[0], given[0], in_order) and all(
            same_rows(tables[name], rows, False) for name, rows in given[1].items()
        )

    def describe(self, reference: str) -> str:
        """What makes a reference that runs a poor judge; '' for nothing."""
        rows, tables = self.outcome(reference)
        if self.alike(([], {}), (rows, tables), False):
            return "have an empty result"
        ordered = has_order(reference)
        for other in self.other_orders(reference, ordered):
            if not self.alike((rows, tables), other, ordered):
                return "depend on the order of rows, or of equal ones"
        return ""

    def other_orders(self, reference: str, ordered: bool) -> list[tuple]:
        """Outcomes where rows that nothing orders, and equal ones, come in another order."""
        found = []
        self.own("PRAGMA reverse_unordered_selects = ON")
        with contextlib.suppress(Exception):  # it may take too long; DISTINCT takes no random()
            found.append(self.outcome(reference))
            by = r"(?is)(.*\border\s+by\b.*?)(\blimit\b.*)?$"
            for _ in range(4 if ordered else 0):
                found.append(self.outcome(re.sub(by, r"\1, random() \2", reference, count=1)))
        self.own("PRAGMA reverse_unordered_selects = OFF")
        return found


def has_order(statement: str) -> bool:
    """Whether a query has ORDER BY at its top level: not in quotes, comments or brackets."""
    quoted = r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*\]|--[^\n]*|/\*.*?\*/"""
    text = re.sub(quoted, " x ", statement, flags=re.DOTALL)
    inner = True
    while inner:
        text, inner = re.subn(r"\([^()]*\)", " ", text)
    return bool(re.search(r"\border\s+by\b", text, re.IGNORECASE))


def same_rows(wanted: list[tuple], given: list[tuple], in_order: bool) -> bool:
    """Whether two results are the same, in any order unless it counts."""
    if not in_order:
        wanted = sorted(wanted, key=row_order)
        given = sorted(given, key=row_order)
    return len(wanted) == len(given) and all(map(same_row, wanted, given))


def row_order(row: tuple) -> tuple:
    """By what rows are sorted: numbers last, and those that only rounding tells apart alike."""
    words = [(type(cell).__name__, str(cell)) for cell in row if not is_number(cell)]
    return words, [float(f"{cell:.12g}") for cell in row if is_number(cell)]


def is_number(cell: object) -> bool:
    """Whether SQLite holds a number in it."""
    return isinstance(cell, (int, float))


def same_row(wanted: tuple, given: tuple) -> bool:
    """Whether two rows are the same, numbers within 1e-6."""
    return len(wanted) == len(given) and all(
        one == other
        or is_number(one)
        and is_number(other)
        and float in (type(one), type(other))  # ids are exact
        and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-6)
        for one, other in zip(wanted, given, strict=True)
    )


# --- plan ---------------------------------------------------------------------------------------


PROCESS_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")

# Bytes per parameter of the optimizer's moments; a paged optimizer may move them to the host, but
# only where they do not fit.
OPTIMIZER_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2),
    "sgd": 0,
}
# Bytes per logit at the peak of a loss, in training and in evaluation, as torch's tracker counts
# them: the 16-bit logits, 32-bit ones, their log-softmax and the gradients; dpo and kto have those
# of a reference model, kto also those of the KL samples.
LOGIT_BYTES = {
    **dict.fromkeys(("pt", "sft"), (12, 10)),
    "dpo": (16, 12),
    "orpo": (12, 8),
    "kto": (20, 16),
    "rm": (6, 6),
}
KNOWN_FOR_MEMORY = {
    "finetuning_type": ("full",),
    "stage": LOGIT_BYTES,
    "optim": OPTIMIZER_BYTES,
    "flash_attn": (None, "auto", "sdpa", "fa2"),
    "do_train": (True,),
}
UNKNOWN_MEMORY = (
    "fsdp use_galore use_apollo use_badam use_adam_mini use_muon use_mca use_hyper_parallel use_kt "
    "use_unsloth use_unsloth_gc use_dft_loss use_asft_loss use_eaft_loss label_smoothing_factor "
    "shift_attn mixture_of_depths fp8 quantization_bit ref_model predict_with_generate"
).split()


def derive_accumulation(config: Config, ranks: int) -> Config:
    """Turn `global_batch_size` (samples per optimizer step) into gradient_accumulation_steps.

    What the command line says wins over the file, also between these two. Raises LaunchError.
    """
    wanted = config.values.global_batch_size
    given = config.values.get(ACCUMULATION)
    newer = config.overridden & {"global_batch_size", ACCUMULATION}
    if wanted is None or newer == {ACCUMULATION}:
        return config.update(global_batch_size=None)
    micro = config.values.per_device_train_batch_size
    at_once = micro * ranks
    where = config.where("global_batch_size")
    arithmetic = f"{micro} per device x {plural(ranks, 'process')} = {at_once}"
    steps, rest = divmod(wanted, at_once)
    if rest:
        near = " and ".join(str(n * at_once) for n in (steps, steps + 1) if n)
        fitting = [str(n) for n in range(1, 65) if wanted % (micro * n) == 0]
        others = f"; or use {' or '.join(fitting)} processes" if fitting else ""
        raise LaunchError(
            f"{where}: {wanted} cannot be split into micro-batches of {arithmetic}; the "
            f"nearest that can: {near}{others}"
        )
    if given not in (None, steps) and newer != {"global_batch_size"}:
        raise LaunchError(
            f"{where}: {wanted} means gradient_accumulation_steps {steps} ({arithmetic}), but "
            f"{config.where(ACCUMULATION)} is {given}; remove one of the two"
        )
    return config.update(gradient_accumulation_steps=steps)


def make_plan(
    config: Config,
    devices: Devices,
    gpus: list[Gpu],
    zero: Zero,
    model: Model,
    data: list[tuple],
    eval_data: list[tuple],
    world_size: int,
) -> Plan:
    """Work out the plan; asks only the disk and the host's memory."""
    values = config.values
    if devices.ids:
        room = min((gpu.total for gpu in gpus if gpu.total), default=None)
    else:
        room = host_bytes() // max(devices.processes, 1)
    rows = tuple([count for _, count, _ in sets] for sets in (data, eval_data))
    steps = plan_steps(rows[0], values, world_size)
    files = fingerprints(data + eval_data)
    free = free_bytes(Path(values.output_dir))
    plan = Plan(devices, gpus, world_size, zero, values, steps, model, room, free, files, rows)
    return estimate(replace(plan, figures=earlier_figures(plan)))


def plan_steps(rows: list[int | None], values: dict, world_size: int) -> Steps:
    """Optimizer steps as transformers' Trainer.set_initial_training_values counts them.

    `rows` are the data sets' rows after max_samples, of which LLaMA-Factory's split_dataset takes
    val_size for evaluation: a number, or a share. Each rank gets ceil(ceil(samples / micro-batch)
    / ranks) batches (accelerate's BatchSamplerShard with even_batches); gradient accumulation
    groups them, the last group of an epoch may be short.
    """
    values = Values(values)
    if not values.do_train:
        return Steps(None, None, None, "nothing is trained")
    fixed = values.max_steps if values.max_steps > 0 else None
    reason = uncountable_reason(rows, values)
    if reason:
        return Steps(None, None, fixed, reason)
    samples = sum(rows)
    held_out = values.val_size
    if held_out < 1:
        held_out = math.ceil(samples * held_out)
    samples -= int(held_out)
    whole = math.floor if values.dataloader_drop_last else math.ceil
    batches = whole(whole(samples / values.per_device_train_batch_size) / world_size)
    per_epoch = max(math.ceil(batches / values.gradient_accumulation_steps), 1)
    return Steps(samples, per_epoch, fixed or math.ceil(values.num_train_epochs * per_epoch))


def estimate(plan: Plan) -> Plan:
    """The plan with the bytes that it takes, where the model's size is known.

    The formulas are those of full fine-tuning.
    """
    values = plan.values
    is_full = values.finetuning_type == "full" and not values.fsdp
    if not (plan.model.parameters and is_full and values.optim in OPTIMIZER_BYTES):
        return plan
    checkpoint, at_once = estimate_disk(plan)
    plan = replace(plan, checkpoint_bytes=checkpoint, disk_bytes=at_once)
    if unknown_memory(plan):
        return plan
    states, host = estimate_states(plan)
    phases = estimate_phases(plan)
    if values.score:
        beside = (plan.device_bytes or math.inf) - sum(states.values())
        phases["scores"] = {"answers": score_bytes(plan, beside)}
    largest = max(phases, key=lambda phase: sum(phases[phase].values()))
    memory = states | phases[largest]
    return replace(plan, phase=largest, memory=memory, host_memory=host)


def unknown_memory(plan: Plan) -> str:
    """The key, or `key: value`, for which there is no formula; '' where memory can be estimated."""
    values = plan.values
    if plan.model.shape.get("num_experts"):
        return "num_experts in the model's config.json"
    for key, known in KNOWN_FOR_MEMORY.items():
        if values[key] not in known:
            return f"{key}: {values[key]}"
    if values.pure_bf16 and plan.zero.used:
        return "pure_bf16 under DeepSpeed"
    return next((key for key in UNKNOWN_MEMORY if values[key]), "")


def uncountable_reason(rows: list[int | None], values: Values) -> str:
    """Why the number of training samples is unknown before the start; '' where it is known."""
    if values.tokenized_path and os.path.isdir(values.tokenized_path):
        return "tokenized_path holds the samples, whatever the data keys say now"
    if values.streaming:
        return "the data is streamed"
    if packs(values):
        return "packing joins samples"
    if None in rows or not rows:
        return "the rows of the data are counted when it is loaded"
    if values.mix_strategy != "concat" and len(rows) > 1:
        return "interleaving draws the samples"
    return ""


def packs(values: Values) -> bool:
    """Whether samples are joined up to cutoff_len, as pre-training does by default."""
    return values.get("packing", values.stage == "pt") or values.neat_packing


def estimate_states(plan: Plan) -> tuple[dict[str, int], int]:
    """Bytes on each device that are there in every phase, by part; and bytes on the host.

    Weights and gradients in the training precision, 32-bit weights and the optimizer's moments
    under DeepSpeed (ZeRO, Rajbhandari et al. 2020, section 3.1); stages 1, 2 and 3 divide the
    optimizer, the gradients and the weights by the ranks, ZeRO-3 also holds the largest layer and
    its gradients. Without DeepSpeed LLaMA-Factory keeps 32-bit weights, but for pure_bf16. A
    reference model is divided by ZeRO-3 alone. Buffers: prefetched weights, or DDP's buckets and
    autocast's 16-bit copies of the weights; 1 GiB for CUDA. Host: offloaded states (gradients in
    32 bit), half of them again for buffers (estimate_zero3_model_states_mem_needs), and the
    weights that rank 0 gathers to save them.
    """
    zero = plan.zero
    values = plan.values
    count = plan.model.parameters
    width = weight_bytes(plan)
    states = {  # bytes per parameter, the stage that divides them, whether they are offloaded
        "parameters": (width, 3, zero.offload_parameters),
        "gradients": (4 if zero.offload_optimizer else width, 2, zero.offload_optimizer),
        "optimizer": (optimizer_bytes(plan), 1, zero.offload_optimizer),
    }
    if kind_of_loss(values) in ("dpo", "kto"):
        states["reference"] = (activation_bytes(values), 3, zero.offload_parameters)
    parts = dict.fromkeys((*states, "buffers"), 0)
    host = 0
    for name, (size, stage, is_offloaded) in states.items():
        size *= count / (plan.world_size if zero.stage >= stage else 1)
        if is_offloaded:
            host += int(1.5 * size * plan.devices.processes)
        else:
            parts[name] = int(size)
    if zero.stage == 3:
        parts["parameters"] += 2 * width * plan.model.largest_layer
        parts["buffers"] = width * min(count, 10**9)
        host += width * count if host else 0
    elif not zero.used:
        parts["buffers"] = parts["gradients"] + (width - activation_bytes(values)) * count
    if not values.use_cpu:
        parts["buffers"] += 1 << 30
    return parts, host


def estimate_phases(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes on each device by phase and part, beside the states that are always there.

    At the loss the kept activations and the logits are there; in backward, with gradient
    checkpointing, one layer in full and its gradients; an evaluation keeps no activations. In its
    step ZeRO has a 16-bit and a 32-bit copy of the gradients of up to 1e9 parameters
    (DeepSpeedZeroOptimizer_Stage3._prepare_fp32_grad_for_sub_group), and AdamW, where it is not
    the fused one, a root of its second moments.
    """
    values = plan.values
    shape = plan.model.shape
    train_logit, eval_logit = LOGIT_BYTES[kind_of_loss(values)]
    if values.enable_liger_kernel and values.stage in ("pt", "sft"):
        train_logit = 0
    batch = plan.sequences * plan.micro
    tokens = batch * plan.longest
    kept, working = (tokens * size for size in activations_per_token(plan, batch > 1))
    phases = {
        "loss": {"activations": kept, "logits": tokens * shape["vocab_size"] * train_logit},
        "backward": {"activations": kept + working},
        "optimizer step": {"gradient copies": step_bytes(plan)},
    }
    if values.eval_strategy != "no" or values.do_eval:
        longest = plan.figures.get("evaluated", values.cutoff_len)
        tokens = plan.sequences * values.per_device_eval_batch_size * longest
        phases["evaluation"] = {
            "activations": 4 * tokens * shape["hidden_size"],
            "logits": tokens * shape["vocab_size"] * eval_logit,
        }
    return phases


def score_bytes(plan: Plan, room: float) -> int:
    """Bytes of the answers that a rank gives at once: as many as there is room for."""
    values = plan.values
    own = math.ceil(plan.values.score_samples / plan.world_size)
    one = answer_bytes(plan.model.shape, values.cutoff_len, activation_bytes(values))
    return int(one * max(min(own, room // one), 1))


def answer_bytes(shape: dict, tokens: int, width: int) -> int:
    """Bytes that one answer takes, its prompt included, at most, by a model's config.json: keys and
    values of all layers, what one layer computes of the prompt, the logits of the last token; a
    quarter more, since the keys and values are copied as they grow.
    """
    hidden = shape.get("hidden_size", 0)
    heads = shape.get("num_attention_heads", 1)
    head = shape.get("head_dim") or hidden // heads
    keys = 2 * head * (shape.get("num_key_value_heads") or heads)
    layer = 6 * hidden + 3 * shape.get("intermediate_size", 0)
    kept = (shape.get("num_hidden_layers", 0) * keys + layer) * width * tokens
    return int(1.25 * (kept + 10 * shape.get("vocab_size", 0))) + 1


def activations_per_token(plan: Plan, is_padded: bool) -> tuple[int, int]:
    """Bytes per token that are kept for backward, and that backward itself has in one layer.

    What autograd saves in transformers' Qwen3DecoderLayer: for each of two norms its input in 32
    bit, the normalized one and the output; the same of queries and keys, these after RoPE, the
    values and the result of attention, whose scores flash and SDPA do not store; four of the
    MLP. Padding makes SDPA repeat keys and values for all heads. Where autocast has 32-bit
    weights, layers pass 32 bit on. tests/benchmarks/memory.py compares it with torch's tracker.
    """
    shape = plan.model.shape
    width = activation_bytes(plan.values)
    passed_on = weight_bytes(plan)
    hidden = shape["hidden_size"]
    heads = shape["num_attention_heads"]
    inner = shape["intermediate_size"]
    layers = shape["num_hidden_layers"]
    head = shape.get("head_dim") or hidden // heads
    queries = head * heads
    keys = head * (shape.get("num_key_value_heads") or heads)
    norm = (4 + 2 * width) * hidden
    layer = 2 * norm + 5 * (passed_on - width) * hidden
    layer += (4 + 3 * width) * (queries + keys) + 4 * width * inner
    if is_padded:
        layer += 2 * width * queries
    gradients = 2 * width * (inner + hidden)
    if plan.values.disable_gradient_checkpointing:
        return layers * layer + norm, gradients
    return layers * passed_on * hidden + norm, layer + gradients


def step_bytes(plan: Plan) -> int:
    """Bytes that the optimizer's step takes on each device beside the states."""
    values = plan.values
    zero = plan.zero
    if zero.offload_optimizer:
        return 0
    root = 4 if values.optim == "adamw_torch" else 0
    if not zero.used:
        return root * plan.model.parameters
    count = plan.model.parameters // (plan.world_size if zero.stage else 1)
    if zero.stage == 3:
        count = min(count, 10**9)
    return count * (4 + max(root, 2))


def kind_of_loss(values: Values) -> str:
    """The stage; orpo where dpo has a loss that needs no reference model."""
    if values.stage == "dpo" and values.pref_loss in ("orpo", "simpo"):
        return "orpo"
    return values.stage


def optimizer_bytes(plan: Plan) -> int:
    """Bytes per parameter of the optimizer's moments, and of DeepSpeed's 32-bit weights."""
    moments = OPTIMIZER_BYTES[plan.values.optim]
    if plan.zero.used:
        return moments + 4
    return moments // 2 if plan.values.pure_bf16 and moments == 8 else moments


def activation_bytes(values: Values) -> int:
    """Bytes of a number that the model computes with."""
    return 4 if precision(values) == "fp32" else 2


def weight_bytes(plan: Plan) -> int:
    """Bytes of a weight; without DeepSpeed LLaMA-Factory keeps 32-bit ones, but for pure_bf16."""
    if plan.zero.used or plan.values.pure_bf16:
        return activation_bytes(plan.values)
    return 4


def precision(values: dict) -> str:
    """The training precision's name."""
    return next((key for key in ("pure_bf16", "bf16", "fp16") if values.get(key)), "fp32")


def estimate_disk(plan: Plan) -> tuple[int, int | None]:
    """Bytes of one checkpoint, and of all that the run may hold at once: the checkpoints it keeps,
    one being written, and the model.

    The weights in the training precision, twice below ZeRO-3, where DeepSpeed's
    mp_rank_00_model_states.pt holds them too; for resuming, DeepSpeed's 32-bit weights and the
    optimizer's moments, or without DeepSpeed the moments alone.
    """
    zero = plan.zero
    count = plan.model.parameters
    weights = checkpoint = count * weight_bytes(plan)
    if not plan.values.save_only_model:
        checkpoint += count * optimizer_bytes(plan)
        if zero.used and zero.stage < 3:
            checkpoint += weights
    kept = count_times(plan, "save")
    if (plan.values.save_total_limit or 0) > 0:
        kept = min(kept, plan.values.save_total_limit + 1)
    if kept == math.inf:
        return checkpoint, None
    return checkpoint, kept * checkpoint + weights


def count_times(plan: Plan, key: str) -> float:
    """How often the run does `key`, save or eval; infinite where the number of steps is unknown."""
    values = plan.values
    total = plan.steps.total
    strategy = values[f"{key}_strategy"]
    every = values[f"{key}_steps"] or values.logging_steps
    if strategy == "no":
        return 0
    if strategy == "epoch":
        every = plan.steps.per_epoch
    if not total or not every:
        return math.inf
    if every < 1:
        every = math.ceil(total * every)
    return math.ceil(total / every)


def host_bytes() -> int:
    """Memory of this node in bytes, or what this process's cgroup and those above it allow.

    Slurm and containers set such limits. /proc/self/cgroup has lines such as 0::/job (version 2)
    and 9:memory:/job (version 1); inside a container the path may be that of the host.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):
        for line in PROCESS_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS
            file = "memory.max"
            if "memory" in controllers.split(","):
                root = CGROUPS / "memory"
                file = "memory.limit_in_bytes"
            folder = root / path.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):
                    total = min(total, int((place / file).read_text()))
    return total


def free_bytes(folder: Path) -> int:
    """Free disk for `folder`, which need not exist yet."""
    while not os.path.exists(folder):
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_plan(plan: Plan, config: Config, run: Run | None) -> Iterator[str]:
    """What would not fit: device memory, host memory, disk.

    The user may know better than an estimate: all of it can be forced.
    """
    if plan.auto and plan.devices.ids and not (plan.memory and plan.device_bytes):
        yield (
            f"{config.where('per_device_train_batch_size')}: auto cannot tell what fits where the "
            "memory is not known (see the plan); give a number, and let --rehearse try it"
        )
    if plan.device_bytes and plan.needed > plan.device_bytes and not plan.provisional:
        kind = "memory" if plan.devices.ids else "host memory"
        yield Forceable(
            f"{kind}: {format_bytes(plan.needed)} is needed on each {plan.unit}, "
            f"{format_bytes(plan.device_bytes)} is there{nearest_that_fits(plan)}"
        )
    if plan.host_memory and plan.host_memory > host_bytes():
        yield Forceable(
            f"host memory: offloading and saving need {format_bytes(plan.host_memory)}, this node "
            f"has {format_bytes(host_bytes())}; use more GPUs without offload, or a smaller model"
        )
    yield from check_disk(plan, config, run)


def check_disk(plan: Plan, config: Config, run: Run | None) -> Iterator[str]:
    """Room for the checkpoints of this run that are still to come, and for a download."""
    room = plan.disk_free
    if run:  # folders count with their 4 KiB
        room += sum(map(file_size, run.path.glob("checkpoint-*/**/*")))
    if plan.disk_bytes and plan.disk_bytes > room:
        yield Forceable(
            f"{config.where('output_dir')}: disk: {format_bytes(plan.disk_bytes)} is needed, "
            f"{format_bytes(plan.disk_free)} is free; lower save_total_limit or use another "
            "output_dir"
        )
    cache = hub_cache(plan.values)
    if plan.model.download > free_bytes(cache):
        yield Forceable(
            f"{cache}: the download of {plan.model.label} does not fit in "
            f"{format_bytes(free_bytes(cache))}; set HF_HOME to a larger disk"
        )


def nearest_that_fits(plan: Plan) -> str:
    """The first of nearer_plans that fits; '' if none."""
    for words, other in nearer_plans(plan):
        if other.needed <= plan.device_bytes and other.host_memory <= host_bytes():
            return f"; it fits with {words} ({format_bytes(other.needed)})"
    return ""


def nearer_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """What could fit, and how to ask for it, the smallest change first: smaller batches of what
    takes the most, offload, more devices.
    """
    key = "per_device_eval_batch_size"
    smaller = {}
    if plan.phase == "evaluation":
        for size in range(plan.values[key] - 1, 0, -1):
            yield split_step(plan, plan.micro, **{key: size})
        smaller = {key: 1}
    sizes = [size for size in divisors(plan.per_rank) if size <= plan.micro]
    for size in sizes:
        yield split_step(plan, size, **smaller)
    offloaded = replace(plan, zero=Zero(3, True, True, used=True))
    for size in sizes:
        yield split_step(
            offloaded, size, "deepspeed=configs/deepspeed/ds_z3_offload_config.json", **smaller
        )
    for count in (2, 4, 8, 16, 32, 64):
        if count > plan.world_size:
            yield f"{count} devices", estimate(replace(plan, world_size=count))


def divisors(samples: int) -> list[int]:
    """The micro-batches into which so many samples can be split, the largest first."""
    return [size for size in range(samples, 0, -1) if samples % size == 0]


# --- the split of a step into micro-batches
#
# The same samples per step in fewer, larger micro-batches are the same step. What is fewer is
# fixed work, above all the gathers of ZeRO-3; what is more is padding, where lengths differ.


def split_step(plan: Plan, size: int, *words: str, **more: object) -> tuple[str, Plan]:
    """The same step in micro-batches of `size`: `words` and the keys to change; its plan."""
    values = plan.values
    keys = split_keys(plan.per_rank, size) | more
    changed = [f"{key}={value}" for key, value in keys.items() if value != values[key]]
    return " ".join([*words, *changed]), estimate(replace(plan, values=Values(values | keys)))


def split_keys(samples: int, size: int) -> dict[str, int]:
    """The keys that split `samples` per rank and step into micro-batches of `size`."""
    return dict(zip(SPLIT, (size, samples // size), strict=True))


def choose_split(plan: Plan) -> Plan:
    """The plan with the micro-batch that does the step with the least work, or with the fastest one
    of a rehearsal with auto.
    """
    known = plan.figures or packs(plan.values) or plan.values.streaming
    kept = rehearsal_of(plan, SPLIT)
    size = kept.get("auto") and kept["configuration"]["per_device_train_batch_size"]
    best = min(splits(plan), key=lambda other: other.micro != size)  # the first without any
    steps = plan_steps(plan.rows[0], best.values, plan.world_size)
    return replace(best, provisional=not known, steps=steps)


def splits(plan: Plan, **more: object) -> list[Plan]:
    """The plan in all micro-batches that fit, that of the least work first; of one sample, where
    none fits. `more` are keys to change.

    At most 0.9 of a device may be needed, by the plan and what a rehearsal had beyond it.
    """
    made = [split_step(plan, size, **more)[1] for size in divisors(plan.per_rank)]
    room = 0.9 * (plan.device_bytes or math.inf) - beyond_plan(plan)
    fitting = [other for other in made if other.needed <= room]
    return sorted(fitting or made[-1:], key=step_work)


def beyond_plan(plan: Plan) -> int:
    """Bytes by which a rehearsal of this configuration, however split, was above the plan."""
    rehearsal = rehearsal_of(plan, SPLIT)
    if not rehearsal:
        return 0
    _, rehearsed = split_step(plan, rehearsal["configuration"]["per_device_train_batch_size"])
    return rehearsal["peak_memory"] - rehearsed.needed


def step_work(plan: Plan) -> float:
    """What a step costs each rank, in tokens: its own, with their padding, and gather_cost for each
    micro-batch.
    """
    accumulation = plan.values.gradient_accumulation_steps
    tokens = plan.sequences * plan.per_rank * padded_length(plan)
    return accumulation * gather_cost(plan) + tokens


def gather_cost(plan: Plan) -> int:
    """What a micro-batch costs besides its tokens, in tokens.

    ZeRO-3 gathers all weights for forward and again for backward, and reduces all gradients: 6
    bytes per parameter in 16 bit (Rajbhandari et al. 2020, section 7.2), where a token takes 6
    operations per parameter, so that the size of the model cancels out. At NVLink's 200 GB/s and
    300 TFLOP/s that is some 1,100 tokens, ten times as many over PCIe, between nodes and from the
    host. On two CPU ranks it was 300 to 1,600, by the length of the samples
    (tests/benchmarks/README.md). Else the starts of kernels are left.
    """
    from_host = plan.zero.offload_parameters
    gpus = plan.gpus
    if plan.zero.stage < 3 or (plan.world_size == 1 and not from_host):
        return 150
    if not plan.devices.ids:
        return 600
    indices = {gpu.index for gpu in gpus}
    linked = len(gpus) == plan.world_size and all(
        indices <= {gpu.index} | gpu.linked for gpu in gpus
    )
    return 1_100 if linked and not from_host else 11_000


def padded_length(plan: Plan) -> float:
    """Tokens to which a sample is padded, on average.

    In random order that is the expected maximum of a micro-batch, under ZeRO-3 of those of all
    ranks, which wait for one another. group_by_length sorts 50 steps of a rank, or a quarter of
    the samples, and cuts micro-batches from them (transformers' get_length_grouped_indices).
    """
    total = sum(count for _, count in plan.lengths)
    micro = plan.micro
    sorted_steps = max(min(total // (4 * plan.per_rank), 50), 1)
    batches = sorted_steps * plan.per_rank // micro
    if plan.zero.stage == 3:
        micro *= plan.world_size
    shorter = 0
    before = 0.0
    mean = 0.0
    for tokens, count in plan.lengths:
        shorter += count
        share = (shorter / total) ** micro
        if plan.values.train_sampling_strategy == "group_by_length":
            share = shorter * batches // total / batches
        mean += tokens * (share - before)
        before = share
    return mean


CLEARLY = 0.9  # so much of the work, or less, is worth a line
# What can help besides another split, the last where the logits leave little room.
FASTER = {"train_sampling_strategy": "group_by_length", "enable_liger_kernel": "true"}


def suggest_split(plan: Plan) -> str:
    """What does the same step with clearly less work, and what it gains; '' for nothing."""
    found = []
    values = plan.values
    tries = [{}]
    if values.stage in ("pt", "sft") and not values.disable_shuffling:
        tries += [{key: value} for key, value in FASTER.items()]
    for more in tries if plan.memory and plan.device_bytes else ():
        other = splits(plan, **more)[0]
        if step_work(other) < CLEARLY * step_work(plan):
            found.append(describe_gain(plan, other, more))
            if not more:
                plan = other
    return "; then ".join(found)


def describe_gain(plan: Plan, other: Plan, more: dict) -> str:
    """`KEY=VALUE ... is the same step, 3.1 x less work (gathers 8 -> 1, 61.2 GiB, padding 3 % ->
    9 %)`, and what the keys of `more` free alone.
    """
    words, _ = split_step(plan, other.micro, **more)
    counts = " -> ".join(str(one.values[ACCUMULATION]) for one in (plan, other))
    parts = [f"{plan.fixed_work} {counts}, {format_bytes(other.needed + beyond_plan(plan))}"]
    if plan.figures:
        parts.append(f"padding {padding_share(plan)} -> {padding_share(other)}")
    freed = plan.needed - split_step(plan, plan.micro, **more)[1].needed
    if freed > 0:
        parts.append(f"{format_bytes(freed)} freed")
    times = step_work(plan) / step_work(other)
    return f"{words} is the same step, {times:.1f} x less work ({', '.join(parts)})"


def padding_share(plan: Plan) -> str:
    """How much of the tokens of a step is padding: `12 %`."""
    total = sum(count for _, count in plan.lengths)
    mean = sum(tokens * count for tokens, count in plan.lengths) / total
    return f"{100 - 100 * mean / padded_length(plan):.0f} %"


# --- rules between keys -------------------------------------------------------------------------


def keep_one(keys: str, other: str) -> tuple:
    """Keys that cannot be on together with another."""
    return keys, lambda v: v[other], f"cannot be combined with {other}; keep one"


def needs(keys: str, other: str, *values: str) -> tuple:
    """Keys that work where another has one of these values."""
    text = f"needs {other}: {' or '.join(values)}; set that, or turn it off"
    return keys, lambda v: v[other] not in values, text


def not_with_zero3(key: str, advice: str) -> tuple:
    """A key that ZeRO-3 cannot do."""
    return key, lambda v: v.zero.stage == 3, f"cannot be used with ZeRO-3; {advice}"


def saves_between_evaluations(v: Values) -> bool:
    """Whether a checkpoint falls between two evaluations (TrainingArguments._validate_args)."""
    every = v.eval_steps or v.logging_steps
    # Times 10**6, since shares of all steps are compared as well.
    is_between = v.save_steps * 10**6 % (every * 10**6) != 0
    return v.save_strategy == v.eval_strategy == "steps" and is_between


def has_batches(v: Values) -> bool:
    """Whether training, evaluation or prediction takes more than one sequence at a time."""
    evaluates = v.eval_strategy != "no" or v.do_eval or v.do_predict
    batch = v.per_device_train_batch_size
    if evaluates:
        batch = max(batch, v.per_device_eval_batch_size)
    return batch > 1


def lacks_metric(v: Values) -> bool:
    """Whether nothing decides which checkpoint is the best."""
    return v.eval_strategy == "no" or not (v.metric_for_best_model or v.load_best_model_at_end)


def loses_weights(v: Values) -> bool:
    """Whether ZeRO-3 leaves the final model in shards; LoRA adapters are always gathered."""
    adapter = v.finetuning_type in ("lora", "oft") and v.stage != "rm"
    return not v.zero.saves_weights and not adapter


def differing_settings(v: Values) -> str:
    """The settings of the DeepSpeed file that do not equal their key: `bf16.enabled`.

    transformers compares these in integrations/deepspeed.py, after data and model are loaded.
    """
    if not v.zero.used:  # a file that cannot be read
        return ""
    wanted = {
        "train_micro_batch_size_per_gpu": v.per_device_train_batch_size,
        "gradient_accumulation_steps": v.gradient_accumulation_steps,
        "train_batch_size": v.global_batch,
        "gradient_clipping": v.max_grad_norm,
        "bf16.enabled": bool(v.bf16 or v.bf16_full_eval),
        "fp16.enabled": bool(v.fp16 or v.fp16_full_eval),
        "optimizer.params.lr": v.learning_rate or 5e-5,
        "optimizer.params.betas": [v.adam_beta1 or 0.9, v.adam_beta2 or 0.999],
        "optimizer.params.eps": v.adam_epsilon or 1e-8,
        "optimizer.params.weight_decay": v.weight_decay or 0,
        "scheduler.params.warmup_max_lr": v.learning_rate or 5e-5,
    }
    warmup = v.warmup_ratio or v.warmup_steps or 0
    if v.max_steps > 0:  # else only the tokenized data can tell
        wanted["scheduler.params.total_num_steps"] = v.max_steps
    if not 0 < warmup < 1:
        wanted["scheduler.params.warmup_num_steps"] = warmup
    # What a missing one means: DeepSpeed ends at its start, nothing is accumulated or clipped.
    given = {
        "train_micro_batch_size_per_gpu": None,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0,
    }
    given |= by_path(v.zero.settings)
    names = [key for key in wanted if given.get(key, "auto") not in ("auto", wanted[key])]
    return ", ".join(names)


def by_path(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their path, `bf16.enabled`; without those that are null."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= by_path(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value
    return found


def missing_metric(v: Values) -> str:
    """The metrics that an evaluation gives, where the one that decides is not among them."""
    metric = (v.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss"]
    if v.compute_accuracy:
        known.append("accuracy")
    if v.predict_with_generate:  # without labels there is no loss
        known = ["rouge-1", "rouge-2", "rouge-l", "bleu-4"]
    if v.score:
        known += SCORES.get(v.score, ("exact",))
    if v.eval_on_each_dataset:
        known = [f"{name}_{key}" for name in name_list(v.eval_dataset) for key in known]
    if v.eval_strategy == "no" or metric in known or (v.stage != "sft" and metric != "loss"):
        return ""
    if v.score and v.score not in SCORES and v.metric_for_best_model:
        return ""  # what a script gives is seen before step 1
    return " or ".join(known)


def incomplete_data(v: Values) -> str:
    """tokenized_path, where it holds something, but no data that was written to its end."""
    folder = Path(v.tokenized_path)
    with contextlib.suppress(OSError):
        if os.listdir(folder) and not any(folder.rglob("state.json")):
            return v.tokenized_path
    return ""


def unknown_template(v: Values) -> str:
    """What is wrong with a template that the installed LLaMA-Factory does not have; '' for none."""
    templates = read_templates()
    if v.template in templates or not templates:
        return ""
    return f"{v.template!r} is unknown to LLaMA-Factory{did_you_mean(v.template, templates)}"


def read_templates() -> dict[str, str]:
    """LLaMA-Factory's chat templates and the source of each; {} where it is missing."""
    with contextlib.suppress(OSError):
        source = source_of("llamafactory/data/template.py")
        return dict(
            re.findall(r'^    name="([^"]+)"(.*?)^\)', source, re.MULTILINE | re.DOTALL)
        )
    return {}


# What LLaMA-Factory or transformers would refuse after minutes, or what loses the model: keys, what
# is asked where one of them is on, and the problem where the answer is true. Asked of the
# configuration's Values and, in them, the plan's `zero`, `model` and `global_batch`; {} in a text
# stands for the answer. The conditions are those of LLaMA-Factory 0.9.5's hparams/parser.py,
# transformers 5.5.4's TrainingArguments and Trainer, and accelerate's DeepSpeed.
RULES = (
    (
        "per_device_train_batch_size",
        lambda v: v.auto and not v.global_batch_size,
        "auto needs global_batch_size, the samples per optimizer step; set it too",
    ),
    (
        "tokenized_path",
        incomplete_data,
        "{} holds incomplete tokenized data; remove the folder to tokenize again",
    ),
    keep_one("val_size", "eval_dataset"),
    keep_one("mask_history", "train_on_prompt"),
    ("template", unknown_template, "{}"),
    (
        "streaming",
        lambda v: v.max_steps <= 0,
        "streamed data has no length; set max_steps",
    ),
    (
        "max_samples",
        lambda v: v.streaming,
        "cannot be combined with streaming: true; use max_steps",
    ),
    (
        "val_size",
        lambda v: v.streaming and v.val_size < 1,
        "cannot be a share with streaming: true; give a number of samples",
    ),
    (
        "resume_from_checkpoint",
        lambda v: not os.path.isdir(str(v.resume_from_checkpoint)) and v.resume_from_checkpoint,
        "{} does not exist; expected a checkpoint folder; to continue a run use --resume",
    ),
    needs("predict_with_generate neat_packing mask_history train_on_prompt", "stage", "sft"),
    needs("adapter_name_or_path", "finetuning_type", "lora"),
    (
        "train_sampling_strategy",
        lambda v: v.train_sampling_strategy == "group_by_length" and v.stage in ("dpo", "rm"),
        "preference pairs cannot be grouped by length; use random",
    ),
    (
        "stage",
        lambda v: v.stage == "ppo",
        "ppo needs trl 0.9.6 or older, which this LLaMA-Factory does not take; use dpo or kto",
    ),
    (
        "stage",
        lambda v: (
            v.stage == "rm"
            and v.model.shape.get("tie_word_embeddings")
            and v.finetuning_type != "lora"
            and not v.zero.stage
        ),
        "LLaMA-Factory cannot save a reward model whose embeddings are tied without ZeRO-3; "
        "set deepspeed: configs/deepspeed/ds_z3_config.json, or finetuning_type: lora",
    ),
    # precision and attention
    keep_one("fp16 pure_bf16", "bf16"),
    keep_one("pure_bf16", "fp16"),
    ("fp16 pure_bf16", lambda v: v.use_cpu, "cannot be used on a CPU; use bf16"),
    (
        "flash_attn",
        lambda v: v.flash_attn == "fa3",
        "LLaMA-Factory cannot switch fa3 on; use fa2 or auto",
    ),
    not_with_zero3("pure_bf16", "use bf16: true"),
    (
        "flash_attn",
        lambda v: v.flash_attn == "fa2" and precision(v) == "fp32",
        "fa2 computes in 16 bit only; set bf16: true, or use flash_attn: sdpa",
    ),
    (
        "neat_packing",
        lambda v: v.flash_attn == "fa2" and has_batches(v),
        "takes one sequence at a time with flash_attn: fa2; set per_device_train_batch_size and "
        "per_device_eval_batch_size to 1",
    ),
    # evaluation, and which checkpoint is the best
    (
        "eval_strategy do_eval do_predict predict_with_generate score",
        lambda v: not v.eval_dataset and not v.val_size,
        "there is nothing to evaluate on; set eval_dataset or val_size, or turn evaluation off",
    ),
    not_with_zero3("predict_with_generate", "use ZeRO-2, or generate after training"),
    (
        "do_predict",
        lambda v: v.stage == "sft" and not v.predict_with_generate,
        "needs predict_with_generate: true; set that, or turn it off",
    ),
    keep_one("predict_with_generate", "compute_accuracy"),
    (
        "load_best_model_at_end",
        lambda v: v.save_strategy not in ("best", v.eval_strategy),
        "needs the same save_strategy and eval_strategy, or save_strategy: best",
    ),
    (
        "load_best_model_at_end",
        saves_between_evaluations,
        "needs an evaluation at each checkpoint; make save_steps a multiple of eval_steps",
    ),
    (
        "save_only_model",
        lambda v: v.load_best_model_at_end and v.zero.used,
        "cannot be combined with load_best_model_at_end under DeepSpeed; keep one",
    ),
    (
        "save_strategy",
        lambda v: v.save_strategy == "best" and lacks_metric(v),
        "best needs evaluation and a metric; set eval_strategy and metric_for_best_model: loss",
    ),
    (
        "early_stopping_steps",
        lacks_metric,
        "needs evaluation and a metric; set eval_strategy and metric_for_best_model: loss",
    ),
    (
        "load_best_model_at_end",
        lambda v: v.stage == "rm",
        "cannot be used with stage: rm; turn it off",
    ),
    (
        "metric_for_best_model",
        missing_metric,
        "evaluation does not give it; set metric_for_best_model: {} (for accuracy also "
        "compute_accuracy: true, for exact score: exact, for execution score: sql)",
    ),
    (
        "load_best_model_at_end",
        lambda v: not v.metric_for_best_model and missing_metric(v),
        "needs a metric that evaluation gives; set metric_for_best_model: {}",
    ),
    # scores
    (
        "score",
        lambda v: v.score not in SCORES and not v.score.endswith(".py"),
        "expected exact, sql, or a script such as my_scores.py",
    ),
    (
        "score",
        lambda v: v.eval_strategy == "no" and not (v.do_eval or v.eval_on_start),
        "nothing is evaluated; set eval_strategy: steps, or do_eval: true for one score at the end",
    ),
    (
        "score",
        lambda v: v.score == "sql" and not v.score_database,
        "sql needs score_database: an SQLite file, or a .sql script with schema and rows",
    ),
    needs("score", "stage", "sft"),
    needs("score_database", "score", "sql"),
    (
        "score_samples",
        lambda v: "score_samples" in v and not v.score,
        "needs score: exact or sql",
    ),
    keep_one(
        "packing neat_packing train_on_prompt streaming predict_with_generate fsdp use_unsloth "
        "use_kt use_mca use_hyper_parallel",
        "score",
    ),
    (
        "lr_scheduler_type",
        lambda v: (
            v.lr_scheduler_type.endswith("_min_lr")
            and "min_lr" not in str(v.lr_scheduler_kwargs)
        ),
        'needs its lowest rate; set lr_scheduler_kwargs: {"min_lr_rate": 0.1}',
    ),
    # DeepSpeed, quantization, workers
    keep_one("fsdp use_galore use_apollo", "deepspeed"),
    (
        "deepspeed",
        loses_weights,
        "the run would end without a model; set stage3_gather_16bit_weights_on_model_save: "
        "true in its zero_optimization",
    ),
    (
        "deepspeed",
        # engine.DDP_BFLOAT16 saves none; with data_types: fp32 it is saved, but not loaded.
        lambda v: v.zero.kind == "ZeRO-0" and (v.bf16 or v.bf16_full_eval),
        "stage 0 resumes no optimizer state with bf16; use ZeRO stage 1, or no deepspeed",
    ),
    (
        "deepspeed",
        differing_settings,
        'set {} to "auto" in it: missing, or not what the key here says',
    ),
    (
        "deepspeed",
        lambda v: v.zero.offload_optimizer and not v.optim.startswith("adamw_torch"),
        "offloading replaces it by Adam; set optim: adamw_torch, or do not offload",
    ),
    not_with_zero3("auto_find_batch_size", "set per_device_train_batch_size, or use ZeRO-2"),
    not_with_zero3("use_unsloth", "use ZeRO-2"),
    not_with_zero3("pissa_init", "run LLaMA-Factory's scripts/pissa_init.py first"),
    needs("quantization_bit", "finetuning_type", "lora", "oft"),
    needs("use_galore use_apollo", "finetuning_type", "full", "freeze"),
    (
        "dataloader_prefetch_factor dataloader_persistent_workers",
        lambda v: not v.dataloader_num_workers and not v.streaming,
        "needs dataloader_num_workers: 1 or more",
    ),
)


def check_rules(config: Config, plan: Plan) -> Iterator[str]:
    """Keys that are missing, leave nothing to train on, or exclude each other."""
    view = Values(
        plan.values,
        zero=plan.zero,
        model=plan.model,
        global_batch=plan.global_batch,
        auto=plan.auto,
    )
    required = {
        "model_name_or_path": "is missing; name a model, such as Qwen/Qwen3-14B",
        "output_dir": "is missing; name the folder that will hold the runs",
        "do_train": "nothing would be trained; set do_train: true",
        "dataset": "no data to train on; name a data set of dataset_info.json",
    }
    if only_scores(plan.values):
        required = without(required, "do_train", "dataset")
    for key, text in required.items():
        if not config.values.get(key) and key not in config.refused:
            yield f"{config.where(key)}: {text}"
    if plan.steps.samples is not None and plan.steps.samples < 1:
        yield (
            f"{config.where('val_size')}: {plan.values.val_size} leaves no sample to train on; "
            "use less"
        )
    for keys, breaks, text in RULES:
        for key in keys.split():
            is_on = view[key] not in (None, False, "", "no", [])
            found = is_on and key not in config.refused and breaks(view)
            if found:
                yield f"{config.where(key)}: {text.replace('{}', str(found))}"


# --- resume -------------------------------------------------------------------------------------

# What may not change on resume: the model would not load, the data would be other data, or the
# checkpoint's value would win without a word.
FIXED_KEYS = """
    model_name_or_path model_revision train_from_scratch resize_vocab add_tokens add_special_tokens
    rope_scaling finetuning_type freeze_trainable_layers freeze_trainable_modules
    freeze_extra_modules freeze_vision_tower freeze_multi_modal_projector freeze_language_model
    lora_rank lora_alpha lora_target lora_dropout use_rslora use_dora pissa_init additional_target
    oft_rank oft_block_size oft_target adapter_name_or_path create_new_adapter
    stage ref_model pref_beta pref_loss bf16 fp16 pure_bf16 quantization_bit
    template default_system tool_format enable_thinking train_on_prompt mask_history
    dataset dataset_dir tokenized_path streaming buffer_size max_samples val_size cutoff_len
    packing neat_packing mix_strategy interleave_probs train_sampling_strategy disable_shuffling
    seed data_seed optim use_galore use_apollo use_badam use_adam_mini use_muon loraplus_lr_ratio
    learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon deepspeed fsdp global_batch_size
""".split()
# Samples are packed within what a tokenizing process has at once.
PACKING_KEYS = ("preprocessing_num_workers", "preprocessing_batch_size")
# What decides how long a step takes and how much memory; not how many steps, checkpoints and
# evaluations there are, which forecast() counts anew.
DECISIVE = (
    *FIXED_KEYS,
    *PACKING_KEYS,
    ACCUMULATION,
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
)


def find_run(options: argparse.Namespace) -> Run | None:
    """The run that --resume means: RUN_DIR, else the newest unfinished one; None: a new run.

    One with a checkpoint comes before one without; one that is still running comes last.
    """
    if options.resume is None:
        return None
    if options.resume:
        run = Run(Path(options.resume).expanduser().resolve())
        if not run.config_file.is_file():
            raise LaunchError(
                f"--resume {options.resume}: {run.config_file} does not exist; expected the "
                "directory of a run"
            )
        return run
    config = load_config(options.config, options.overrides)
    output_dir = Path(config.values.output_dir)
    runs = [Run(path.parent) for path in output_dir.glob("[!.]*/config.yaml")]
    if not runs:
        raise LaunchError(f"--resume: there is no run under {output_dir}; start one first")

    def order(run: Run) -> tuple:
        has_checkpoint = run.newest_checkpoint() is not None
        newest = run.config_file.stat().st_mtime
        return not run.is_running(), not run.is_finished(), has_checkpoint, newest

    return max(runs, key=order)


def check_resume(config: Config, plan: Plan, run: Run) -> Iterator[str]:
    """Why the run cannot continue like this: it has changed, or has no checkpoint."""
    recorded = run.read("plan.json")
    now = decisive_values(plan)
    old = load_config(run.config_file, {}).values
    keys = FIXED_KEYS
    if packs(plan.values):
        keys = [*keys, *PACKING_KEYS]
    before = {key: old[key] for key in keys}  # where plan.json is lost
    before |= {key: now[key] for key in ("deepspeed", "global_batch_size")}
    before |= recorded.get("configuration", {})
    if run.read("summary.json").get("state") == "diverged":
        before["learning_rate"] = now["learning_rate"]
    for key in keys:
        was = before[key]
        new = now[key]
        if (was or None) != (new or None):  # false is what most are where not given
            yield (
                f"{config.where(key)}: was {was} when the run started and is {new} now, but "
                "cannot change on resume; start a new run instead"
            )
    for path, content in plan.data.items():
        if (recorded.get("data") or {}).get(path, content) != content:
            yield Forceable(
                f"{path}: has changed since the run started; put the old file back, or start a "
                "new run"
            )
    yield from check_checkpoint(plan, run)


def decisive_values(plan: Plan) -> dict:
    """The values that a resume, and a rehearsal's figures, go by, with what the plan derives."""
    return {key: plan.values[key] for key in DECISIVE} | {
        "deepspeed": plan.zero.kind,
        "offloads": str(plan.zero),
        "global_batch_size": plan.values.global_batch_size or plan.global_batch,
        "world_size": plan.world_size,
    }


def check_checkpoint(plan: Plan, run: Run) -> Iterator[str]:
    """Whether there is a checkpoint that these ranks can load."""
    good = run.newest_checkpoint()
    if not good:
        found = [f"{path.name}: {checkpoint_problem(path)}" for path in run.checkpoints()]
        seen = f" ({'; '.join(found)})" if found else ""
        yield (
            f"{run.path}: there is no checkpoint to resume from{seen}; start a new run, under "
            "another run_name or after removing this folder"
        )
        return
    ranks = run.checkpoint_ranks()
    if ranks != plan.world_size and not plan.values.optim.startswith("adamw_torch"):
        yield (
            f"{good.name} was saved by {plural(ranks, 'rank')}, this run has {plan.world_size}: "
            "only torch's AdamW can be resharded; use as many GPUs as then"
        )


# --- the plan for people and as data ------------------------------------------------------------


def dry_run(found: Preflight, as_json: bool, env: Environment) -> None:
    """Print the plan and the exact command; start nothing and write nothing."""
    run = found.run or Problems().attempt(new_run, found.config) or Run(Path("RUN_NAME"))
    data = plan_as_data(found, run, env)
    if as_json:
        say(json.dumps(data, indent=1))
    elif found.plan.devices.processes:
        print_plan(found, run, env)
        words = [f"{key}={shlex.quote(value)}" for key, value in data["environment"].items()]
        print_lines({"command": " ".join([*words, shlex.join(data["command"])])})


def print_plan(found: Preflight, run: Run, env: Environment) -> None:
    """Print the plan, one screen."""
    plan = found.plan
    chosen = chosen_tracking(found.config, run, env)
    names = [str(chosen.get(name, name)) for name in tracking_backends(found.config.values)]
    print_lines(
        {
            **plan_lines(plan),
            "resharded": describe_resharding(found),
            "thinking": thinking_advice(plan),
            "tracking": ", ".join(names) or "none",
            "run": str(run.path),
            "follow": f"tail -F {shlex.quote(str(run.logs / 'rank0.log'))}",
        }
    )


def describe_resharding(found: Preflight) -> str:
    """`checkpoint-40: 4 ranks -> 2 ranks`; '' where the number of ranks is the same."""
    before = found.run and found.run.checkpoint_ranks()
    now = found.plan.world_size
    if before in (None, now):
        return ""
    name = found.run.newest_checkpoint().name
    text = f"{name}: {plural(before, 'rank')} -> {plural(now, 'rank')}"
    if found.plan.values.train_sampling_strategy == "group_by_length":
        text += "; group_by_length draws the samples in another order"
    return text


def thinking_advice(plan: Plan) -> str:
    """That an empty thought is learned with each answer; '' where none is."""
    if "enable_thinking" in plan.values:
        return ""
    template = plan.values.template
    files = [path for path in plan.data if path.endswith((".json", ".jsonl", ".csv"))]
    thinks = "ReasoningTemplate" in read_templates().get(template, "")
    if not (thinks and files):
        return ""
    for path in files:
        with open(path, "rb") as file:
            if b"<think>" in file.read(1 << 20):
                return ""
    return (
        f"template {template} puts an empty <think></think> before each answer, which is "
        "learned as part of it; with enable_thinking: false it belongs to the prompt"
    )


def print_lines(lines: dict[str, object], stream: TextIO | None = None) -> None:
    """Print `label       text` lines; an empty text is left out."""
    for label, text in lines.items():
        if text:
            say(f"{label:<11} {text}", stream)


def plan_lines(plan: Plan) -> dict[str, str]:
    """The plan for people: {label: text}."""
    values = plan.values
    size = ""
    if plan.model.parameters:
        size = f": {format_count(plan.model.parameters)} parameters"
    batch = (
        f"{values.per_device_train_batch_size} per device x "
        f"{plural(plan.world_size, plan.unit)} x {values.gradient_accumulation_steps} "
        f"accumulation = {plan.global_batch} samples per step{describe_choice(plan)}"
    )
    return {
        "model": plan.model.label + size,
        "method": f"{values.stage}, {values.finetuning_type}, {plan.zero}, {precision(values)}",
        "devices": describe_devices(plan),
        "batch": batch,
        "longest": describe_longest(plan),
        "steps": describe_steps(plan),
        "schedule": describe_schedule(values),
        "scores": describe_scores(values),
        **resource_lines(plan),
        "faster": suggest_split(plan),
    }


def describe_choice(plan: Plan) -> str:
    """Why auto has chosen this split; '' where it was given."""
    if not plan.auto:
        return ""
    if plan.provisional:
        return " (auto: by cutoff_len, and again once the data is tokenized)"
    blind = splits(replace(plan, figures={}))[0]
    reason = f"longest sample {plan.longest} tokens, padding {padding_share(plan)}"
    if blind.micro < plan.micro:
        parts = f"{blind.micro} x {blind.values[ACCUMULATION]}"
        reason += f", {plan.micro / blind.micro:.3g} x fewer {plan.fixed_work} than {parts}"
    return f" (auto: {reason})"


def describe_longest(plan: Plan) -> str:
    """How many tokens are planned for a sample, by what, and when auto meets the longest."""
    if not plan.figures:
        return f"{plan.longest} tokens are planned for each sample: cutoff_len"
    text = f"{plan.longest} tokens in a sample, by {plan.figures['source']}"
    if plan.auto and plan.values.train_sampling_strategy == "group_by_length":
        text += "; they are in the first step"
    elif plan.auto:
        text += "; drawn at random: --rehearse trains on the longest first"
    return text


def describe_devices(plan: Plan) -> str:
    """`GPUs 0,1 (from CUDA_VISIBLE_DEVICES), 2 processes`, and what GPUs where they differ."""
    devices = plan.devices
    what = "CPU"
    if devices.ids:
        what = ("GPUs " if len(devices.ids) > 1 else "GPU ") + ",".join(devices.ids)
    text = f"{what} ({devices.reason}), {plural(devices.processes, 'process')}"
    kinds = sorted({(gpu.name, gpu.total) for gpu in plan.gpus if gpu.total})
    if len(kinds) > 1:
        names = ", ".join(f"{name} {format_bytes(total)}" for name, total in kinds)
        text += f"; mixed: {names}; the smallest one's memory counts"
    return text


def format_count(count: int) -> str:
    """14.8 B, 1.07 M."""
    return f"{count / 1e9:.3g} B" if count >= 1e8 else f"{count / 1e6:.3g} M"


def describe_steps(plan: Plan) -> str:
    """Samples, steps per epoch and in all, or why they are unknown."""
    steps = plan.steps
    values = plan.values
    if steps.samples is None:
        return f"{steps.total or 'unknown'} in all ({steps.reason})"
    total = f"max_steps: {steps.total}"
    if values.max_steps <= 0:
        total = f"x {plural(values.num_train_epochs, 'epoch')} = {steps.total}"
    samples = plural(steps.samples, "sample")
    return f"{samples}: {plural(steps.per_epoch, 'step')} per epoch, {total}"


def describe_schedule(values: Values) -> str:
    """When it logs, saves and evaluates."""
    parts = (
        describe_interval(values, "log", "logs", "logging"),
        describe_interval(values, "save", "checkpoints", "save"),
        describe_interval(values, "evaluate", "evaluation", "eval"),
    )
    return ", ".join(parts)


def describe_interval(values: Values, verb: str, noun: str, key: str) -> str:
    """`save every 500 steps`, `evaluate every epoch`, `no evaluation`."""
    steps = values[f"{key}_steps"] or values.logging_steps
    every = f"{steps:g} of all steps" if steps < 1 else plural(int(steps), "step")
    words = {"no": f"no {noun}", "best": f"{verb} the best", "epoch": f"{verb} every epoch"}
    return words.get(values[f"{key}_strategy"], f"{verb} every {every}")


def describe_scores(values: Values) -> str:
    """What is scored in each evaluation; '' for nothing."""
    if not values.score:
        return ""
    names = " and ".join(SCORES.get(values.score, [values.score]))
    return f"{names} of {values.score_samples} answers, at most, in each evaluation"


def resource_lines(plan: Plan) -> dict[str, str]:
    """Memory and disk, where they can be estimated."""
    if not plan.model.parameters:
        return {}
    lines = {"memory": describe_memory(plan)}
    there = format_bytes(host_bytes())
    weights = plan.model.parameters * weight_bytes(plan)
    if plan.host_memory:
        lines["host"] = f"{format_bytes(plan.host_memory)} of {there} for offloading and saving"
    elif plan.zero.stage == 3 and weights > host_bytes():
        lines["host"] = (
            f"saving gathers {format_bytes(weights)} on rank 0, the node has {there}"
        )
    if not plan.checkpoint_bytes:
        return lines
    need = f", at most {format_bytes(plan.disk_bytes)} at once" if plan.disk_bytes else ""
    lines["disk"] = (
        f"{format_bytes(plan.checkpoint_bytes)} per checkpoint{need}, of "
        f"{format_bytes(plan.disk_free)} free"
    )
    return lines


def describe_memory(plan: Plan) -> str:
    """The memory of the largest phase against what there is, and its parts."""
    if not plan.memory:
        return f"not estimated with {unknown_memory(plan)}"
    room = f" of {format_bytes(plan.device_bytes)}" if plan.device_bytes else ""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.memory.items())
    text = (
        f"{format_bytes(plan.needed)}{room} per {plan.unit} at the peak ({plan.phase}): {parts}"
    )
    if plan.device_bytes and plan.needed > 0.95 * plan.device_bytes:
        text += "; over 95 %, so it may run out of memory"
    return text


def plan_as_data(found: Preflight, run: Run, env: Environment) -> dict:
    """The plan as one JSON object; null where something cannot be known. Sizes in bytes."""
    plan = found.plan
    return {
        "devices": list(plan.devices.ids),
        "devices_reason": plan.devices.reason,
        "world_size": plan.world_size,
        "global_batch_size": plan.global_batch,
        "samples": plan.steps.samples,
        "steps_per_epoch": plan.steps.per_epoch,
        "total_steps": plan.steps.total,
        "parameters": plan.model.parameters,
        "memory_per_gpu": plan.memory,
        "host_memory": plan.host_memory,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "disk_bytes": plan.disk_bytes,
        "data": plan.data,
        "data_key": data_key(plan),
        "longest_sample": plan.longest,
        "auto": plan.auto,
        "configuration": decisive_values(plan),
        "problems": found.problems,
        "command": build_torchrun_command(plan.devices, run.config_file, env),
        "environment": shown_environment(build_rank_environment(found, run, env), env),
    }


# --- settings of the trackers ---------------------------------------------------------------------


def chosen_tracking(config: Config, run: Run, env: Environment) -> dict[str, Tracking]:
    """How the trackers of report_to that have a process of their own record the run, by name."""
    names = [name for name in tracking_backends(config.values) if name in TRACKERS]
    return {name: TRACKERS[name][0](config, run, env) for name in names}


@dataclass(frozen=True)
class Tracking:
    """How a tracker records the run: its mode, why, and what it is given to begin with."""

    title: str
    mode: str
    reason: str
    init: dict

    def __str__(self) -> str:
        return f"{self.title} {self.mode} ({self.reason}), {self.init['log_dir']}"


def setup_experiment_tracking(config: Config, run: Run, env: Environment) -> Tracking:
    """Choose SwanLab's mode and settings. Starts nothing.

    The mode is SWANLAB_MODE, else `swanlab_mode`, else online where a key is found, local where
    not.
    """
    values = config.values
    key = find_swanlab_key(config, env)
    if env.get("SWANLAB_MODE"):
        mode = env["SWANLAB_MODE"]
        reason = "from SWANLAB_MODE"
    elif values.swanlab_mode:
        mode = values.swanlab_mode
        reason = f"from swanlab_mode, {config.place('swanlab_mode')}"
    else:
        mode = "online"
        reason = f"API key from {key}"
    if mode == "cloud":
        mode = "online"
    if mode == "online" and not key:
        mode = "local"
        reason = "no API key was found"
    project = env.get("SWANLAB_PROJ_NAME") or tracking_project(values)
    folder = values.swanlab_logdir or env.get("SWANLAB_LOG_DIR")
    init = {
        "project": re.sub(r"[^\w.+-]", "-", project, flags=re.ASCII)[:100],
        "workspace": values.swanlab_workspace or env.get("SWANLAB_WORKSPACE"),
        "name": values.swanlab_run_name or run.path.name,
        "log_dir": folder or str(run.path.parent / "swanlog"),
    }
    return Tracking("SwanLab", mode, reason, init)


def find_swanlab_key(config: Config, env: Environment) -> str:
    """Where an API key for SwanLab is: YAML, environment, login; '' if nowhere."""
    if config.secrets.get("swanlab_api_key"):
        return "swanlab_api_key"
    if env.get("SWANLAB_API_KEY", "").strip():
        return "SWANLAB_API_KEY"
    home = env.get("SWANLAB_ROOT") or env.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    for path in (Path(".swanlab/.netrc"), Path(home, ".netrc")):
        if path.is_file():
            return f"the login in {path}"
    return ""


def tracking_project(values: Values) -> str:
    """The project's name on every tracker."""
    return str(values.swanlab_project or values.project or "qwen3-ft")


# --- rehearsal ----------------------------------------------------------------------------------

REHEARSAL = ".rehearsal-"  # begins the name of its directory, by which a rank knows it
CANDIDATES = 3  # splits that a rehearsal with auto tries
REHEARSED_STEPS = 10  # one of the longest samples, and enough others for a median
# What would tell others, or judge a model that nobody wants.
NOT_REHEARSED = """
    load_best_model_at_end early_stopping_steps eval_on_start eval_delay do_predict plot_loss
    push_to_hub use_swanlab
""".split()
# What of a summary is of the run itself.
RUNS_OWN = "run model curve dashboard resume rehearsal steps total_steps checkpoints".split()


def rehearse(found: Preflight, as_json: bool, env: Environment) -> int:
    """Run a few steps of the run, and show what they took; returns the exit code.

    With auto also in the next two splits; the fastest is kept for the run.
    """
    plans = [found.plan]
    if found.plan.auto and read_count(env, "NNODES", 1) == 1:
        plans = splits(found.plan)[:CANDIDATES]
    tried = []
    said = []
    for plan in plans:
        code, figures = rehearse_split(found, plan, as_json, env)
        pace = figures.get("step_seconds") or 0
        tried.append((code, pace, plan.micro, plan, figures))
        said.append(f"{plan.micro} x {plan.values[ACCUMULATION]} in {spoken(pace)}")
        if code > 1 or node_rank(env):  # it was stopped
            break
    code, _, _, plan, figures = min(tried)
    if node_rank(env):
        return code
    text = json.dumps(figures, indent=1)
    output_dir = Path(found.plan.values.output_dir)
    if code == 0:
        (output_dir / REHEARSAL_FILE).write_text(text, encoding="utf-8")
    if as_json:
        say(text)
    else:
        print_lines(rehearsal_lines(plan, figures))
        if len(said) > 1:
            print_lines({"tried": f"{', '.join(said)} per step; the fastest is kept"})
    return code


def rehearse_split(
    found: Preflight, plan: Plan, as_json: bool, env: Environment
) -> tuple[int, dict]:
    """Rehearse the run as this plan splits it; returns the exit code and what it took."""
    config = rehearsal_config(replace(found.config, values=plan.values))
    rehearsal = replace(found, config=config, plan=plan)
    run = new_run(config)
    if node_rank(env):
        return launch(rehearsal, env), {}
    remove_rehearsals(run.path.parent)
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            code = launch(rehearsal, env)
        figures = forecast(plan, run.read("summary.json"))
        if code == 0:
            keep_figures(run, found.config)
    finally:
        remove_rehearsals(run.path.parent)
    return code, figures


def rehearsal_config(config: Config) -> Config:
    """What a rehearsal changes: fewer steps, one evaluation where the run evaluates, one
    checkpoint; nobody is told.
    """
    changes = dict.fromkeys(NOT_REHEARSED) | {
        "run_name": REHEARSAL + new_run(config).path.name,
        "save_strategy": "steps",
        "max_restarts": 0,
        "report_to": "none",
    }
    changes |= dict.fromkeys(("max_steps", "save_steps", "eval_steps"), REHEARSED_STEPS)
    if config.values.eval_strategy != "no":
        changes["eval_strategy"] = "steps"
    return replace(config.update(**changes), secrets=without(config.secrets, "notify"))


def remove_rehearsals(output_dir: Path) -> None:
    """Remove what rehearsals have left, also one whose launcher was killed."""
    for folder in output_dir.glob(f"{REHEARSAL}*"):
        if not Run(folder).is_running():
            shutil.rmtree(folder, ignore_errors=True)


def forecast(plan: Plan, summary: dict) -> dict:
    """The summary of a rehearsal, with what the run would take where its steps are known."""
    figures = without(summary, *RUNS_OWN)
    steps = plan.steps
    if not (steps.per_epoch and summary.get("step_seconds")):
        return figures
    saves = count_times(plan, "save")
    evaluations = count_times(plan, "eval")
    counts = {"step": steps.total, "checkpoint": saves, "evaluation": evaluations}
    total = sum(count * figures[f"{what}_seconds"] for what, count in counts.items())
    return figures | {
        "counts": counts,
        "epoch_seconds": steps.per_epoch * figures["step_seconds"],
        "total_seconds": figures["start_seconds"] + total,
    }


def rehearsal_lines(plan: Plan, figures: dict) -> dict[str, str]:
    """A rehearsal for people: {label: text}; of a failure the cause has been said."""
    key = "per_device_train_batch_size"
    state = figures.get("state")
    if OUT_OF_MEMORY in figures.get("cause", ""):
        return {"memory": f"{OUT_OF_MEMORY}, also with {key}={figures['configuration'][key]}"}
    if state != "finished":
        return {"state": state, "cause": state == "refused" and figures["cause"]}
    lines = measured_lines(figures)
    words, _ = split_step(plan, figures["configuration"][key])
    if words:
        lines["memory"] += f", with {words}; {OUT_OF_MEMORY} with {plan.values[key]}"
    if "counts" in figures:
        epoch = spoken(figures["epoch_seconds"])
        total = format_seconds(figures["total_seconds"])
        counts = ", ".join(plural(count, what) for what, count in figures["counts"].items())
        lines["time"] += f", {epoch} per epoch, about {total} in all ({counts})"
    return lines


REHEARSAL_FILE = "rehearsal.json"  # in output_dir


def rehearsal_of(plan: Plan, but: Iterable[str] = ()) -> dict:
    """The rehearsal of this configuration, `but` for some keys, from output_dir; {} for none."""
    rehearsal = read_json_or_empty(Path(plan.values.output_dir, REHEARSAL_FILE))
    rehearsed = without(rehearsal.get("configuration", {}), *but)
    return rehearsal if rehearsed == without(decisive_values(plan), *but) else {}


# --- launch: run directory, torchrun's command and environment ----------------------------------


def tokenize(found: Preflight, count: str, env: Environment) -> int:
    """Tokenize the data as the run would, in a process of its own without GPUs, and leave what
    it measures for the next plan; returns the exit code. A preview shows `count` samples.

    The ranks find it in the cache of datasets.
    """
    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        config = found.config
        found = replace(found, config=without_model(config))
        run.logs.mkdir()
        write_run_files(found, run, env)
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), "--tokenize", folder, "--preview", count],
            env=build_rank_environment(found, run, env) | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=1 if count else 2,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        keep_figures(run, config)
        return done.returncode


def keep_figures(run: Run, config: Config) -> None:
    """Leave the figures of the data where the next plan finds them, though their run goes."""
    figures = run.read(DATA_FILE)
    folder = Path(config.values.output_dir)
    if figures:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DATA_FILE, json.dumps(figures))


def launch(found: Preflight, env: Environment) -> int:
    """Start the run and watch it to its end; returns the exit code."""
    run = found.run
    leads = node_rank(env) == 0
    if run is None:
        run = create_run(found.config) if leads else wait_for_run(found.config)
        if not leads:  # node 0 may have chosen another split
            config = derive_accumulation(
                load_config(run.config_file, {}), found.plan.world_size
            )
            found = replace(found, config=replace(found.config, values=config.values))
    with run.lock() if leads else contextlib.nullcontext():
        command = build_torchrun_command(found.plan.devices, run.config_file, env)
        rank_env = build_rank_environment(found, run, env)
        if leads:
            write_run_files(found, run, env)
            print_plan(found, run, env)
        clear_stale_locks(Path(rank_env["TORCH_EXTENSIONS_DIR"]))
        return Supervisor(found, run, command, rank_env).supervise()


def new_run(config: Config) -> Run:
    """The run that would begin now, by its `run_name`, else by the local time as YYYYmmdd-HHMMSS.

    Raises LaunchError.
    """
    name = str(config.values.get("run_name", time.strftime("%Y%m%d-%H%M%S")))
    if not name.strip(". ") or name.startswith("-") or "/" in name:
        raise LaunchError(
            f"{config.where('run_name')}: {name!r} cannot be a folder name; expected one word "
            "without slashes and without - in front"
        )
    return Run(Path(config.values.output_dir, name))


def create_run(config: Config) -> Run:
    """Create `<output_dir>/<run name>` with logs/. Raises LaunchError."""
    while True:
        run = new_run(config)
        try:
            run.path.mkdir(parents=True)
            run.logs.mkdir()
            return run
        except FileExistsError:
            if "run_name" in config.values or not run.path.is_dir():
                raise LaunchError(
                    f"{run.path}: exists already; choose another run_name, or continue that "
                    f"run: --resume {run.path}"
                ) from None
            time.sleep(0.2)  # another run began in this very second; the next one is ours
        except OSError as error:
            raise LaunchError(
                f"{config.where('output_dir')}: cannot create {run.path}: {error.strerror.lower()}"
            ) from None


def wait_for_run(config: Config) -> Run:
    """On a node other than 0: wait for the run directory that node 0 creates."""
    run = new_run(config)
    for waited in wait_for(f"node 0 to create {run.path}"):
        if run.config_file.exists():
            break
        if waited > RENDEZVOUS_SECONDS:
            raise LaunchError(
                f"{run.path}: node 0 has not created it within {RENDEZVOUS_SECONDS} s; "
                "output_dir must be on a file system that all nodes share, and run_name the "
                "same"
            )
    return run


def wait_for(what: str) -> Iterator[float]:
    """The seconds waited so far, five times per second; after 10 s a line says for `what`, if it
    has a name.
    """
    begun = time.monotonic()
    told = not what
    while True:
        waited = time.monotonic() - begun
        if waited > 10 and not told:
            told = True
            say(f"waiting for {what}, up to {RENDEZVOUS_SECONDS // 60} minutes")
        yield waited
        time.sleep(0.2)


def write_run_files(found: Preflight, run: Run, env: Environment) -> None:
    """Write plan.json and config.yaml and forget old STOP and SAVE files. Raises LaunchError."""
    run.stop_file.unlink(missing_ok=True)
    run.save_file.unlink(missing_ok=True)
    plan = json.dumps(plan_as_data(found, run, env), indent=1)
    try:
        write_atomically(run.path / "plan.json", plan + "\n")
        write_atomically(run.config_file, launchable_config(found.config, found.plan.devices))
    except OSError as error:
        raise LaunchError(f"{run.path}: cannot be written: {error.strerror.lower()}") from None


def launchable_config(config: Config, devices: Devices) -> str:
    """The text of the run's config.yaml: resolved, no secrets, with its command."""
    values = without(config.values, "run_name")
    chosen = f"NPROC_PER_NODE={devices.processes}"
    if "global_batch_size" in values:
        values.pop(ACCUMULATION, None)
    if devices.ids:
        chosen = f"CUDA_VISIBLE_DEVICES={','.join(devices.ids)}"
    left_out = "".join(f"# {key} was left out: give it again\n" for key in config.secrets)
    return (
        f"# Resolved from {config.source}. The same again, in a new run directory:\n#   "
        f"{chosen} python {SCRIPT} config.yaml\n"
        + left_out
        + yaml.dump(values, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)
    )


class ConfigDumper(yaml.SafeDumper):
    """Quotes whatever a YAML 1.1 reader or ConfigLoader would not read back as the text it is."""

    yaml_implicit_resolvers = (
        yaml.SafeDumper.yaml_implicit_resolvers | ConfigLoader.yaml_implicit_resolvers
    )


# `python -m torch.distributed.run` whose import takes a second less without the cycle collector.
TORCHRUN = "import gc; gc.disable(); import torch.distributed.run as it; gc.enable(); it.main()"


def build_torchrun_command(devices: Devices, config_path: Path, env: Environment) -> list[str]:
    """The torchrun command that starts one rank per device on this node. Starts nothing.

    One node: torchrun takes a free port unless MASTER_PORT is set, and MASTER_ADDR, which a
    scheduler may have left behind, is ignored. Several: they meet at MASTER_ADDR. torchrun
    handles no signal but SIGQUIT: on SIGTERM it would give a checkpoint 30 seconds and then
    kill it.
    """
    nodes = read_count(env, "NNODES", 1)
    host = "127.0.0.1"
    meeting = []
    if nodes > 1:
        host = env.get("MASTER_ADDR", host)
        is_host = int(node_rank(env) == 0)
        timeouts = f"join_timeout={RENDEZVOUS_SECONDS},read_timeout={RENDEZVOUS_SECONDS}"
        meeting += ["--rdzv-conf", f"is_host={is_host},{timeouts}"]
        # Node 0 is MASTER_ADDR, which its own /etc/hosts may map to a loopback address.
        meeting += ["--local-addr", host if is_host else address_towards(host)]
    # -P: a torch or random.py of the working directory must not be taken for the package.
    command = [sys.executable, "-P", "-c", TORCHRUN]
    command += ["--nproc-per-node", str(devices.processes), "--nnodes", str(nodes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", config_path.parent.name]
    command += ["--rdzv-endpoint", f"{host}:{env.get('MASTER_PORT', '0')}", *meeting]
    return [*command, "--signals-to-handle", "SIGQUIT", str(SCRIPT), str(config_path)]


def address_towards(host: str) -> str:
    """The address by which `host` reaches this node; its host name need not resolve there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def build_rank_environment(found: Preflight, run: Run, env: Environment) -> Environment:
    """A copy of `env` for the ranks: their devices, where libraries write, and the secrets."""
    devices = found.plan.devices
    secrets = found.config.secrets
    defaults = {"TORCH_EXTENSIONS_DIR": str(extensions_folder())}
    # The ids are those that nvidia-smi shows.
    fixed = {
        "CUDA_VISIBLE_DEVICES": ",".join(devices.ids),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "FORCE_TORCHRUN": "1",
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    if devices.ids:
        # As llamafactory-cli does: less fragmentation, so fewer out-of-memory errors.
        defaults["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    else:
        # Threads that spin while they wait run fifty times slower on cores that others use too.
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"
        fixed["DS_ACCELERATOR"] = "cpu"
    if found.plan.zero.offload_optimizer and devices.processes > 1:
        # torchrun would set 1, and DeepSpeed's CPU Adam uses OpenMP.
        threads = (os.cpu_count() or 1) // devices.processes
        defaults["OMP_NUM_THREADS"] = str(max(threads, 1))
    for key, variable in SECRET_ENVIRONMENT.items():
        if key in secrets:
            fixed[variable] = secrets[key]
    others = without(secrets, *SECRET_ENVIRONMENT, "notify")
    handover = {"secrets": others, "force": found.force, "data": found.plan.data}
    fixed[HANDOVER_VARIABLE] = json.dumps(handover)
    return {**defaults, **tracker_environment(found.plan, run), **env, **fixed}


def tracker_environment(plan: Plan, run: Run) -> Environment:
    """Where the trackers of report_to write, and under which name."""
    project = tracking_project(plan.values)
    variables = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(run.path / "tensorboard")},
        "wandb": {"WANDB_DIR": str(run.path), "WANDB_PROJECT": project},
        "mlflow": {
            "MLFLOW_TRACKING_URI": f"sqlite:///{run.path.parent / 'mlflow.db'}",
            "MLFLOW_EXPERIMENT_NAME": project,
        },
    }
    found = {}
    for backend in tracking_backends(plan.values):
        found |= variables.get(backend, {})
    return found


def extensions_folder() -> Path:
    """Where DeepSpeed's compiled operators go: a folder for each host, torch and environment.

    Two environments would compile it anew in turn, each for its own headers, and wait for each
    other's lock.
    """
    where = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:8]
    name = f"{socket.gethostname()}-torch-{installed_version('torch')}-{where}"
    return user_cache() / "torch_extensions" / name


def shown_environment(rank_env: Environment, env: Environment) -> dict[str, str]:
    """What of the ranks' environment the plan shows: what was added, but no secret."""
    hidden = {HANDOVER_VARIABLE, LAUNCHER_VARIABLE, *SECRET_ENVIRONMENT.values()}
    return {
        key: value
        for key, value in rank_env.items()
        if key not in hidden and (env.get(key) != value or key == "CUDA_VISIBLE_DEVICES")
    }


def clear_stale_locks(folder: Path) -> None:
    """Remove build locks that no process holds open: torch would wait for them forever."""
    for lock in folder.glob("*/lock"):
        held = set()
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # another user's process, or one that just ended
                held.add(os.readlink(link))
        if str(lock.resolve()) not in held:
            lock.unlink(missing_ok=True)


# --- supervision --------------------------------------------------------------------------------


class Ending(NamedTuple):
    """How training ended: finished, stopped, diverged, hung, failed, or refused (the data teaches
    nothing); and why, where that is known.
    """

    state: str
    cause: str = ""


class Supervisor:
    """One launch: torchrun on this node, watched and restarted until the run has ended.

    Node 0 leads: it looks after the run directory, the console, the tracker and the summary.
    """

    def __init__(self, found: Preflight, run: Run, command: list[str], env: Environment):
        self.config = found.config
        self.run = run
        self.command = command
        self.env = env
        self.leads = node_rank(env) == 0
        self.started = time.time()
        self.log = run.logs / f"torchrun{'' if self.leads else node_rank(env)}.log"
        self.process = None
        self.ranks = []
        self.shrunk = 0
        self.plan = found.plan
        self.devices = found.plan.devices
        self.stop = StopRequest(run, self.kill)
        self.metrics = Follower(run.metrics_file)
        self.console = Console()
        self.children = tracker_processes(found, run, env) if self.leads else []

    def supervise(self) -> int:
        """Run torchrun, and again as long as it fails after progress; returns the exit code."""
        limit = self.config.values.max_restarts
        restarts = 0
        while True:
            before = checkpoint_step(self.run.newest_checkpoint())
            if self.leads:
                roll_back_to_checkpoint(self.run)
            said = file_size(self.log)
            state, cause = self.run_torchrun()
            self.stop.handle_signals()
            if state not in ("failed", "hung"):
                break
            if state == "failed" and self.stop.presses < 3:
                cause = cause or describe_failure(self.run, self.log, said)
                say(f"training failed:\n{cause}")
            good = self.run.newest_checkpoint()
            if self.stop.is_requested() or disk_is_full(self.run.path):
                break
            if OUT_OF_MEMORY in cause and self.shrink_batch("evaluation_loop" in cause):
                continue
            if restarts == limit or checkpoint_step(good) <= before:
                break
            restarts += 1
            say(f"restart {restarts} of {limit}: resuming from {good.name}")
        if self.leads:
            self.close(state, cause)
        return {"finished": 0, "refused": 2, "stopped": self.stop.exit_code()}.get(state, 1)

    def shrink_batch(self, evaluates: bool) -> bool:
        """After a GPU was out of memory: the same step in smaller micro-batches, or half the
        evaluation batch; the run goes on from its last checkpoint.
        """
        values = self.config.values
        key = "per_device_eval_batch_size"
        is_fixed = False
        changes = {key: values[key] // 2}
        if not evaluates:
            micro = values.per_device_train_batch_size
            given = self.plan.zero.settings.get("train_micro_batch_size_per_gpu", "auto")
            is_fixed = micro == 1 or given != "auto"
            samples = micro * values[ACCUMULATION]
            smaller = [size for size in divisors(samples) if size < micro]
            changes = split_keys(samples, max(smaller, default=1))
        if is_fixed or 0 in changes.values() or self.shrunk == 3:
            return False
        self.shrunk += 1
        self.config = self.config.update(**changes)
        if self.leads:
            write_atomically(self.run.config_file, launchable_config(self.config, self.devices))
        words = " ".join(f"{name}={value}" for name, value in changes.items())
        say(f"starting again with {words}, the same samples per step")
        return True

    def read_end(self) -> Ending:
        """How the ranks say that training ended."""
        end = [{}, *self.run.read_metrics()][-1]
        state = end.get("state", "finished")
        cause = end.get("cause", "")
        if state == "diverged":
            cause = f"diverged at step {end['step']}: {cause}"
        # Of a rehearsal node 0 has removed everything by then, perhaps.
        has_model = has_weights(self.run.path) or not self.config.values.do_train
        if state == "finished" and not (self.run.is_rehearsal or has_model):
            return Ending("failed", f"training ended, but {self.run.path} has no model weights")
        return Ending(state, cause)

    def run_torchrun(self) -> Ending:
        """One torchrun from start to end."""
        self.start_torchrun()
        if not self.wait_for_ranks():
            return Ending("stopped")
        cause = ""
        hang_watch = HangWatch(self.run, self.config.values.hang_timeout)
        while self.process.poll() is None:
            self.stop.handle_signals()
            if self.run.is_rehearsal and self.stop.is_requested():
                self.kill()
            self.follow()
            cause = hang_watch.problem(self.ranks)
            if cause:
                say(cause)
                self.kill()
            time.sleep(0.2)
        deadline = time.monotonic() + 60
        # A rank that still writes would disturb the next start.
        while any(map(process_state, self.ranks)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.follow()
        if cause:
            return Ending("hung", cause)
        if self.run.is_rehearsal and self.stop.is_requested():
            return Ending("stopped")
        problem = self.run.read("data.json").get("problem")
        if problem:
            return Ending("refused", problem)
        return Ending("failed") if self.process.returncode else self.read_end()

    def start_torchrun(self) -> None:
        """Start torchrun in a session of its own."""
        with open(self.log, "ab") as messages:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
                preexec_fn=partial(before_torchrun, os.getpid()),
            )

    def wait_for_ranks(self) -> bool:
        """Wait until torchrun has ranks, which takes as long as another node does not come.

        False: the run was asked to stop before, and torchrun is gone.
        """
        import psutil

        missing = ""
        torchrun = psutil.Process(self.process.pid)
        if read_count(self.env, "NNODES", 1) > 1:
            missing = "the other nodes at {MASTER_ADDR}:{MASTER_PORT}".format_map(self.env)
        for _ in wait_for(missing):
            self.ranks = torchrun.children()
            if self.process.poll() is not None or len(self.ranks) >= self.devices.processes:
                break
            self.stop.handle_signals()
            if self.stop.is_requested():
                self.kill()
                return False
        return True

    def follow(self) -> None:
        """Show what rank 0 has logged since the last time, and watch the children beside it."""
        if not self.leads:
            return
        self.console.show_data(self.run)
        for line in self.metrics.new_lines():
            self.console.show(line)
            for child in self.children:
                child.begin()  # not before: its imports would slow down those of the ranks
        self.console.advance(self.run)
        for child in self.children:
            child.watch()

    def kill(self) -> None:
        """Kill torchrun; the ranks die with it."""
        self.process.kill()
        self.process.wait()

    def close(self, state: str, cause: str) -> None:
        """End the records and leave the summary; a full disk has no room for it."""
        self.console.close()
        for child in self.children:
            child.finish(state, cause)
        values = self.config.values
        is_wanted = values.do_train and (state != "finished" or values.plot_loss is not False)
        if is_wanted and not self.run.is_rehearsal:
            with contextlib.suppress(Exception):  # a full disk; the summary matters more
                draw_curve(self.run)
        summary = summarize(self.run, state, cause, self.started)
        summary |= compare(replace(self.plan, values=self.config.values), self.run)
        strict = without_nan(summary)
        with contextlib.suppress(OSError):
            write_atomically(
                self.run.path / "summary.json", json.dumps(strict, indent=1) + "\n"
            )
        if self.run.is_rehearsal:
            return
        print_summary(self.run, self.config, summary)
        notify(self.config, without(strict, "wrong_answers"))  # data stays here


def without_nan(values: dict) -> dict:
    """The same for JSON, which has no NaN and no infinity: null."""
    floats = [key for key, value in values.items() if isinstance(value, float)]
    odd = [key for key in floats if not math.isfinite(values[key])]
    return values | dict.fromkeys(odd)


def roll_back_to_checkpoint(run: Run) -> None:
    """Before a start: no incomplete checkpoint in the way, nothing that tells of an older end."""
    for line in quarantine_incomplete_checkpoints(run):
        say(line)
    ours = ("summary.json", "training_loss.png", "data.json")
    for pattern in (*ours, "logs/rank*.error", "logs/rank*.progress"):
        for path in run.path.glob(pattern):
            path.unlink(missing_ok=True)


def quarantine_incomplete_checkpoints(run: Run) -> list[str]:
    """Rename every incomplete checkpoint that is newer than the newest good one.

    So nobody resumes from it. Returns a line for each.
    """
    good = checkpoint_step(run.newest_checkpoint())
    lines = []
    for folder in run.checkpoints():
        problem = incomplete_files(folder)
        if problem and checkpoint_step(folder) > good:
            aside = run.path / f"incomplete-{folder.name}"
            number = 0
            while aside.exists():  # from an earlier start
                number += 1
                aside = aside.with_name(f"incomplete-{folder.name}.{number}")
            folder.rename(aside)
            lines.append(f"{folder.name} is incomplete ({problem}); moved to {aside.name}")
    return lines


def before_torchrun(parent: int) -> None:
    """In torchrun's process: die with the launcher, and leave stopping to the STOP file."""
    die_with_parent(parent)
    ignore_stop_signals()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_stop_signals() -> None:
    """In a process that the launcher has started: it stops by other means."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """What the launcher's signals ask for: the first for a checkpoint and the end, the third Ctrl-C
    for a kill.

    The handler only takes note, since a signal may arrive while a line is printed. A STOP file
    older than this launcher, which node 0 will remove, asks for nothing.
    """

    def __init__(self, run: Run, kill: Callable[[], None]):
        self.run = run
        self.kill = kill
        self.arrived = []
        self.presses = 0
        self.old = modified(run.stop_file)
        for number in STOP_SIGNALS:  # nohup ignores SIGHUP: the run continues
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self.arrived.append(number))

    def handle_signals(self) -> None:
        """Do what the signals since the last time ask for.

        Only Ctrl-C is counted, since schedulers repeat SIGTERM.
        """
        while self.arrived:
            number = self.arrived.pop(0)
            self.presses += number == signal.SIGINT
            if not self.is_requested():
                self.run.request_stop(number)
                text = "; a step that has begun is finished and saved first, which may take a while"
                if self.run.is_rehearsal:
                    text = ""
                say(f"{signal.Signals(number).name}: stopping{text}")
            elif self.presses == 2:
                say(
                    "still stopping; press Ctrl-C once more to kill the run now, without a "
                    "checkpoint"
                )
            elif self.presses == 3:
                self.kill()
                say("killed, without a checkpoint")

    def is_requested(self) -> bool:
        """Whether anybody, on any node, has asked the run to stop."""
        return modified(self.run.stop_file) not in (None, self.old)

    def exit_code(self) -> int:
        """128 + the signal that the STOP file names; SIGTERM where it was made by hand."""
        name = read_from(self.run.stop_file).strip()
        return 128 + signal.Signals.__members__.get(name, signal.SIGTERM)


def modified(path: Path) -> int | None:
    """When a file was written last, in nanoseconds; None where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


class HangWatch:
    """Notices that no rank makes progress; each tells in logs/rank<R>.progress what it is doing.

    So it also notices a node that is lost without a word: its peers wait for it in a collective.

    `timeout` is in seconds: so long may a micro-batch or an evaluation batch take, or 10 median
    steps where that is longer, and LONGER times so long loading, tokenizing or saving.
    """

    LONGER = 6

    def __init__(self, run: Run, timeout: float):
        self.run = run
        self.timeout = timeout
        self.seen = set()
        self.since = time.monotonic()
        self.work = 0
        self.looked = 0.0
        self.step = run.read_progress()
        self.step_began = self.since
        self.paces = []

    def problem(self, ranks: list) -> str:
        """Where this node's ranks (psutil's processes) stand if nobody makes progress, else ''.

        Their stacks go to their logs.
        """
        import psutil

        if not self.is_stuck(ranks):
            return ""
        where: dict[str, list[str]] = {}
        for process in ranks:
            number = "?"
            place = "is gone"
            with contextlib.suppress(psutil.Error):
                number = process.environ()["RANK"]
                place = self.place_of(process, number)
            where.setdefault(place, []).append(number)
        parts = [f"rank {' and '.join(numbers)} {place}" for place, numbers in where.items()]
        waited = time.monotonic() - self.since
        return f"no progress for {waited:.0f} s: {'; '.join(parts)}"

    def is_stuck(self, ranks: list) -> bool:
        """Whether nobody has made progress for too long."""
        files = list(self.run.logs.glob("rank*.progress"))
        now = time.monotonic()
        self.learn_pace(now)
        seen = set(map(modified, files))
        if seen != self.seen:
            self.seen = seen
            self.since = now
        if now - self.since <= self.timeout:
            return False
        pace = statistics.median(self.paces) if len(self.paces) >= 5 else 0
        limit = max(self.timeout, 10 * pace)
        if any(read_from(path).endswith(("starting", "saving")) for path in files):
            limit = max(limit, self.LONGER * self.timeout)
            self.look_for_work(ranks, files[0], now)
        return now - self.since > limit

    def look_for_work(self, ranks: list, file: Path, now: float) -> None:
        """Once per timeout: a download, or tokenizing, is progress; let all nodes see it."""
        if now - self.looked > self.timeout:
            work = sum(map(work_of, ranks))
            self.looked = now
            if work > self.work:
                self.work = work
                os.utime(file)

    def learn_pace(self, now: float) -> None:
        """Learn from rank 0's progress how long a step takes."""
        step = self.run.read_progress()
        if step > self.step > 0:
            self.paces.append((now - self.step_began) / (step - self.step))
        if step != self.step:
            self.step = step
            self.step_began = now

    def place_of(self, process, rank: str) -> str:
        """`in all_reduce (distributed_c10d.py:2810)`, as faulthandler writes it into the log."""
        if process_state(process) == "stopped":
            return "is stopped by a signal (SIGSTOP)"
        log = self.run.logs / f"rank{rank}.log"
        position = file_size(log)
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        for stack in read_from(log, position).split("\n\n"):
            found = re.search(r'File "([^"]*)(?<!nvtx.py)", line (\d+) in (\w+)', stack)
            if found and "in run_rank" in stack:  # the main thread
                return f"in {found[3]} ({Path(found[1]).name}:{found[2]})"
        return "does not answer"


def work_of(rank) -> int:
    """What a rank and its children have read and written, in MiB, and its children's CPU seconds.

    Not its own: a rank that waits in a collective computes, too, and writes a few bytes.
    """
    import psutil

    work = 0
    with contextlib.suppress(psutil.Error):
        for process in (rank, *rank.children(recursive=True)):
            done = process.io_counters()
            used = process.cpu_times()
            work += (done.read_chars + done.write_chars + done.read_bytes) >> 20
            work += int(used.user + used.system) if process != rank else 0
    return work


def process_state(process) -> str:
    """What one of psutil's processes does: `sleeping`, `stopped` ...; '' where it has ended."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.status()
    return ""


# --- console ------------------------------------------------------------------------------------


class Console:
    """Shows the run: a bar in a terminal, else at most about LINES lines, or one per minute."""

    LINES = 30

    def __init__(self):
        self.bar = None
        self.begin = {}
        self.evaluated = set()
        self.spoke, self.due = 0.0, 0.0  # when the last line was, and the step of the next one
        self.knows_data = False
        self.scores: dict[tuple, str] = {}  # by step and data set

    def show_data(self, run: Run) -> None:
        """The figures of the tokenized data, once."""
        figures = not self.knows_data and run.read("data.json")
        if figures:
            self.knows_data = True
            print_lines(data_lines(figures, run))

    def show(self, line: dict) -> None:
        """Show one line of metrics.jsonl."""
        if line.get("event") == "begin":
            self.begin = line
            self.due = 0.0
            self.open_bar()
        elif line.get("event") == "note":
            say(line["text"])
        elif line.get("event") == "scores":
            self.scores[line["step"], line["name"]] = score_text(line["counts"])
        elif "loss" in line:
            self.show_loss(line)
        else:
            self.show_evaluation(line)

    def open_bar(self) -> None:
        """The bar of this start, where stdout is a terminal."""
        self.close()
        if sys.stdout and sys.stdout.isatty():
            from tqdm import tqdm

            width, height = shutil.get_terminal_size()  # tqdm shows nothing in a size of 0
            self.bar = tqdm(
                total=self.begin["total_steps"],
                initial=self.begin["step"],
                file=sys.stdout,
                unit="step",
                leave=False,
                ncols=width,
                nrows=height,
            )

    def show_loss(self, line: dict) -> None:
        """The bar's text; else a line, unless the last one was just now."""
        text = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}"
        if self.bar is not None:
            self.bar.set_description_str(text)
            return
        step = line["step"]
        total = self.begin["total_steps"]
        if step < self.due and line["time"] - self.spoke < 60:
            return
        self.spoke = line["time"]
        self.due = step + total / self.LINES
        pace = (line["time"] - self.begin["time"]) / max(step - self.begin["step"], 1)
        say(
            f"step {step}/{total}  {text}  {line.get('train_tokens_per_second', 0):.0f} tokens/s  "
            f"{format_seconds(pace * (total - step))} left"
        )

    def show_evaluation(self, line: dict) -> None:
        """A line for each evaluation loss, once; its name may hold the data set's."""
        for name in line:
            found = re.fullmatch(r"eval_(.+_)?loss", name)
            seen = (line["step"], name)
            if found and seen not in self.evaluated:
                self.evaluated.add(seen)
                text = f"step {line['step']}/{self.begin['total_steps']}  evaluation loss "
                text += f"{line[name]:.4f}"
                data = (found[1] or "").rstrip("_")
                if data:
                    text += f" on {data}"
                say(text + self.scores.get((line["step"], data), ""))

    def advance(self, run: Run) -> None:
        """Move the bar to the step that rank 0 has done."""
        if self.bar is not None:
            self.bar.update(max(run.read_progress() - self.bar.n, 0))

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def data_lines(figures: dict, run: Run) -> dict[str, str]:
    """What data.json says, for people: {label: text}, '' where there is nothing to say."""
    dropped, cut, unended = (figures[name] for name in ("dropped", "cut", "unended"))
    shown = figures | {"percent": round(100 * figures["padding"])}
    lines = {
        "data": "{kept} of {rows} rows, {tokens[min]}-{tokens[max]} tokens (median "
        "{tokens[median]}, 99 %: {tokens[p99]}), {cut} cut at {cutoff_len}, {dropped} dropped, "
        "{percent} % padding".format_map(shown),
        "template": figures["template"],
    }
    if dropped:
        reason = re.search(
            r">> ((Invalid|Dropped) .{0,150})", read_from(run.logs / "rank0.log", 0)
        )
        lines["dropped"] = plural(dropped, "row") + (
            f"; the first: {reason[1]}" if reason else ""
        )
    if cut > 0.01 * figures["kept"]:
        enough, rest = figures["enough"]
        lines["cut"] = (
            f"{plural(cut, 'sample')}; cutoff_len={enough} would cut {rest or 'none'}"
        )
    if figures["unlearned"]:
        lines["unlearned"] = f"{plural(figures['unlearned'], 'sample')} with no answer left"
    if unended:
        lines["unended"] = (
            f"{plural(unended, 'answer')} lost the end token: the model learns not to stop"
        )
    return lines


# --- children beside the ranks ------------------------------------------------------------------


def tracker_processes(found: Preflight, run: Run, env: Environment) -> list[TrackerProcess]:
    """The trackers that the run needs."""
    return [
        TrackerProcess(name, tracking, run, env, describe_run(found, run))
        for name, tracking in chosen_tracking(found.config, run, env).items()
        if tracking.mode != "disabled"
    ]


class TrackerProcess:
    """A tracker, seen from the launcher; what it says of itself it writes to logs/<name>.json.

    A child beside the ranks has three methods: begin() at the first line of metrics.jsonl, watch()
    five times per second, finish() when the run has ended. Where a tracker dies, or has not begun
    after READY seconds, another one records this launch from its beginning, locally. finish() waits
    END seconds at most for a tracker that has begun.
    """

    READY = 25
    END = 25
    STARTS = 3

    def __init__(self, name: str, tracking: Tracking, run: Run, env: Environment, config: dict):
        self.name = name
        self.title = tracking.title
        self.run = run
        self.env = env
        self.online = tracking.mode == "online"
        position = file_size(run.metrics_file)
        own = {"tracker": name, "mode": tracking.mode, "config": config, "position": position}
        self.init = tracking.init | own
        self.process = None
        self.starts = 0
        self.begun = 0.0
        self.is_starting = False
        self.problem = self.end = (
            ""  # why it was started again, until that is said; the last order
        )

    def begin(self) -> None:
        """Start the process, once; the record is one experiment however often the run restarts.

        Online a resumed run continues its experiment; elsewhere each launch is a record of its
        own, so its name tells which resume it is.
        """
        if self.starts:
            return
        known = self.run.read(f"logs/{self.name}.json")
        resumes = known.get("launches", 0)
        self.init |= {"id": known.get("id", os.urandom(8).hex()), "launches": resumes + 1}
        if resumes and not self.online:
            self.init["name"] += f" (resume {resumes})"
        self.start()

    def start(self) -> None:
        """Start a tracker, which reads its settings from stdin."""
        self.starts = self.starts + 1
        self.begun = time.monotonic()
        self.is_starting = True
        with open(self.run.logs / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(SCRIPT), "--tracker", str(self.run.path)],
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.order(json.dumps(self.init))
        if self.end:
            self.order(self.end)

    def order(self, line: str) -> None:
        """Hand the tracker a line; one that has just died is noticed by watch()."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def state(self) -> dict:
        """What this very process has written: `problem`, or where it records; {} before."""
        state = self.run.read(f"logs/{self.name}.json")
        return state if state.get("pid") == self.process.pid else {}

    def watch(self) -> None:
        """Notice that the tracker has begun, that it does not, or that it has died."""
        if not self.process:
            return
        if self.process.poll():
            self.start_again(self.state().get("problem", "its process ended"))
        elif self.is_starting and "later" in self.state():
            self.is_starting = False
            self.tell_of_restart(self.state()["later"])
        elif self.is_starting and time.monotonic() - self.begun > self.READY:
            self.start_again(f"no answer in {self.READY} s")

    def tell_of_restart(self, later: str) -> None:
        """Say why this tracker is not the first one, if it is not."""
        if self.problem and self.online:
            say(f"{self.title} cannot be reached ({self.problem}), {later}")
        elif self.problem:
            say(f"{self.title}'s process ended ({self.problem}); it was started again")
        self.problem = ""

    def start_again(self, problem: str) -> None:
        """Replace a tracker that does not answer or has died; by a local one if it was online."""
        self.process.kill()
        self.process.wait()
        self.problem = problem
        if self.online:
            self.init["mode"] = "local"
        if self.starts < self.STARTS:
            self.start()
        else:
            self.process = None
            log = self.run.logs / f"{self.name}.log"
            say(f"{self.title} does not record this run ({problem}); see {log}")

    def finish(self, state: str, cause: str) -> None:
        """Tell the tracker how the run ended, and wait for it, with a limit."""
        if not self.process:
            return
        self.end = json.dumps({"state": state, "cause": cause[-300:]})
        self.order(self.end)
        self.watch()
        deadline = time.monotonic() + self.END + (self.READY if self.is_starting else 0)
        while self.process and self.process.poll() != 0:
            if time.monotonic() > deadline:
                self.process.kill()
                later = self.state().get("later", "and has not begun")
                return say(f"{self.title} did not take the whole run in time, {later}")
            time.sleep(0.2)
            self.watch()
        self.watch()  # one that was started again and has ended by now


def describe_run(found: Preflight, run: Run) -> dict:
    """What a tracker shows beside the curves: the configuration, the plan's numbers, versions."""
    plan = run.read("plan.json")
    shown = "world_size global_batch_size samples steps_per_epoch total_steps parameters"
    return {
        **found.config.values,
        "plan": {key: plan.get(key) for key in shown.split()},
        "gpus": [gpu.name for gpu in found.plan.gpus],
        "versions": {name: installed_version(name) for name in (*TESTED, "swanlab")},
    }


# --- why a run failed ---------------------------------------------------------------------------

RANK_START = "--- this rank starts"  # in its log, which holds all starts of the run
NO_MEMORY = (
    r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"
    r"|(?:CUDA error|Cuda failure)[^\n]*out of memory"
)
# (what the messages show, its likely cause and what to do)
CAUSES = (
    (
        r"shm_open|out of shared memory|unable to \w+ shared memory|[Bb]us error|SIGBUS"
        r"|No space left[^\n]*/dev/shm",
        "/dev/shm is full: start the container with --shm-size=16g or --ipc=host, or use "
        "fewer dataloader_num_workers",
    ),
    (
        rf"(?s)evaluation_loop.*({NO_MEMORY})",
        f"{OUT_OF_MEMORY} in an evaluation: use a smaller per_device_eval_batch_size, or fewer "
        "score_samples",
    ),
    (
        NO_MEMORY,
        f"{OUT_OF_MEMORY}: use a smaller per_device_train_batch_size or cutoff_len, or "
        "configs/deepspeed/ds_z3_offload_config.json",
    ),
    (
        r"Disk quota exceeded|Errno 122",
        "your disk quota is used up: make room or use another output_dir, then resume",
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
        r"EADDRINUSE|[Aa]ddress already in use",
        "another process has taken the port of the rendezvous: choose another MASTER_PORT",
    ),
    (
        r"Rendezvous\w*Error",
        "the nodes did not meet: start the same command on each, and see that all of them "
        "reach MASTER_PORT of MASTER_ADDR",
    ),
    (
        r"killed by SIGKILL|killed by signal: Killed|subprocesses has abruptly died",
        "the kernel's out-of-memory killer, most often (dmesg shows it): use fewer "
        "preprocessing_num_workers or less offloading",
    ),
)


def describe_failure(run: Run, log: Path, position: int) -> str:
    """Why ranks failed: the first one's own traceback, its likely cause, and where the full log is.

    `log` is torchrun's; what this start has said there begins at byte `position`.
    """
    messages = read_from(log, position)
    evidence = ""
    errors = sorted(run.logs.glob("rank*.error"), key=modified)
    # Two lines of torchrun's report: `rank      : 1 (local_rank: 1)`, `exitcode  : -9 (pid: 77)`;
    # -15 is torchrun's own SIGTERM. Another rank's error is then a consequence of it, even where
    # torchrun saw it first.
    killed = re.search(r"rank +: (\d+) [^\n]*\n *exitcode +: -(?!15 )(\d+) ", messages)
    if killed and not (errors and came_first(errors[0], run.logs / f"rank{killed[1]}.log")):
        rank = killed[1]
        name = signal.Signals(int(killed[2])).name
        text = f"rank {rank} was killed by {name}"
        log = run.logs / f"rank{rank}.log"
        if name != "SIGKILL":  # NCCL and CUDA abort: their reason is in the rank's log
            evidence = read_from(log, max(file_size(log) - (64 << 10), 0)).split(RANK_START)[-1]
    elif errors:
        text = read_from(errors[0]).strip()
        log = errors[0].with_suffix(".log")
        text += f"\nphase: {read_from(log.with_suffix('.progress')).partition(' ')[2]}"
    else:
        known = re.findall(r"Rendezvous\w*Error[^\n]*|[^\n]*EADDRINUSE[^\n]*", messages)
        text = "\n".join(known[-1:] or messages.splitlines()[-15:]) or "torchrun failed"
        evidence = messages
    if disk_is_full(run.path):
        evidence = "No space left on device"
        text += f"\n{evidence}: {run.path}"
    for pattern, hint in CAUSES:
        if re.search(pattern, f"{text}\n{evidence}"):
            text += f"\nlikely cause: {hint}"
            break
    if run.is_rehearsal:  # its logs are removed with it
        return text
    return f"{text}\nfull log: {log}"


def came_first(error: Path, log: Path) -> bool:
    """Whether a rank had failed before another one wrote its last words: NCCL aborts the others."""
    return modified(error) < (modified(log) or 0)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model, or an adapter."""
    kinds = {path.suffix for path in folder.glob("*model*")}
    return bool(kinds & {".safetensors", ".bin"})


def disk_is_full(folder: Path) -> bool:
    """Whether hardly a byte is free; PyTorch does not tell why a file could not be written."""
    return free_bytes(folder) < 16 << 20


# --- scores, for people -------------------------------------------------------------------------


def score_text(counts: dict) -> str:
    """`  exact 93 of 100 (+-5)  execution 95 of 100`, from {name: [sum, samples]}."""
    parts = [f"  {name} {share_text(*pair)}" for name, pair in counts.items()]
    total, samples = next(iter(counts.values()))
    # The 95 % interval of Agresti and Coull (1998), which has a width at 0 and at 100 % too.
    share = (total + 2) / (samples + 4)
    parts[0] += f" (+-{1.96 * samples * math.sqrt(share * (1 - share) / (samples + 4)):.0f})"
    return "".join(parts)


def share_text(total: float, samples: int) -> str:
    """`93 of 100`; a mean where the numbers are not counted."""
    if total == int(total):
        return f"{total:.0f} of {samples}"
    return f"{total / samples:.3f}"


def mean_score(total: float, samples: int) -> float:
    """The share, or the mean; 0 where nothing could be judged."""
    return total / max(samples, 1)


def scores_by_step(lines: list[dict]) -> dict[str, dict]:
    """{name: {step: (sum, samples)}} in the order of steps; of several data sets by their names."""
    found: dict[str, dict] = {}
    for line in lines:
        if line.get("event") == "scores":
            for name, pair in line["counts"].items():
                steps = found.setdefault(f"{line['name']} {name}".strip(), {})
                steps[line["at"]] = pair
    return {name: dict(sorted(steps.items())) for name, steps in found.items()}


def summarize_scores(lines: list[dict]) -> dict:
    """{name: {"first": [step, sum, samples], "best": ..., "last": ...}}."""
    summary = {}
    for name, pairs in scores_by_step(lines).items():
        steps = [[step, *pair] for step, pair in pairs.items()]
        best = max(steps, key=lambda score: mean_score(*score[1:]))
        summary[name] = {"first": steps[0], "best": best, "last": steps[-1]}
    return summary


def score_lines(run: Run, summary: dict) -> dict[str, str]:
    """The scores of a run for people: {label: text}, and answers that were wrong at last."""
    lines = {}
    for name, scores in summary["scores"].items():
        if scores["first"] == scores["last"]:
            scores = {"": scores["last"]}
        lines[name] = ", ".join(
            f"{when} {share_text(total, samples)} (step {step})".strip()
            for when, (step, total, samples) in scores.items()
        )
    for number, row in enumerate(summary["wrong_answers"], 1):
        lines[f"wrong {number}"] = " ".join(row["answer"].split()) or "(no answer)"
        lines[f"wanted {number}"] = " ".join(row["reference"].split())
    if lines:
        lines["answers"] = str(run.path / "scores")
    return lines


# --- summary ------------------------------------------------------------------------------------


# What the ranks measure: in seconds, in bytes, and as a share.
MEASURED = """
    step_seconds checkpoint_seconds evaluation_seconds score_seconds peak_memory peak_rank
    input_wait
""".split()


def summarize(run: Run, state: str, cause: str, started: float) -> dict:
    """How the run ended, in numbers from its own files; `started` is in seconds since 1970.

    Seconds per step and of a checkpoint are medians, without the wait for others; `input_wait` is
    the share of a step's time in which a rank waits for its data.
    """
    lines = run.read_metrics()
    good = run.newest_checkpoint()
    planned = run.read("plan.json").get("total_steps")
    curve = run.path / "training_loss.png"
    own = [line for line in lines if line["time"] > started]  # of this launch
    finished = state == "finished"
    newest = next(iter(run.checkpoints()), run.path)
    files = read_json_or_empty(newest / MANIFEST).get("files", {})
    model = run.path if finished else good
    return {
        "run": str(run.path),
        "state": state,
        "cause": cause,
        "model": str(model) if model and has_weights(model) else None,
        "steps": max([*logged(lines, "step"), checkpoint_step(good)]),
        "total_steps": max(logged(lines, "total_steps"), default=planned),
        "first_loss": last(lines[::-1], "loss"),
        "last_loss": last(lines, "loss"),
        "seconds": round(time.time() - started, 1),
        "tokens_per_second": last(lines, "train_tokens_per_second"),
        "start_seconds": own[0]["time"] - started if own else None,
        "checkpoint_bytes": sum(files.values()) or None,
        **dict.fromkeys(MEASURED),
        **last(own, "figures", {}),
        "scores": summarize_scores(lines),
        "wrong_answers": last(lines, "wrong", []),
        "checkpoints": [path.name for path in run.checkpoints() if (path / MANIFEST).exists()],
        "curve": str(curve) if curve.exists() else None,
        "dashboard": run.read("logs/swanlab.json").get("dashboard"),
        "resume": resume_command(run) if good and not finished else None,
    }


def compare(plan: Plan, run: Run) -> dict:
    """What the plan said, and the rehearsal of the same configuration, or None."""
    rehearsal = {} if run.is_rehearsal else rehearsal_of(plan)
    return {
        "configuration": decisive_values(plan),
        "auto": plan.auto,
        "device_memory": plan.device_bytes,
        "planned_memory": estimate(plan).needed or None,
        "resident": not plan.devices.ids,  # on a CPU the peak has Python and its libraries too
        "rehearsal": rehearsal or None,
    }


def print_summary(run: Run, config: Config, summary: dict) -> None:
    """Print how the run ended."""
    state = summary["state"]
    rate = summary["tokens_per_second"]
    loss = ""
    time = format_seconds(summary["seconds"])
    resume = summary["resume"]
    figures = measured_lines(summary)
    if rate:
        time += f", {rate:.0f} tokens/s"
    if figures:
        time += f", {figures.pop('time')}"
    if summary["last_loss"] is not None:
        loss = "{first_loss:.4f} at first, {last_loss:.4f} at last".format_map(summary)
    commands = {}
    if summary["model"]:
        commands = model_commands(Path(summary["model"]), config.values)
    if not resume and state != "finished":
        resume = "there is no checkpoint to resume from"
    total = summary["total_steps"] or "an unknown number"
    trains = config.values.do_train
    print_lines(
        {
            "state": f"{state} at step {summary['steps']} of {total}" if trains else state,
            "cause": state != "failed" and summary["cause"],
            "hint": state == "diverged" and DIVERGED_HINT,
            "loss": loss,
            **score_lines(run, summary),
            "time": time,
            **figures,
            "checkpoints": ", ".join(summary["checkpoints"]),
            "curve": summary["curve"],
            "dashboard": summary["dashboard"],
            "model": summary["model"],
            **commands,
            "resume": resume,
        }
    )


DIVERGED_HINT = (
    "usual causes: a learning rate that is too high, fp16, bad rows in the data; resume with "
    "learning_rate=... from the newest checkpoint, which is from before"
)


def measured_lines(summary: dict) -> dict[str, str]:
    """What a run has measured, for people: {label: text}; {} where it has not come so far."""
    shown = {key: format_bytes(summary[key] or 0) for key in summary if "memory" in key}
    pace = summary["step_seconds"]
    save = summary["checkpoint_seconds"]
    size = summary["checkpoint_bytes"]
    if not pace:
        return {}
    memory = shown["peak_memory"]
    if summary["device_memory"]:
        memory += f" of {shown['device_memory']}"
    memory += f" at the peak (rank {summary['peak_rank']})"
    time = f"{spoken(pace)} per step"
    checkpoint = ""
    if summary["planned_memory"] and not summary["resident"]:
        memory += f", the plan said {shown['planned_memory']}"
    if summary.get("rehearsal"):
        memory += f", the rehearsal {format_bytes(summary['rehearsal']['peak_memory'])}"
        time += f", {spoken(summary['rehearsal']['step_seconds'])} in the rehearsal"
    if save and size:
        checkpoint = f"{format_bytes(size)} in {spoken(save)} ({size / save / 1e9:.2g} GB/s)"
    return {
        "memory": memory,
        "time": time,
        "checkpoint": checkpoint,
        "start": f"{spoken(summary['start_seconds'])} to the first step",
        "input": f"the ranks waited for data {100 * summary['input_wait']:.0f} % of the time",
    }


def spoken(seconds: float) -> str:
    """3.2 s, 72 s, 4 min 10 s."""
    if seconds < 99:
        return f"{seconds:.2g} s"
    return "{} min {} s".format(*divmod(round(seconds), 60))


def logged(lines: list[dict], key: str) -> list:
    """All values of a key of metrics.jsonl."""
    return [line[key] for line in lines if key in line]


def last(lines: list[dict], key: str, default: object = None):
    """The last value of a key of metrics.jsonl."""
    return next(reversed(logged(lines, key)), default)


def draw_curve(run: Run) -> None:
    """Draw training_loss.png from metrics.jsonl, where there is anything to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    lines = run.read_metrics()
    axes, rates = figure.subplots(2, sharex=True, height_ratios=(5, 1))
    loss = series(lines, "loss")
    axes.plot(*loss, color="C0", alpha=0.3)
    axes.plot(loss[0], smoothed(loss[1]), color="C0", label="training loss, smoothed")
    names = {
        name: 0 for line in lines for name in line if re.fullmatch("eval_(.+_)?loss", name)
    }
    for name, marker in zip(names, itertools.cycle("osv^D"), strict=False):
        label = name.replace("eval", "evaluation").replace("_", " ")
        axes.plot(*series(lines, name), color="C1", marker=marker, label=label)
    is_scored = draw_scores(axes, lines)
    rates.plot(*series(lines, "learning_rate"), color="C7")
    mark_epochs_and_restarts(axes, lines)
    if not (loss[0] or is_scored):
        return
    axes.set(ylabel="loss", title=run.path.name)
    rates.set(xlabel="optimizer step", ylabel="learning rate")
    figure.legend(loc="outside upper right", ncols=5, fontsize="small")
    figure.savefig(run.path / "training_loss.png", dpi=120)


def series(lines: list[dict], key: str) -> tuple[list, list]:
    """The steps at which a number was logged, and the numbers."""
    return [line["step"] for line in lines if key in line], logged(lines, key)


def smoothed(numbers: list[float]) -> list[float]:
    """The mean of each number and those before it, a twentieth of all."""
    width = len(numbers) // 20 + 1
    return [
        statistics.fmean(numbers[max(at - width, 0) : at + 1]) for at in range(len(numbers))
    ]


def draw_scores(axes, lines: list[dict]) -> bool:
    """Draw the scores on an axis of their own, from 0 to 1, where there are any."""
    scores = scores_by_step(lines)
    if scores:
        right = axes.twinx()
        right.set(ylabel="score", ylim=(0, 1.02))
        for number, (name, steps) in enumerate(scores.items(), 2):
            shares = [mean_score(*pair) for pair in steps.values()]
            right.plot([*steps], shares, "s--", color=f"C{number}", label=name)
    return bool(scores)


def mark_epochs_and_restarts(axes, lines: list[dict]) -> None:
    """A grey line where an epoch ends, unless there are too many, a black one at a restart."""
    ends: dict[int, int] = {}
    for line in lines:
        ends.setdefault(int(line.get("epoch", 0)), line["step"])
    marks = [step for epoch, step in ends.items() if epoch and len(ends) <= 20]
    starts = [line["step"] for line in lines if line.get("event") == "begin"]
    for places, color, label in ((marks, "C7", "epoch"), (starts[1:], "black", "restart")):
        for step in places:
            axes.axvline(step, color=color, linestyle=":", label=label)
            label = "_"  # one entry of the legend


def resume_command(run: Run) -> str:
    """What resumes the run, with what no configuration holds: nodes, GPUs, processes."""
    names = "NNODES", *NODE_VARIABLES, "NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES"
    variables = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return shlex.join([*variables, "python", str(SCRIPT), "--resume", str(run.path)])


def model_commands(model: Path, values: Values) -> dict[str, str]:
    """What chats with the model or its adapter, and what serves it; {} for a reward model.

    Both think, or do not, as the model was trained to.
    """
    if values.stage == "rm":
        return {}
    chat = ["llamafactory-cli", "chat", "--model_name_or_path", str(model)]
    serve = ["vllm", "serve", str(model)]
    if values.finetuning_type in ("lora", "oft"):
        base = values.model_name_or_path
        chat[3:] = [base, "--adapter_name_or_path", str(model)]
        serve[2:] = [base, "--enable-lora", "--lora-modules", f"{model.name}={model}"]
    chat += ["--template", values.get("template", "default")]
    if values.get("enable_thinking") is False:
        chat += ["--enable_thinking", "false"]
        serve += ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    elif values.template in ("qwen3", "qwen3_vl"):
        serve += ["--reasoning-parser", "qwen3"]
    return {"chat": shlex.join(chat), "serve": shlex.join(serve)}


def notify(config: Config, summary: dict) -> None:
    """Post the summary to `notify`, in 10 s at most: a server may answer byte by byte."""
    if "notify" in config.secrets:
        arguments = (config.secrets["notify"], summary)
        thread = threading.Thread(target=post_json, args=arguments, daemon=True)
        thread.start()
        thread.join(10)


def post_json(url: str, message: dict) -> None:
    """Post a message; one that cannot be sent costs a line, which does not repeat the URL."""
    import urllib.request

    try:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(message).encode(), headers)
        urllib.request.urlopen(request, timeout=10).close()
    except Exception as error:
        say(f"notify: the message was not delivered: {type(error).__name__}")


def format_seconds(seconds: float) -> str:
    """0:01:51."""
    return str(timedelta(seconds=int(seconds)))


# ================================================================================================
# RANK
# ================================================================================================


def run_rank(run: Run, env: Environment) -> int:
    """Train as one rank; whatever it prints goes to logs/rank<R>.log. Does not return."""
    import psutil

    if LAUNCHER_VARIABLE not in env:
        refuse_torchrun(env)
    follow_parent()
    if psutil.Process(os.getppid()).ppid() != int(env[LAUNCHER_VARIABLE]):
        os._exit(1)  # torchrun died before this process could ask to die with it
    os.register_at_fork(after_in_child=follow_parent)
    rank = env["RANK"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send_output_to(run.logs / f"rank{rank}.log")
    say(RANK_START)
    faulthandler.register(signal.SIGUSR1)  # the stack of a rank that hangs goes to its log
    (run.logs / f"rank{rank}.progress").write_text("0 starting", encoding="utf-8")
    try:
        train(run, env)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk, which the launcher sees
            write_atomically(run.logs / f"rank{rank}.error", traceback.format_exc())
        say(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # no thread or hook of a library may keep a finished rank


def send_output_to(path: Path) -> None:
    """Append stdout and stderr to a file, also what C++ code prints."""
    with open(path, "ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)


def refuse_torchrun(env: Environment) -> None:
    """Raises LaunchError: somebody else's torchrun would lose the checkpoint at SIGTERM and Ctrl-C.

    Local rank 0 says so; the others wait, since torchrun ends all ranks with the first that ends.
    """
    if env.get("LOCAL_RANK") != "0":
        time.sleep(10)
        raise LaunchError
    raise LaunchError(
        "this script starts torchrun itself; type "
        f"NPROC_PER_NODE={env.get('LOCAL_WORLD_SIZE', 1)} python {SCRIPT.name} ... instead of "
        f"torchrun {SCRIPT.name} ..."
    )


def follow_parent() -> None:
    """In a rank, and in what it forks to tokenize or load data: die with the parent, or when it
    sends SIGTERM, as torchrun does when another rank has failed.

    Anybody else's SIGTERM is ignored: a scheduler's to everybody must cost neither the
    checkpoint, for which the launcher asks, nor a pool that a rank waits for. A thread waits for
    it, since a rank inside a collective runs no Python signal handler. Blocked before any heavy
    import, since OpenBLAS's threads would take it with its default action.
    """
    parent = os.getppid()
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_with_parents_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end_with_parents_sigterm, daemon=True).start()


def train(run: Run, env: Environment) -> None:
    """LLaMA-Factory's run_exp with our callback."""
    ranks = int(env["WORLD_SIZE"])
    if ranks != int(env["LOCAL_WORLD_SIZE"]) * read_count(env, "NNODES", 1):
        raise RuntimeError(
            "the nodes started different numbers of processes; give each node the same number "
            "of GPUs"
        )
    handover = json.loads(os.environ.pop(HANDOVER_VARIABLE))
    config = derive_accumulation(load_config(run.config_file, {}), ranks)
    run_exp = import_trainer(env, unused_packages(config.values))
    from transformers import TrainerCallback

    checkpoint = agree_on_checkpoint(run, env)
    args = build_training_args(config, run, checkpoint)
    # The launcher knows RankCallback, too, and imports no transformers, which has its base.
    callback_class = type("RankCallback", (RankCallback, TrainerCallback), {})
    callback = callback_class(run, config, Asked(args, checkpoint, handover))
    hold_trainer(callback)
    if config.values.score:
        callback.scorer = Scorer(callback)
        score_evaluations(callback)
    saved_by = checkpoint and read_json_or_empty(checkpoint / MANIFEST).get("world_size")
    if config.values.deepspeed and saved_by not in (None, ranks):
        reshard_on_load()
    measure_data(config.values, partial(record_data, run))
    if run.is_rehearsal:
        rehearse_data(callback)
    with contextlib.suppress(Stopped):
        run_exp(args | handover["secrets"], [callback])
    ending = callback.ending or Ending("finished")
    callback.write(event="end", **ending._asdict(), figures=callback.figures)
    if "wandb" in tracking_backends(config.values):
        finish_wandb()


def unused_packages(values: Values) -> set[str]:
    """What LLaMA-Factory and its libraries import wherever it is installed, though this run does
    not use it: sklearn is for assisted decoding, and the launcher draws the curve.
    """
    used = {BACKENDS[name] for name in tracking_backends(values)}
    return {"sklearn", "matplotlib", *BACKENDS.values()} - used - {"transformers"}


def import_trainer(env: Environment, unused: set[str]) -> Callable:
    """Import what a rank needs without Python's cycle collector, a quarter of the import time, and
    without what it does not use.
    """
    gc.disable()
    hidden = unused - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # to find_spec, too, None is not installed
    import torch
    from torch.serialization import register_package

    planned = len(name_list(env["CUDA_VISIBLE_DEVICES"]))
    if torch.cuda.device_count() != planned:
        raise RuntimeError(
            f"{plural(planned, 'GPU')} planned, but torch sees {torch.cuda.device_count()}: "
            "compare nvidia-smi, the driver, and the devices of the container"
        )
    from llamafactory.train.tuner import run_exp

    if not planned:
        import transformers.training_args as training_args

        # It asks a GPU whether it can bf16 where use_cpu is not set, as under DeepSpeed.
        training_args.is_torch_bf16_gpu_available = lambda: True
        # Several CPU ranks resume to the device cpu:0, which torch.load knows as cpu only.
        on_cpu = lambda storage, place: storage if place.startswith("cpu:") else None  # noqa: E731
        register_package(99, lambda storage: None, on_cpu)
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  accelerate always would, with the collector on
    for name in hidden:
        del sys.modules[name]  # the model's own code, or a plugin, may use it
    gc.enable()
    gc.freeze()
    return run_exp


def agree_on_checkpoint(run: Run, env: Environment) -> Path | None:
    """The checkpoint to resume from, chosen by rank 0, told through torchrun's store.

    Other nodes may see a shared folder as it was a minute ago, so they wait for it.
    """
    chosen = run.newest_checkpoint()
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # all_differences will tell
        return chosen
    from torch.distributed import TCPStore

    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    if env["RANK"] == "0":
        store.set(MANIFEST, chosen.name if chosen else "")
    name = store.get(MANIFEST).decode()
    folder = run.path / name
    for waited in wait_for(f"{folder} to appear on this node"):
        if not name or (folder / MANIFEST).exists() or waited > RENDEZVOUS_SECONDS:
            break
    return folder if name else None


def hold_trainer(callback: RankCallback) -> None:
    """Let the callback know its trainer: only that has the engine and the samples."""
    from transformers import Trainer

    train = Trainer.train

    def train_and_tell(trainer, *args, **options):
        callback.trainer = trainer
        return train(trainer, *args, **options)

    Trainer.train = train_and_tell


def build_training_args(config: Config, run: Run, checkpoint: Path | None) -> dict:
    """The dict for LLaMA-Factory's run_exp: without the launcher's keys and secrets, writing into
    the run directory, resuming `checkpoint`.
    """
    values = config.values
    args = {
        "disable_tqdm": True,  # the console has a bar of ours; the logs need none
        # For tokens per second; neat_packing's attention mask is no count of tokens.
        "include_num_input_tokens_seen": "all" if values.neat_packing else "non_padding",
        "logging_nan_inf_filter": False,  # it shows a NaN loss as the average so far
        "ddp_timeout": 7200,  # ranks wait for rank 0's tokenization
        **values,
        "output_dir": str(run.path),
        "run_name": run.path.name,
    }
    names = [name for name in tracking_backends(values) if name not in TRACKERS]
    args["report_to"] = names or ["none"]
    if values.streaming:  # accelerate's default joins rank 0's batches, which differ in length
        args.setdefault("accelerator_config", {"dispatch_batches": False})
        # LLaMA-Factory cuts a file into as many shards as there are workers: none means no data.
        args["dataloader_num_workers"] = values.dataloader_num_workers or 1
    # The callback rotates; overwrite_output_dir would delete the log at each restart.
    left_out = {*LAUNCHER_FIELDS, "use_swanlab", "save_total_limit", "overwrite_output_dir"}
    left_out.add("plot_loss")  # the launcher draws
    left_out |= {key for key in args if key.startswith("swanlab_")}
    if values.deepspeed:  # with use_cpu transformers would not initialize DeepSpeed
        left_out.add("use_cpu")
    return without(args, *left_out) | resume_args(run, values, checkpoint)


def resume_args(run: Run, values: Values, checkpoint: Path | None) -> dict:
    """What resumes `checkpoint` or, where there is none, begins at step 0."""
    if not checkpoint:
        # Else LLaMA-Factory resumes from any checkpoint that it finds, without an optimizer too.
        return {"overwrite_output_dir": True}
    done = checkpoint_step(checkpoint)
    goal = run.read("plan.json").get("total_steps")
    if not goal:
        state = read_json_or_empty(checkpoint / "trainer_state.json")
        done = state["epoch"]
        goal = values.num_train_epochs
    resume = {"resume_from_checkpoint": str(checkpoint)}
    if done >= goal and not values.streaming:
        # The last checkpoint was saved, the model was not. The trainer would train a step more.
        resume |= {"max_steps": -1, "num_train_epochs": 0.0}
    return resume


NOTHING, SAVE, STOP = range(3)  # what is asked of a running training


class Stopped(Exception):
    """Training ended early; the callback's `ending` says how."""


@dataclass(frozen=True)
class Asked:
    """What a rank was started to do: run_exp's arguments, from which checkpoint, and what the
    launcher handed over: `force`, and the fingerprints of its node's `data`.
    """

    args: dict
    checkpoint: Path | None
    handover: dict


class RankCallback:
    """The trainer callback of every rank: stop together, commit checkpoints, write the metrics."""

    def __init__(self, run: Run, config: Config, asked: Asked):
        self.run = run
        self.config = config
        self.asked = asked
        self.trainer = None
        self.state = None
        self.saved = None
        self.loss_watch = LossWatch()
        self.ending: Ending | None = None  # where it ends early
        # In seconds; a step with its wait for data, without saving and evaluating.
        self.waits = []
        self.steps = []
        self.saves = []
        self.evaluations = []
        self.lapped = 0.0
        self.figures = {}
        self.scorer = None
        self.scorings = []
        self.evaluating = 0.0
        self.batches = 1  # evaluations in one; a rehearsal's evaluates one batch of so many
        self.progress = run.logs / f"rank{os.environ['RANK']}.progress"

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = state
        loaded = {}
        if self.asked.checkpoint:
            loaded = local_state(self.trainer)
            use_learning_rate(args.learning_rate, kwargs["lr_scheduler"])
        # A resumed run would go by the checkpoint's save_steps and others.
        state.compute_steps(args, state.max_steps)
        self.prove(loaded)
        if self.scorer:
            self.scorer.check_references()
        if self.agree(args) == STOP:
            self.ending = Ending("stopped")
            raise Stopped
        seed_length_groups(args.seed, state)
        self.write(event="begin", total_steps=state.max_steps)
        self.lap()

    def prove(self, loaded: dict) -> None:
        """End the run before its first step where the ranks do not agree, where they would do
        something else than asked, or where they have not loaded what was saved.
        """
        asked = self.asked
        own = {
            "facts": rank_facts(self.trainer, asked, self.config),
            "settings": list(wrong_settings(self.trainer, asked, self.run)),
            "state": loaded,
        }
        ranks = gather(own)
        problems = rank_differences([rank["facts"] for rank in ranks])
        problems += next((rank["settings"] for rank in ranks if rank["settings"]), [])
        if asked.checkpoint:
            state = join_states([rank["state"] for rank in ranks])
            problems += resume_differences(self.run, asked.checkpoint, state)
        if problems and not asked.handover["force"]:
            self.ending = Ending("failed", "; ".join(problems))
            raise Stopped
        for text in problems:
            self.write(event="note", text=text)

    def lap(self) -> float:
        """Seconds since the last call."""
        before = self.lapped
        self.lapped = time.perf_counter()
        return self.lapped - before

    def tell(self, phase: str) -> None:
        """Let the launcher see what this rank is doing: the hang watch reads it."""
        with contextlib.suppress(OSError):  # a full disk
            self.progress.write_text(f"{self.state.global_step} {phase}", encoding="utf-8")

    def on_substep_end(self, args, state, control, **kwargs):
        self.tell("training")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.tell("evaluating")

    def on_step_begin(self, args, state, control, **kwargs):
        self.waits.append(self.lap())
        self.commit_saved(args, state)
        self.tell("training")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            asked = self.agree(args)
            control.should_save |= asked > NOTHING
            if asked == STOP:
                # Save at once, so that it can be resumed, whatever the configuration saves.
                self.ending = Ending("stopped")
                control.should_training_stop = True
                control.should_evaluate = args.save_only_model = False
        self.steps.append(self.waits[-1] + self.lap())
        self.tell("saving" if control.should_save else "training")

    def agree(self, args) -> int:
        """What any rank sees asked of the run, by the files SAVE and STOP; an all-reduce: all do it
        at the same step.
        """
        import torch

        files = {SAVE: self.run.save_file, STOP: self.run.stop_file}
        own = max([NOTHING, *(asked for asked, file in files.items() if file.exists())])
        seen = torch.tensor(own, device=args.device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return int(seen.item())

    def on_save(self, args, state, control, **kwargs):
        # At once, since a training that has ended may load the best model before the commit.
        self.saved = local_state(self.trainer)
        self.saves.append(self.lap())

    def commit_saved(self, args, state) -> None:
        """Commit the checkpoint that was saved last, once all callbacks are done with it.

        LLaMA-Factory's own on_save callbacks run after ours and rewrite its files.
        """
        if self.saved is None:
            return
        # Where all states are there, every rank has written its part.
        saved = join_states(gather(self.saved))
        folder = self.run.path / f"checkpoint-{saved['step']}"
        if not weights_are_finite(saved):
            say(f"{folder.name} holds NaN or infinite weights and is not committed")
        elif state.is_world_process_zero:
            problem = resume_problem(self.config.values, folder)
            if args.save_only_model:
                problem = "save_only_model left out what resuming needs"
            commit_checkpoint(folder, args.world_size, problem, saved)
            best = Path(state.best_model_checkpoint or "").name
            rotate_checkpoints(self.run, self.config.values.save_total_limit, best)
            if self.run.save_file.exists():
                self.run.save_file.unlink(missing_ok=True)
                self.write(event="note", text=f"{folder.name} is saved, as the file SAVE asked")
        self.saved = None
        self.saves[-1] += self.lap()

    def on_evaluate(self, args, state, control, **kwargs):
        self.tell("saving")  # which may follow
        self.evaluations.append(self.evaluating + self.lap())
        self.evaluating = 0.0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.commit_saved(args, state)
        self.tell("saving")  # which may follow, and at the end the best model is loaded
        if self.ending:  # without what an epoch and a training end with
            control.should_save = control.should_evaluate = args.load_best_model_at_end = False

    def on_train_end(self, args, state, control, **kwargs):
        self.commit_saved(args, state)
        self.tell("saving")
        self.gather_figures(args)
        if self.ending:
            self.skip_final_model()

    def gather_figures(self, args) -> None:
        """MEASURED of this start: medians, the rank with the most memory, and the share of the time
        that the rank waited for data which waited most.
        """
        waited = sum(self.waits[1:]) / sum(self.steps or [1])
        gathered = gather((peak_memory(), args.process_index, waited))
        peak, rank, _ = max(gathered)
        self.figures = {
            "step_seconds": statistics.median(self.steps or [0]),
            "checkpoint_seconds": statistics.median(self.saves or [0]),
            "evaluation_seconds": statistics.median(self.evaluations or [0]) * self.batches
            + statistics.median(self.scorings or [0]),
            "score_seconds": statistics.median(self.scorings or [0]),
            "peak_memory": peak,
            "peak_rank": rank,
            "input_wait": max(wait for _, _, wait in gathered),
        }

    def skip_final_model(self) -> None:
        """Leave once all callbacks have seen the end: LLaMA-Factory saves the model after it."""
        from transformers import Trainer

        def save_model(*args, **kwargs):
            raise Stopped

        Trainer.save_model = save_model

    def on_log(self, args, state, control, logs, **kwargs):
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if "loss" in numbers:
            warm = state.global_step > args.get_warmup_steps(state.max_steps)
            # Every rank logs the same numbers, so all of them stop at this step.
            problem = self.loss_watch.problem(state.global_step, numbers, args.fp16, warm)
            if problem:
                self.ending = Ending("diverged", problem)
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
        self.write(**numbers)

    def write(self, **more: object) -> None:
        """Append one line to metrics.jsonl; rank 0 does.

        Each line has time (seconds since 1970), step and tokens. A log of the trainer adds its
        numbers; `event: begin`, at each start, total_steps; `event: note` a text for the user;
        `event: scores` what Scorer found; `event: end` state, cause and figures.
        """
        if not self.state.is_world_process_zero:
            return
        step = self.state.global_step
        tokens = self.state.num_input_tokens_seen
        line = {"time": time.time(), "step": step, "tokens": tokens, **more}
        with open(self.run.metrics_file, "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def seed_length_groups(seed: int, state) -> None:
    """Let the order by length follow from the epoch, on all ranks and after a resume."""
    import torch
    from transformers import trainer_pt_utils as samplers

    def draw(sampler):
        generator = torch.Generator().manual_seed(seed + int(state.epoch))
        lengths = sampler.lengths
        group = sampler.batch_size
        return iter(samplers.get_length_grouped_indices(lengths, group, generator=generator))

    samplers.LengthGroupedSampler.__iter__ = draw


def use_learning_rate(rate: float, scheduler) -> None:
    """Resume with the configuration's learning rate and steps, not with the checkpoint's."""
    scheduler = innermost(scheduler, "scheduler")
    rates = scheduler.base_lrs if hasattr(scheduler, "lr_lambdas") else ()
    if len(set(rates)) == 1:
        scheduler.base_lrs = [rate] * len(rates)
    if rates:
        scheduler.last_epoch -= 1
        scheduler.step()  # sets this step's rates anew


class LossWatch:
    """Notices from the logs that a run has diverged.

    That is a loss or gradient norm that is not finite in two logs in a row, or a loss of more than
    5 times its running median in 5 logs in a row, after the warm-up and the first 20 logs, which
    does not fall and is above the first ones: harder data begin high, too, but are learned.
    """

    def __init__(self):
        self.losses = deque(maxlen=100)
        self.first = []
        self.high: list[float] = []  # losses in a row that are far above the median
        self.infinite: dict[str, int] = {}  # since which step a number is not finite

    def problem(self, step: int, numbers: dict, fp16: bool, warm: bool) -> str:
        """`grad_norm nan since step 30`; '' while the run is healthy."""
        for name in ("loss", "grad_norm"):
            value = numbers.get(name, 0.0)
            # fp16's loss scaler skips steps whose gradients overflow: not a divergence.
            if math.isfinite(value) or (fp16 and name == "grad_norm"):
                self.infinite.pop(name, None)
            elif name in self.infinite:
                return f"{name} {value} since step {self.infinite[name]}"
            else:
                self.infinite[name] = step
        return self.rising_loss(numbers["loss"], warm)

    def rising_loss(self, loss: float, warm: bool) -> str:
        """Why a loss that stays high is a divergence; '' where it is not."""
        if not math.isfinite(loss):
            return ""
        usual = statistics.median(self.losses or [math.inf])
        count = len(self.losses)
        self.losses.append(loss)
        if count < 5:
            self.first.append(loss)
        if not (warm and count >= 20 and loss > 5 * usual > 0):
            self.high = []
            return ""
        self.high.append(loss)
        rises = loss > max(0.9 * self.high[0], statistics.median(self.first))
        if len(self.high) < 5 or not rises:
            return ""
        return f"loss {loss:.4g}, over 5 times its median of {usual:.4g} for 5 logs"


def gather(own: object) -> list:
    """What each rank hands in, in the order of the ranks, on all of them."""
    import torch

    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return gathered


# --- scores -------------------------------------------------------------------------------------
#
# After the loss of each evaluation all ranks give answers to its prompts, each judges its own, and
# all of them put the same numbers into the evaluation's metrics, before anybody reads these.


# The model's own generation_config.json may sample; training has switched the cache off.
NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "use_cache": True,
}


@dataclass(frozen=True)
class Sample:
    """A row of the evaluation data: all before the last part that is learned, and that part."""

    prompt: list[int]
    reference: list[int]


def score_evaluations(callback: RankCallback) -> None:
    """Let the trainer score in each of its evaluations."""
    from transformers import Trainer

    evaluate = Trainer.evaluation_loop

    def evaluate_and_score(trainer, loader, *args, metric_key_prefix="eval", **options):
        if callback.state is None:  # nothing is trained
            callback.trainer = trainer
            callback.state = trainer.state
            callback.write(event="begin", total_steps=0)
            callback.scorer.check_references()
            callback.lap()
        options["metric_key_prefix"] = metric_key_prefix
        output = evaluate(trainer, loader, *args, **options)
        callback.evaluating = callback.lap()
        name = metric_key_prefix.removeprefix("eval").removeprefix("_")
        shares = callback.scorer.score(name, loader.dataset)
        output.metrics.update(
            {f"{metric_key_prefix}_{key}": share for key, share in shares.items()}
        )
        return output

    Trainer.evaluation_loop = evaluate_and_score


class Scorer:
    """Has the model answer the prompts of an evaluation, and judges the answers."""

    def __init__(self, callback: RankCallback):
        self.callback = callback
        self.values = callback.config.values
        self.judge = Judge(self.values)
        self.known: dict[tuple, dict] = {}  # by data set and step of the weights
        self.whole = None  # the data set, where a rehearsal evaluates a part of it
        self.ends, self.pad = [], 0  # the tokens that end and that fill up an answer

    def samples(self, dataset) -> list[Sample]:
        """The rows that are scored, the same each time: drawn by seed, with a reference that
        cutoff_len has left whole.
        """
        drawn = random.Random(self.callback.trainer.args.seed)
        order = drawn.sample(range(len(dataset)), len(dataset))
        ends = set(self.ends)
        found = []
        for index in order:
            row = dataset[index]
            if lost_part(row["labels"], ends) == 0:
                found.append(split_sample(row["input_ids"], row["labels"]))
            if len(found) == self.values.score_samples:
                break
        if not found:
            raise RuntimeError("score: cutoff_len leaves no reference whole; raise it")
        return found

    def text(self, tokens: list[int]) -> str:
        """Tokens as text, without special ones."""
        return self.callback.trainer.processing_class.decode(tokens, skip_special_tokens=True)

    def check_references(self) -> None:
        """Before the first evaluation; rank 0 names the references that are poor judges."""
        callback = self.callback
        tokens = callback.trainer._gen_kwargs  # an evaluation forgets LLaMA-Factory's
        self.ends = tokens["eos_token_id"]
        self.pad = tokens["pad_token_id"]
        data = self.whole or callback.trainer.eval_dataset
        if not callback.state.is_world_process_zero:
            return
        for dataset in data.values() if isinstance(data, dict) else [data]:
            kinds: dict[str, list[str]] = {}
            given = set()
            for sample in self.samples(dataset):
                prompt = self.text(sample.prompt)
                reference = self.text(sample.reference)
                problem, row = self.judge.describe(reference, prompt)
                kinds.setdefault(problem, []).append(plain_answer(reference))
                given |= row.keys() - UNSCORED
                callback.tell("scoring")
            self.require_metric(given, kinds)
            count = sum(map(len, kinds.values()))
            for problem, found in without(kinds, "").items():
                text = f"{len(found)} of {count} references {problem}: {found[0]}"
                callback.write(event="note", text=f"scores: {text}")

    def require_metric(self, given: set, kinds: dict) -> None:
        """End the run before step 1 where a script gives no score, or not the one that decides."""
        metric = self.values.metric_for_best_model or "loss"
        if self.judge.script and (len(given) == 1 or not metric.endswith((*given, "loss"))):
            raise RuntimeError(
                f"score: the script gives {', '.join(given - {'exact'}) or 'nothing'}; expected "
                f"a number or {{name: number}}, and metric_for_best_model, {metric}, among them; "
                + next(iter(kinds))
            )

    def score(self, name: str, dataset) -> dict[str, float]:
        """{"exact": 0.93, ...}: the shares of right answers, the same on all ranks."""
        state = self.callback.state
        args = self.callback.trainer.args
        at = state.global_step
        if args.load_best_model_at_end and not self.callback.trainer.is_in_train:
            at = state.best_global_step or at  # the best weights are loaded by now
        if (name, at) not in self.known:
            begun = time.perf_counter()
            samples = self.samples(self.whole or dataset)
            self.callback.tell("scoring")
            answers = self.answer(samples)
            rows = self.judge_answers(samples, answers)
            seconds = time.perf_counter() - begun
            counts = count_scores(rows, SCORES.get(self.values.score, ()))
            shares = {key: mean_score(*pair) for key, pair in counts.items()}
            self.known[name, at] = shares
            self.record(name, at, rows, counts, seconds)
            self.callback.scorings.append(self.callback.lap())
        return self.known[name, at]

    def answer(self, samples: list[Sample]) -> dict[int, list[int]]:
        """This rank's answers by the sample's number. All ranks have as many batches: a rank that
        has no sample left repeats one, since each token is a collective of all.
        """
        args = self.callback.trainer.args
        order = sorted(range(len(samples)), key=lambda index: -len(samples[index].prompt))
        longest = max(len(sample.reference) for sample in samples)
        new = longest + longest // 4 + 8
        count = math.ceil(len(samples) / args.world_size)
        size = self.batch_size(count, len(samples[order[0]].prompt) + new)
        own = order[args.process_index :: args.world_size]
        answers = {}
        for start in range(0, count, size):
            batch = own[start : start + size] or order[:1]
            tokens = self.generate([samples[index].prompt for index in batch], new)
            answers.update(zip(batch, tokens, strict=True))
        return {index: answers[index] for index in own}

    def batch_size(self, count: int, tokens: int) -> int:
        """How many of `count` answers at once: as the rank that has least memory can hold."""
        shape = self.callback.trainer.model.config.get_text_config().to_dict()
        one = answer_bytes(shape, tokens, activation_bytes(self.values))
        key = "per_device_eval_batch_size"  # which the launcher halves after an evaluation ran out
        planned = self.callback.run.read("plan.json")["configuration"][key]
        allowed = math.ceil(count * self.values[key] / planned)
        return max(min(gather(min(allowed, free_memory() // one))), 1)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The tokens that the model says after each prompt, at most `new`, greedily."""
        import torch
        from transformers import GenerationConfig

        trainer = self.callback.trainer
        batch = trainer.processing_class.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        ).to(trainer.args.device)
        ends = {"eos_token_id": self.ends, "pad_token_id": self.pad}
        greedy = GenerationConfig(**NEUTRAL, **ends, max_new_tokens=new)

        def go_on(ids, scores, **options):
            self.callback.tell("scoring")
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        # inference_mode would break ZeRO-3's layers for the training that follows. The trainer has
        # put the model into evaluation, without gradient checkpointing, and takes it out again.
        with torch.no_grad(), trainer.accelerator.autocast():
            output = trainer.model.generate(
                **batch, generation_config=greedy, stopping_criteria=[go_on]
            )
        return output[:, batch["input_ids"].shape[1] :].tolist()

    def judge_answers(self, samples: list[Sample], answers: dict) -> list[dict]:
        """The rows of scores/: each rank judges its own answers, all ranks get all rows."""
        own = {}
        for index, answer in answers.items():
            sample = samples[index]
            parts = {"prompt": sample.prompt, "answer": answer, "reference": sample.reference}
            texts = {name: self.text(tokens) for name, tokens in parts.items()}
            own[index] = texts | self.judge.judge(**texts)
            self.callback.tell("scoring")
        rows: dict[int, dict] = {}
        for others in gather(own):
            rows |= others
        return [rows[index] for index in sorted(rows)]

    def record(self, name: str, at: int, rows: list, counts: dict, seconds: float) -> None:
        """On rank 0: write scores/step-N.jsonl, and the counts for launcher and tracker."""
        if not self.callback.state.is_world_process_zero:
            return
        file = f"step-{at}-{name}" if name else f"step-{at}"
        path = self.callback.run.path / "scores" / f"{file}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(path, "".join(lines))
        main = [*counts][-1]
        wrong = sorted((row for row in rows if row.get(main, 1) < 1), key=lambda row: row[main])
        texts = ("answer", "reference")
        shown = [{key: plain_answer(row[key])[:1000] for key in texts} for row in wrong[:3]]
        more = {"counts": counts, "wrong": shown, "seconds": seconds}
        self.callback.write(event="scores", at=at, name=name, **more)


def split_sample(ids: list[int], labels: list[int]) -> Sample:
    """A row as the prompt, and the last run of tokens that are learned."""
    end = len(labels)
    while labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return Sample(ids[:start], ids[start:end])


def count_scores(rows: list[dict], wanted: Iterable[str]) -> dict[str, list]:
    """{name: [sum, samples]} of the `wanted` scores and those that the rows have. An answer for
    which a script failed counts as 0, what could not be judged does not count.
    """
    named = [name for row in rows for name in row if name not in UNSCORED]
    counts = {}
    for name in dict.fromkeys([*wanted, *named]):
        judged = (row for row in rows if name in row or not row["error"].startswith(UNJUDGED))
        numbers = [row.get(name, 0.0) for row in judged]
        counts[name] = [sum(numbers), len(numbers)]
    return counts


def free_memory() -> int:
    """Bytes that this rank may still take: of its GPU, or half of its share of a CPU's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available // (2 * int(os.environ["LOCAL_WORLD_SIZE"]))


# --- proofs -------------------------------------------------------------------------------------
#
# A list of rules is never complete. So before the first step the ranks compare what they are about
# to do with what was asked, themselves with one another, and what they have loaded with what was
# saved, whatever key or library makes the difference.

PROVEN_PACKAGES = """
    accelerate datasets deepspeed llamafactory peft tokenizers torch transformers
""".split()
# Elements that are summed at once in float64: on a CPU they fit in its cache, on a GPU in 128 MiB.
CHUNKS = {"cpu": 1 << 16, "cuda": 1 << 24}
# What decides how many steps there are.
STEP_KEYS = """
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    dataloader_drop_last
""".split()
# LLaMA-Factory's optimizers, whose groups and rates are not those of the keys.
OWN_OPTIMIZERS = """
    use_galore use_apollo use_badam use_adam_mini use_muon loraplus_lr_ratio
""".split()
# What LLaMA-Factory and transformers set as they like, and what teaches the model nothing else.
UNCOMPARED = """
    report_to do_eval remove_unused_columns generation_max_length generation_num_beams
    dataloader_pin_memory
""".split()
ROUNDING = 1e-12  # of sums in float64, relative to the sum of all sizes
# What ZeRO calls its ranks' parts of the fp32 weights.
MASTERS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}


def innermost(wrapper, name: str):
    """What is inside of all wrappers that hold it under `name`."""
    while hasattr(wrapper, name):
        wrapper = getattr(wrapper, name)
    return wrapper


def local_state(trainer) -> dict:
    """What a resume must bring back, as far as this rank holds it.

    `sums` are {name: [elements, sum, sum of squares, sum weighted by position]} of the trained
    weights, their fp32 masters and Adam's moments. Over all ranks they are the same however the
    tensors are cut; a part in another place shows in the last one.
    """
    optimizer = innermost(trainer.optimizer, "optimizer")
    steps = {int(own["step"]) for own in optimizer.state.values() if "step" in own}
    sums = {}
    try:
        for name, tensors, vectors in held_tensors(trainer, optimizer):
            sums[name] = measure(tensors, vectors, trainer.args.process_index)
    except (AttributeError, KeyError) as error:
        say(f"what a resume loads cannot be proven for {type(optimizer).__name__}: {error!r}")
    return {
        "step": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "optimizer steps": sorted(steps),
        "scheduler step": innermost(trainer.lr_scheduler, "scheduler").last_epoch,
        "learning rates": [float(group["lr"]) for group in optimizer.param_groups],
        "sums": sums,
    }


def held_tensors(trainer, optimizer) -> Iterator[tuple[str, list, list[Vector]]]:
    """(name, tensors that this rank holds or has a part of, the vectors that they belong to)."""
    engine = trainer.deepspeed
    stage = engine.zero_optimization_stage() if engine else 0
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    vectors = [vector_of(number, weight) for number, weight in enumerate(weights)]
    yield "weights", weights, vectors
    masters = [weight for group in optimizer.param_groups for weight in group["params"]]
    if stage:
        masters = getattr(engine.optimizer, MASTERS[stage])
        vectors = find_vectors(engine._get_zero_param_shapes(), engine.dp_world_size, stage)
    else:
        vectors = [vector_of(number, weight) for number, weight in enumerate(masters)]
    if engine:  # else the weights are their own masters
        yield "masters", masters, vectors
    for name in MOMENTS:
        moments = [optimizer.state.get(weight, {})[name] for weight in masters]
        yield name, moments, vectors


def vector_of(number: int, tensor) -> Vector:
    """How a tensor is cut between the ranks; of one that all ranks have each sums up its part."""
    import torch

    ranks = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    if hasattr(tensor, "ds_tensor"):  # ZeRO-3
        return Vector(number, 0, tensor.ds_tensor.numel(), tensor.ds_numel)
    size = tensor.numel()
    if hasattr(tensor, "to_local"):  # FSDP, by rows
        rows = len(tensor)
        return Vector(number, 0, math.ceil(rows / ranks) * (size // rows), size)
    part = math.ceil(size / ranks)
    return Vector(number, rank * part, part, size)


def local_part(tensor):
    """What this rank holds of a tensor, in one dimension."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).reshape(-1)


def measure(tensors: list, vectors: list[Vector], rank: int) -> list[float]:
    """Elements, sum, sum of squares and sum weighted by position of a rank's parts, in float64.

    The padding at a vector's end does not count.
    """
    import torch

    device = local_part(tensors[0]).device
    chunk = CHUNKS.get(device.type, CHUNKS["cuda"])
    places = torch.arange(chunk, dtype=torch.float64, device=device)
    count = 0
    before = 0
    total = places.new_zeros(3)
    for vector in vectors:
        begin = rank * vector.part
        size = min(max(vector.size - begin, 0), vector.part)
        own = local_part(tensors[vector.group])[vector.start : vector.start + size]
        for part in own.split(chunk):
            numbers = part.to(places)
            whole = numbers.sum()
            at = numbers @ places[: len(numbers)]
            total += torch.stack([whole, numbers @ numbers, at + whole * (before + begin)])
            begin += len(numbers)
        count += len(own)
        before += vector.size
    return [count, *total.tolist()]


def join_states(states: list[dict]) -> dict:
    """The state over all ranks, of what each of them holds."""
    joined = {}
    for name in states[0]["sums"]:
        columns = zip(*(state["sums"][name] for state in states), strict=True)
        joined[name] = list(map(math.fsum, columns))
    return states[0] | {"sums": joined}


def weights_are_finite(state: dict) -> bool:
    """Whether no trained weight is NaN or infinite: else a sum of them is not finite."""
    return all(map(math.isfinite, state["sums"].get("weights", ())))


def resume_differences(run: Run, checkpoint: Path, loaded: dict) -> list[str]:
    """That what was loaded is not what was saved, and what to do; [] where it is the same."""
    saved = read_json_or_empty(checkpoint / MANIFEST).get("state")
    found = ", ".join(state_differences(saved, loaded)) if saved else ""
    if not found:
        return []
    older = [path for path in run.checkpoints() if not checkpoint_problem(path)]
    older = older[older.index(checkpoint) + 1 :]
    advice = "start a new run"
    if older:
        aside = shlex.join(["mv", str(checkpoint), f"{run.path}/broken-{checkpoint.name}"])
        advice = f"to go on from {older[0].name}: {aside}; {resume_command(run)}"
    return [f"{checkpoint.name} is not loaded as it was saved: {found}; {advice}"]


def state_differences(saved: dict, loaded: dict) -> Iterator[str]:
    """Where two states differ: exactly, but for the rounding of sums."""
    for name in without(saved, "sums"):
        if saved[name] != loaded[name]:
            yield f"{name} {saved[name]} saved, {loaded[name]} loaded"
    for name, old in saved["sums"].items():
        new = loaded["sums"].get(name, [0] * 4)
        count, _, squares, _ = old
        size = math.sqrt(count * squares)  # at least the sum of all absolute values
        allowed = [0, size, squares, size * count]
        for what, was, now, most in zip(
            ("elements", "sum", "squares", "places"), old, new, allowed, strict=True
        ):
            if not abs(now - was) <= ROUNDING * most:
                yield f"{what} of {name} {was:.10g} saved, {now:.10g} loaded"
                break


def rank_facts(trainer, asked: Asked, config: Config) -> dict:
    """What must be the same on each rank: {what: value}."""
    return {
        "step": trainer.state.global_step,
        "checkpoint": asked.checkpoint and asked.checkpoint.name,
        **{f"{key} in config.yaml": value for key, value in config.values.items()},
        **asked.handover["data"],
        "the tokenized samples": samples_digest(trainer.train_dataset),
        "python": sys.version_info[:2],
        **{name: installed_version(name) for name in PROVEN_PACKAGES},
    }


def samples_digest(samples) -> str:
    """How many samples there are, and a hash of a hundred of them; '' where they are streamed."""
    if not hasattr(samples, "__len__"):
        return ""
    rows = range(0, len(samples), len(samples) // 100 + 1)
    text = repr([samples[row] for row in rows]).encode()
    return f"{len(samples)} {hashlib.sha256(text).hexdigest()[:16]}"


def rank_differences(ranks: list[dict]) -> list[str]:
    """Where ranks are not like rank 0, and what to do; [] where all are."""
    found = []
    for number, facts in enumerate(ranks):
        for name in facts.keys() | ranks[0].keys():
            first = ranks[0].get(name)
            own = facts.get(name)
            if own != first:
                found.append(f"{name} is {own} on rank {number}, {first} on rank 0")
    if not found:
        return []
    advice = "give every node the same files and packages"
    return [f"the ranks do not agree: {', '.join(sorted(found)[:3])}; {advice}"]


def wrong_settings(trainer, asked: Asked, run: Run) -> Iterator[str]:
    """Where trainer and engine would do something else than was asked, by key."""
    values = Values(vars(trainer.args) | asked.args)
    for subject in (
        key_settings,
        batch_settings,
        data_settings,
        optimizer_settings,
        schedule_settings,
        precision_settings,
    ):
        try:
            for key, wanted, done in subject(trainer, values, run):
                if wanted != done:
                    yield f"{key}: {wanted} was asked for, {done} would be used"
        except Exception:  # a library that nobody has foreseen has them elsewhere; it may train
            traceback.print_exc()


def key_settings(trainer, values: Values, run: Run) -> Iterator[tuple]:
    """(key, what was asked for, what would be used) of the keys that the trainer has itself."""
    for key, value in values.items():
        done = getattr(trainer.args, key, value)
        is_number = {type(value), type(done)} <= {int, float}
        if key not in UNCOMPARED and (isinstance(done, type(value)) or is_number):
            yield key, value, done


def batch_settings(trainer, values: Values, run: Run) -> Iterator[tuple]:
    """The samples of a step, and the steps."""
    micro = values.per_device_train_batch_size
    parts = values[ACCUMULATION]
    ranks = int(os.environ["WORLD_SIZE"])
    engine = trainer.deepspeed
    yield "WORLD_SIZE", ranks, trainer.args.world_size
    if engine:
        yield "per_device_train_batch_size", micro, engine.train_micro_batch_size_per_gpu()
        yield ACCUMULATION, parts, engine.gradient_accumulation_steps()
        yield "global_batch_size", micro * parts * ranks, engine.train_batch_size()
    if hasattr(trainer.train_dataset, "__len__"):
        loader = trainer.callback_handler.train_dataloader
        yield "per_device_train_batch_size", micro * ranks, loader.total_batch_size
        counted = {key: values[key] for key in STEP_KEYS}
        steps = plan_steps([len(trainer.train_dataset)], counted, ranks)
        yield "max_steps", steps.total, trainer.state.max_steps


def data_settings(trainer, values: Values, run: Run) -> Iterator[tuple]:
    """How many samples there are, and how long the longest is."""
    from datasets import Dataset
    from pyarrow.compute import list_value_length

    samples = trainer.train_dataset
    figures = run.read("data.json")
    planned = run.read("plan.json").get("samples")
    if figures and planned is not None:
        yield "dataset", f"{planned} rows", f"{figures['rows']} rows"
        yield "dataset", f"{figures['kept']} samples", f"{len(samples)} samples"
    cutoff = values.cutoff_len
    if isinstance(samples, Dataset) and cutoff:
        lengths = list_value_length(samples.data.column(0)).to_numpy()
        longest = int(lengths.max())
        yield "cutoff_len", cutoff, longest if longest > cutoff + 1 else cutoff


def optimizer_settings(trainer, values: Values, run: Run) -> Iterator[tuple]:
    """The optimizer, its numbers and what clips its gradients."""
    if trainer.deepspeed:
        zero = trainer.deepspeed.optimizer
        engine = trainer.deepspeed
        clips = getattr(zero, "clip_grad", engine.gradient_clipping())
        yield "max_grad_norm", values.max_grad_norm, clips
    if any(values[key] for key in OWN_OPTIMIZERS):
        return
    name = type(innermost(trainer.optimizer, "optimizer")).__name__
    if values.optim.startswith("adamw") and "adam" not in name.lower():
        yield "optim", values.optim, name
    groups = trainer.optimizer.param_groups
    yield "weight_decay", values.weight_decay, max(group["weight_decay"] for group in groups)
    for group in groups:
        if "betas" in group:
            yield "adam_beta1", values.adam_beta1, group["betas"][0]
            yield "adam_beta2", values.adam_beta2, group["betas"][1]
            yield "adam_epsilon", values.adam_epsilon, group["eps"]


def schedule_settings(trainer, values: Values, run: Run) -> Iterator[tuple]:
    """The learning rate, and its share at some steps, which is that of a scheduler made anew."""
    from torch import optim, zeros
    from transformers import get_scheduler

    total = trainer.state.max_steps
    args = trainer.args
    scheduler = innermost(trainer.lr_scheduler, "scheduler")
    if not (total and hasattr(scheduler, "lr_lambdas")):
        return
    if not any(values[key] for key in OWN_OPTIMIZERS):
        for rate in scheduler.base_lrs:
            yield "learning_rate", values.learning_rate, rate
    fresh = get_scheduler(
        values.lr_scheduler_type,
        optim.SGD([zeros(1)]),
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    for step in (0, 1, total // 10, total // 2, total - 1):
        wanted, done = (made.lr_lambdas[0](step) for made in (fresh, scheduler))
        yield f"lr_scheduler_type at step {step}", wanted, done


def precision_settings(trainer, values: Values, run: Run) -> Iterator[tuple]:
    """What computes and what holds the weights, and how ZeRO cuts them."""
    engine = trainer.deepspeed
    zero = read_deepspeed(values)
    stage = engine.zero_optimization_stage() if engine else 0
    yield "deepspeed", str(zero.kind), replace(zero, stage=stage, used=bool(engine)).kind
    mixed = precision(values).replace("fp32", "no").replace("pure_bf16", "no")
    yield "bf16" if values.bf16 else "fp16", mixed, trainer.accelerator.mixed_precision
    if values.finetuning_type != "full" or values.pure_bf16 or trainer.is_fsdp_enabled:
        return
    trained = (weight for weight in trainer.model.parameters() if weight.requires_grad)
    largest = max(trained, key=lambda weight: getattr(weight, "ds_numel", weight.numel()))
    names = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "no": "torch.float32"}
    wanted = names[mixed if engine else "no"]
    yield "the weights", wanted, str(largest.dtype)


def resume_problem(values: Values, folder: Path) -> str:
    """Why a checkpoint cannot be resumed from though it was saved; '' where it can."""
    if values.stage == "rm":  # an adapter's keys are lost behind the value head
        return "LLaMA-Factory cannot resume stage: rm"
    saved = [*folder.rglob("*optim*")]
    if not values.bf16:
        saved += folder.rglob("*model_states.pt")  # which hold it too under DeepSpeed stage 0
    return "" if saved else "no optimizer state was saved"


def finish_wandb(seconds: float = 60) -> None:
    """End wandb's run, which it does at Python's exit and this process ends without.

    wandb waits without limit for its service, so it gets `seconds`.
    """
    import wandb

    thread = threading.Thread(target=wandb.finish, daemon=True)
    thread.start()
    thread.join(seconds)


def peak_memory() -> int:
    """The most memory this rank used, in bytes: of its GPU, or resident on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- resume on another number of ranks ----------------------------------------------------------
#
# ZeRO cuts vectors into equal parts, one for each rank. Under ZeRO-3 every parameter is a vector,
# and the parts of many parameters lie one behind the other in a rank's flat groups; under ZeRO-1
# and 2 all parameters of a flat group are one vector. Every rank reads its part of each vector out
# of the old ranks' files, which are mapped into memory: nothing is computed or written.


def reshard_on_load() -> None:
    """Let DeepSpeed load a checkpoint that another number of ranks has saved."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    load_module = DeepSpeedEngine.load_module_state_dict

    def load_trained(engine, checkpoint, **options):
        """Leave out frozen parameters, cut for the old ranks: they are still the base model's."""
        load_module(engine, checkpoint | {"frozen_param_fragments": None}, **options)

    def first_file(engine, *path):
        """Rank 0's file beside the optimizer's will do for every rank."""
        return [engine._get_ckpt_name(*path, "00", "0")]

    DeepSpeedEngine.load_module_state_dict = load_trained
    DeepSpeedEngine._get_all_ckpt_names = first_file
    DeepSpeedEngine._load_zero_checkpoint = load_resharded


# What ZeRO-1 and 2, and what ZeRO-3, call the fp32 weights and the optimizer's state.
ZERO_KEYS = (
    ("single_partition_of_fp32_groups", "base_optimizer_state"),
    ("fp32_flat_groups", "optimizer_state_dict"),
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


@dataclass(frozen=True)
class Vector:
    """Where every rank has its part of a vector: in a flat group, from `start` on."""

    group: int
    start: int
    part: int  # elements in a part; the last parts end with padding
    size: int  # elements of the whole, without padding


def load_resharded(engine, *folder: str, load_optimizer_states: bool = True) -> bool:
    """Load other ranks' shards in DeepSpeed's place. Raises ValueError where it is not exact."""
    import torch

    optimizer = engine.optimizer
    rank = engine.global_rank
    stage = engine.zero_optimization_stage()
    weights, state = ZERO_KEYS[stage == 3]
    # Tensors are read when they are used.
    read = partial(torch.load, map_location="cpu", mmap=True, weights_only=False)
    names = engine._get_all_zero_checkpoint_names(*folder, engine.bfloat16_enabled())
    shards = [read(name)["optimizer_state_dict"] for name in names]
    flats = [flat_groups(shard, stage) for shard in shards]
    shapes = read(*engine._get_all_ckpt_names(*folder))["param_shapes"]
    old = find_vectors(shapes, len(shards), stage)
    new = find_vectors(engine._get_zero_param_shapes(), engine.dp_world_size, stage)
    check_layout(flats[0], old, engine.zero_round_robin_gradients())
    own = optimizer.state_dict()
    for group, size in group_sizes(new).items():
        moments = {key: own[weights][group].new_zeros(size) for key in MOMENTS}
        # A tensor `step` that groups share would count once for each of them.
        own[state]["state"][group] = moments | {"step": copy.deepcopy(flats[0][0]["step"])}
    for group, saved in zip(
        own[state]["param_groups"], shards[0][state]["param_groups"], strict=True
    ):
        group |= saved | {"params": group["params"]}
    fresh = flat_groups(own, stage)
    for saved, part in matching_parts(old, flats, new, fresh, rank):
        part.copy_(saved)
    content = shards[0] | {weights: own[weights], state: own[state]}
    optimizer.load_state_dict({rank: content}, load_from_fp32_weights=True)
    return True


def flat_groups(zero: dict, stage: int) -> list[dict]:
    """A rank's flat groups, {"fp32": ..., "exp_avg": ..., "exp_avg_sq": ..., "step": 20} each."""
    weights, state = ZERO_KEYS[stage == 3]
    moments = zero[state]["state"]
    return [{"fp32": flat.detach()} | moments[i] for i, flat in enumerate(zero[weights])]


def find_vectors(param_shapes: list[dict], ranks: int, stage: int) -> list[Vector]:
    """The vectors that DeepSpeed cuts, out of {parameter: shape} of each flat group."""
    found = []
    for group, shapes in enumerate(param_shapes):
        sizes = [shape.numel() for shape in shapes.values()]
        unit = 1
        start = 0
        if stage < 3:
            sizes = [sum(sizes)]
            unit = 2
        for size in sizes:
            found.append(Vector(group, start, math.ceil(size / (ranks * unit)) * unit, size))
            start += found[-1].part
    return found


def group_sizes(vectors: list[Vector]) -> dict[int, int]:
    """Elements of each flat group."""
    return {vector.group: vector.start + vector.part for vector in vectors}


def check_layout(groups: list[dict], old: list[Vector], round_robin: bool) -> None:
    """Raises ValueError where the old shards are not what find_vectors takes them for."""
    adam = all(set(group) == {"fp32", "step", *MOMENTS} for group in groups)
    if not adam or round_robin:
        raise ValueError("only Adam can be resharded, and without round_robin_gradients")
    if group_sizes(old) != {i: len(group["exp_avg"]) for i, group in enumerate(groups)}:
        raise ValueError("ZeRO shards are missing here, or were cut in a way that is not known")


def matching_parts(old: list[Vector], flats: list, new: list[Vector], own: list, rank: int):
    """What this rank has of all vectors, piece by piece: in an old rank's flat group, in its own.

    `flats[rank]` are the flat groups of an old rank. The padding at a vector's end is left out.
    """
    for source, target in zip(old, new, strict=True):
        begin = rank * target.part
        end = min(begin + target.part, target.size)
        for key in ("fp32", *MOMENTS):
            here = target.start
            for index, groups in enumerate(flats):
                first = index * source.part
                part = groups[source.group][key][source.start : source.start + source.part]
                saved = part[max(begin - first, 0) : max(end - first, 0)]
                yield saved, own[target.group][key][here : here + len(saved)]
                here += len(saved)


# --- the data as the model sees it --------------------------------------------------------------
#
# LLaMA-Factory's own template and processor are measured while they tokenize. The measures travel
# in two columns that nothing after this sees, so they are exact with several tokenizing processes,
# and where the tokenized data comes from the cache.

STREAMED_ROWS = 1000  # streamed data is measured by its first rows
SAMPLED = 100_000  # so many lengths tell how much is padding
IGNORED = -100  # the label of a token that is not learned


def measure_data(values: Values, tell: Callable) -> None:
    """Call `tell(figures, samples, template, tokenizer, is_eval)` for each data set as soon as it
    is tokenized, which is before there is a model.
    """
    from datasets import Dataset
    from llamafactory.data import loader

    new_processor = loader._get_dataset_processor
    tokenize = loader._get_preprocessed_dataset

    def new_measured_processor(*args, **options):
        return measured(new_processor(*args, **options))

    def tokenize_and_tell(rows, *more, is_eval):
        data_args, args, stage, template, tokenizer, *_ = more
        tokenized = tokenize(rows, *more, is_eval=is_eval)
        if os.environ.get("RANK", "0") != "0":
            return tokenized.remove_columns(["measured", "lost"])
        counted = rows
        samples = tokenized
        if stage == "pt":  # its samples are blocks of text, not rows
            counted = samples
        if data_args.streaming:
            counted = samples = Dataset.from_list(list(tokenized.take(STREAMED_ROWS)))
        try:
            figures = data_figures(samples, len(counted), data_args, args, values)
            figures["template"] = template_difference(template, tokenizer, rows)
        except Exception:  # data that nobody has foreseen may have no figures, but it may train
            traceback.print_exc()
        else:
            figures["problem"] = data_problem(figures, samples, tokenizer, values)
            tell(figures, samples, template, tokenizer, is_eval)
        return tokenized.remove_columns(["measured", "lost"])

    loader._get_dataset_processor = new_measured_processor
    loader._get_preprocessed_dataset = tokenize_and_tell


def measured(processor):
    """The same LLaMA-Factory processor, whose batches have two columns more.

    `measured` holds, in the first row of each batch, the tokens of each of its samples before
    cutoff_len; `lost` is lost_part of each sample. The class stands in the function, so that
    datasets makes its code part of the cache's key.
    """
    kind = type(processor)

    class Measured(kind):
        def preprocess_dataset(self, examples):
            whole = []
            cutoff = self.data_args.cutoff_len
            encode = self.template.encode_multiturn
            end = int(self.template.efficient_eos)

            def encode_and_count(*args):
                pairs = encode(*args)
                whole.append(end + sum(len(prompt) + len(answer) for prompt, answer in pairs))
                return pairs

            self.template.encode_multiturn = encode_and_count  # per batch: per row costs 5 %
            batch = kind.preprocess_dataset(self, examples)
            del self.template.encode_multiturn
            if not batch:  # every row was dropped; datasets fails at a batch without a column
                return {"input_ids": []}
            samples = next(iter(batch.values()))  # their ids
            rows = len(samples)
            if not whole:  # other stages than sft: measured as they were cut
                whole = [len(ids) for ids in samples]
            batch["measured"] = [whole] + [[]] * (rows - 1)
            batch["lost"] = [0] * rows
            ends = set(self.template.get_stop_token_ids(self.tokenizer))
            for row, tokens in enumerate(whole):
                if tokens > cutoff and not self.data_args.packing:
                    batch["lost"][row] = lost_part(batch["labels"][row], ends)
            return batch

    processor.__class__ = Measured  # keeps what LLaMA-Factory gave this one
    return processor


def lost_part(labels: list[int], ends: set[int]) -> int:
    """What of the answer a sample that was cut has lost: 0 nothing, 1 its end, 2 all of it."""
    if set(labels) == {IGNORED}:
        return 2
    return int(not ends.intersection(labels[-4:]))


def data_figures(samples, rows: int, data_args, args, values: Values) -> dict:
    """What data.json holds of `rows` rows of which measure_data has made these samples.

    Preferences are measured by their chosen answer. `enough`: a cutoff_len that keeps 99.9 % of the
    samples whole, and how many it would still cut. `lengths`: those of count_lengths.
    """
    import numpy

    cutoff = data_args.cutoff_len
    lost = samples.data.column("lost").to_numpy()
    # Not through datasets, which takes a minute for a million rows.
    whole = samples.data.column("measured").combine_chunks().flatten().to_numpy()
    tokens = numpy.minimum(whole, cutoff)
    least, median, p99, most = numpy.quantile(
        tokens, [0, 0.5, 0.99, 1], method="nearest"
    ).tolist()
    enough = 64 * math.ceil(numpy.quantile(whole, 0.999, method="higher") / 64)
    lengths = tokens
    total = int(tokens.sum())
    order = args.train_sampling_strategy
    if data_args.packing and values.stage != "pt":
        lengths = numpy.full(len(samples), cutoff + 1)
    if values.disable_shuffling:
        order = "sequential"
    some = lengths[:: len(lengths) // SAMPLED + 1]
    learned = total * len(some) / len(lengths)
    return {
        "rows": rows,
        "kept": len(tokens),
        "dropped": rows - len(tokens),
        "cutoff_len": cutoff,
        "cut": int((whole > cutoff).sum()),
        "unlearned": int((lost == 2).sum()),
        "unended": int((lost > 0).sum()),
        "tokens": {"min": least, "median": median, "p99": p99, "max": most, "all": total},
        "padding": 1 - learned / drawn_tokens(some, args, order),
        "lengths": count_lengths(samples.data),
        "enough": [enough, int((whole > enough).sum())],
    }


def drawn_tokens(lengths, args, order: str) -> int:
    """Tokens, padding included, of the first epoch's batches of samples of these lengths.

    `random` is the order of accelerate's seeded sampler; that of group_by_length depends on a
    generator's state that nobody knows before there is a model, so it is another shuffle's.
    """
    import numpy
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    batch = args.per_device_train_batch_size
    drawn = range(len(lengths))
    shuffle = torch.Generator().manual_seed(args.data_seed or args.seed)
    if order == "group_by_length":
        group = batch * args.gradient_accumulation_steps
        drawn = get_length_grouped_indices(lengths.tolist(), group, generator=shuffle)
    elif order == "random":
        drawn = torch.randperm(len(lengths), generator=shuffle)
    starts = numpy.arange(0, len(lengths), batch)
    longest = numpy.maximum.reduceat(lengths[numpy.asarray(drawn)], starts)
    sizes = numpy.diff(starts, append=len(lengths))
    return int((numpy.ceil(longest / PADDED_TO) * PADDED_TO * sizes).sum())


def count_lengths(table) -> list[list[int]]:
    """[tokens with their padding, how many samples have them], shortest first; of the sequences
    that a sample has, such as a pair, the longest.
    """
    import numpy
    from pyarrow.compute import list_value_length

    ids = [name for name in table.column_names if name.endswith("input_ids")]
    lengths = [list_value_length(table.column(name)).to_numpy() for name in ids]
    parts = -(-numpy.maximum.reduce(lengths) // PADDED_TO)
    tokens, counts = numpy.unique(parts * PADDED_TO, return_counts=True)
    return numpy.column_stack([tokens, counts]).tolist()


def template_difference(template, tokenizer, rows) -> str:
    """Where the prompt that is trained on differs from what the tokenizer's chat template makes of
    it, with which the model is served; '' where it does not.
    """
    row = next((row for row in rows if row["_prompt"] and row["_response"]), None)
    if not row:  # pre-training
        return ""
    turns = row["_prompt"][:1] + row["_response"][:1]
    system = row["_system"]
    trained, _ = template.encode_oneturn(tokenizer, turns, system)
    if system:
        turns.insert(0, {"role": "system", "content": system})
    try:
        served = tokenizer.apply_chat_template(
            turns[:-1],
            add_generation_prompt=True,
            return_dict=False,
            enable_thinking=bool(template.enable_thinking),
        )
    except Exception as error:  # jinja2's or the template's own, or there is none
        return f"cannot be compared with the tokenizer's chat template: {error}"
    if trained == served:
        return ""
    at = len(os.path.commonprefix([trained, served]))
    ours, theirs = (tokenizer.decode(ids[at : at + 8]) for ids in (trained, served))
    return (
        f"differs from the tokenizer's chat template at token {at}: {ours!r} is trained, "
        f"{theirs!r} would be served"
    )


def data_problem(figures: dict, samples, tokenizer, values: Values) -> str:
    """Why this data cannot train this model; '' where it can."""
    if figures["unlearned"] == figures["kept"]:
        return f"nothing to learn from: cutoff_len={figures['cutoff_len']} leaves no answer"
    # Its weights do not matter here.
    model = read_model(Values(values, train_from_scratch=True))
    size = model.shape.get("vocab_size", math.inf)
    # The first sample has all the tokens that the template adds to the tokenizer.
    largest = max(samples[0].get("input_ids") or samples[0]["chosen_input_ids"])
    if largest < size or values.resize_vocab:
        return ""
    token = tokenizer.convert_ids_to_tokens(largest)
    return f"{token} is token {largest}, the model embeds {size} only; set resize_vocab: true"


def record_data(run: Run, figures, samples, template, tokenizer, is_eval) -> None:
    """In a rank: write data.json and the Modelfile for Ollama; end where nothing can be learned."""
    if os.environ.get("RANK", "0") == "0":
        write_figures(run, figures, is_eval)
        if not is_eval:
            write_modelfile(run, template, tokenizer)
    if figures["problem"]:
        raise RuntimeError(figures["problem"])


def write_modelfile(run: Run, template, tokenizer) -> None:
    """The template for Ollama, where its form can hold it."""
    with contextlib.suppress(Exception):
        modelfile = template.get_ollama_modelfile(tokenizer)
        if not template.enable_thinking:  # trained prompts end with an empty thought
            thought = template.add_thought()
            modelfile = modelfile.replace("{{ else if eq", thought + "{{ else if eq")
        write_atomically(run.path / "Modelfile", modelfile)


def write_figures(run: Run, figures: dict, is_eval: bool) -> None:
    """data.json: the figures of the training data, and the tokens of the longest evaluated."""
    if is_eval:
        longest = figures["lengths"][-1][0]
        figures = run.read(DATA_FILE)
        if not figures:  # training data that could not be measured
            return
        figures["evaluated"] = max(longest, figures.get("evaluated", 0))
    figures["key"] = run.read("plan.json").get("data_key")
    write_atomically(run.path / DATA_FILE, json.dumps(figures))


def rehearse_data(callback: RankCallback) -> None:
    """Train on the longest samples in the first step, then on steps from all over the run's own
    epoch, whose order may go by length; evaluate one batch, of the longest. Streamed data stays as
    it is.
    """
    from datasets import Dataset
    from pyarrow.compute import list_value_length
    from torch import default_generator
    from transformers import Trainer

    new_dataloader = Trainer._get_dataloader

    def longest_first(trainer, *, dataset, batch_size, sampler_fn, is_training=False, **more):
        args = trainer.args
        count = batch_size * trainer.args.world_size
        if isinstance(dataset, Dataset):
            lengths = list_value_length(dataset.data.column(0)).to_numpy()  # the ids
            longest = lengths.argsort()[::-1].tolist()
            if is_training:
                default_generator.manual_seed(args.seed)  # the same order on each rank
                count *= args.gradient_accumulation_steps
                drawn = list(sampler_fn(dataset))
                steps = [drawn[at : at + count] for at in range(0, len(drawn), count)]
                every = math.ceil(len(steps) / REHEARSED_STEPS)
                drawn = sum(steps[every // 2 :: every], longest[:count])
                sampler_fn = lambda dataset: drawn  # noqa: E731
            else:
                if callback.scorer:
                    callback.scorer.whole = dataset
                callback.batches = math.ceil(len(dataset) / count)
                dataset = dataset.select(longest[:count])
        more |= {"dataset": dataset, "batch_size": batch_size, "sampler_fn": sampler_fn}
        return new_dataloader(trainer, is_training=is_training, **more)

    Trainer._get_dataloader = longest_first


def run_tokenizer(run: Run, count: str) -> int:
    """Tokenize as a run would, without a model, write data.json and, where there is a `count`, show
    so many samples and the figures of each data set; returns the exit code.
    """
    console = os.fdopen(os.dup(1), "w", buffering=1)
    send_output_to(run.logs / "rank0.log")
    try:
        gc.disable()  # see import_trainer
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.hparams import get_train_args
        from llamafactory.model import load_tokenizer

        gc.enable()
        gc.freeze()
        config = load_config(run.config_file, {})
        if config.values.get("overwrite_cache"):
            config = config.update(overwrite_cache=None)
            overwrite_cache()
        tell = partial(record_data, run)
        if count:
            tell = partial(show_samples, run, int(count), console)
        measure_data(config.values, tell)
        model_args, data_args, args, method, _ = get_train_args(
            build_training_args(config, run, None)
        )
        tools = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tools["tokenizer"], data_args)
        stage = "rm" if method.stage == "dpo" else method.stage  # as its own workflow calls it
        get_dataset(template, model_args, data_args, args, stage, **tools)
    except Exception as error:
        traceback.print_exc()
        reason = str(error.__cause__ or error)  # `Failed to load tokenizer.` has one
        say(f"error: {' '.join(reason.split())}", console)
        return 2
    return 0


def overwrite_cache() -> None:
    """Tokenize anew, though the key of that name, a part of the cache's own key, is taken out: else
    ranks without it would not find what is cached now.
    """
    from datasets import Dataset

    cached = Dataset.map

    def fresh(rows, *args, **options):
        return cached(rows, *args, **options | {"load_from_cache_file": False})

    Dataset.map = fresh


def show_samples(run, count, console, figures, samples, template, tokenizer, is_eval):
    """In a preview: samples as the model sees them, the learned part marked, and the figures."""
    name = "evaluation" if is_eval else "training"
    marks = ("[[", "]]")
    write_figures(run, figures, is_eval)
    if console.isatty():
        marks = ("\033[32m", "\033[0m")
    for sample in itertools.islice(samples, count):
        prefix = "" if "input_ids" in sample else "chosen_"
        ids = sample[f"{prefix}input_ids"]
        labels = sample.get(f"{prefix}labels")
        labels = labels or ids  # pre-training learns all of it
        learned = len(ids) - labels.count(IGNORED)
        say(f"{name} sample: {len(ids)} tokens, {learned} of them learned", console)
        say(mark_learned(ids, labels, tokenizer, marks), console)
    figures["template"] = figures["template"] or "the same as the tokenizer's chat template"
    print_lines(data_lines(figures, run) | {"problem": figures["problem"]}, console)


def mark_learned(ids: list[int], labels: list[int], tokenizer, marks: tuple[str, str]) -> str:
    """The text of a sample, with the parts that are learned between the two marks."""
    text = ""
    pairs = zip(ids, labels, strict=True)
    for is_learned, part in itertools.groupby(pairs, lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in part])
        text += piece.join(marks) if is_learned else piece
    return text


# ================================================================================================
# TRACKER
# ================================================================================================


def run_tracker(run: Run) -> int:
    """Follow metrics.jsonl and record it with a tracker. Does not return.

    The first line of stdin is what opens the record, with the `position` in metrics.jsonl where
    this launch begins; the next one says how the run ended. Where stdin ends without it the
    launcher has died, and the record ends as crashed.
    """
    orders = open(0, "rb", buffering=0, closefd=False)  # unbuffered, so that select() sees all
    init = json.loads(orders.readline())
    name, position, launches = (init.pop(key) for key in ("tracker", "position", "launches"))
    metrics = Follower(run.metrics_file, position)
    state = {"pid": os.getpid()}
    ignore_stop_signals()  # they are for the launcher
    signal.alarm(30)  # without a network, init waits for longer than a dead launcher may
    try:
        _, open_record = TRACKERS[name]
        record = open_record(init)
        state |= record.place | {"id": init["id"], "launches": launches}
    except BaseException as error:  # whatever it is, training continues
        traceback.print_exc()
        state["problem"] = f"{type(error).__name__}: {error}"[:300]
    write_atomically(run.logs / f"{name}.json", json.dumps(state))
    if "problem" in state:
        os._exit(1)
    signal.alarm(0)
    end = follow_to_the_end(record, metrics, orders)
    # In an outage finish() has no end, and the launcher that would kill this process may be killed.
    signal.alarm(TrackerProcess.END + 5 if end else 6)
    record.finish(**end or {"state": "failed", "cause": "the launcher died"})
    os._exit(0)


def follow_to_the_end(record, metrics: Follower, orders) -> dict | None:
    """Record all numbers until stdin tells the end; None: the launcher has died."""
    while True:
        ended = bool(select.select([orders], [], [], 0.5)[0])
        for line in metrics.new_lines():  # after the end nothing is added any more
            if line.get("wrong"):
                record.note("wrong answers", wrong_answers(line), line["step"])
            if "event" not in line:
                numbers = without(line, "time", "step").items()
                named = {tracked_name(name): float(value) for name, value in numbers}
                record.log(named, line["step"])
        if ended:
            return json.loads(orders.readline() or "null")


def wrong_answers(line: dict) -> str:
    """Some wrong answers of an evaluation."""
    return "\n\n".join(f"{row['answer']}\nwanted: {row['reference']}" for row in line["wrong"])


def tracked_name(name: str) -> str:
    """`eval/loss` for eval_loss, `train/loss` for loss."""
    if name.startswith("eval_"):
        return name.replace("_", "/", 1)
    return f"train/{name}"


class SwanLabRecord:
    """SwanLab's record of this run; `place` is where to see it, and how to bring a local one to the
    service.
    """

    def __init__(self, init: dict):
        import swanlab

        probe = {"git": False, "runtime": False, "requirements": False, "swanlab": False}
        quiet = swanlab.Settings(
            interactive=False, terminal={"proxy_type": "none"}, probe=probe
        )
        self.record = swanlab.init(**init, resume="allow", settings=quiet)
        folder = self.record.dir
        dashboard = {
            "local": f"swanlab watch {folder.parent}",
            "offline": f"swanlab sync {folder}",
        }
        sync = f"swanlab sync {shlex.quote(str(folder))} -i {init['id']}"
        self.place = {
            "dashboard": dashboard.get(init["mode"]) or self.record.url,
            "later": f"but the run is recorded locally. Later: {sync}",
        }

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Record numbers at a step; one that a restart repeats SwanLab leaves out by itself."""
        self.record.log(numbers, step=step)

    def note(self, name: str, text: str, step: int) -> None:
        """Record a text at a step."""
        import swanlab

        self.record.log({name: swanlab.Text(text)}, step=step)

    def finish(self, state: str, cause: str) -> None:
        """End the record as success, aborted or crashed."""
        endings = {
            "finished": {"state": "success"},
            "stopped": {"state": "aborted", "error": "stopped by the user"},
        }
        self.record.finish(**endings.get(state, {"state": "crashed", "error": cause}))


# report_to's name of each tracker that has a process of its own (in BACKENDS as well): a function
# that chooses its Tracking, whose `init` has a `name` and a `log_dir`; and what records. That is
# made of `init` with mode, id and config. It has log(), note() and finish(), and `place`, which is
# {"dashboard": how to see it, "later": what to do where the service did not take the run}. Where it
# dies, another one is started and gets this launch from its beginning again.
TRACKERS = {"swanlab": (setup_experiment_tracking, SwanLabRecord)}


# ================================================================================================
# SHARED
# ================================================================================================


class Run:
    """A run directory: its files, and what they say.

    Written by            file                      read by
    launcher              config.yaml, plan.json    ranks, a resume, other nodes
    launcher, or you      STOP                      ranks, at the end of each step; launcher
    you                   SAVE                      ranks, at the end of each step
    rank 0                metrics.jsonl             launcher (console, summary), tracker
    rank 0                data.json, Modelfile      launcher, ranks (settings), later plans; people
    rank 0                scores/step-N.jsonl       people: every scored answer
    each rank             logs/rank<R>.progress     launcher (hang watch, bar): `12 training`
    each rank             logs/rank<R>.log, .error  launcher, where the run failed; people
    launcher              logs/torchrun.log, lock   launcher; people
    tracker               logs/swanlab.json         launcher: has it begun; a resume: id, launches
    tracker               logs/swanlab.log          people
    all ranks             checkpoint-N/             ranks of a resume
    rank 0                checkpoint-N/manifest.json, written last: launcher, ranks of a resume
    launcher              summary.json, training_loss.png: a resume (its state); people
    LLaMA-Factory         trainer_log.jsonl, the model and its card

    Lines of metrics.jsonl, each with time (s), step (the last one done) and tokens (so far):
    {..., "event": "begin", "total_steps": 12}                   at each start of the ranks
    {..., "loss": 7.28, "grad_norm": 1.9, "learning_rate": 0.003, "epoch": 0.08}  and what else
                                                                 the trainer logs, eval_loss too
    {..., "event": "note", "text": "checkpoint-4 is saved, ..."} for the console
    {..., "event": "scores", "at": 12, "name": "", "counts": {"exact": [93.0, 100]},
     "wrong": [{"answer": "...", "reference": "..."}], "seconds": 3.1}
                                                                 before an evaluation's numbers
    {..., "event": "end", "state": "finished", "cause": "", "figures": {"step_seconds": 0.5, ...}}
    """

    def __init__(self, path: Path):
        self.path = path
        self.logs = path / "logs"
        self.config_file = path / "config.yaml"
        self.stop_file = path / "STOP"
        self.save_file = path / "SAVE"
        self.metrics_file = path / "metrics.jsonl"
        self.is_rehearsal = path.name.startswith(REHEARSAL)

    def lock(self) -> IO:
        """Hold the directory; raises LaunchError while another launcher runs here."""
        try:
            self.logs.mkdir(exist_ok=True)
            file = open(self.logs / "lock", "a+b", buffering=0)
        except OSError as error:
            raise LaunchError(
                f"{self.path}: cannot be written: {error.strerror.lower()}"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LaunchError(
                f"{self.path}: this run is still running (launcher pid {file.read().decode()}); "
                "stop it first, or wait"
            ) from None
        except OSError:  # some shared file systems have no locks: nothing to hold
            return file
        with contextlib.suppress(OSError):  # a full disk; the pid is for a message only
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        return file

    def is_running(self) -> bool:
        """Whether a launcher runs here."""
        try:
            if (self.logs / "lock").exists():
                self.lock().close()
        except LaunchError:
            return True
        return False

    def request_stop(self, number: int) -> None:
        """Create the STOP file, which every rank looks for at the end of a step."""
        with contextlib.suppress(OSError):  # on a full disk the file is created nevertheless
            self.stop_file.write_text(signal.Signals(number).name, encoding="utf-8")

    def read(self, name: str) -> dict:
        """A JSON file of the directory, such as plan.json; {} where it is missing or broken."""
        return read_json_or_empty(self.path / name)

    def is_finished(self) -> bool:
        """Whether the run has trained to its end."""
        return self.read("summary.json").get("state") == "finished"

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, without those of steps that were trained again."""
        kept: list[dict] = []
        for line in Follower(self.metrics_file, 0).new_lines():
            if line.get("event") == "begin":
                kept = [old for old in kept if old["step"] <= line["step"]]
            kept.append(line)
        return kept

    def read_progress(self) -> int:
        """The last step that rank 0 has told of."""
        words = read_from(self.logs / "rank0.progress").split()
        return int(words[0]) if words else 0

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, newest first."""
        paths = self.path.glob("*")
        found = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=checkpoint_step, reverse=True)

    def checkpoint_ranks(self) -> int | None:
        """The number of ranks that saved the newest checkpoint; None: there is none."""
        folder = self.newest_checkpoint()
        return folder and read_json_or_empty(folder / MANIFEST)["world_size"]

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that can be resumed from; None: there is none."""
        return next((path for path in self.checkpoints() if not checkpoint_problem(path)), None)


class Follower:
    """Reads what is added to a file of JSON lines, from a byte on (None: from its end)."""

    def __init__(self, path: Path, position: int | None = None):
        self.path = path
        self.position = file_size(path) if position is None else position

    def new_lines(self) -> list[dict]:
        """The whole lines that were added since the last time."""
        lines = []
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            file.seek(self.position)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self.position += len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError):  # a line that a full disk cut
                    lines.append(json.loads(line))
        return lines


# --- checkpoints --------------------------------------------------------------------------------


def commit_checkpoint(
    folder: Path, world_size: int, problem: str = "", state: dict | None = None
) -> None:
    """Make a saved checkpoint durable, then say so: fsync every file, then write the manifest.

    `problem` is why it cannot be resumed from, though it is complete; `state` what a resume must
    bring back.
    """
    files = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        sync(path)
        if path.is_file() and path.name != MANIFEST:  # one is there where a step is saved twice
            files[str(path.relative_to(folder))] = path.stat().st_size
    content = {"world_size": world_size, "problem": problem, "state": state, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a folder; some file systems cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def checkpoint_problem(folder: Path) -> str:
    """Why a checkpoint cannot be resumed from; '' where it can."""
    return incomplete_files(folder) or read_json_or_empty(folder / MANIFEST).get("problem", "")


def incomplete_files(folder: Path) -> str:
    """What a checkpoint lacks: a manifest, or the files that it lists; '' where it is complete."""
    manifest = read_json_or_empty(folder / MANIFEST)
    if not manifest:
        return "it has no manifest"
    for name, size in manifest["files"].items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if file_size(folder / name) != size:
            return f"{name} has {file_size(folder / name)} bytes instead of {size}"
    return ""


def checkpoint_step(folder: Path | None) -> int:
    """The optimizer step of a checkpoint folder; 0 for none."""
    return int(folder.name.rpartition("-")[2]) if folder else 0


def rotate_checkpoints(run: Run, keep: int | None, best: str) -> None:
    """Remove the oldest checkpoints so that `keep` remain; the newest and the `best` always do."""
    if (keep or 0) < 1:
        return
    newest, *older = run.checkpoints()
    older.sort(key=lambda path: path.name != best)  # the best counts first
    spared = max(keep - 1, int(best in [path.name for path in older]))
    for folder in older[spared:]:
        (folder / MANIFEST).unlink(missing_ok=True)  # half removed, it cannot be trusted
        shutil.rmtree(folder, ignore_errors=True)


# --- files and processes ------------------------------------------------------------------------


def read_json_or_empty(path: Path) -> dict:
    """A JSON object of ours; {} where the file is missing or broken."""
    with contextlib.suppress(ValueError):
        return json.loads(read_from(path))
    return {}


def read_from(path: Path, position: int = 0) -> str:
    """The text of a file from a byte on; '' where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(position)
        return file.read().decode("utf-8", errors="replace")
    return ""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file completely or, where that fails, leave the old one as it was."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def file_size(path: Path) -> int:
    """A file's size in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def die_with_parent(parent: int) -> None:
    """Ask Linux to SIGKILL this process when the thread that started it ends (PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main())
