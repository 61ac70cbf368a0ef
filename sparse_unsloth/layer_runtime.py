"""What a hooked layer reads of the forward that runs through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_unsloth.channel_selections import AttentionSelection, MlpSelection
from sparse_unsloth.context import SparseContext
from sparse_unsloth.errors import AttachError
from sparse_unsloth.layer_rules import LayerSparsity
from sparse_unsloth.layers import DecoderLayer
from sparse_unsloth.modes import in_backward
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.row_choice import RowChoice

if TYPE_CHECKING:
    from sparse_unsloth.runtime import SparsityState


def runs_twice(where: str) -> AttachError:
    """What a module or a layer that is called again in one forward is refused with."""
    return AttachError(
        f"{where} runs more than once in one forward (a decoder that loops over its layers, or one module that several "
        "layers share), so its two calls' rows and channels cannot be told apart. It has no sparse path; train it "
        "dense (sparsity=None)."
    )


class LayerRuntime:
    """A hooked decoder layer: how sparse it is, and the context of the forward that runs through it now.

    ``sparsity`` is that of context rows.
    ``parts`` are those that leave out rows without loss, in the last layer, where a forward may
    (`SparseContext.loss_only`). ``handed`` holds Q, K, V while a whole layer's forward has computed them;
    it is empty, and not None, where that computes O alone. ``not_whole``: why the layer runs part by part,
    ``not_fusable``: why the functions of `functions.layer` do not compute its chosen rows, ``not_captured``: why CUDA
    graphs do not hold it; "" where that is so.
    """

    def __init__(self, state: SparsityState, layer: DecoderLayer, sparsity: LayerSparsity):
        self.state = state
        self.layer = layer
        self.sparsity = sparsity
        self.context: SparseContext | None = None
        self.parts: tuple[str, ...] = ()
        self.not_whole = ""
        self.not_fusable = ""
        self.not_captured = ""
        self.handed: tuple[Tensor, ...] | None = None

    def is_sparse(self, part: str) -> bool:
        """Whether ``part`` ("mlp" or "self_attn") selects channels in the forward that runs now."""
        context = self.context
        if context is None or context.scale <= 0:
            return False
        if getattr(self.sparsity, part) <= 0:
            return False
        return not context.paused or (self.layer.index, part) not in context.paused

    def row_choice(self, module: nn.Module, rows: Tensor) -> RowChoice | None:
        """The rows of this layer's backward pass, or None where ``module``'s own function runs as it is.

        Raises:
            AttachError: see `check_rows`.
        """
        context = self.context
        if context is None or context.scale <= 0 or not (self.state.by_rows and module.training):
            return None
        self.check_rows(module, rows)
        return context.row_choice(self.layer.index, self.state.config.backward_rows)

    def check_rows(self, module: nn.Module, rows: Tensor) -> None:
        """Raises AttachError unless ``rows [..., width]``, the input of ``module``, are those that have roles."""
        shape, expected = tuple(rows.shape[:-1]), tuple(self.context.partition.shape)
        if shape == expected:
            return
        sizes = [size for size in shape if size != 1]
        if sizes in ([size for size in expected if size != 1], [expected[0] * expected[1]]):
            return
        named = self.layer.module.named_modules()
        where = next((f".{name}" for name, one in named if one is module and name), "")
        raise AttachError(
            f"{self.layer.name}{where} got {rows.shape[:-1].numel()} rows, {list(shape)}, but the labels of this "
            f"forward count {expected[0] * expected[1]}, {list(expected)}, so the rows' roles are not known. The model "
            "puts rows in front of the tokens (soft prompts, a prefix, images, sound), cuts its input off "
            "(max_seq_length), or cuts or reorders its rows. Give it embeddings and labels of the whole length "
            "(-100 for the rows in front), or train dense (sparsity=None)."
        )

    def partition(self, part: str, module: nn.Module, rows: Tensor) -> TokenPartition | None:
        """The rows that ``part`` computes, or None where ``module``'s own function does.

        That is so whenever the module's own ``training`` flag is off, unless prompts are sparse outside training too.
        In the last layer these are the rows of the MLP and of the O projection; its keys and values need every row.

        Raises:
            AttachError: see `check_rows`; ``rows`` is the input of ``module``.
        """
        context, sparse = self.context, self.is_sparse(part)
        if context is None or not (module.training or context.prefill):
            return None
        found = context.partition if sparse else None
        if part in self.parts and context.loss_only and not self._mlp_scores_every_row(part):
            found = context.rows_with_loss(sparse)
        if found is not None:
            self.check_rows(module, rows)
        return found

    def _mlp_scores_every_row(self, part: str) -> bool:
        """Whether ``part`` is the attention whose output the MLP of this layer chooses its channels by, for every row.

        It is with ``dense_tokens="none"``: rows with loss are context then, and their channels are chosen among all.
        """
        return part == "self_attn" and self.is_sparse("mlp") and not len(self.context.partition.dense)

    def mlp_channels(self, hidden_states: Tensor, partition: TokenPartition) -> Tensor:
        """int64 ``[k]``: the MLP channels that context rows keep in this forward.

        Args:
            hidden_states: the MLP's input, ``[..., hidden_size]``.
            partition: what `partition` gave for the MLP.
        """
        chosen = self._of_all_rows("mlp", hidden_states, partition)
        # Without context rows there is nothing to choose, and nothing that the choice would change.
        return partition.dense[:0] if chosen is None else chosen.channels

    def attention_channels(
        self, partition: TokenPartition, hidden_states: Tensor | None = None
    ) -> AttentionSelection | None:
        """The attention channels of context rows, None: all of them; arguments as `mlp_channels`.

        ``hidden_states`` is the input of Q, K, V.

        Raises:
            AttachError: without ``hidden_states``, when Q, K, V have not chosen yet.
        """
        return self._of_all_rows("self_attn", hidden_states, partition)

    def mlp_of_context(self, context_rows: Tensor) -> MlpSelection:
        """The MLP's selection of this forward, from its input on the context rows alone, ``[n, hidden_size]``."""
        return self._selection("mlp", context_rows, self.sparsity.mlp, None)

    def attention_of_context(self, context_rows: Tensor | None) -> AttentionSelection:
        """The attention's likewise; None once Q, K, V have chosen."""
        return self._selection("self_attn", context_rows, self.sparsity.self_attn, None)

    def record_run(self, part: str) -> None:
        """Notes that ``part`` ran by our functions, and in this step if sparse with gradients (see `verify_step`).

        Raises:
            AttachError: it ran in this forward already, and this is no recompute.
        """
        whole = self.context.probe and "_sparse_original" in self.layer.module.__dict__  # runs both ways in the probe
        if (self.layer.index, part) in self.context.ran and not (in_backward() or whole):
            raise runs_twice(f"{self.layer.name}.{part}")
        self.context.ran.add((self.layer.index, part))
        by_rows = self.state.by_rows and self.layer.index in self.state.runtimes
        if torch.is_grad_enabled() and (by_rows or self.is_sparse(part)):
            self.state.ran.add((self.layer.index, part))

    def leaves_output_out(self, context: SparseContext) -> bool:
        """Whether a recompute of this layer computes no MLP output, because nobody reads it (`exact_removal`)."""
        rows = self.state.by_rows or context.memo(self.layer.index).get("first with gradients") is False
        ran = (self.layer.index, "mlp") in context.ran
        return rows and ran and self.state.config.exact_removal and self.layer.adds_mlp_output

    def _of_all_rows(self, part: str, hidden_states: Tensor | None, partition: TokenPartition):
        """The choice by the context rows among all of ``hidden_states``; None without any, or in a dense part."""
        if not len(partition.context) or getattr(self.sparsity, part) <= 0:
            return None
        return self._selection(part, hidden_states, getattr(self.sparsity, part), self.context.partition.context)

    def _selection(self, part: str, hidden_states: Tensor | None, sparsity: float, rows: Tensor | None):
        """The choice by ``rows`` of ``hidden_states``; None: these are the context rows alone."""
        key = (self.layer.index, part)
        chosen = self.context.selections.get(key)
        if chosen is None:
            if hidden_states is None:
                raise AttachError(f"{self.layer.name}: o_proj ran before q_proj, k_proj and v_proj chose channels.")
            select = self.state.selector.mlp if part == "mlp" else self.state.selector.attention
            # What is kept of it (static channels, factors on the device) serves trainings too.
            with torch.inference_mode(False), torch.no_grad():
                chosen = select(self.layer, hidden_states, sparsity, rows)
            if part == "mlp" and chosen.order is not None:
                self.context.memo(self.layer.index)["order"] = chosen.order
            self.context.selections[key] = chosen
        if self.context.observation is not None and hidden_states is not None:
            self.state.observer.see(self.context.observation, self.layer, part, hidden_states, chosen, rows is None)
        return chosen
