"""Equality checks on the loaded model: a method that fails is not timed, for a fast wrong step is worth nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sparse_unsloth.attachment import get_state
from sparse_unsloth.bench.methods import EQUAL_TO_PLAIN
from sparse_unsloth.bench.shapes import Shape, make_batch
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.functions.linear import SelectedProjection, masked_linear, sparse_linear
from sparse_unsloth.functions.mlp import GatedMlp, masked_mlp, sparse_mlp
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import MLP_PROJECTIONS
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.weights import Projection, read_projection

TOLERANCE = 0.03
"""Relative error of a tensor that two orders of bf16 arithmetic may leave."""
STEP_TOLERANCE = 0.05
"""The same of all gradients of a step together: rounding grows over tens of layers, and a wrong layer is far beyond."""
LOSS_TOLERANCE = 2e-3
SMALL = Shape(2, 256, 64)
LAYERS = 2
"""Layers of each kind that are checked."""


class CheckFailed(SparsityError):
    """A method that does not compute what it should."""


def check(model: nn.Module, method: str, plain: tuple[float, dict[str, Tensor]] | None) -> str:
    """Checks the attached ``model``; returns what was found.

    Args:
        plain: `loss_and_gradients` before it was attached, for the methods that must equal it.

    Raises:
        CheckFailed: it differs.
    """
    found = []
    state = get_state(model)
    if state is not None and method != "hooks-dense":
        for part, function in (("mlp", check_mlp), ("self_attn", check_attention)):
            runtimes = [runtime for runtime in state.runtimes.values() if getattr(runtime.sparsity, part) > 0]
            found += [function(runtime) for runtime in runtimes[:LAYERS]]
    if method in EQUAL_TO_PLAIN:
        found.append(check_model(loss_and_gradients(model), plain))
    return "; ".join(found) or "nothing to check"


def check_mlp(runtime: LayerRuntime) -> str:
    """One layer's sparse MLP against its masked definition, forward and every gradient."""
    layer = runtime.layer
    projections = [read_projection(getattr(layer.mlp, name)) for name in MLP_PROJECTIONS]
    mlp = GatedMlp(*projections, layer.activation)
    x, partition = _input(layer.hidden_size, projections[0])
    context = x.flatten(0, 1)[partition.context]
    channels = runtime.state.selector.mlp(layer, context, runtime.sparsity.mlp).channels
    return _compare(
        f"{layer.name}.mlp",
        projections,
        x,
        lambda source: [sparse_mlp(source, partition, channels, mlp)],
        lambda source: [masked_mlp(source, partition, channels, mlp)],
    )


def check_attention(runtime: LayerRuntime) -> str:
    """One layer's sparse Q, K, V and O against their masked definition, likewise."""
    layer, attention = runtime.layer, runtime.layer.self_attn
    query, key, value, output = (read_projection(getattr(attention, f"{name}_proj")) for name in "qkvo")
    x, partition = _input(layer.hidden_size, query)
    context = x.flatten(0, 1)[partition.context]
    chosen = runtime.state.selector.attention(layer, context, runtime.sparsity.self_attn)
    inputs = [
        SelectedProjection(projection, out_index=index)
        for projection, index in ((query, chosen.q), (key, chosen.k), (value, chosen.v))
    ]
    found = []
    for name, parts, width in (
        ("qkv", inputs, layer.hidden_size),
        ("o", [SelectedProjection(output, in_index=chosen.o)], layer.num_heads * layer.head_dim),
    ):
        x, _ = _input(width, query)
        found.append(
            _compare(
                f"{layer.name}.{name}",
                [part.projection for part in parts],
                x,
                lambda source, parts=parts: sparse_linear(source, partition, parts),
                lambda source, parts=parts: masked_linear(source, partition, parts),
            )
        )
    return "; ".join(found)


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Of one small batch; the gradients of every trained parameter on the CPU."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**make_batch(SMALL, model.config.vocab_size, 0, device)).loss
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def check_model(ours: tuple[float, dict[str, Tensor]], plain: tuple[float, dict[str, Tensor]]) -> str:
    """Loss and gradients of a whole step against the plain model's."""
    (loss, gradients), (plain_loss, plain_gradients) = ours, plain
    if not abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss):
        raise CheckFailed(f"loss {loss:.5f} is not the plain model's {plain_loss:.5f}")
    if gradients.keys() != plain_gradients.keys():
        raise CheckFailed("other parameters have gradients than in the plain model")
    difference = _norm(gradients[name] - plain for name, plain in plain_gradients.items())
    error = difference / max(_norm(plain_gradients.values()), 1e-12)
    if not error <= STEP_TOLERANCE:
        raise CheckFailed(f"gradients differ from the plain model's by {error:.3f} of their norm")
    return f"whole step: loss {loss:.5f} of {plain_loss:.5f}, gradients within {error:.1e}"


def _input(width: int, projection: Projection) -> tuple[Tensor, TokenPartition]:
    """Random rows ``[batch, length, width]`` of the small shape, and their roles."""
    device = projection.base.device
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(SMALL.batch, SMALL.length, width, generator=generator).to(device, torch.bfloat16)
    return x, TokenPartition.from_labels(make_batch(SMALL, 100, 0, device)["labels"])


def _compare(name: str, projections: list[Projection], x: Tensor, ours: Callable, masked: Callable) -> str:
    """Outputs, and the gradients of the input and of LoRA, of two functions of ``x``; returns the largest error."""
    loras = [tensor for projection in projections for tensor in (projection.lora.A, projection.lora.B)]
    results = []
    for function in (ours, masked):
        source = x.clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = list(function(source))
        objective = sum(output.float().square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(objective, [source, *loras])])
    errors = [_norm([a.float() - b.float()]) / max(_norm([b]), 1e-6) for a, b in zip(*results, strict=True)]
    if not max(errors) <= TOLERANCE:
        raise CheckFailed(f"{name}: the sparse function differs from the masked one by {max(errors):.3f} of its norm")
    return f"{name} within {max(errors):.1e}"


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.detach().float().square().sum().item() for tensor in tensors) ** 0.5
