"""Checkpointed models whose layers keep attention, and how often attention's kernels run."""

from collections import Counter
from math import inf

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_unsloth import attach, get_state
from sparse_unsloth.ops.kept_attention import KERNELS
from sparse_unsloth.runtime import checkpoint_planner

BUDGET = 0.9 if torch.cuda.is_available() else 2.0


def keep_attention_alone(monkeypatch):
    """Lets planners keep attention of documents of any length, and no layer's activations."""
    monkeypatch.setattr(checkpoint_planner, "KEEPS_ATTENTION", True)
    monkeypatch.setattr(checkpoint_planner, "LEAST_ATTENTION", 0)
    monkeypatch.setattr(checkpoint_planner.CheckpointPlanner, "_needs", lambda *given: [inf])


def attach_keeping(model, sparsity, **changes):
    """The state of ``model`` at the beginning of training, with a planner."""
    attach(model, {**sparsity, "exact_removal": False, "memory_budget": BUDGET, **changes})
    state = get_state(model)
    state.config = state.config.model_copy(update={"exact_removal": True})  # stand-ins have no fused loss
    state.begin_training("test", max_steps=100)
    state.set_step(0)
    return state


class Kernels(TorchDispatchMode):
    """Counts the calls of attention's kernels, forward, and of their backwards."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in KERNELS:
            self.calls["forward"] += 1
        elif name.removesuffix("_backward") in KERNELS or name == "aten::_flash_attention_backward":
            self.calls["backward"] += 1
        return func(*args, **(kwargs or {}))
