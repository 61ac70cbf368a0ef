"""Computes the model by plain functions, several LoRA adapters in lockstep, with masks instead of gathers.

The masked forward is that of docs/how-it-works.md, section 4.1.
Tensors have a leading dimension of seeds: ``x [seeds, rows, hidden_size]``, ``A [seeds, rank, in]``. Base weights are
shared. Everything that differs between settings of sparsity and between steps is a tensor (masks, numbers of
channels), so that few captured CUDA graphs serve all settings; `Mode` says which of these tensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.batches import Batch, Layout
from sparse_unsloth.channels.energy import base_weight
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.kernels.fp8 import reference_quantize_rows
from sparse_unsloth.layer.spec import head_norm_modules, place_norms, read_norm
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.model.decoder_layer import DecoderLayer, find_layers

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Mode(NamedTuple):
    """The masks that a step reads.

    Attributes:
        kind: "dense"; "forward", the MLP sparse as in section 4.1; "rows", an exact forward in which only the context
            rows of largest gradient send it into the MLP, the output projection and the queries.
        contextual: channels are chosen from each batch by factors, not given.
        random_rows: of the kind "rows", any context rows instead of those of largest gradient.
        precision: of products with frozen weights, see `SparsityConfig.precision`.
    """

    kind: str = "dense"
    contextual: bool = False
    random_rows: bool = False
    precision: str = "bf16"


DENSE = Mode()


class LayerWeights(NamedTuple):
    """Frozen weights of one layer, ``[out, in]``, its norms ``[hidden_size]``, and those of heads ``[head_dim]``."""

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    attention_output_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class Selection(NamedTuple):
    """What is sparse in one layer; an index into the first dimension of each tensor of `Sparsity`.

    Attributes:
        channels: bool ``[seeds, intermediate_size]``, kept on context rows.
        keep: int64 ``[]``, how many channels are chosen from the batch; 0 for none. Of the kind "rows", how many
            context rows, in units of 1 / intermediate_size of a seed's.
        down: ``[seeds, 2 rank, hidden_size]``, factors of gate and up.
        up_gate, up_up: ``[seeds, intermediate_size, rank]``.
        gain: fp32 ``[seeds, intermediate_size]``: scores are the estimate's L2 norms times this.
    """

    channels: Tensor
    keep: Tensor
    down: Tensor
    up_gate: Tensor
    up_up: Tensor
    gain: Tensor


@dataclass(frozen=True)
class Network:
    """The base model.

    Attributes:
        shape: its sizes.
        layers: the frozen weights, in ``dtype``.
        embedding: ``[vocab_size, hidden_size]``; ``head`` the same shape; ``final_norm`` ``[hidden_size]``.
        activation: a key of `ACTIVATIONS`.
        epsilon: as in the model's configuration; rope_bases: of each layer.
        lora_scale: alpha over rank.
        embedding_scale: what embeddings are multiplied with.
        window: the longest sequence that every layer attends to as a whole; None: any.
    """

    shape: ModelShape
    layers: tuple[LayerWeights, ...]
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    activation: str
    epsilon: float
    rope_bases: tuple[float, ...]
    lora_scale: float
    embedding_scale: float = 1.0
    window: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].q_proj.dtype

    def rotary(self, layout: Layout) -> dict[float, tuple[Tensor, Tensor]]:
        """Cosine and sine ``[rows, 1, head_dim]`` of every row's position, by the base of the angles.

        Raises:
            ValueError: a sequence is longer than a layer's window.
        """
        longest = max(length for _, length in layout.groups)
        if self.window is not None and longest > self.window:
            raise ValueError(f"sequences of {longest} tokens are longer than the window of {self.window}")
        half = torch.arange(0, self.shape.head_dim, 2, device=self.head.device, dtype=torch.float64)
        found = {}
        for base in set(self.rope_bases):
            frequencies = base ** (-half / self.shape.head_dim)
            angles = layout.positions().to(self.head.device)[:, None] * torch.cat((frequencies, frequencies))
            found[base] = angles.cos()[:, None].to(self.dtype), angles.sin()[:, None].to(self.dtype)
        return found


def read_network(model: nn.Module, dtype: torch.dtype, lora_scale: float) -> Network:
    """Reads the weights of a transformers Llama without biases (SmolLM2) or of a Gemma 3, with or without PEFT.

    Raises:
        ValueError: the model has another form.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, found = causal.config, find_layers(causal)
    gemma = config.model_type == "gemma3_text"
    if not (gemma or config.model_type == "llama") or config.attention_bias or getattr(config, "mlp_bias", False):
        raise ValueError(f"the benchmark computes Llama models without biases and Gemma 3, not {config.model_type}")
    if gemma and (config.query_pre_attn_scalar != config.head_dim or config.final_logit_softcapping):
        raise ValueError("the benchmark scales queries by their head dimension, and caps no logits")
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layer = [ropes[kind] for kind in config.layer_types] if gemma else [ropes] * len(found)
    kinds = {rope.get("rope_type", "default") for rope in by_layer}
    if kinds != {"default"}:
        raise ValueError(f"rotary embeddings of kind {', '.join(sorted(kinds))} are not computed here")
    return Network(
        shape=ModelShape.from_config(config),
        layers=tuple(_layer_weights(layer, dtype) for layer in found),
        embedding=causal.get_input_embeddings().weight.detach().to(dtype),
        head=causal.get_output_embeddings().weight.detach().to(dtype),
        final_norm=_norm(causal.model.norm, dtype),
        activation=found[0].activation,
        epsilon=config.rms_norm_eps,
        rope_bases=tuple(float(rope.get("rope_theta") or config.rope_theta) for rope in by_layer),
        lora_scale=lora_scale,
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        window=config.sliding_window if gemma else None,
    )


def _layer_weights(layer: DecoderLayer, dtype: torch.dtype) -> LayerWeights:
    weights = [base_weight(layer, name).dense(dtype) for name in _order(layer.projections())]
    norms = {name: part for name, part in layer.module.named_children() if name.endswith("norm")}
    before, after, before_mlp, after_mlp = (_norm(part, dtype) for part in place_norms(norms))
    heads = (_norm(part, dtype) for part in head_norm_modules(layer.self_attn))
    return LayerWeights(*weights, before, before_mlp, after, after_mlp, *heads)


def _norm(module: nn.Module | None, dtype: torch.dtype) -> Tensor | None:
    """What an RMS norm multiplies with."""
    if module is None:
        return None
    norm = read_norm(module, type(module).__name__)
    return (norm.offset + norm.weight).to(dtype)


def _order(projections: dict[str, nn.Module]) -> list[str]:
    return sorted(projections, key=lambda name: PROJECTIONS.index(name.split(".")[1]))


def layer_forward(
    x: Tensor,
    weights: LayerWeights,
    adapters: tuple[Tensor, ...],
    selection: Selection | None,
    context: Tensor,
    rotary: tuple[Tensor, Tensor],
    network: Network,
    layout: Layout,
    mode: Mode,
) -> Tensor:
    """Computes one decoder layer: ``[seeds, rows, hidden_size]`` fp32 (or wider) to the same.

    Args:
        context: bool ``[seeds, rows, 1]``.
        adapters: A and B of each of `PROJECTIONS` in turn; the scale is not in them.
    """
    normed = rms_norm(x, weights.attention_norm, network.epsilon)
    y = attention(normed, weights, adapters, rotary, network, layout, context, mode)
    inner = x + y
    normed = rms_norm(inner, weights.mlp_norm, network.epsilon)
    z = gated_mlp(normed, weights, adapters, selection, context, network, mode)
    z = output_norm(z, weights.mlp_output_norm, network.epsilon)
    return inner + z if mode.kind != "rows" else x + sparse_rows(y.to(x.dtype) + z, selection, context, network, mode)


def sparse_rows(y: Tensor, selection: Selection | None, context: Tensor, network: Network, mode: Mode) -> Tensor:
    """Returns ``y [seeds, rows, hidden_size]``; its gradient passes through answers and chosen context rows only."""
    share = selection.keep / network.shape.intermediate_size
    return _SparseRows.apply(y, context[..., 0], share, mode.random_rows)


class _SparseRows(torch.autograd.Function):
    """The identity; the gradient passes through a share of each seed's context rows: the largest, or random ones."""

    @staticmethod
    def forward(ctx, y: Tensor, context: Tensor, share: Tensor, random: bool) -> Tensor:
        ctx.save_for_backward(context, share)
        ctx.random = random
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        context, share = ctx.saved_tensors
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        scores = (torch.rand_like(norms) if ctx.random else norms).masked_fill(~context, -1.0)
        count = (context.sum(1, keepdim=True) * share).ceil().long()
        least = scores.sort(dim=1, descending=True).values.gather(1, (count - 1).clamp_min(0))
        kept = ~context | ((scores >= least) & (count > 0))
        return gradient * kept[..., None], None, None, None


def frozen_products(x: Tensor, weights: Sequence[Tensor], context: Tensor | None, mode: Mode) -> Sequence[Tensor]:
    """``x W'`` of frozen weights that share an input, by the precision of ``mode``."""
    if mode.precision == "bf16":
        return [F.linear(x, weight) for weight in weights]
    fp8_rows = context if mode.precision == "fp8-context" else None
    return _Fp8Product.apply(x, torch.cat(tuple(weights)), fp8_rows).split([len(weight) for weight in weights], dim=-1)


class _Fp8Product(torch.autograd.Function):
    """``x W'`` and its input gradient in e4m3, as `sparse_unsloth.ops.fp8` multiplies: weights that share an input
    share the scales of the gradient's rows and of the weights' columns."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, fp8_rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, fp8_rows)
        return fp8_product(x, weight, fp8_rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, fp8_rows = ctx.saved_tensors
        return fp8_product(gradient, weight.t(), fp8_rows), None, None


def fp8_product(x: Tensor, weight: Tensor, fp8_rows: Tensor | None) -> Tensor:
    """``x W'`` with the rows of both rounded to e4m3; emulated: e4m3 values are multiplied in the dtype of ``x``.

    Args:
        x: ``[seeds, rows, K]``; weight: ``[N, K]``.
        fp8_rows: bool ``[seeds, rows, 1]``: the rows that are rounded; None: all.
    """
    (rows, row_scales), (columns, column_scales) = (reference_quantize_rows(y) for y in (x.flatten(0, 1), weight))
    y = F.linear(rows.to(x.dtype), columns.to(x.dtype)) * (row_scales * column_scales.t())
    y = y.to(x.dtype).view(*x.shape[:2], -1)
    return y if fp8_rows is None else torch.where(fp8_rows, y, F.linear(x, weight))


def attention(normed, weights, adapters, rotary, network, layout, context=None, mode=DENSE) -> Tensor:
    """Causal grouped-query attention; arguments as `layer_forward`, ``normed`` in the weights' dtype."""
    shape = network.shape
    q, k, v = (
        base + _lora(normed, adapters, place, network.lora_scale)
        for place, base in enumerate(frozen_products(normed, weights[:3], context, mode))
    )
    seeds, rows, _ = normed.shape
    q, k, v = (y.view(seeds, rows, -1, shape.head_dim) for y in (q, k, v))
    q, k = (output_norm(y, norm, network.epsilon) for y, norm in ((q, weights.query_norm), (k, weights.key_norm)))
    q, k = (y * rotary[0] + _rotated(y) * rotary[1] for y in (q, k))
    mixed, start = [], 0
    for count, length in layout.groups:
        group = [
            y[:, start : start + count * length].reshape(seeds * count, length, -1, shape.head_dim).transpose(1, 2)
            for y in (q, k, v)
        ]
        repeat = shape.num_heads // shape.num_kv_heads
        group[1:] = [y.repeat_interleave(repeat, dim=1) for y in group[1:]]
        out = F.scaled_dot_product_attention(*group, is_causal=True)
        mixed.append(out.transpose(1, 2).reshape(seeds, count * length, -1))
        start += count * length
    (base,) = frozen_products(out := torch.cat(mixed, dim=1), weights[3:4], context, mode)
    return output_norm(
        base + _lora(out, adapters, 3, network.lora_scale), weights.attention_output_norm, network.epsilon
    )


def gated_mlp(x, weights, adapters, selection, context, network, mode) -> Tensor:
    """The MLP; arguments as `layer_forward`, ``x`` in the weights' dtype."""
    act, scale = ACTIVATIONS[network.activation], network.lora_scale
    gate_base, up_base = frozen_products(x, weights[4:6], context, mode)
    gate_lora, up_lora = (_lora(x, adapters, place, scale) for place in (4, 5))
    if mode.kind in ("dense", "rows"):
        h = act(gate_base + gate_lora) * (up_base + up_lora)
        (base,) = frozen_products(h, weights[6:7], context, mode)
        return base + _lora(h, adapters, 6, scale)
    channels = selection.channels[:, None]
    if mode.contextual:
        channels = contextual_channels(x, selection, context, network)
    kept = ~context | channels
    h = act(gate_base * kept + gate_lora) * (up_base * kept + up_lora)
    return F.linear(h * kept, weights.down_proj) + _lora(h, adapters, 6, scale)


@torch.no_grad()
def contextual_channels(x: Tensor, selection: Selection, context: Tensor, network: Network) -> Tensor:
    """bool ``[seeds, 1, intermediate_size]``: the ``keep`` channels of highest score over each seed's context rows."""
    reduced = torch.bmm(x.detach(), selection.down.mT)
    rank = reduced.shape[-1] // 2
    gates = torch.bmm(reduced[..., :rank], selection.up_gate.mT)
    ups = torch.bmm(reduced[..., rank:], selection.up_up.mT)
    hidden = ACTIVATIONS[network.activation](gates) * ups * context
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scores = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=wide) * selection.gain[:, None]
    ranked = scores.sort(dim=-1, descending=True).values
    at = (selection.keep - 1).clamp_min(0).expand(*scores.shape[:2], 1)
    return (scores >= ranked.gather(2, at)) & (selection.keep > 0)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of a row, computed in ``x``'s dtype, in the dtype of ``weight``."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(weight.dtype)


def output_norm(y: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`rms_norm` of a product, in fp32 at least, where the model has it."""
    return y if weight is None else rms_norm(y.to(torch.promote_types(y.dtype, torch.float32)), weight, epsilon)


def answer_logits(x: Tensor, loss_rows: Tensor, network: Network) -> Tensor:
    """fp32 (or wider) logits ``[seeds, places, vocab_size]`` of ``loss_rows [seeds, places]``."""
    chosen = x.gather(1, loss_rows[..., None].expand(-1, -1, x.shape[-1]))
    logits = F.linear(rms_norm(chosen, network.final_norm, network.epsilon), network.head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of each seed's answer tokens, ``[seeds]``."""
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (losses.view(batch.weights.shape) * batch.weights).sum(1)


def run(
    network: Network,
    ids: Tensor,
    adapters: list[tuple[Tensor, ...]],
    sparsity: Callable[[int], Selection] | None,
    context: Tensor,
    rotary: dict[float, tuple[Tensor, Tensor]],
    layout: Layout,
    mode: Mode,
    layer: Callable[..., Tensor] = layer_forward,
) -> Tensor:
    """Hidden states before the final norm, ``[seeds, rows, hidden_size]``.

    Args:
        ids: int ``[seeds, rows]``.
        context: bool ``[seeds, rows, 1]``.
        adapters: of each layer, see `layer_forward`.
        sparsity: the `Selection` of a layer; unused in the dense mode.
        layer: `layer_forward`, or it compiled.
    """
    x = F.embedding(ids, network.embedding)
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * network.embedding_scale
    if torch.is_grad_enabled():
        x.requires_grad_()  # so that the first layer is compiled together with the others
    for index, weights in enumerate(network.layers):
        selection = None if mode.kind == "dense" else sparsity(index)
        angles = rotary[network.rope_bases[index]]
        x = layer(x, weights, adapters[index], selection, context, angles, network, layout, mode)
    return x


def _lora(x: Tensor, adapters: tuple[Tensor, ...], place: int, scale: float) -> Tensor:
    a, b = adapters[2 * place], adapters[2 * place + 1]
    return torch.bmm(torch.bmm(x, a.mT), b.mT) * scale


def _rotated(y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
