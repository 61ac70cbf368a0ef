"""Gives Unsloth's fused loss the rows of loss positions only (docs/how-it-works.md, section 5.1).

The fused loss multiplies every row by the output head, forward and backward. Here it receives only the loss positions,
with labels that are shifted already: the same divisor, the same sum in another order, and a zero gradient elsewhere.
Unsloth's CausalLM forwards look the function up in two modules: Mistral's in its own, those of other families in
Llama's. Both names are replaced as long as a model uses this; calls for other models pass unchanged. Unsloth does not
call the function when logits are requested (``UNSLOTH_RETURN_LOGITS=1``), so logits stay complete.
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
"""The first five parameters of the fused loss, which must also have ``shift_labels``."""
ROW_MULTIPLE = 128
"""The number of rows is rounded up to a multiple of this, with rows that add nothing to the loss: a matmul computes
whole tiles anyway, and the allocator and the kernels' heuristics see few distinct sizes."""


class Forward(Protocol):
    """What the last decoder layer receives in a forward: the token roles, and whether the fused loss was called."""

    partition: TokenPartition
    loss_reached: bool


class LossRowsOnly:
    """Registers one model for a loss over loss positions only, until `remove`."""

    def __init__(self, model: nn.Module, last_layer: nn.Module, context_argument: str):
        self._model, self._argument = model, context_argument
        self._context: Forward | None = None
        self._hook = last_layer.register_forward_pre_hook(self._note_context, prepend=True, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_context": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Registers the copied or loaded model too."""
        self.__dict__.update(state)
        _replace_functions()
        _registered.add(self)

    @property
    def head(self) -> Tensor:
        """The weight of the output head, ``[vocabulary, hidden_size]``: identifies the model whose loss is computed."""
        return self._model.get_output_embeddings().weight

    def num_rows(self, is_loss: Tensor) -> int:
        """The number of rows for the fused loss: at least all loss positions, a multiple of `ROW_MULTIPLE`.

        With a partition it follows from counts that the host knows: loss positions are not more than labelled tokens,
        which are loss tokens (with ``dense_tokens="none"`` the loss positions are counted). Without a partition, in
        evaluation, the host waits for the count.

        Args:
            is_loss: bool ``[batch * sequence]``: the loss positions.
        """
        if self._context is None:
            count = int(is_loss.sum())
        else:
            count = self._context.partition.num_labelled
        return -(-max(count, 1) // ROW_MULTIPLE) * ROW_MULTIPLE

    def reached(self) -> None:
        """Notes that the fused loss of the present forward was called."""
        if self._context is not None:
            self._context.loss_reached = True

    def remove(self) -> None:
        """Unregisters the model; after the last one Unsloth's own functions are restored. May be called again."""
        self._hook.remove()
        _registered.discard(self)
        if not _registered:
            _restore_functions()

    def _note_context(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Every forward runs this before its loss, so the context is never that of an earlier forward.
        self._context = kwargs.get(self._argument)


_registered: WeakSet[LossRowsOnly] = WeakSet()
_replaced: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {}  # by module: (ours, Unsloth's)


def install_loss_removal(model: nn.Module, last_layer: nn.Module, context_argument: str) -> LossRowsOnly:
    """Makes the fused loss of ``model``, which Unsloth loaded, compute loss positions only.

    Args:
        model: the outermost model; ``get_output_embeddings()`` is its output head.
        last_layer: its last decoder layer.
        context_argument: the keyword argument by which the layer receives a `Forward`; without one, rows are counted.

    Raises:
        AttachError: the installed Unsloth lacks the fused loss in one of `MODULES`, or its parameters are different.
    """
    _replace_functions()
    removal = LossRowsOnly(model, last_layer, context_argument)
    _registered.add(removal)
    return removal


def _replace_functions() -> None:
    modules = [importlib.import_module(name) for name in MODULES]
    for module in modules:
        function = getattr(module, FUNCTION, None)
        names = [] if function is None else list(inspect.signature(function).parameters)
        if names[: len(PARAMETERS)] != PARAMETERS or "shift_labels" not in names:
            raise AttachError(
                f"The installed Unsloth has no {module.__name__}.{FUNCTION}({', '.join(PARAMETERS)}, ..., "
                "shift_labels=), so logits that no loss reads cannot be skipped. Install a version that sparse_unsloth "
                "is tested with (`sparse-unsloth doctor` lists it), or set exact_removal: false."
            )
    for module in modules:
        function = getattr(module, FUNCTION)
        if function is not _replaced.get(module.__name__, (None,))[0]:
            ours = _on_loss_rows(function)
            _replaced[module.__name__] = ours, function
            setattr(module, FUNCTION, ours)


def _restore_functions() -> None:
    """Where others have wrapped our function, it stays inside their wrapper and passes every call on."""
    for name, (ours, original) in _replaced.items():
        module = importlib.import_module(name)
        if getattr(module, FUNCTION, None) is ours:
            setattr(module, FUNCTION, original)
    _replaced.clear()


def _on_loss_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``original`` on selected rows ``[1, n, hidden_size]`` and their labels ``[1, n]``, for registered models.

    Calls with another meaning (shifted labels, a mask, another ignored label, not one label per token) and calls that
    would save no row pass unchanged.
    """

    @functools.wraps(original)
    def fused_loss(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *args, **kwargs):
        removal = next((each for each in _registered if each.head is lm_head_weight), None)
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
    """``(rows int64 [n], their shifted labels [1, n])``, loss positions first, or None if no row would be saved.

    Rows are read from the labels that the loss receives, where Unsloth has already separated documents.
    """
    shifted = labels.roll(-1, dims=1)
    shifted[:, -1] = IGNORE_INDEX
    shifted = shifted.flatten()
    is_loss = shifted != IGNORE_INDEX
    num_rows = removal.num_rows(is_loss)
    if num_rows >= len(shifted):
        return None
    rows = is_loss.byte().argsort(descending=True, stable=True)[:num_rows]
    return rows.to(hidden_states.device), shifted.index_select(0, rows)[None]


class _TakeRows(torch.autograd.Function):
    """``x [N, H]`` to ``x[rows] [n, H]`` for distinct rows: its backward copies and needs no atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return dy.new_zeros(ctx.num_rows, dy.shape[1]).index_copy_(0, rows, dy), None
