"""Faults planted into the ranks of a run.

FAULTS is a JSON list of {"point", "step", "rank" (0), "name"}; each strikes once, which a file in FAULT_MARKERS
remembers, so that the run that is restarted goes through.
"""

import ctypes
import importlib.abc
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path


def strike_once(fault):
    """Whether this fault has not struck yet; it has from now on."""
    name = fault.get("name", f"{fault['point']}-{fault['step']}")
    try:
        os.close(
            os.open(os.path.join(os.environ["FAULT_MARKERS"], name), os.O_CREAT | os.O_EXCL)
        )
    except FileExistsError:
        return False
    return True


def die(fault):
    """Be killed here, unless this fault has struck already."""
    if strike_once(fault):
        os.kill(os.getpid(), signal.SIGKILL)


def at_event(fault, wanted, pattern):
    """Die just before a file of this checkpoint is opened for writing ("open") or renamed ("os.rename")."""
    expression = re.compile(rf"checkpoint-{fault['step']}/{pattern}")

    def hook(event, arguments):
        if (
            event == wanted
            and expression.search(str(arguments[0]))
            and (wanted != "open" or "w" in str(arguments[1]))
        ):
            die(fault)

    sys.addaudithook(hook)


def in_rotation(fault):
    """Die when two files of this checkpoint have been removed."""
    left = [0]

    def hook(event, arguments):
        if event == "shutil.rmtree" and re.search(
            rf"checkpoint-{fault['step']}\b", str(arguments[0])
        ):
            left[0] = 3
        elif event == "os.remove" and left[0]:
            left[0] -= 1
            if left[0] == 0:
                die(fault)

    sys.addaudithook(hook)


class Patch(importlib.abc.MetaPathFinder):
    """Calls `change(module)` as soon as the module `name` has been imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def before(owner, method, action):
    """Call `action(self, *args)` before each call of `owner.method`."""
    original = getattr(owner, method)

    def wrapped(self, *args, **kwargs):
        action(self, *args)
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def after_weights(fault):
    def action(engine, folder, *args):
        if folder.endswith(f"checkpoint-{fault['step']}"):
            die(fault)

    Patch(
        "deepspeed.runtime.engine",
        lambda module: before(module.DeepSpeedEngine, "save_checkpoint", action),
    )


def after_one_shard(fault):
    """Rank 1 dies before it writes its shard, once rank 0 has written its own (and the script that lies beside it)."""

    def action(engine, folder, tag):
        if folder.endswith(f"checkpoint-{fault['step']}"):
            while not os.path.exists(os.path.join(folder, "zero_to_fp32.py")):
                time.sleep(0.01)
            die(fault)

    Patch(
        "deepspeed.runtime.engine",
        lambda module: before(module.DeepSpeedEngine, "_save_zero_checkpoint", action),
    )


def in_step(fault, act):
    calls = [0]

    def action(trainer, *args):
        calls[0] += 1
        if calls[0] == fault["step"] and strike_once(fault):
            act()

    Patch(
        "transformers.trainer", lambda module: before(module.Trainer, "training_step", action)
    )


def in_each_step(fault, act):
    """Call `act(model, inputs)` before every training step from this one on, in every start."""
    calls = [0]

    def action(trainer, model, inputs, *args):
        calls[0] += 1
        if calls[0] >= fault.get("step", 1):
            act(model, inputs)

    Patch(
        "transformers.trainer", lambda module: before(module.Trainer, "training_step", action)
    )


def nan_loss(fault):
    """From this step on the loss is NaN, while the weights stay what they are."""

    def change(module):
        original, calls = module.Trainer.training_step, [0]

        def wrapped(*args, **kwargs):
            calls[0] += 1
            loss = original(*args, **kwargs)
            return loss * float("nan") if calls[0] >= fault["step"] else loss

        module.Trainer.training_step = wrapped

    Patch("transformers.trainer", change)


def nan_weights(model, inputs):
    parameter = next(model.parameters())
    getattr(parameter, "ds_tensor", parameter).data[:1] = float("nan")


def out_of_memory(fault):
    """A GPU that holds so many samples at once and no more, or no more of them where the batch is
    padded to more tokens than `over`.
    """

    def act(model, inputs):
        import torch

        samples, tokens = inputs["input_ids"].shape
        if samples > fault["samples"] and tokens > fault.get("over", 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    in_each_step(fault, act)


def out_of_memory_in_evaluation(fault):
    """A GPU that holds so many samples of an evaluation at once and no more."""

    def action(trainer, model, inputs, *args):
        import torch

        if len(inputs["input_ids"]) > fault["samples"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    Patch(
        "transformers.trainer", lambda module: before(module.Trainer, "prediction_step", action)
    )


def in_scoring(fault, act):
    """At the start of these answers of a rank, counted over all evaluations of a start."""
    calls = [0]

    def action(*args):
        calls[0] += 1
        if calls[0] == fault["step"] and strike_once(fault):
            act()

    Patch(
        "transformers.generation.utils",
        lambda module: before(module.GenerationMixin, "generate", action),
    )


def out_of_memory_in_scoring(fault):
    """A GPU that holds so many answers at once and no more."""

    def change(module):
        import torch

        original = module.GenerationMixin.generate

        def wrapped(model, **options):
            if len(options["input_ids"]) > fault["samples"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(model, **options)

        module.GenerationMixin.generate = wrapped

    Patch("transformers.generation.utils", change)


def other_version(fault):
    """This rank's node has another version of a package."""
    original = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        fault["version"] if name == fault["package"] else original(name)
    )


def stale_folder(fault):
    """This rank's node does not see yet that a folder is there."""
    original = Path.glob
    Path.glob = lambda self, pattern, **options: (
        path for path in original(self, pattern, **options) if path.name != fault["hidden"]
    )


def sleep_in_collator(fault):
    """The batch of this step is never made."""
    batches = [0]

    def action(*args):
        batches[0] += 1
        if batches[0] == fault["step"] and strike_once(fault):
            time.sleep(600)

    Patch(
        "llamafactory.data.collator",
        lambda module: before(module.SFTDataCollatorWith4DAttentionMask, "__call__", action),
    )


def save_slowly(fault):
    """Each checkpoint takes so many seconds longer."""
    Patch(
        "transformers.trainer",
        lambda module: before(
            module.Trainer, "_save_checkpoint", lambda *args: time.sleep(fault["seconds"])
        ),
    )


def leave_out_a_collective():
    """The other ranks wait in a collective that this rank never enters."""
    import torch

    torch.distributed.barrier()


def stop_here():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise RuntimeError("planted fault: the third sample is bad")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail_out_of_memory():
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def outlive_torchrun(seconds):
    """A rank that kills torchrun, and stays though its end was asked for."""
    ctypes.CDLL(None).prctl(1, 0)  # torchrun's end does not end this process
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(seconds)
    os._exit(1)


def slow_log(fault):
    """Each line that LLaMA-Factory's thread writes to trainer_log.jsonl takes `seconds`."""
    wait = lambda *arguments: time.sleep(fault["seconds"])  # noqa: E731
    Patch(
        "llamafactory.train.callbacks",
        lambda module: before(module.LogCallback, "_write_log", wait),
    )


def slow_down(fault):
    """Give the test time to act between two steps."""
    Patch(
        "transformers.trainer",
        lambda module: before(module.Trainer, "training_step", lambda *args: time.sleep(0.4)),
    )


def clock(fault):
    """Write down when each training step was done."""

    def change(module):
        original = module.Trainer.training_step

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            with open(os.path.join(os.environ["FAULT_MARKERS"], "clock"), "a") as file:
                file.write(f"{time.time()}\n")
            return result

        module.Trainer.training_step = wrapped

    Patch("transformers.trainer", change)


def hold_tokenization(fault):
    def action(self, *args):
        time.sleep(fault.get("seconds", 300))

    Patch(
        "llamafactory.data.processor.supervised",
        lambda module: before(module.SupervisedDatasetProcessor, "preprocess_dataset", action),
    )


def before_final_save(fault):
    """Die when all checkpoints are committed and the final model is about to be written."""

    def change(module):
        original = module.Trainer.save_model

        def wrapped(trainer, *args, _internal_call=False, **kwargs):
            if not _internal_call:
                die(fault)
            return original(trainer, *args, _internal_call=_internal_call, **kwargs)

        module.Trainer.save_model = wrapped

    Patch("transformers.trainer", change)


POINTS = {
    "weights": after_weights,
    "one shard": after_one_shard,
    "trainer state": lambda fault: at_event(fault, "open", r"trainer_state\.json"),
    "manifest": lambda fault: at_event(fault, "open", r"manifest\.json"),
    "manifest rename": lambda fault: at_event(fault, "os.rename", r"manifest\.json"),
    "rotation": in_rotation,
    "raise": lambda fault: in_step(fault, fail),
    "kill": lambda fault: in_step(fault, kill),
    "nan loss": nan_loss,
    "nan weights": lambda fault: in_each_step(fault, nan_weights),
    "out of memory": out_of_memory,
    "out of memory in evaluation": out_of_memory_in_evaluation,
    "other version": other_version,
    "stale folder": stale_folder,
    "out of memory once": lambda fault: in_step(fault, fail_out_of_memory),
    "outlive torchrun": lambda fault: in_step(
        fault, lambda: outlive_torchrun(fault["seconds"])
    ),
    "slow log": slow_log,
    "SIGSTOP": lambda fault: in_step(fault, stop_here),
    "sleep in collator": sleep_in_collator,
    "save slowly": save_slowly,
    "collective left out": lambda fault: in_step(fault, leave_out_a_collective),
    "slow": slow_down,
    "clock": clock,
    "out of memory in scoring": out_of_memory_in_scoring,
    "kill in scoring": lambda fault: in_scoring(fault, kill),
    "hang in scoring": lambda fault: in_scoring(fault, lambda: time.sleep(600)),
    "hold tokenization": hold_tokenization,
    "final save": before_final_save,
}


def plant():
    for fault in json.loads(os.environ["FAULTS"]):
        if str(fault.get("rank", 0)) == os.environ["RANK"]:
            POINTS[fault["point"]](fault)
