"""Computes a training step in float32 and plain PyTorch, the reference of steps in bf16.

It uses no code of Unsloth, of transformers' modules or of this package's functions, only the model's weights, rounded
to bf16. One layer at a time is in memory (0.9 GB of a Llama-3-8B), and the backward pass recomputes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_unsloth.kernels.dequantize import reference_whole
from sparse_unsloth.model.activations import ACTIVATIONS
from sparse_unsloth.model.decoder_layer import DecoderLayer, find_layers
from sparse_unsloth.ops.projection import BaseWeight, Projection, read_projection

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` with a reference."""


def float32_step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss, and the gradient of every LoRA matrix by its parameter's name, on the CPU.

    Args:
        model: with LoRA on all seven projections; of `FAMILIES`.
        batch: ``input_ids`` and ``labels [batch, length]``, without padding.
    """
    base = model.get_base_model()
    layers, eps = find_layers(model), base.config.rms_norm_eps
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rope = _rope(base.config, layers[0].head_dim, batch["input_ids"])
    gradients = {}
    with _full_precision():
        inputs = [base.model.embed_tokens.weight.detach()[batch["input_ids"]].float()]
        for layer in layers:
            with torch.no_grad():
                inputs.append(_layer(inputs[-1], layer, _read(layer), rope, eps))
        last = inputs.pop().requires_grad_()
        loss = _loss(last, base, batch["labels"], eps)
        (gradient,) = torch.autograd.grad(loss, last)
        for layer in reversed(layers):
            x, projections = inputs.pop().requires_grad_(), _read(layer)
            output = _layer(x, layer, projections, rope, eps)
            loras = [lora for projection in projections for lora in (projection.lora.A, projection.lora.B)]
            gradient, *found = torch.autograd.grad(output, [x, *loras], gradient)
            parameters = [p for projection in layer.projections().values() for p in _lora(projection)]
            gradients |= {names[id(p)]: g.cpu() for p, g in zip(parameters, found, strict=True)}
    return loss.item(), gradients


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Turns TF32 off in float32 products."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


def _lora(module: nn.Module) -> tuple[Tensor, Tensor]:
    lora = read_projection(module).lora
    return lora.A, lora.B


def _read(layer: DecoderLayer) -> list[Projection]:
    """Reads the projections with float32 weights: gate, up, down, q, k, v, o."""
    found = []
    for module in layer.projections().values():
        projection = read_projection(module)
        base, lora = projection.base, projection.lora
        bias = None if base.bias is None else base.bias.detach().float()
        A, B = (_as_bf16(matrix).requires_grad_() for matrix in (lora.A, lora.B))
        found.append(Projection(BaseWeight(_dense(base), None, bias), type(lora)(A, B, lora.scale)))
    return found


def _dense(base: BaseWeight) -> Tensor:
    weight = base.weight.detach()
    return _as_bf16(weight if base.quant_state is None else reference_whole(weight, base.quant_state, torch.float32))


def _as_bf16(tensor: Tensor) -> Tensor:
    """Rounds to bf16, and returns float32."""
    return tensor.detach().to(torch.bfloat16).float()


def _layer(x: Tensor, layer: DecoderLayer, projections: Sequence[Projection], rope, eps: float) -> Tensor:
    """Computes one layer: ``[batch, length, hidden_size]`` to the same."""
    gate, up, down, query, key, value, output = projections
    attention, (batch, length, _) = layer.self_attn, x.shape
    normed = _norm(x, layer.module.input_layernorm, eps)
    q, k, v = (_multiply(normed, part).view(batch, length, -1, layer.head_dim) for part in (query, key, value))
    if hasattr(attention, "q_norm"):
        q, k = _norm(q, attention.q_norm, eps), _norm(k, attention.k_norm, eps)
    q, k, v = _rotate(q, rope).transpose(1, 2), _rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
    k, v = (part.repeat_interleave(layer.groups, dim=1) for part in (k, v))
    scores = (q @ k.transpose(2, 3)) * layer.head_dim**-0.5
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    x = x + _multiply(mixed.transpose(1, 2).flatten(2), output)
    normed = _norm(x, layer.module.post_attention_layernorm, eps)
    h = ACTIVATIONS[layer.activation](_multiply(normed, gate)) * _multiply(normed, up)
    return x + _multiply(h, down)


def _multiply(x: Tensor, projection: Projection) -> Tensor:
    lora = projection.lora
    y = F.linear(x, projection.base.weight, projection.base.bias)
    return y + lora.scale * (x @ lora.A.t() @ lora.B.t())


def _norm(x: Tensor, norm: nn.Module, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.weight.detach().float()


def _loss(x: Tensor, base: nn.Module, labels: Tensor, eps: float) -> Tensor:
    """Returns the mean cross entropy of the labelled tokens, each predicted by the position before it."""
    predicting = labels[:, 1:] != -100
    rows = _norm(x[:, :-1][predicting], base.model.norm, eps)
    return F.cross_entropy(rows @ base.lm_head.weight.detach().float().t(), labels[:, 1:][predicting])


def _rope(config, head_dim: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines ``[length, 1, head_dim]``."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = parameters.get("rope_type", "default"), 1.0
    if kind == "default":
        theta = parameters.get("rope_theta") or config.rope_theta
        frequencies = theta ** -(torch.arange(0, head_dim, 2, device=ids.device).float() / head_dim)
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, ids.device, seq_len=ids.shape[1])
    angles = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=1)[:, None]
    return angles.cos() * factor, angles.sin() * factor


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs ``(d, d + head_dim / 2)`` of ``x [batch, length, heads, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
