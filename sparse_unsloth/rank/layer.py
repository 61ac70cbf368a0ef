"""Makes A and B of a LoRA layer show chosen rank components only: those of a training forward, or the retained ones."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.rank.config import RankConfig, RankError, count_of

logger = logging.getLogger("sparse_unsloth")

STUCK_FORWARDS = 1000
"""More forwards than gradient accumulation runs between two optimiser steps."""


class ShownLinear(nn.Linear):
    """A LoRA factor whose ``weight`` is the whole parameter, or some of its rows or columns; see `RankLayer.show`.

    Code that reads ``lora_A[adapter].weight`` (PEFT's forward and merge, our functions, Unsloth's) computes with those
    components. Code that works on parameters (optimisers, checkpoints) sees all.
    """

    _rank_layer: RankLayer
    _rank_dim: int

    @property
    def weight(self) -> Tensor:
        whole = self._parameters["weight"]
        layer = self.__dict__.get("_rank_layer")
        return whole if layer is None else layer.show(whole, self._rank_dim)


@dataclass
class _Choice:
    """The components of one forward of one layer; chosen at the first use, and kept to the end of the forward."""

    source: Tensor | None
    """The layer's input, ``[..., in]``; None where it is not known before the branch is computed."""
    index: Tensor | None = None
    made: bool = False
    weights: dict[tuple[int, bool], Tensor] = field(default_factory=dict)


class RankLayer:
    """The importances of one layer's components, and the choice of those that its forward computes.

    Args:
        name: of the module in the model.
        module: PEFT's LoRA layer.
        adapter: whose factors these are.

    Attributes:
        importance: moving average of the contextual importance, fp32 ``[r]``; sums to one once a step is done.
        pending: sum of the contextual importances over the ``forwards`` forwards of this step, fp32 ``[r]``.
        idle: optimiser steps since a component was last chosen, fp32 ``[r]``.
        unused: 1 where no forward of this step chose the component, else 0; fp32 ``[r]``.
        dead: bool ``[r]``, the pruned components; None while there are none.
        forced: int64, the components to compute in every mode; None: the usual ones.
    """

    def __init__(self, name: str, module: nn.Module, adapter: str, config: RankConfig):
        self.name, self.module, self.adapter = name, module, adapter
        self.A: ShownLinear = module.lora_A[adapter]
        self.B: ShownLinear = module.lora_B[adapter]
        self.rank = len(self.whole_A)
        self.kept = config.kept(self.rank)
        self.selects = False
        """Whether forwards choose; during warm-up they compute everything and only add up importances."""
        zeros = torch.zeros(self.rank, dtype=torch.float32, device=self.whole_A.device)
        self.importance, self.pending, self.idle = zeros, zeros.clone(), zeros.clone()
        self.unused = torch.ones_like(zeros)
        self.dead: Tensor | None = None
        self.forced: Tensor | None = None
        self.forwards = 0
        self._config = config
        self._choice: _Choice | None = None
        self._norms: tuple[tuple[int, int], Tensor, Tensor] | None = None
        self._retained: Tensor | None = None

    @property
    def whole_A(self) -> Tensor:
        """``[r, in]``, the parameter."""
        return nn.Module.__getattr__(self.A, "weight")

    @property
    def whole_B(self) -> Tensor:
        """``[out, r]``, the parameter."""
        return nn.Module.__getattr__(self.B, "weight")

    def install(self) -> None:
        """Makes the factors show chosen components. (Their class changes; names, parameters and state dict do not.)"""
        for factor, dim in ((self.A, 0), (self.B, 1)):
            factor.__class__ = ShownLinear
            factor.__dict__.update(_rank_layer=self, _rank_dim=dim)

    def uninstall(self) -> None:
        for factor in (self.A, self.B):
            factor.__class__ = nn.Linear
            del factor.__dict__["_rank_layer"], factor.__dict__["_rank_dim"]

    def open(self, source: Tensor | None) -> None:
        """Begins a forward; in training the factors show the components chosen for ``source`` until `close`."""
        if self.module.training and not self.module.merged and not self.module.disable_adapters:
            self._choice = _Choice(source)

    def close(self) -> None:
        self._choice = None

    def show(self, whole: Tensor, dim: int) -> Tensor:
        """The weight that the factor with parameter ``whole`` shows: ``whole``, or ``k`` rows (0) or columns (1) of it.

        Inside a training forward these are the chosen components. Otherwise (evaluation, generation, merging) they are
        those of a pruned checkpoint of the target density; during warm-up, all.

        Raises:
            RankError: FSDP shards the factor.
        """
        if self.forced is not None:
            return self._part(whole, dim, self.forced)
        choice = self._choice
        if choice is None:
            index = self.retained()
            return whole if index is None else self._part(whole, dim, index)
        if not choice.made:
            choice.index, choice.made = self._choose(choice.source), True
        if choice.index is None:
            return whole
        key = (dim, torch.is_grad_enabled())
        if key not in choice.weights:
            choice.weights[key] = self._part(whole, dim, choice.index)
        return choice.weights[key]

    def _part(self, whole: Tensor, dim: int, index: Tensor) -> Tensor:
        part = whole.index_select(dim, index)
        return part * self.gain if dim == 1 and self.gain != 1 else part

    @property
    def gain(self) -> float:
        """The factor on the output of each component; 1 during warm-up.

        It scales the branch for the computed rank in place of the whole rank: ``alpha / sqrt(kept)`` with
        rank-stabilised scaling.
        """
        return math.sqrt(self.rank / self.kept) if self.selects else 1.0

    @torch.no_grad()
    def _choose(self, source: Tensor | None) -> Tensor | None:
        """The chosen components, int64 ``[kept]``, ascending; None: all. It is a function of input and step.

        So the recompute under gradient checkpointing chooses what its forward chose. It adds its importances a second
        time, which does not change their mean over the step's forwards.
        """
        if isinstance(self.whole_A, DTensor):
            raise RankError(
                f"{self.name}: FSDP shards this adapter, and components are chosen from whole factors. Train with DDP, "
                "or keep LoRA parameters out of the sharding."
            )
        if self.importance.device != self.whole_A.device:
            self._follow(self.whole_A.device)
        contextual = self.contextual_importance(source)
        self.pending += contextual
        self.forwards += 1
        if self.forwards == STUCK_FORWARDS:
            logger.warning(
                "%s: %d forwards since the last optimiser step that rank-sparse LoRA noticed, so nothing gets sparse. "
                "If your optimiser is not one of PyTorch's, or keeps copies of the parameters, call "
                "get_rank_state(model).advance() after each step.",
                self.name,
                STUCK_FORWARDS,
            )
        if not self.selects:
            return None
        if self.kept >= self.rank:
            self.unused.zero_()
            return None
        weight = self._config.importance_lambda
        score = torch.lerp(contextual, self.importance, weight)
        if self.dead is not None:
            score = score.masked_fill_(self.dead, -1.0)
        index = score.topk(self.kept).indices.sort().values
        self.unused.index_fill_(0, index, 0.0)
        return index

    def _follow(self, device: torch.device) -> None:
        """Moves the layer's tensors to ``device``; those on the meta device are made anew."""
        for name in ("importance", "pending", "idle", "unused", "dead"):
            value = getattr(self, name)
            if value is not None:
                fresh = torch.ones_like if name == "unused" else torch.zeros_like
                setattr(self, name, fresh(value, device=device) if value.is_meta else value.to(device))

    @torch.no_grad()
    def contextual_importance(self, source: Tensor | None) -> Tensor:
        """``|x A_i| |B_i|`` over at most ``score_rows`` rows of ``source`` (None: ``|A_i| |B_i|``), fp32 ``[r]``.

        It sums to one, or is zero if B or every row is zero.
        """
        norm_A, norm_B = self._factor_norms()
        if source is not None:
            rows = source.detach().flatten(0, -2)
            rows = rows[:: -(-len(rows) // self._config.score_rows)] if len(rows) else rows
            with torch.autocast(rows.device.type, enabled=False):
                norm_A = _norms(rows @ self.whole_A.to(rows.dtype).t(), 0)
        importance = norm_A * norm_B
        return importance / importance.sum().clamp_min(torch.finfo(torch.float32).tiny)

    def _factor_norms(self) -> tuple[Tensor, Tensor]:
        """``|A_i|`` and ``|B_i|``, computed anew after a write to the weights."""
        # Fused optimisers may not change the version counters, so steps call `changed` as well.
        versions = self.whole_A._version, self.whole_B._version
        if self._norms is None or self._norms[0] != versions:
            self._norms = versions, _norms(self.whole_A, 1), _norms(self.whole_B, 0)
        return self._norms[1:]

    def changed(self) -> None:
        """Drops everything computed from weights and importances, because they changed."""
        self._norms = self._retained = None

    @torch.no_grad()
    def prune(self, index: Tensor) -> None:
        """Sets the components ``index`` (int64) to zero in A and B, and marks them as pruned."""
        if self.dead is None:
            self.dead = torch.zeros(self.rank, dtype=torch.bool, device=self.importance.device)
        self.dead.index_fill_(0, index, True)
        self.importance.index_fill_(0, index, 0.0)
        self.zero_dead()

    @torch.no_grad()
    def zero_dead(self) -> None:
        for whole, dim in ((self.whole_A, 0), (self.whole_B, 1)):
            whole.index_fill_(dim, self.dead.nonzero()[:, 0], 0.0)
        self.changed()

    def retained(self) -> Tensor | None:
        """The components to use outside training, int64, ascending, as many as a step computes; None: all."""
        if not self.selects or self.kept >= self.rank:
            return None
        if self._retained is None or self._retained.device != self.whole_A.device:
            self._retained = self.best(self._config.target_density)
        return self._retained

    @torch.no_grad()
    def best(self, ratio: float) -> Tensor:
        """The most important components, a share ``ratio`` of all, without pruned ones; int64, ascending.

        Before the first step, when no importance is accumulated, ``|A_i| |B_i|`` decides.
        """
        if self.importance.device != self.whole_A.device:
            self._follow(self.whole_A.device)
        score = self.importance
        if not bool(score.any()):
            score = self.contextual_importance(None)
        alive = self.rank if self.dead is None else int((~self.dead).sum())
        if self.dead is not None:
            score = score.masked_fill(self.dead, -1.0)
        count = min(alive, count_of(ratio, self.rank))
        return score.topk(count).indices.sort().values


def _norms(matrix: Tensor, dim: int) -> Tensor:
    """L2 norms along ``dim``, fp32, accumulated in fp32 or higher precision."""
    accumulator = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix, dim=dim, dtype=accumulator).float()
