"""Exact removal of logits that no loss reads, under Unsloth: hidden states -> loss of the loss-bearing rows alone.

Unsloth's fused loss multiplies every position with the output head, forward and backward, although only positions t
with ``labels[t + 1] != -100`` add to it. Here the same function gets those rows alone, with their labels shifted
already: the same divisor, the same sum in another order, and a zero gradient everywhere else (DESIGN, section 5). Its
callers, Unsloth's CausalLM forwards, look it up in two modules: Mistral's in its own, every other fast family's in
Llama's. Both names are replaced while at least one model asks; calls for other models pass unchanged. Unsloth does not
call it at all when logits are asked for (``UNSLOTH_RETURN_LOGITS=1``), so they stay complete.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparse_unsloth.errors import AttachError
from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition

MODULES = ("unsloth.models.llama", "unsloth.models.mistral")
FUNCTION = "unsloth_fused_ce_loss"
PARAMETERS = ["trainer", "hidden_states", "lm_head_weight", "lm_head_bias", "labels"]
"""The first five of the fused loss; it must know ``shift_labels`` too."""
ROW_MULTIPLE = 128
"""Rows are handed on in multiples of this, filled up with rows that bear no loss: a matrix product pays for whole tiles
anyway, and the allocator and the kernels' heuristics meet few distinct sizes."""


class Forward(Protocol):
    """What the last decoder layer gets with a forward: the roles of its rows, and where to note that the loss came."""

    partition: TokenPartition
    loss_reached: bool


class LossRowsOnly:
    """One model's wish for loss-bearing rows only; `remove` ends it, and may be called again."""

    def __init__(self, model: nn.Module, last_layer: nn.Module, context_argument: str):
        self._model, self._argument = model, context_argument
        self._context: Forward | None = None
        self._hook = last_layer.register_forward_pre_hook(self._note_context, prepend=True, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_context": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or loaded model asks for itself."""
        self.__dict__.update(state)
        _replace_functions()
        _asking.add(self)

    @property
    def head(self) -> Tensor:
        """The weight of the model's output head, ``[vocabulary, hidden_size]``: it tells whose loss a call computes."""
        return self._model.get_output_embeddings().weight

    def num_rows(self, bears_loss: Tensor) -> int:
        """How many rows to hand on: at least as many as bear loss, a multiple of `ROW_MULTIPLE`.

        A forward with a partition has counted its dense rows, and every labelled token is one, so no more rows bear
        loss (with ``dense_tokens="none"`` none is, and the rows that bear loss were counted themselves). Without a
        partition (evaluation) the host waits for the count.

        Args:
            bears_loss: bool ``[batch * sequence]``.
        """
        if self._context is None:
            count = int(bears_loss.sum())
        else:
            partition = self._context.partition
            count = max(len(partition.dense), len(partition.loss))
        return -(-max(count, 1) // ROW_MULTIPLE) * ROW_MULTIPLE

    def reached(self) -> None:
        """The fused loss got the labels of the forward that runs now."""
        if self._context is not None:
            self._context.loss_reached = True

    def remove(self) -> None:
        """Takes the wish back; after the last one Unsloth's own functions stand in their places again."""
        self._hook.remove()
        _asking.discard(self)
        if not _asking:
            _restore_functions()

    def _note_context(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Every forward passes here before its loss, so this is never an earlier or interrupted forward's.
        self._context = kwargs.get(self._argument)


_asking: WeakSet[LossRowsOnly] = WeakSet()
_replaced: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {}  # by module: (ours, Unsloth's)


def install_loss_removal(model: nn.Module, last_layer: nn.Module, context_argument: str) -> LossRowsOnly:
    """From now on the fused loss of ``model``, which Unsloth loaded, computes loss-bearing rows only.

    Args:
        model: the outermost model; its output head is what ``get_output_embeddings()`` gives.
        last_layer: its last decoder layer.
        context_argument: the keyword argument by which a `Forward` arrives there; without it, rows are counted anew.

    Raises:
        AttachError: the installed Unsloth has no such loss where it is to be replaced, or one with other arguments.
    """
    _replace_functions()
    removal = LossRowsOnly(model, last_layer, context_argument)
    _asking.add(removal)
    return removal


def _replace_functions() -> None:
    modules = [importlib.import_module(name) for name in MODULES]
    for module in modules:
        function = getattr(module, FUNCTION, None)
        names = [] if function is None else list(inspect.signature(function).parameters)
        if names[: len(PARAMETERS)] != PARAMETERS or "shift_labels" not in names:
            raise AttachError(
                f"The installed Unsloth has no {module.__name__}.{FUNCTION}({', '.join(PARAMETERS)}, ..., "
                "shift_labels=), so logits without loss cannot be left out. Install a version that sparse_unsloth is "
                "tested with (`sparse-unsloth doctor` lists it), or set exact_removal: false."
            )
    for module in modules:
        function = getattr(module, FUNCTION)
        if function is not _replaced.get(module.__name__, (None,))[0]:
            ours = _on_loss_rows(function)
            _replaced[module.__name__] = ours, function
            setattr(module, FUNCTION, ours)


def _restore_functions() -> None:
    """Where somebody wrapped ours since, it stays inside that wrapper and passes every call on."""
    for name, (ours, original) in _replaced.items():
        module = importlib.import_module(name)
        if getattr(module, FUNCTION, None) is ours:
            setattr(module, FUNCTION, original)
    _replaced.clear()


def _on_loss_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``original``, given only rows ``[1, n, hidden_size]`` and their labels ``[1, n]`` by the models that ask.

    Calls that mean something else (labels shifted already, a mask, another ignored label, labels that are not one per
    token) and those where no row would be saved pass unchanged.
    """

    @functools.wraps(original)
    def fused_loss(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *args, **kwargs):
        removal = next((one for one in _asking if one.head is lm_head_weight), None)
        usual = kwargs.get("shift_labels", True) is True and kwargs.get("ignore_index", IGNORE_INDEX) == IGNORE_INDEX
        usual = usual and labels.ndim == 2 and labels.shape == hidden_states.shape[:-1]
        if removal is not None and usual and not args and kwargs.get("mask") is None:
            removal.reached()
            subset = _loss_rows(removal, hidden_states, labels)
            if subset is not None:
                rows, labels = subset
                hidden_states = _TakeRows.apply(hidden_states.flatten(0, 1), rows)[None]
                kwargs["shift_labels"] = False
        return original(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *args, **kwargs)

    return fused_loss


def _loss_rows(removal: LossRowsOnly, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(rows int64 [n], their shifted labels [1, n])``, rows with loss first, or None where nothing is saved.

    The rows come from the labels that the loss is given, in which Unsloth has cut documents apart already.
    """
    shifted = labels.roll(-1, dims=1)
    shifted[:, -1] = IGNORE_INDEX
    shifted = shifted.flatten()
    bears_loss = shifted != IGNORE_INDEX
    num_rows = removal.num_rows(bears_loss)
    if num_rows >= len(shifted):
        return None
    rows = bears_loss.byte().argsort(descending=True, stable=True)[:num_rows]
    return rows.to(hidden_states.device), shifted.index_select(0, rows)[None]


class _TakeRows(torch.autograd.Function):
    """``x [N, H] -> x[rows] [n, H]`` for distinct rows, so that backward copies instead of adding atomically."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return dy.new_zeros(ctx.num_rows, dy.shape[1]).index_copy_(0, rows, dy), None
