"""The model as plain functions, several LoRA adapters in lockstep: DESIGN.md section 2 with masks instead of gathers.

Tensors have a leading dimension of seeds: ``x [seeds, rows, hidden_size]``, ``A [seeds, rank, in]``. Base weights are
shared. Everything that differs between settings of sparsity and between steps is a tensor (masks, numbers of channels,
stand-ins), so that few captured CUDA graphs serve all settings; `Mode` says which of these tensors are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_unsloth.costs import ModelShape
from sparse_unsloth.energy import base_weight
from sparse_unsloth.functions.activations import ACTIVATIONS
from sparse_unsloth.layers import find_layers
from sparse_unsloth.quality.batches import Batch, Layout

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Mode(NamedTuple):
    """Which masks a step looks at.

    Attributes:
        kind: "dense"; "forward", sparse as DESIGN.md section 2; "backward", an exact forward whose context rows send
            gradients through the selected MLP channels of the base weights only; "rows", an exact forward in which only
            the context rows of largest gradient send it into the MLP, the output projection and the queries.
        cut: context rows receive no gradient from the layer above, where `Selection.cut` says so: their adapters learn
            by what the answers read of their keys and values.
        contextual: channels are chosen from each batch by factors, not given.
        compensation: stand-ins are added to context rows.
        attention: Q, K, V and O are masked too.
        outputs: answer tokens have MLP masks of their own.
        last: the last prompt token counts as context.
        per_sample: of contextual channels, every sequence has a set of its own.
        random_rows: of the kind "rows", any context rows instead of those of largest gradient.
    """

    kind: str = "dense"
    cut: bool = False
    contextual: bool = False
    compensation: bool = False
    attention: bool = False
    outputs: bool = False
    last: bool = False
    per_sample: bool = False
    random_rows: bool = False


DENSE = Mode()


class LayerWeights(NamedTuple):
    """Frozen weights of one layer, ``[out, in]``, and its two norms ``[hidden_size]``."""

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor


class Selection(NamedTuple):
    """What is sparse in one layer; an index into the first dimension of each tensor of `Sparsity`.

    Attributes:
        channels: bool ``[seeds, intermediate_size]``, kept on context rows.
        output_channels: likewise, on answer tokens.
        keep: int64 ``[]``, how many channels are chosen from the batch; 0 for none. Of the kind "rows", how many
            context rows, in units of 1 / intermediate_size of a seed's.
        down: ``[seeds, 2 rank, hidden_size]``, factors of gate and up.
        up_gate, up_up: ``[seeds, intermediate_size, rank]``.
        gain: fp32 ``[seeds, intermediate_size]``: scores are the estimate's L2 norms times this.
        stand_in_down, stand_in_up: ``[seeds, rank, hidden_size]`` and ``[seeds, hidden_size, rank]``.
        stand_in_bias: ``[seeds, hidden_size]``.
        stand_in_on: fp32 ``[]``, 0 or 1.
        q, k, v, o: bool ``[seeds, width]``, kept on context rows.
        cut: bool ``[]``: context rows' gradients stop before this layer.
    """

    channels: Tensor
    output_channels: Tensor
    keep: Tensor
    down: Tensor
    up_gate: Tensor
    up_up: Tensor
    gain: Tensor
    stand_in_down: Tensor
    stand_in_up: Tensor
    stand_in_bias: Tensor
    stand_in_on: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    cut: Tensor


@dataclass(frozen=True)
class Network:
    """The base model.

    Attributes:
        shape: its sizes.
        layers: the frozen weights, in ``dtype``.
        embedding: ``[vocab_size, hidden_size]``; ``head`` the same shape; ``final_norm`` ``[hidden_size]``.
        activation: a key of `ACTIVATIONS`.
        epsilon, rope_base: as in the model's configuration.
        lora_scale: alpha over rank.
    """

    shape: ModelShape
    layers: tuple[LayerWeights, ...]
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    activation: str
    epsilon: float
    rope_base: float
    lora_scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].q_proj.dtype

    def rotary(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[rows, 1, head_dim]`` of every row's position."""
        half = torch.arange(0, self.shape.head_dim, 2, device=self.head.device, dtype=torch.float64)
        frequencies = self.rope_base ** (-half / self.shape.head_dim)
        angles = layout.positions().to(self.head.device)[:, None] * torch.cat((frequencies, frequencies))
        return angles.cos()[:, None].to(self.dtype), angles.sin()[:, None].to(self.dtype)


def read_network(model: nn.Module, dtype: torch.dtype, lora_scale: float) -> Network:
    """The weights of a transformers Llama without biases and head norms (SmolLM2 is one), bare or with PEFT's adapters.

    Raises:
        ValueError: a model of another form.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, found = causal.config, find_layers(causal)
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"the benchmark computes Llama models without biases, not {config.model_type}")
    layers = []
    for layer in found:
        weights = [base_weight(layer, name).dense(dtype) for name in _order(layer.projections())]
        norms = (layer.module.input_layernorm.weight, layer.module.post_attention_layernorm.weight)
        layers.append(LayerWeights(*weights, *(norm.detach().to(dtype) for norm in norms)))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary embeddings of kind {rope['rope_type']} are not computed here")
    return Network(
        shape=ModelShape.from_config(config),
        layers=tuple(layers),
        embedding=causal.get_input_embeddings().weight.detach().to(dtype),
        head=causal.get_output_embeddings().weight.detach().to(dtype),
        final_norm=causal.model.norm.weight.detach().to(dtype),
        activation=found[0].activation,
        epsilon=config.rms_norm_eps,
        rope_base=float(rope.get("rope_theta") or config.rope_theta),
        lora_scale=lora_scale,
    )


def _order(projections: dict[str, nn.Module]) -> list[str]:
    return sorted(projections, key=lambda name: PROJECTIONS.index(name.split(".")[1]))


class Roles(NamedTuple):
    """Rows that count as context and as answers, bool ``[seeds, rows, 1]``."""

    context: Tensor
    output: Tensor


def roles_of(batch: Batch, mode: Mode) -> Roles:
    """Roles as ``mode`` sees them."""
    context = batch.context | batch.last if mode.last else batch.context
    return Roles(context[..., None], batch.output[..., None])


def layer_forward(
    x: Tensor,
    weights: LayerWeights,
    adapters: tuple[Tensor, ...],
    selection: Selection | None,
    roles: Roles,
    rotary: tuple[Tensor, Tensor],
    network: Network,
    layout: Layout,
    mode: Mode,
) -> Tensor:
    """One decoder layer: ``[seeds, rows, hidden_size]`` fp32 (or wider) to the same.

    Args:
        adapters: A and B of each of `PROJECTIONS` in turn; the scale is not in them.
    """
    if mode.cut:
        x = torch.where(roles.context & selection.cut, x.detach(), x)
    normed = rms_norm(x, weights.attention_norm, network.epsilon)
    y = attention(normed, weights, adapters, selection, roles, rotary, network, layout, mode)
    inner = x + y
    normed = rms_norm(inner, weights.mlp_norm, network.epsilon)
    z = gated_mlp(normed, weights, adapters, selection, roles, network, mode, layout)
    return inner + z if mode.kind != "rows" else x + sparse_rows(y.to(x.dtype) + z, selection, roles, network, mode)


def sparse_rows(y: Tensor, selection: Selection | None, roles: Roles, network: Network, mode: Mode) -> Tensor:
    """``y [seeds, rows, hidden_size]``, whose gradient is that of answers and chosen context rows only."""
    share = selection.keep / network.shape.intermediate_size
    return _SparseRows.apply(y, roles.context[..., 0], share, mode.random_rows)


class _SparseRows(torch.autograd.Function):
    """The identity; of the gradient only a share of each seed's context rows goes on: the largest, or random ones."""

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


def attention(normed, weights, adapters, selection, roles, rotary, network, layout, mode) -> Tensor:
    """Causal grouped-query attention; arguments as `layer_forward`, ``normed`` in the weights' dtype."""
    shape = network.shape
    masked = mode.attention and mode.kind == "forward"

    def project(place: int, source: Tensor, channels: Tensor | None) -> Tensor:
        base = F.linear(source, weights[place])
        if channels is not None:
            base = base * _kept(channels, roles.context)
        return base + _lora(source, adapters, place, network.lora_scale)

    masks = (selection.q, selection.k, selection.v) if masked else (None, None, None)
    q, k, v = (project(place, normed, masks[place]) for place in range(3))
    seeds, rows, _ = normed.shape
    q, k, v = (y.view(seeds, rows, -1, shape.head_dim) for y in (q, k, v))
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
    a = torch.cat(mixed, dim=1)
    source = a * _kept(selection.o, roles.context) if masked else a
    return F.linear(source, weights.o_proj) + _lora(a, adapters, 3, network.lora_scale)


def gated_mlp(x, weights, adapters, selection, roles, network, mode, layout: Layout | None = None) -> Tensor:
    """The MLP; arguments as `layer_forward`, ``x`` in the weights' dtype; a set of each sample needs ``layout``."""
    act, scale = ACTIVATIONS[network.activation], network.lora_scale
    gate_base, up_base = F.linear(x, weights.gate_proj), F.linear(x, weights.up_proj)
    gate_lora, up_lora = (_lora(x, adapters, place, scale) for place in (4, 5))
    if mode.kind in ("dense", "rows"):
        h = act(gate_base + gate_lora) * (up_base + up_lora)
        return F.linear(h, weights.down_proj) + _lora(h, adapters, 6, scale)
    channels = selection.channels[:, None]
    if mode.contextual:
        channels = contextual_channels(x, selection, roles, network, layout if mode.per_sample else None)
    kept = ~roles.context | channels
    if mode.outputs:
        kept = kept & (~roles.output | selection.output_channels[:, None])
    if mode.kind == "backward":
        gate_base, up_base = (torch.where(kept, y, y.detach()) for y in (gate_base, up_base))
        h = act(gate_base + gate_lora) * (up_base + up_lora)
        return F.linear(torch.where(kept, h, h.detach()), weights.down_proj) + _lora(h, adapters, 6, scale)
    h = act(gate_base * kept + gate_lora) * (up_base * kept + up_lora)
    y = F.linear(h * kept, weights.down_proj) + _lora(h, adapters, 6, scale)
    if mode.compensation:
        y = y + stand_in(x, selection) * (roles.context * selection.stand_in_on).to(x.dtype)
    return y


def stand_in(x: Tensor, selection: Selection) -> Tensor:
    """What the dropped channels would have added, as calibrated: ``[seeds, rows, hidden_size]``."""
    thin = torch.bmm(x, selection.stand_in_down.mT)
    return torch.baddbmm(selection.stand_in_bias[:, None], thin, selection.stand_in_up.mT)


@torch.no_grad()
def contextual_channels(
    x: Tensor, selection: Selection, roles: Roles, network: Network, layout: Layout | None = None
) -> Tensor:
    """bool ``[seeds, 1, intermediate_size]``: the ``keep`` channels of highest score over each seed's context rows.

    With ``layout``, ``[seeds, rows, intermediate_size]``: over those of each sequence.
    """
    thin = torch.bmm(x.detach(), selection.down.mT)
    rank = thin.shape[-1] // 2
    gates = torch.bmm(thin[..., :rank], selection.up_gate.mT)
    ups = torch.bmm(thin[..., rank:], selection.up_up.mT)
    hidden = ACTIVATIONS[network.activation](gates) * ups * roles.context
    wide = torch.promote_types(hidden.dtype, torch.float32)
    groups = ((1, x.shape[1]),) if layout is None else layout.groups
    parts = hidden.split([count * length for count, length in groups], dim=1)
    norms = [
        torch.linalg.vector_norm(part.unflatten(1, group), dim=2, dtype=wide)
        for part, group in zip(parts, groups, strict=True)
    ]
    scores = torch.cat(norms, dim=1) * selection.gain[:, None]
    ranked = scores.sort(dim=-1, descending=True).values
    at = (selection.keep - 1).clamp_min(0).expand(*scores.shape[:2], 1)
    chosen = (scores >= ranked.gather(2, at)) & (selection.keep > 0)
    if layout is None:
        return chosen
    each = chosen.split([count for count, _ in groups], dim=1)
    return torch.cat([part.repeat_interleave(length, 1) for part, (_, length) in zip(each, groups, strict=True)], dim=1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of a row, computed in ``x``'s dtype, in the dtype of ``weight``."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(weight.dtype)


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
    roles: Roles,
    rotary: tuple[Tensor, Tensor],
    layout: Layout,
    mode: Mode,
    layer: Callable[..., Tensor] = layer_forward,
) -> Tensor:
    """Hidden states before the final norm, ``[seeds, rows, hidden_size]``.

    Args:
        ids: int ``[seeds, rows]``.
        adapters: of each layer, see `layer_forward`.
        sparsity: the `Selection` of a layer; unused in the dense mode.
        layer: `layer_forward`, or it compiled.
    """
    x = F.embedding(ids, network.embedding)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.is_grad_enabled():
        x.requires_grad_()  # so that the first layer is compiled together with the others
    for index, weights in enumerate(network.layers):
        selection = None if mode == DENSE else sparsity(index)
        x = layer(x, weights, adapters[index], selection, roles, rotary, network, layout, mode)
    return x


def _lora(x: Tensor, adapters: tuple[Tensor, ...], place: int, scale: float) -> Tensor:
    a, b = adapters[2 * place], adapters[2 * place + 1]
    return torch.bmm(torch.bmm(x, a.mT), b.mT) * scale


def _kept(channels: Tensor, context: Tensor) -> Tensor:
    return ~context | channels[:, None]


def _rotated(y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
