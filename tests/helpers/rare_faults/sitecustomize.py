"""Faults that one test each needs, planted like those of ../faults and with their tools.

RARE_FAULTS is a JSON list like FAULTS. "out of memory": a step fails as PyTorch does on a full GPU.
"outlive torchrun": a rank kills torchrun, and stays for `seconds` though its end was asked for.
"slow log": each line that LLaMA-Factory's thread writes to trainer_log.jsonl takes `seconds`.
"""

import ctypes
import importlib.util
import json
import os
import signal
import time
from pathlib import Path

FAULTS = Path(__file__).resolve().parent.parent / "faults" / "sitecustomize.py"
spec = importlib.util.spec_from_file_location("faults", FAULTS)
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)


def out_of_memory(fault):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def outlive_torchrun(fault):
    ctypes.CDLL(None).prctl(1, 0)  # torchrun's end does not end this process
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(fault["seconds"])
    os._exit(1)


def slow_log(fault):
    def change(module):
        wait = lambda *arguments: time.sleep(fault["seconds"])  # noqa: E731
        faults.before(module.LogCallback, "_write_log", wait)

    faults.Patch("llamafactory.train.callbacks", change)


POINTS = {
    "out of memory": lambda fault: faults.in_step(fault, lambda: out_of_memory(fault)),
    "outlive torchrun": lambda fault: faults.in_step(fault, lambda: outlive_torchrun(fault)),
    "slow log": slow_log,
}


if "LOCAL_RANK" in os.environ and "RARE_FAULTS" in os.environ:
    for fault in json.loads(os.environ["RARE_FAULTS"]):
        if str(fault.get("rank", 0)) == os.environ["RANK"]:
            POINTS[fault["point"]](fault)
