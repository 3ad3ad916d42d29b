"""What the plan has for each phase of training, to compare it with what is measured."""

from __future__ import annotations

import train_qwen3_ft as ft
from helpers import SCRIPT  # noqa: F401 - makes the script importable


def bare_plan(
    shape: dict, zero: ft.Zero, ranks: int, room: int | None = None, **values: object
) -> ft.Plan:
    """The plan of full fine-tuning in bf16, before its estimate, of a model of this config.json on
    `ranks` GPUs of `room` bytes each.
    """
    model, steps = ft.Model("", ft.count_parameters(shape), shape), ft.Steps(None, None, None)
    given = ft.Values(finetuning_type="full", bf16=True, **values)
    return ft.Plan(
        ft.Devices(("0",), "", ranks), [], ranks, zero, given, steps, model, room, 0, {}
    )


def plan_phases(
    shape: dict, batch: int, tokens: int, checkpointing: bool, ranks: int
) -> dict[str, int]:
    """{phase: bytes beside the model states} under ZeRO-3, by the plan; the phases of
    memory_tracker.track.
    """
    plan = bare_plan(
        shape,
        ft.Zero(3, used=True),
        ranks,
        cutoff_len=tokens,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        eval_strategy="steps",
        disable_gradient_checkpointing=not checkpointing,
    )
    found = {phase: sum(parts.values()) for phase, parts in ft.estimate_phases(plan).items()}
    found["forward/backward"] = max(found.pop("loss"), found.pop("backward"))
    return found
