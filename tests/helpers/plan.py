"""What the plan has for each phase of training, to compare it with what is measured."""

from __future__ import annotations

from helpers import SCRIPT  # noqa: F401 - makes the script importable
from train_qwen3_ft import (
    Devices,
    Model,
    Plan,
    Steps,
    Values,
    Zero,
    count_parameters,
    estimate_phases,
)


def plan_phases(
    shape: dict, batch: int, tokens: int, checkpointing: bool, ranks: int
) -> dict[str, int]:
    """{phase: bytes beside the model states} in bf16 under ZeRO-3, by the plan; the phases of
    memory_tracker.track.
    """
    values = Values(
        bf16=True,
        cutoff_len=tokens,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        eval_strategy="steps",
        disable_gradient_checkpointing=not checkpointing,
    )
    model, steps = Model("", count_parameters(shape), shape), Steps(None, None, None)
    devices, zero = Devices(("0",), "", ranks), Zero(3, used=True)
    plan = Plan(devices, [], ranks, zero, values, steps, model, None, 0)
    found = {phase: sum(parts.values()) for phase, parts in estimate_phases(plan).items()}
    found["forward/backward"] = max(found.pop("loss"), found.pop("backward"))
    return found
