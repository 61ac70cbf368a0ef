"""Plans of one small layer for the functions of `ops.decoder_layer`, and the masked layer that they must equal."""

from dataclasses import dataclass, replace

import torch

from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.ops.linear import SelectedProjection, masked_linear
from sparse_unsloth.ops.mlp import GatedMlp, masked_mlp
from sparse_unsloth.ops.norms import Norm, normalise
from sparse_unsloth.ops.projection import BaseWeight, Lora, Projection
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.tokens.partition import TokenPartition, every_row_dense

HIDDEN, INTERMEDIATE, QUERIES, KEYS = 32, 48, 32, 16
SIZES = {
    "q": (QUERIES, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, QUERIES),
    "gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE),
}  # fmt: skip
NORMS = {
    "plain": ("plain", "", "plain", ""),
    "offset": ("offset", "", "offset", ""),
    "output norms": ("offset", "offset", "offset", "offset"),
    "output norms alone": ("", "plain", "", "plain"),
    "weightless": ("weightless", "", "weightless", ""),
    "multiplied": ("plain", "", "plain", ""),
    "multiplied output norms": ("plain", "weightless", "plain", "plain"),
}
"""N1 to N4 by form; the multiplied ones have a residual multiplier."""
RANKS = {
    "equal": dict.fromkeys(SIZES, 4),
    "unequal": {"q": 2, "k": 6, "v": 6, "o": 3, "gate": 4, "up": 8, "down": 1},
    "some": {"q": 4, "v": 2, "down": 5},
    "none": {},
}


@dataclass(frozen=True)
class Layer:
    """A layer's plan, and its inputs: hidden states, and the gradient of the output, ``[2, 7, HIDDEN]``."""

    plan: LayerPlan
    x: torch.Tensor
    dy: torch.Tensor

    @property
    def leaves(self):
        return [self.x, *lora_tensors_of(self.plan.projections)]

    def with_plan(self, **changes):
        return replace(self, plan=replace(self.plan, **changes))


def roles(text="ccdpcdc dccpdcc"):
    lines = text.split()
    rows = {role: torch.tensor([i for i, r in enumerate("".join(lines)) if r == role]).long() for role in "dcp"}
    return TokenPartition((len(lines), len(lines[0])), rows["d"], rows["c"], rows["p"], rows["d"])


def make_layer(form="plain", ranks="equal", sparse=True, partition=None, activation="silu", **options):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    def norm(kind):
        weight = {"plain": 1 + draw(HIDDEN, scale=0.3), "offset": draw(HIDDEN, scale=0.3)}.get(kind)
        return Norm(weight, 1e-3, float(kind == "offset")) if kind else None

    def projection(name, out_features, in_features):
        bias = draw(out_features, scale=0.1) if name in "qkvo" else None
        base, r = BaseWeight(draw(out_features, in_features, scale=0.2), None, bias), RANKS[ranks].get(name)
        if r is None:
            return Projection(base)
        A, B = draw(r, in_features, scale=0.2).requires_grad_(), draw(out_features, r, scale=0.5).requires_grad_()
        return Projection(base, Lora(A, B, 0.5 + 0.25 * r))

    def some(size, kept):
        return torch.randperm(size, generator=generator)[:kept].sort().values

    partition = roles() if partition is None else partition
    rows = RowOrder(partition, True) if sparse else RowOrder(every_row_dense(partition), False)
    attention, mlp = AttentionSelection(some(32, 10), some(16, 5), some(16, 6), some(32, 12)), some(48, 20)
    plan = LayerPlan(
        *map(norm, NORMS[form]), rows, rows, [projection(name, *shape) for name, shape in SIZES.items()], activation,
        lambda normed: attention, lambda normed: MlpSelection(mlp), output_unused=False, keep=True,
        residual_multiplier=0.22 if "multiplied" in form else 1.0,
    )  # fmt: skip
    shape = *partition.shape, HIDDEN
    return Layer(replace(plan, **options), draw(*shape).requires_grad_(), draw(*shape))


def attend(q, k, v):
    """A row-wise stand-in for attention."""
    return torch.tanh(q) * torch.cat((k, v), dim=-1)


def compute(plan, x, before=pre_attention, after=post_attention):
    *qkv, residual = before(x, plan)
    return after(attend(*qkv), residual, plan)


def masked(plan, x):
    """The layer in plain PyTorch, in ``x``'s dtype."""
    *qkv, o, gate, up, down = [_exact(projection, x.dtype) for projection in plan.projections]
    norms = plan.attention_norm, plan.attention_output_norm, plan.mlp_norm, plan.mlp_output_norm
    norms = [one and replace(one, weight=None if one.weight is None else one.weight.to(x.dtype)) for one in norms]
    chosen, multiplier = plan.choose_attention(None), plan.residual_multiplier
    indices = (chosen.q, chosen.k, chosen.v, chosen.o) if plan.attention.sparse else (None,) * 4
    parts = [SelectedProjection(one, out_index=index) for one, index in zip(qkv, indices, strict=False)]
    attended = attend(*masked_linear(normalise(x, norms[0]), plan.attention.partition, parts))
    (y,) = masked_linear(attended, plan.attention.partition, [SelectedProjection(o, in_index=indices[3])])
    x = x + multiplier * normalise(y, norms[1])
    channels = plan.choose_mlp(None).channels
    y = masked_mlp(normalise(x, norms[2]), plan.mlp.partition, channels, GatedMlp(gate, up, down, plan.activation))
    return x + multiplier * normalise(y, norms[3])


def _exact(projection, dtype):
    base, lora = projection.base, projection.lora
    base = BaseWeight(base.weight.to(dtype), None, None if base.bias is None else base.bias.to(dtype))
    return Projection(base, lora and replace(lora, A=lora.A.to(dtype), B=lora.B.to(dtype)))


def outcome(layer, function):
    """The output of ``function(plan, x)``, and the gradients of the leaves."""
    output = function(layer.plan, layer.x)
    return [output, *torch.autograd.grad(output, layer.leaves, layer.dy.to(output.dtype))]


def expected(layer):
    """`outcome` of `masked`, computed in float64."""
    return outcome(layer, lambda plan, x: masked(plan, x.double()))


def assert_close(ours, others, tolerance=2e-5):
    """By the largest value of each tensor: sums of float32 products are rounded by their largest terms."""
    for number, (left, right) in enumerate(zip(ours, others, strict=True)):
        right = right.to(left.dtype)
        bound = tolerance * max(1.0, right.abs().max().item())
        torch.testing.assert_close(left, right, rtol=0, atol=bound, msg=lambda m, n=number: f"tensor {n}: {m}")
