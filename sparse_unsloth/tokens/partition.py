"""Splits the tokens of a forward by role: batch -> row indices, once per forward.

Rows are tokens of the flattened ``[batch * sequence]`` micro-batch, in every layout. Roles follow from the labels as
the model receives them (docs/how-it-works.md, section 2).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_unsloth.errors import ConfigError
from sparse_unsloth.tokens.batch import Batch

IGNORE_INDEX = -100
EVERY_TOKEN_BEARS_LOSS = "every token bears loss, so no token has the role of context, and no other can be sparse."
ROLES_COME_FROM = (
    "prompt and completion (or question and answer) columns, messages with assistant_only_loss: true, or labels that "
    "are -100 on prompts"
)
"""What tells prompts from answers."""
PADDING_PLACE = -(1 << 30)
"""A padding row in `TokenPartition.place`."""


@dataclass(frozen=True, eq=False)
class TokenPartition:
    """Rows of the flattened ``[batch * sequence]`` tokens by role; each tensor ascending, int64, on the labels' device.

    Attributes:
        shape: ``(batch, sequence)``.
        dense, context, padding: disjoint, and together all rows: loss tokens, context tokens, padding tokens.
        loss: the loss positions, a subset of ``dense`` unless the partition was made with ``dense_tokens="none"``.
        labelled: how many rows may bear the loss; None: as many as are dense, or as are loss positions.
    """

    shape: tuple[int, int]
    dense: Tensor
    context: Tensor
    padding: Tensor
    loss: Tensor
    labelled: int | None = None

    @property
    def num_labelled(self) -> int:
        """How many rows may bear the loss: a number that the host knows."""
        return max(self.num_dense, len(self.loss)) if self.labelled is None else self.labelled

    @classmethod
    def from_batch(
        cls, batch: Batch, dense_tokens: Literal["output", "none"] = "output", padding_masked: bool = True
    ) -> TokenPartition:
        """Splits the tokens of one forward by the labels of its tokens; the host waits for the device once.

        A loss token is never padding, even where it is masked, because the model's loss counts it. Where position ids
        alone tell documents apart, one-token documents without a label at the end of a sequence are padding: collators
        fill position ids with zeros there. No document's last token bears the loss of the next document's first label
        (Unsloth masks it, and TRL's and transformers' collators never set it).

        Args:
            batch: with labels ``[batch, sequence]``.
            dense_tokens: "output" as above; "none" makes every loss token a context token.
            padding_masked: whether the model keeps tokens from attending to padding. Where it does not, masked tokens
                with a real token after them (left padding) count as tokens like any other, because that one reads them.

        Raises:
            ConfigError: labels that are not one integer per token; an attention mask, shifted labels, position ids or
                lengths that do not fit them.
        """
        _check(batch, dense_tokens)
        labels, (starts, after_last, covered) = batch.labels, batch.documents
        output = labels != IGNORE_INDEX
        if batch.is_context_parallel:
            loss = batch.shift_labels.to(labels.device) != IGNORE_INDEX
        else:
            loss = (output & ~starts).roll(-1, dims=1)
            loss[:, -1:] = False
        dense = output | loss
        if batch.attention_mask is not None:
            padding = after_last | (batch.attention_mask == 0)
            padding = padding if padding_masked else _at_the_end(padding)
        elif batch.layout == "position_ids":
            padding = _at_the_end(starts & ~dense)
        else:
            padding = after_last
        padding = padding & ~dense
        if dense_tokens == "none":
            dense = torch.zeros_like(dense)
        return cls._from_masks(dense, padding, loss, covered)

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_lengths: Tensor | None = None,
        dense_tokens: Literal["output", "none"] = "output",
        padding_masked: bool = True,
        shift_labels: Tensor | None = None,
    ) -> TokenPartition:
        """`from_batch` of these tensors; see `Batch` for their shapes."""
        batch = Batch(
            labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            packed_seq_lengths=packed_seq_lengths,
            shift_labels=shift_labels,
        )
        return cls.from_batch(batch, dense_tokens, padding_masked)

    @classmethod
    def from_sequences(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        dense_tokens: Literal["output", "none"] = "output",
    ) -> TokenPartition:
        """Splits the tokens of a sequence classifier's forward, which has one label per sequence and none per token.

        The head reads one token of each sequence, the last one that is no padding token (`pooled_positions`). It is the
        loss token; the others are context tokens. Padding are masked tokens, and without a mask those after the pooled
        one, which causal attention hides from it.

        Args:
            input_ids: integers ``[batch, sequence]``.
            attention_mask: ``[batch, sequence]``, 0 marks padding; the pooled token is none even so.
            pad_token_id: of the model's configuration.
            dense_tokens: "output" as above; "none" makes the pooled token a context token too (published for GLUE).

        Raises:
            ConfigError: tokens that are not ``[batch, sequence]`` integers, or a mask that does not fit them.
        """
        _check(Batch(input_ids, attention_mask=attention_mask), dense_tokens)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        pooled = pooled_positions(input_ids, pad_token_id)[:, None]
        loss = positions == pooled
        padding = (positions > pooled) if attention_mask is None else (attention_mask == 0) & ~loss
        dense = torch.zeros_like(loss) if dense_tokens == "none" else loss
        return cls._from_masks(dense, padding, loss, loss.new_zeros((), dtype=torch.int64))

    @classmethod
    def unknown(cls, tokens: Tensor) -> TokenPartition:
        """The rows of ``tokens [batch, sequence, ...]`` before their roles are known: all count as context."""
        rows = torch.arange(tokens.shape[:2].numel(), device=tokens.device)
        return cls(tuple(tokens.shape[:2]), rows[:0], rows, rows[:0], rows[:0])

    @classmethod
    def from_gradient(
        cls,
        gradient: Tensor,
        shape: tuple[int, int],
        attention_mask: Tensor | None = None,
        dense_tokens: Literal["output", "none"] = "output",
        padding_masked: bool = True,
    ) -> TokenPartition:
        """Splits the tokens of a forward without labels by the gradient of the decoder stack's output.

        A row bears loss unless its gradient is exactly zero. Padding are masked tokens, and all tokens of a sequence
        without loss, beside others: no gradient reaches it. The host waits for the device once.

        Args:
            gradient: ``[..., batch, sequence, width]`` or ``[batch * sequence, width]``.
            shape: batch and sequence.
            attention_mask: ``[batch, sequence]``, 0 marks padding.
            dense_tokens, padding_masked: as for `from_batch`.
        """
        largest = torch.linalg.vector_norm(gradient, float("inf"), dim=-1)
        loss = (largest != 0).reshape(-1, *shape).any(dim=0)
        padding = ~loss.any(dim=1, keepdim=True) & loss.any()
        if attention_mask is not None:
            masked = (attention_mask == 0).to(loss.device)
            padding = padding | (masked if padding_masked else _at_the_end(masked))
        padding = padding & ~loss
        dense = torch.zeros_like(loss) if dense_tokens == "none" else loss
        return cls._from_masks(dense, padding, loss, loss.new_zeros((), dtype=torch.int64))

    @classmethod
    def from_prompts(
        cls, tokens: Tensor, attention_mask: Tensor | None = None, dense_tokens: Literal["output", "none"] = "output"
    ) -> TokenPartition:
        """Splits the prompts of a generation: the last token of each is a loss token, as it predicts the first answer.

        So is the last column, whose logits a generation reads even where padding is on the right.

        Args:
            tokens: ``[batch, sequence]`` ids, or ``[batch, sequence, hidden_size]`` embeddings.
            attention_mask: ``[batch, sequence]``, 0 marks padding.
            dense_tokens: "output" as above; "none" makes the last token a context token too, as in training.
        """
        shape = tokens.shape[:2]
        real = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        if attention_mask is not None:
            real = attention_mask != 0
        last = real & (real.flip(1).cumsum(1).flip(1) == 1)
        last[:, -1] = True
        dense = torch.zeros_like(last) if dense_tokens == "none" else last
        return cls._from_masks(dense, ~(real | last), last, last.new_zeros((), dtype=torch.int64))

    @classmethod
    def _from_masks(cls, dense: Tensor, padding: Tensor, loss: Tensor, covered: Tensor) -> TokenPartition:
        """Row numbers from bool masks ``[batch, sequence]``; ``covered`` counts the tokens of packed documents.

        Raises:
            ConfigError: more tokens covered than there are.
        """
        role = (~dense).long() + padding.long()  # 0 dense, 1 context, 2 padding
        by_role, by_loss = torch.stack((role, (~loss).long())).flatten(1).argsort(dim=1, stable=True)
        counts = torch.stack((dense.sum(), padding.sum(), loss.sum(), covered))
        num_dense, num_padding, num_loss, num_covered = counts.tolist()  # the one host sync
        if num_covered > dense.numel():
            raise ConfigError(
                f"packed_seq_lengths (cu_seq_lens_q) sum to {num_covered} tokens, but the labels of shape "
                f"{list(dense.shape)} hold only {dense.numel()}: truncate the lengths together with the tokens."
            )
        num_tokens = dense.numel() - num_padding
        return cls(
            shape=tuple(dense.shape),
            dense=by_role[:num_dense],
            context=by_role[num_dense:num_tokens],
            padding=by_role[num_tokens:],
            loss=by_loss[:num_loss],
        )

    @functools.cached_property
    def num_dense(self) -> int:
        return self.dense.shape[0]

    @functools.cached_property
    def num_context(self) -> int:
        return self.context.shape[0]

    @functools.cached_property
    def num_padding(self) -> int:
        return self.padding.shape[0]

    @functools.cached_property
    def rows(self) -> Tensor:
        """The dense rows, then the context rows: int64 `[num_dense + num_context]`."""
        return torch.cat((self.dense, self.context))

    @functools.cached_property
    def place(self) -> Tensor:
        """Where each row is in `rows`, as `sparse_unsloth.kernels.columns` expects it: int64 `[batch * sequence]`.

        A dense row's number among the dense rows; `-1 - n` for the n-th context row; `PADDING_PLACE` for padding.
        """
        place = self.dense.new_full((self.shape[0] * self.shape[1],), PADDING_PLACE)
        count = torch.arange(max(self.num_dense, self.num_context), device=place.device)
        place.index_copy_(0, self.dense, count[: self.num_dense])
        return place.index_copy_(0, self.context, -1 - count[: self.num_context])

    @property
    def context_share(self) -> float:
        """Context rows over all rows that are not padding; 0 where there are none. Needs no host sync."""
        return len(self.context) / max(len(self.context) + len(self.dense), 1)


def partition_of(
    model: nn.Module,
    batch: Batch,
    dense_tokens: Literal["output", "none"] = "output",
    padding_masked: bool = True,
) -> TokenPartition:
    """The roles of the tokens of ``batch`` as ``model`` receives it: by token labels, or by sequence labels.

    Without token labels the completions of the batch count as labelled (`Batch.num_completion`).

    Raises:
        ConfigError: see `TokenPartition.from_batch` and `TokenPartition.from_sequences`.
    """
    if not is_sequence_classifier(model):
        if batch.labels is None and batch.num_completion:
            labels = batch.input_ids.clone()
            labels[:, : -batch.num_completion] = IGNORE_INDEX
            mask = batch.attention_mask
            batch = batch.changed(labels=labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX))
        return TokenPartition.from_batch(batch, dense_tokens, padding_masked)
    if batch.input_ids is None:
        raise ConfigError(
            "A sequence classifier was called without input_ids, and inputs_embeds do not tell which row its head "
            "reads; pass input_ids."
        )
    pad = model.config.get_text_config().pad_token_id
    return TokenPartition.from_sequences(batch.input_ids, batch.attention_mask, pad, dense_tokens)


def is_sequence_classifier(model: nn.Module) -> bool:
    """Whether ``model`` (bare, or in PEFT's wrapper) has one label per sequence."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__.endswith("ForSequenceClassification")


def pooled_positions(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """int64 ``[batch]``: the position that transformers' classification heads of decoder models read.

    It is the last token that is not ``pad_token_id``, on whichever side the padding is; without such an id the last
    token, and in a row of padding alone the first.
    """
    if pad_token_id is None:
        return input_ids.new_full((input_ids.shape[0],), input_ids.shape[1] - 1, dtype=torch.int64)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(-1)


def completion_without_loss(partition: TokenPartition, count: int, attention_mask: Tensor | None) -> Tensor:
    """int64 ``[2]``: how many of the last ``count`` tokens of each sequence bear no loss, and how many there are.

    Masked tokens do not count. A token's loss is that of the position before it. No host sync.

    Args:
        count: below the sequence's length.
        attention_mask: ``[batch, sequence]``, 0 marks padding.
    """
    batch, sequence = partition.shape
    loss = torch.zeros(batch * sequence, dtype=torch.bool, device=partition.loss.device)
    predicted = loss.index_fill_(0, partition.loss, True).view(batch, sequence)[:, -count - 1 : -1]
    real = torch.ones_like(predicted)
    if attention_mask is not None:
        real = (attention_mask[:, -count:] != 0).to(loss.device)
    return torch.stack(((real & ~predicted).sum(), real.sum()))


def rows_with_loss(partition: TokenPartition, sparse: bool) -> TokenPartition:
    """The loss positions of ``partition``, with every other row as padding; needs no host sync.

    Args:
        partition: the forward's.
        sparse: keep the loss positions' roles (with ``dense_tokens="none"`` they are context); else all are dense.
    """
    num_rows, loss = partition.shape[0] * partition.shape[1], partition.loss
    others = torch.ones(num_rows, dtype=torch.uint8, device=loss.device).index_fill_(0, loss, 0)
    others = others.argsort(descending=True, stable=True)[: num_rows - len(loss)]
    none = loss[:0]
    dense, context = (none, loss) if sparse and not len(partition.dense) else (loss, none)
    return TokenPartition(partition.shape, dense, context, others, loss)


def every_row_dense(partition: TokenPartition) -> TokenPartition:
    """The same rows, all dense; as many as before may bear the loss."""
    rows = torch.arange(partition.shape[0] * partition.shape[1], device=partition.loss.device)
    return TokenPartition(partition.shape, rows, rows[:0], rows[:0], partition.loss, partition.num_labelled)


def _at_the_end(rows: Tensor) -> Tensor:
    """``rows`` (bool ``[batch, sequence]``) as far as nothing but such rows comes after them."""
    return rows.flip(1).cumprod(1).flip(1).bool()


def _check(batch: Batch, dense_tokens: str) -> None:
    """Raises ConfigError where the labels are not one per token, or another argument does not fit them."""
    labels = batch.labels
    if dense_tokens not in ("output", "none"):
        raise ConfigError(f"dense_tokens is {dense_tokens!r}; it must be 'output' or 'none'.")
    if labels.ndim != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ConfigError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; contextual sparsity needs one integer label per "
            "token, [batch, sequence], as in causal language modelling, or a ...ForSequenceClassification model."
        )
    rows, sequence = labels.shape
    expected = f"the labels are [{rows}, {sequence}]"
    if batch.attention_mask is not None and getattr(batch.attention_mask, "shape", None) != labels.shape:
        raise ConfigError(
            f"attention_mask is {_describe(batch.attention_mask)}, but {expected}: pass a mask of the labels' shape, 0 "
            "for padding. Packed documents are told by position_ids or packed_seq_lengths, not by a 4-D mask."
        )
    if batch.is_context_parallel:  # position ids and lengths are the whole sequence's then, and count for nothing
        if getattr(batch.shift_labels, "shape", None) != labels.shape:
            raise ConfigError(
                f"shift_labels are {_describe(batch.shift_labels)}, but {expected}: pass one for every token, -100 "
                "where it predicts nothing."
            )
        return
    positions = batch.position_ids
    if positions is not None and tuple(positions.shape) not in {(rows, sequence), (1, sequence), (sequence,)}:
        raise ConfigError(
            f"position_ids are {_describe(positions)}, but {expected}: pass [batch, sequence], [1, sequence] or "
            "[sequence]."
        )
    if batch.is_packed and (batch.lengths.ndim != 1 or batch.lengths.numel() == 0):
        raise ConfigError(
            f"{batch.layout} are {_describe(getattr(batch, batch.layout))}: pass a 1-D tensor of the documents' "
            "lengths, at least one."
        )


def _describe(value) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
