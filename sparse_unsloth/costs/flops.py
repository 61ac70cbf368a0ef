"""Counts the FLOPs of one training step of a decoder-only LoRA model, dense or sparse.

A matmul of `[m, n]` and `[n, k]` costs `2mnk` FLOPs. Only matmuls are counted, not norms, activations, RoPE or softmax.
A base weight costs one matmul forward and one backward, LoRA's A and B one forward and two backward
(docs/how-it-works.md, sections 1.2 and 3.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import KW_ONLY, astuple, dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide the cost of a decoder-only model with gated MLPs."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelShape:
        """Reads a transformers config; of a multimodal one, its text part.

        Raises:
            ConfigError: one of the sizes is missing, or differs between layers.
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        sizes = {name: getattr(config, name, None) for name in names}
        wrong = [name for name, size in sizes.items() if not isinstance(size, int)]
        if wrong:
            raise ConfigError(
                f"{type(config).__name__} has no single integer for {', '.join(wrong)}: costs are known for "
                "decoder-only models whose layers are alike; build a ModelShape by hand for others."
            )
        hidden, intermediate, layers, heads, vocab = sizes.values()
        return cls(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocab_size=vocab,
        )

    def projections(self, mlp: float = 0.0, self_attn: float = 0.0) -> dict[str, tuple[int, int]]:
        """In and out features of a layer's seven projections for context tokens at these sparsities.

        Attention's channels are selected among those of keys and values, and repeated for the query heads of a group.
        """
        hidden, inner = self.hidden_size, keep_count(self.intermediate_size, mlp)
        keys = keep_count(self.num_kv_heads * self.head_dim, self_attn)
        queries = keys * (self.num_heads // self.num_kv_heads)
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }


@dataclass(frozen=True)
class Parts:
    """FLOPs by part of the model; parts add up field by field."""

    mlp_base: int = 0
    attention_projections: int = 0
    lora: int = 0
    attention_core: int = 0
    head: int = 0
    estimator: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(left + right for left, right in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step by phase. `recompute` counts what is computed again for backward: layers under gradient
    checkpointing, and with ``backward_rows`` the chosen rows.
    """

    forward: Parts
    recompute: Parts
    backward: Parts

    @property
    def parts(self) -> Parts:
        """The three phases together."""
        return self.forward + self.recompute + self.backward

    @property
    def total(self) -> int:
        return self.parts.total


def attention_pairs(seq_lengths: Iterable[int], causal: bool = True) -> int:
    """Pairs of query and key: those that a causal kernel visits, or the full square of each sequence."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in seq_lengths)


@dataclass(frozen=True)
class TrainingStep:
    """Forward and backward of one or more micro-batches, whose tokens and sequences are added up.

    Args:
        dense_tokens: rows computed densely, with padding if that is computed densely.
        context_tokens: rows computed with selected channels, with padding if that is computed so.
        seq_lengths: tokens of each sequence that attends to itself (the padded length if padding is computed).
        lora_rank: of the adapters on `lora_targets`; 0 without adapters.
        checkpointing: whether the layers, not the head, run forward twice. (Non-reentrant checkpointing may stop the
            recompute before the layer's last LoRA matmul; that is not deducted.)
        head_tokens: rows whose logits are computed; by default all tokens, as in plain transformers.
        trainable_base: whether base weights and head need gradients too (full fine-tuning with `lora_rank=0`).
        lora_targets: projections with an adapter. If the first layer's input needs no gradient and one of its
            projections has no adapter, autograd may skip a little more than is deducted here.
        attention: "fused" (flash) kernels visit causal pairs only and compute the scores again in backward: two
            matmuls forward, five backward. "eager" computes the full square: two forward, four backward.
        input_requires_grad: whether the first layer's Q, K and V compute the gradient of their input. The default is
            `checkpointing or trainable_base`: PEFT requests it with gradient checkpointing, else autograd skips it.
        estimator_rank: of the factors that score the channels of each sparse part on its context tokens, in the first
            forward only; 0 for criteria without matmuls, such as static channels.
        last_layer_tokens: rows that the last layer computes after its keys and values, all densely: the loss positions
            where unused rows are skipped (Unsloth backend; `head_tokens` counts their logits). Attention itself runs
            on all rows, and so do the queries if attention is sparse. None: all rows.
        padding_tokens: further rows, which dense parts compute and sparse parts skip. (`seq_lengths` includes them;
            `head_tokens` decides about their logits.)
        backward_rows: share of the context tokens that backward goes through, in the O projection and the MLP; loss
            tokens are added, padding is skipped.
        whole_layers, skips_output: decide what `backward_rows` computes again; see `recomputes_rows`.
        skips_down: the recompute leaves out the product with W_down, as whole layers do whose output is unused (not
            where an output norm needs it).

    Raises:
        ConfigError: an unknown projection or kind of attention.
    """

    dense_tokens: int
    context_tokens: int
    seq_lengths: Sequence[int]
    lora_rank: int
    _: KW_ONLY
    checkpointing: bool = False
    head_tokens: int | None = None
    trainable_base: bool = False
    lora_targets: Collection[str] = (*ATTENTION, *MLP)
    attention: Literal["fused", "eager"] = "fused"
    input_requires_grad: bool | None = None
    estimator_rank: int = 0
    last_layer_tokens: int | None = None
    padding_tokens: int = 0
    backward_rows: float = 1.0
    whole_layers: bool = True
    skips_output: bool = True
    skips_down: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ("fused", "eager"):
            raise ConfigError(f"attention is {self.attention!r}; it must be 'fused' or 'eager'")
        if unknown := set(self.lora_targets) - {*ATTENTION, *MLP}:
            known = ", ".join((*ATTENTION, *MLP))
            raise ConfigError(f"lora_targets has {sorted(unknown)}; known projections are {known}")


def step_flops(shape: ModelShape, layer_sparsity: Sequence[tuple[float, float]], step: TrainingStep) -> StepFlops:
    """Counts the FLOPs of ``step`` with the `(mlp, self_attn)` sparsity of each layer, in [0, 1).

    All zeros are the dense step. For context tokens base weights keep `keep_count` channels, in forward and for the
    gradient of the input; the LoRA branch stays dense.

    Raises:
        ConfigError: the number of sparsities differs from the number of layers.
    """
    if len(layer_sparsity) != shape.num_layers:
        raise ConfigError(f"{len(layer_sparsity)} layer sparsities were given for a model of {shape.num_layers} layers")
    input_requires_grad = step.input_requires_grad
    if input_requires_grad is None:
        input_requires_grad = step.checkpointing or step.trainable_base
    full = shape.projections()
    fused = step.attention == "fused"
    pairs = attention_pairs(step.seq_lengths, causal=fused)
    attention_product = 2 * pairs * shape.num_heads * shape.head_dim

    forward, recompute, backward = Counter(), Counter(), Counter()
    row_sparse = step.backward_rows < 1
    rows_again = recomputes_rows(step.whole_layers, step.checkpointing and step.skips_output)
    for layer, (mlp, self_attn) in enumerate(layer_sparsity):
        selected = shape.projections(mlp, self_attn)
        skips = layer == shape.num_layers - 1 and step.last_layer_tokens is not None
        skipping = _skips_unused_rows(self_attn) if skips else ()
        for name, (inputs, outputs) in full.items():
            part = "mlp_base" if name in MLP else "attention_projections"
            padding_rows = 0 if (mlp if name in MLP else self_attn) > 0 else step.padding_tokens
            dense_rows, context_rows = step.dense_tokens + padding_rows, step.context_tokens
            if name in skipping:
                dense_rows, context_rows, padding_rows = step.last_layer_tokens, 0, 0
            rows = dense_rows + context_rows
            base = 2 * (dense_rows * inputs * outputs + context_rows * selected[name][0] * selected[name][1])
            rank = step.lora_rank if name in step.lora_targets else 0
            lora_a, lora_b = 2 * rows * inputs * rank, 2 * rows * rank * outputs
            input_gradient = layer > 0 or input_requires_grad or name not in ("q_proj", "k_proj", "v_proj")
            forward[part] += base
            forward["lora"] += lora_a + lora_b
            share = 1.0
            if row_sparse and name not in ATTENTION[:3] and rows:
                share = (dense_rows - padding_rows + ceil(step.backward_rows * context_rows)) / rows
            times = step.checkpointing
            if share < 1:
                skipped = step.skips_output and (step.whole_layers or name in MLP)
                times = share * rows_again + (step.checkpointing and not skipped)
            has_output = not step.skips_down or name != "down_proj" or name in skipping
            recompute[part] += round(times * has_output * base)
            recompute["lora"] += round(times * (lora_a + has_output * lora_b))
            backward[part] += round(share * base) * (input_gradient + step.trainable_base)
            backward["lora"] += round(share * (lora_a * (input_gradient + 1) + 2 * lora_b))
        forward["attention_core"] += 2 * attention_product
        backward["attention_core"] += (5 if fused else 4) * attention_product
        sparse_mlp = mlp > 0 and "gate_proj" not in skipping
        scored = (MLP[:2] if sparse_mlp else ()) + (ATTENTION[:3] if self_attn > 0 else ())
        forward["estimator"] += sum(2 * step.context_tokens * step.estimator_rank * sum(full[name]) for name in scored)
    if step.checkpointing:
        recompute["attention_core"] = forward["attention_core"]

    tokens = step.dense_tokens + step.context_tokens + step.padding_tokens
    head_tokens = tokens if step.head_tokens is None else step.head_tokens
    layers = Parts(**forward)
    logits = 2 * head_tokens * shape.hidden_size * shape.vocab_size
    return StepFlops(
        forward=layers + Parts(head=logits),
        recompute=Parts(**recompute),
        backward=Parts(**backward) + Parts(head=logits * (1 + step.trainable_base)),
    )


def recomputes_rows(whole_layers: bool, skips_output: bool) -> bool:
    """Whether a row-sparse layer's backward computes O and MLP of the chosen rows again; else forward stored them.

    Args:
        whole_layers: whether the layer runs as a whole layer (docs/how-it-works.md, section 7). Else O and the MLP are
            hooked separately and store their inputs alone, and O is recomputed for all rows under checkpointing.
        skips_output: whether gradient checkpointing recomputes the layer without the output that nothing uses
            (`exact_removal`).
    """
    return skips_output or not whole_layers


def _skips_unused_rows(self_attn: float) -> tuple[str, ...]:
    """Projections of the last layer that skip unused rows."""
    return ("o_proj", *MLP) if self_attn > 0 else ("q_proj", "o_proj", *MLP)
