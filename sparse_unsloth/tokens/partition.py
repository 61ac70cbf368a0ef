"""Which tokens of a forward are computed densely: labels -> row indices, once per forward.

Rows are tokens of the flattened `[batch * sequence]` micro-batch, whatever its layout: padded left or right, packed, or
padding-free. Roles follow from the labels as the model receives them (not shifted: position t learns `labels[t + 1]`):

- an *output token* has a label, `labels[t] != -100`;
- a *loss-bearing* row predicts one, `labels[t + 1] != -100` inside the same document, so the last prompt token is one;
- *dense* rows are both together, *context* rows the other tokens, *padding* rows neither.

Where a row's neighbour is not the token that it predicts (context parallelism hands every GPU a part of the sequence),
``shift_labels`` come beside the labels, made before the sequence was cut: then they say which rows bear loss.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_unsloth.errors import ConfigError

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
    """Rows of the flattened `[batch * sequence]` tokens by role; each tensor ascending, int64, on the labels' device.

    `dense`, `context` and `padding` are disjoint and cover every row; `loss` holds the rows that bear loss, a subset of
    `dense` unless the partition was made with `dense_tokens="none"`.
    """

    shape: tuple[int, int]
    dense: Tensor
    context: Tensor
    padding: Tensor
    loss: Tensor

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
        """Splits the tokens of one forward; the host waits for the device once.

        Args:
            labels: integers `[batch, sequence]`, not shifted, -100 where there is no label.
            attention_mask: `[batch, sequence]`, 0 marks padding. A row that has a label or bears loss is no padding
                even so, because the model's loss counts it (left padding before a labelled first token, for one).
            position_ids: integers `[batch, sequence]`, `[1, sequence]` or `[sequence]`; a document starts wherever
                they do not go up by one (transformers' own rule for packed rows). Given alone, the one-token documents
                that end a row without a label are padding: collators fill position ids with zeros there, and no label
                comes after them.
            packed_seq_lengths: integers `[documents]`, lengths of the documents of the flattened rows in order; the
                tail beyond their sum is padding. They go before `position_ids`.
            dense_tokens: "output" as above; "none" makes every token that is not padding a context row.
            padding_masked: whether the model keeps tokens from attending to padding. Where it does not, masked rows
                with a token behind them (left padding) are read by that token, and count as tokens like any other.
            shift_labels: integers ``[batch, sequence]``, what each row predicts, -100 for nothing. Position ids and
                lengths, which are the whole sequence's then, say nothing about these rows.

        The first label of a document counts as an output token, but no row of the document before it bears its loss
        (Unsloth masks it there, and TRL's and transformers' collators never set it).

        Raises:
            ConfigError: labels that are not one integer per token; an attention mask, shifted labels, position ids or
                lengths that do not fit them.
        """
        if shift_labels is not None:
            position_ids = packed_seq_lengths = None
        _check(labels, attention_mask, position_ids, packed_seq_lengths, dense_tokens, shift_labels)
        starts, tail, covered = _documents(labels, position_ids, packed_seq_lengths)
        output = labels != IGNORE_INDEX
        if shift_labels is None:
            loss = (output & ~starts).roll(-1, dims=1)
            loss[:, -1:] = False
        else:
            loss = shift_labels.to(labels.device) != IGNORE_INDEX
        dense = output | loss
        if attention_mask is not None:
            padding = tail | (attention_mask == 0)
            padding = padding if padding_masked else _at_the_end(padding)
        elif packed_seq_lengths is not None:
            padding = tail
        else:
            padding = _at_the_end(starts & ~dense)
        padding = padding & ~dense
        if dense_tokens == "none":
            dense = torch.zeros_like(dense)

        return cls._from_masks(dense, padding, loss, covered)

    @classmethod
    def from_sequences(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        dense_tokens: Literal["output", "none"] = "output",
    ) -> TokenPartition:
        """Splits the tokens of a sequence classifier's forward, which has one label a sequence, none a token.

        The head reads one row of each sequence, the last one that is no padding token (`pooled_positions`). That row
        bears the loss and is dense; the others are context. Rows that nothing reads are padding: masked ones, and
        without a mask those behind the pooled row, which causal attention keeps from it.

        Args:
            input_ids: integers ``[batch, sequence]``.
            attention_mask: ``[batch, sequence]``, 0 marks padding; the pooled row is none even so.
            pad_token_id: of the model's configuration.
            dense_tokens: "output" as above; "none" makes the pooled row context too (published for GLUE).

        Raises:
            ConfigError: tokens that are not ``[batch, sequence]`` integers, or a mask that does not fit them.
        """
        _check(input_ids, attention_mask, None, None, dense_tokens)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        pooled = pooled_positions(input_ids, pad_token_id)[:, None]
        loss = positions == pooled
        padding = (positions > pooled) if attention_mask is None else (attention_mask == 0) & ~loss
        dense = torch.zeros_like(loss) if dense_tokens == "none" else loss
        return cls._from_masks(dense, padding, loss, loss.new_zeros((), dtype=torch.int64))

    @classmethod
    def from_prompts(
        cls, tokens: Tensor, attention_mask: Tensor | None = None, dense_tokens: Literal["output", "none"] = "output"
    ) -> TokenPartition:
        """Splits the prompts of a generation: the last token of each is dense, since it predicts the answer's first.

        So is the last column, whose logits a generation reads even where padding is on the right.

        Args:
            tokens: ``[batch, sequence]`` ids, or ``[batch, sequence, hidden_size]`` embeddings.
            attention_mask: ``[batch, sequence]``, 0 marks padding.
            dense_tokens: "output" as above; "none" makes the last token context too, as it was in training.
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
                f"packed_seq_lengths sum to {num_covered} tokens, but the labels of shape {list(dense.shape)} hold "
                f"only {dense.numel()}: truncate the lengths together with the tokens."
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
        """Where each row stands in `rows`, as `sparse_unsloth.kernels.columns` wants it: int64 `[batch * sequence]`.

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
    batch: Mapping[str, Any],
    dense_tokens: Literal["output", "none"] = "output",
    padding_masked: bool = True,
) -> TokenPartition:
    """The roles of the rows of ``batch`` as ``model`` receives it: by token labels, or by sequence labels.

    Raises:
        ConfigError: see `TokenPartition.from_labels` and `TokenPartition.from_sequences`.
    """
    if is_sequence_classifier(model):
        tokens = batch.get("input_ids")
        if tokens is None:
            raise ConfigError(
                "A sequence classifier was called without input_ids, and inputs_embeds do not tell which row its head "
                "reads; pass input_ids."
            )
        pad = model.config.get_text_config().pad_token_id
        return TokenPartition.from_sequences(tokens, batch.get("attention_mask"), pad, dense_tokens)
    return TokenPartition.from_labels(
        batch["labels"], **layout_of(batch), dense_tokens=dense_tokens, padding_masked=padding_masked
    )


def layout_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``batch`` decides about roles besides the labels, as `TokenPartition.from_labels` takes it."""
    names = ("attention_mask", "position_ids", "packed_seq_lengths", "shift_labels")
    return {name: batch.get(name) for name in names}


def is_context_parallel(batch: Mapping[str, Any]) -> bool:
    """Whether the rows of ``batch`` are parts of sequences whose other parts other GPUs have (context parallelism)."""
    return batch.get("shift_labels") is not None


def is_sequence_classifier(model: nn.Module) -> bool:
    """Whether the labels of ``model`` (bare, or in PEFT's wrapper) are one a sequence."""
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


def sequence_starts(
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    packed_seq_lengths: Tensor | None = None,
) -> Tensor:
    """Where sequences start, as `TokenPartition` tells them, and the first real tokens: bool ``[batch, sequence]``."""
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if packed_seq_lengths is not None:
        ends = packed_seq_lengths.cumsum(0)
        starts.view(-1)[ends[ends < labels.numel()]] = True
    elif position_ids is not None:
        positions = position_ids.expand_as(labels)
        starts |= positions.diff(dim=1, prepend=positions[:, :1]) != 1
    if attention_mask is not None:
        real = attention_mask != 0
        starts |= real & (real.cumsum(1) == 1)
    return starts


def rows_with_loss(partition: TokenPartition, sparse: bool) -> TokenPartition:
    """``partition`` with every row that bears no loss as padding; needs no host sync.

    Args:
        partition: the forward's.
        sparse: keep the others' roles (with ``dense_tokens="none"`` they are context); else all of them are dense.
    """
    num_rows, loss = partition.shape[0] * partition.shape[1], partition.loss
    others = torch.ones(num_rows, dtype=torch.uint8, device=loss.device).index_fill_(0, loss, 0)
    others = others.argsort(descending=True, stable=True)[: num_rows - len(loss)]
    none = loss[:0]
    dense, context = (none, loss) if sparse and not len(partition.dense) else (loss, none)
    return TokenPartition(partition.shape, dense, context, others, loss)


def every_row_dense(partition: TokenPartition) -> TokenPartition:
    """The same rows, all dense."""
    rows = torch.arange(partition.shape[0] * partition.shape[1], device=partition.loss.device)
    return TokenPartition(partition.shape, rows, rows[:0], rows[:0], partition.loss)


def _documents(
    labels: Tensor, position_ids: Tensor | None, packed_seq_lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """First rows of documents, rows behind the last one (bool `[batch, sequence]`), and how many tokens they cover."""
    none = torch.zeros_like(labels, dtype=torch.bool)
    if packed_seq_lengths is not None:
        ends = packed_seq_lengths.to(labels.device, non_blocking=True).cumsum(0)
        rows = torch.arange(labels.numel(), device=labels.device)
        document = torch.searchsorted(ends, rows, right=True).view(labels.shape)
        return document.diff(dim=1, prepend=document[:, :1] - 1) != 0, document == len(ends), ends[-1]
    if position_ids is not None:
        position_ids = position_ids.expand_as(labels)
        starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
        return starts, none, starts.new_zeros((), dtype=torch.int64)
    return none, none, none.new_zeros((), dtype=torch.int64)


def _at_the_end(rows: Tensor) -> Tensor:
    """``rows`` (bool ``[batch, sequence]``) as far as nothing but such rows comes after them."""
    return rows.flip(1).cumprod(1).flip(1).bool()


def _check(labels, attention_mask, position_ids, packed_seq_lengths, dense_tokens, shift_labels=None) -> None:
    if dense_tokens not in ("output", "none"):
        raise ConfigError(f"dense_tokens is {dense_tokens!r}; it must be 'output' or 'none'.")
    if labels.ndim != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ConfigError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; contextual sparsity needs one integer label per "
            "token, [batch, sequence], as in causal language modelling, or a ...ForSequenceClassification model."
        )
    batch, sequence = labels.shape
    expected = f"the labels are [{batch}, {sequence}]"
    if attention_mask is not None and getattr(attention_mask, "shape", None) != labels.shape:
        raise ConfigError(
            f"attention_mask is {_describe(attention_mask)}, but {expected}: pass a mask of the labels' shape, 0 for "
            "padding. Packed documents are told by position_ids or packed_seq_lengths, not by a 4-D mask."
        )
    if shift_labels is not None and getattr(shift_labels, "shape", None) != labels.shape:
        raise ConfigError(
            f"shift_labels are {_describe(shift_labels)}, but {expected}: pass one for every token, -100 where it "
            "predicts nothing."
        )
    if position_ids is not None and tuple(position_ids.shape) not in {(batch, sequence), (1, sequence), (sequence,)}:
        raise ConfigError(
            f"position_ids are {_describe(position_ids)}, but {expected}: pass [batch, sequence], [1, sequence] or "
            "[sequence]."
        )
    if packed_seq_lengths is not None and (packed_seq_lengths.ndim != 1 or packed_seq_lengths.numel() == 0):
        raise ConfigError(
            f"packed_seq_lengths are {_describe(packed_seq_lengths)}: pass a 1-D tensor of the documents' lengths, at "
            "least one."
        )


def _describe(value) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
