"""Holds the state of a rank-sparse model between steps, outside the module tree, so that no checkpoint contains it."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_unsloth.rank.config import RankConfig, RankError
from sparse_unsloth.rank.layer import RankLayer

logger = logging.getLogger("sparse_unsloth")

STATE_NAME = "rank_state.safetensors"
"""The file that ``save_pretrained`` writes beside the adapter, and ``load_adapter`` reads back."""
_KEPT = ("importance", "idle")
MAX_BLIND_STEPS = 3
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")
"""Names of optimisers' first moments (PyTorch's; ``state1``: bitsandbytes')."""


class RankState:
    """The layers, the step, and the work between two optimiser steps.

    Attributes:
        step: optimiser steps done.
        handles: hooks that `remove` removes.
    """

    def __init__(self, model: nn.Module, layers: list[RankLayer], config: RankConfig, adapter: str):
        self.model, self.layers, self.config, self.adapter = weakref.ref(model), layers, config, adapter
        self.step = 0
        self.handles: list[RemovableHandle] = []
        self._zero_again = self._warned = self._agreed = False
        self._blind_steps = 0
        self._set_mode()

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        anchor = self.layers[0].whole_A
        return any(parameter is anchor for group in optimizer.param_groups for parameter in group["params"])

    @torch.no_grad()
    def hold_unused(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes the first moments of components that no forward of this step chose; called before the optimiser step.

        Their gradients are zero, but momentum would move them all. Weight decay still applies.
        """
        if not any(layer.forwards for layer in self.layers):
            return
        self._agree()
        for layer in self.layers:
            if not layer.selects or not layer.forwards:
                continue
            unused = layer.unused.bool()
            for whole, shape in ((layer.whole_A, (-1, 1)), (layer.whole_B, (1, -1))):
                kept = optimizer.state.get(whole, {})
                for name in FIRST_MOMENTS:
                    moment = kept.get(name)
                    if torch.is_tensor(moment) and moment.shape == whole.shape:
                        moment.masked_fill_(unused.view(shape), _zero_of(moment, kept))

    @torch.no_grad()
    def advance(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Updates averages after an optimiser step, and every ``prune_after`` steps prunes idle components.

        A hook calls this for PyTorch optimisers; call it after each step of other optimisers.

        Raises:
            RankError: no forward reached a LoRA layer in several steps, so nothing would ever be sparse.
        """
        seen = [layer for layer in self.layers if layer.forwards]
        if not seen:
            # Some loaders create an optimiser's state by a step without a forward.
            self._blind_steps += 1
            if self._blind_steps < MAX_BLIND_STEPS:
                return
            raise RankError(
                f"{MAX_BLIND_STEPS} optimiser steps were done, and no training forward passed any of the "
                f"{len(self.layers)} rank-sparse layers. Apply to the model that is trained, after everything that "
                "replaces its modules."
            )
        self._blind_steps = 0
        self._agree()
        self._agreed = False
        if self.step == 0 and len(seen) < len(self.layers):
            missed = [layer.name for layer in self.layers if not layer.forwards]
            logger.warning("%d rank-sparse layers did not run in the first step: %s ...", len(missed), missed[0])
        self.step += 1
        pending = [layer.pending for layer in seen]
        # While few steps are averaged, all have equal weight.
        weight = max(1 - self.config.importance_decay, 1 / self.step)
        torch._foreach_lerp_([layer.importance for layer in seen], pending, weight)
        torch._foreach_zero_([layer.pending for layer in self.layers])
        for layer in seen:
            layer.forwards = 0
        if seen[0].selects:
            idle, unused = [layer.idle for layer in seen], [layer.unused for layer in seen]
            torch._foreach_add_(idle, 1.0)
            torch._foreach_mul_(idle, unused)
            torch._foreach_zero_(unused)
            torch._foreach_add_(unused, 1.0)
            if self.config.prune_after and self.step % self.config.prune_after == 0:
                self._prune(optimizer)
        if self._zero_again:
            for layer in self.layers:
                if layer.dead is not None:
                    layer.zero_dead()
        for layer in self.layers:
            layer.changed()
        self._set_mode()

    def _agree(self) -> None:
        """Averages the step's importances over its forwards and over all processes, which share one adapter.

        A component is unused if no process chose it.
        """
        if self._agreed:
            return
        self._agreed = True
        pending, unused = [layer.pending for layer in self.layers], [layer.unused for layer in self.layers]
        torch._foreach_div_(pending, [float(max(layer.forwards, 1)) for layer in self.layers])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _reduce(pending, torch.distributed.ReduceOp.SUM)
            torch._foreach_div_(pending, float(torch.distributed.get_world_size()))
            _reduce(unused, torch.distributed.ReduceOp.MIN)

    def _set_mode(self) -> None:
        for layer in self.layers:
            layer.selects = self.step >= self.config.warmup_steps

    def _prune(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Zeroes components that no forward chose in the last ``prune_after`` steps, and their moments.

        The training forward does not change. Shapes stay, so DDP, resuming and optimisers are not affected: a zero
        component has zero gradients, and with zero moments it does not move. At least ``kept`` components remain, since
        those were chosen in the last step.
        """
        for layer in self.layers:
            going = layer.idle >= self.config.prune_after
            if layer.dead is not None:
                going &= ~layer.dead
            index = going.nonzero()[:, 0]
            if len(index):
                layer.prune(index)
                self._forget_moments(layer, index, optimizer)

    def _forget_moments(self, layer: RankLayer, index: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        for whole, dim in ((layer.whole_A, 0), (layer.whole_B, 1)):
            kept = {} if optimizer is None else optimizer.state.get(whole, {})
            values = [value for value in kept.values() if torch.is_tensor(value) and value.numel() > 1]
            plain = [value for value in values if value.is_floating_point() and value.shape == whole.shape]
            for value in plain:
                value.index_fill_(dim, index, 0)
            # Moments of another form (8-bit codes, say) cannot be zeroed; they fade, and their updates are undone.
            self._zero_again |= optimizer is None or len(plain) < len(values)

    def save(self, folder: str | Path) -> None:
        """Writes the state into ``folder``, from which `load` continues this run."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            tensors |= {f"{layer.name}.{name}": getattr(layer, name).cpu() for name in _KEPT}
            if layer.dead is not None:
                tensors[f"{layer.name}.dead"] = layer.dead.cpu()
        metadata = {"step": str(self.step), "zero_again": str(self._zero_again)}
        save_file(tensors, Path(folder) / STATE_NAME, metadata)

    def warn_that_all_were_saved(self, folder: str | Path) -> None:
        """Warns once where plain PEFT would compute more components from ``folder`` than this model in evaluation."""
        more = any(
            layer.retained() is not None and len(layer.best(1.0)) > len(layer.retained()) for layer in self.layers
        )
        if more and not self._warned:
            self._warned = True
            logger.warning(
                "%s holds every rank component, to resume from. They were not trained together: plain PEFT would "
                "answer worse with it than this model does. To use or publish, write "
                "rank.save_pruned_checkpoint(model, path, %g).",
                folder,
                self.config.target_density,
            )

    def load(self, folder: str | Path) -> None:
        """Loads the state that `save` wrote.

        Raises:
            RankError: the file is missing or damaged, or its layers have other names or ranks.
        """
        path = Path(folder) / STATE_NAME
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
        except (OSError, SafetensorError) as error:
            raise RankError(
                f"{path}: cannot be read ({error}). Start afresh without it, or from another one."
            ) from None
        shapes = {name: tuple(value.shape) for name, value in tensors.items() if name.endswith(".importance")}
        expected = {f"{layer.name}.importance": (layer.rank,) for layer in self.layers}
        if shapes != expected:
            other = next(iter(set(shapes.items()) ^ set(expected.items())))
            raise RankError(f"{path}: is of other layers or ranks than this model's (first: {other[0]}, {other[1]}).")
        for layer in self.layers:
            for name in _KEPT:
                setattr(layer, name, tensors[f"{layer.name}.{name}"].to(layer.importance.device))
            dead = tensors.get(f"{layer.name}.dead")
            layer.dead = None if dead is None else dead.to(layer.importance.device)
            layer.pending.zero_()
            layer.unused.fill_(1.0)
            layer.forwards = 0
            layer.changed()
        self.step, self._zero_again = int(metadata["step"]), metadata["zero_again"] == "True"
        self._set_mode()


def _reduce(values: list[Tensor], operation: Any) -> None:
    """Reduces ``values`` in place over all processes, as one message."""
    flat = torch.cat(values)
    torch.distributed.all_reduce(flat, operation)
    torch._foreach_copy_(values, flat.split([len(value) for value in values]))


def _zero_of(moment: Tensor, kept: dict[str, Any]) -> float | int:
    """Zero as ``moment`` stores it; 8-bit moments are indices into a table of values."""
    return 0.0 if moment.is_floating_point() else int(kept["qmap1"].abs().argmin())
