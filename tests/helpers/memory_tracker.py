"""What torch's own tracker says a training step takes, without a GPU and without the memory.

Tensors under FakeTensorMode have a shape and a type and no data; MemTracker adds up those that are
alive. The layers, the loss and the optimizer are those of transformers and torch; what DeepSpeed
does in its step is repeated here, since it needs real processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM


def track(shape: dict, batch: int, tokens: int, checkpointing: bool, ranks: int) -> dict:
    """{phase: bytes at its peak beside the model states} of a model in bf16 on one device.

    `shape` is its config.json. The gradients of an earlier micro-batch are there, as in
    accumulation; the optimizer has the share of one of `ranks`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = AutoConfig.for_model(**shape, use_cache=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})  # LLaMA-Factory's way
            model.enable_input_require_grads()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids}
        if batch == 1:  # without padding there is no mask; transformers makes one while tracing
            inputs["attention_mask"] = {"full_attention": None}
        count = sum(parameter.numel() for parameter in model.parameters())
        return {
            "forward/backward": peak(lambda: train(model, inputs), model),
            "optimizer step": track_step(count // ranks),
            "evaluation": peak(lambda: evaluate(model, inputs), model),
        }


class WholeTracker(MemTracker):
    """Without the peaks of each module, whose search takes longer with every layer."""

    def _update_peak_stats(self, peak_state: object) -> None:
        modules, self.memory_tracking = self.memory_tracking, {}
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


def peak(action: Callable[[], object], *there: object) -> int:
    """The most bytes that `action` has alive at once, beside what is there before."""
    tracker = WholeTracker()
    tracker.track_external(*there)
    before = total(tracker, "current")
    with tracker:
        action()
    return total(tracker, "peak") - before


def total(tracker: MemTracker, kind: str) -> int:
    """Bytes over all devices."""
    return sum(found["Total"] for found in tracker.get_tracker_snapshot(kind).values())


def train(model: torch.nn.Module, inputs: dict) -> None:
    """One micro-batch; like Trainer.compute_loss it drops the logits before backward."""
    model.train()
    model(**inputs).loss.backward()


def evaluate(model: torch.nn.Module, inputs: dict) -> None:
    """One batch of an evaluation."""
    model.eval()
    with torch.no_grad():
        model(**inputs)


def track_step(count: int) -> int:
    """Bytes beside the states while DeepSpeedZeroOptimizer_Stage3.step updates `count` parameters:
    one group of at most 1e9 after the other (_prepare_fp32_grad_for_sub_group).
    """
    size = min(count, 10**9)
    master = torch.nn.Parameter(torch.empty(size))
    optimizer = torch.optim.AdamW([master], fused=True)
    master.grad = torch.zeros_like(master)
    optimizer.step()
    master.grad = None
    averaged = torch.empty(size, dtype=torch.bfloat16)

    def step() -> None:
        master.grad = torch.cat([averaged]).float()
        optimizer.step()

    return peak(step, optimizer, master, averaged)
