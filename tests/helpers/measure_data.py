"""Measure data sets as a rank does: python measure_data.py CASES.json (a list of arguments).

Prints one JSON list. Of each case: its figures (training data first, then evaluation data), what
record_data wrote or raised, the first sample, what was logged, and the error that ended it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train_qwen3_ft as ft

os.environ["RANK"] = "0"
log = Path(tempfile.mkdtemp(), "log")
console = os.fdopen(os.dup(1), "w")
ft.send_output_to(log)
told: list[tuple] = []
given = ft.Values()
ft.measure_data(given, lambda *args: told.append(args))

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.model import load_tokenizer  # noqa: E402


def record() -> dict[str, str]:
    """What record_data writes and raises for the training data."""
    folder, problem = Path(tempfile.mkdtemp()), ""
    try:
        ft.record_data(ft.Run(folder), *told[0])
    except RuntimeError as error:
        problem = str(error)
    return {"problem": problem, **{path.name: path.read_text() for path in folder.iterdir()}}


def measure() -> dict:
    model_args, data_args, args, method, _ = get_train_args(dict(given))
    tools = load_tokenizer(model_args)
    tokenizer = tools["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    module = get_dataset(template, model_args, data_args, args, method.stage, **tools)
    first = next(iter(module["train_dataset"]))
    shown = ft.mark_learned(first["input_ids"], first["labels"], tokenizer, ("[[", "]]"))
    return {"columns": sorted(first), "marked": shown, **record()}


answers = []
for case in json.loads(Path(sys.argv[1]).read_text()):
    told.clear()
    given.clear()
    given.update(case)
    start = log.stat().st_size
    try:
        answer = measure()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.flush()
    said = log.read_bytes()[start:].decode(errors="replace")
    answers.append(answer | {"figures": [args[0] for args in told], "log": said})
json.dump(answers, console)
console.flush()
