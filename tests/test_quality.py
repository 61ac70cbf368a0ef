"""The quality benchmark's lockstep harness against the library itself, its costs, and its tables."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_unsloth import attach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.quality.batches import Batches, Layout
from sparse_unsloth.quality.fitting import calibrate, fit_stand_ins
from sparse_unsloth.quality.lockstep import Adapters, Lockstep, Sparsity
from sparse_unsloth.quality.network import DENSE, PROJECTIONS, Mode, read_network
from sparse_unsloth.quality.tasks import Items

sys.path.insert(0, str(Path(__file__).parent))
from tiny import loras, loss_and_gradients, make_batch, make_lora

CLOSE = {"rtol": 1e-5, "atol": 1e-7}
"""Norms, rotary angles and losses of transformers are fp32, whatever the weights are."""


def items_of(batch) -> Items:
    """A collated batch, padded on the right, as the benchmark stores items."""
    mask, labels = batch["attention_mask"].numpy(), batch["labels"].numpy()
    lengths = mask.sum(1)
    prompts = lengths - (labels != -100).sum(1)
    return Items(batch["input_ids"].numpy() * mask, lengths, prompts, np.zeros(len(lengths), dtype=np.int64))


def adapters_of(model) -> list[list[torch.Tensor]]:
    """A and B of each projection of each layer, in the benchmark's order."""
    found = loras(model)
    layers = []
    for index in range(model.config.num_hidden_layers):
        tensors = []
        for name in PROJECTIONS:
            part = "self_attn" if name in PROJECTIONS[:4] else "mlp"
            key = f"base_model.model.model.layers.{index}.{part}.{name}.lora_%s.default.weight"
            tensors += [found[key % "A"].detach(), found[key % "B"].detach()]
        layers.append(tensors)
    return layers


class Harness:
    """The harness with two seeds: the model's own adapter, and another one, which must not matter to the first."""

    def __init__(self, model, batches, rank=4, stand_in_rank=8):
        self.network = read_network(model, torch.float64, lora_scale=2.0)
        self.adapters = Adapters(self.network, (5, 6), rank)
        self.adapters.load(0, adapters_of(model))
        self.sparsity = Sparsity(self.network, 2, 8, stand_in_rank)
        self.lockstep = Lockstep(self.network, self.adapters, self.sparsity)
        items = [items_of(batch) for batch in batches]
        count, longest = len(items[0]), max(item.tokens.shape[1] for item in items)
        self.layout = Layout(((count, longest),))
        order = np.arange(count)[None, None].repeat(2, 0)
        self.batches = [Batches([item] * 2, order, self.layout, "cpu").batch(0) for item in items]

    def gradients(self, mode, batch=0):
        """The loss and LoRA gradients of the first seed."""
        gradients = self.lockstep.gradients(self.batches[batch], self.layout, mode)
        return self.lockstep.losses[0], [gradient[0] for gradient in gradients]


def assert_equals_library(harness, mode, model, batch, **tolerance):
    loss, gradients = loss_and_gradients(model, batch)
    ours, our_gradients = harness.gradients(mode)
    torch.testing.assert_close(ours, loss, check_dtype=False, **tolerance)
    expected = [gradients[name] for name in gradients]
    places = [gradient for layer in _names(model) for gradient in (gradients[name] for name in layer)]
    assert len(places) == len(our_gradients) == len(expected)
    for mine, theirs in zip(our_gradients, places, strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False, **tolerance)


def _names(model):
    layers = []
    for index in range(model.config.num_hidden_layers):
        names = []
        for name in PROJECTIONS:
            part = "self_attn" if name in PROJECTIONS[:4] else "mlp"
            names += [f"base_model.model.model.layers.{index}.{part}.{name}.lora_{x}.default.weight" for x in "AB"]
        layers.append(names)
    return layers


def set_selection(harness, selections):
    """Masks of the channels that the library chose in its forward."""
    tensors = harness.sparsity.tensors
    for (index, part), chosen in selections.items():
        if part == "mlp":
            tensors.channels[index] = False
            tensors.channels[index][:, chosen.channels] = True
            continue
        for name in "qkvo":
            mask = getattr(tensors, name)
            mask[index] = False
            mask[index][:, getattr(chosen, name)] = True


def make_model(**changes):
    return make_lora("llama", dtype=torch.float64, **changes)


def attached(model, batch, **config):
    """``model`` attached, always sparse, calibrated on ``batch``; and what it chooses there."""
    attach(model, {"start_step": 0, "end_step": 1.0, **config}, calibration_samples=[batch])
    state, seen = get_state(model), []
    open_forward = state.open_forward
    state.open_forward = lambda *args: seen.append(open_forward(*args)) or seen[-1]
    model(**batch).loss.backward()
    return seen[-1].selections


def test_dense_step_is_that_of_the_model():
    model, batch = make_model(), make_batch()
    assert_equals_library(Harness(model, [batch]), DENSE, model, batch, **CLOSE)


@pytest.mark.parametrize("lora_branch", ["dense", "selected"])
def test_static_channels_equal_the_library(lora_branch):
    model, batch = make_model(), make_batch()
    selections = attached(model, batch, mlp={"1-2": 0.6}, estimator={"kind": "static"}, lora_branch=lora_branch)
    harness = Harness(model, [batch])
    set_selection(harness, selections)
    mode = Mode("forward", selected_lora=lora_branch == "selected")
    assert_equals_library(harness, mode, model, batch, **CLOSE)


def test_attention_channels_equal_the_library():
    model, batch = make_model(), make_batch()
    config = {"mlp": {"all": 0.5}, "self_attn": {"1-2": 0.5}, "estimator": {"kind": "static"}}
    harness = Harness(model, [batch])
    set_selection(harness, attached(model, batch, **config))
    assert_equals_library(harness, Mode("forward", attention=True), model, batch, **CLOSE)


def test_contextual_channels_are_those_of_the_library():
    model, batch = make_model(), make_batch()
    selections = attached(model, batch, mlp={"1-2": 0.6}, estimator={"kind": "prior", "rank": 8})
    harness = Harness(model, [batch])
    calibration = calibrate(model, [items_of(batch)] * 2, count=3)
    tensors = harness.sparsity.tensors
    for name in ("down", "up_gate", "up_up", "gain"):
        getattr(tensors, name).copy_(getattr(calibration, name))
    tensors.keep.copy_(torch.tensor([128, len(selections[1, "mlp"].channels), len(selections[2, "mlp"].channels)]))
    assert_equals_library(harness, Mode("forward", contextual=True), model, batch, **CLOSE)


def test_compensation_equals_the_library():
    model, batch = make_model(lora_b=0.0), make_batch(lengths=((20, 4), (25, 6), (30, 2)))
    config = {"mlp": {"1-2": 0.6}, "estimator": {"kind": "static", "compensation_rank": 8}}
    harness = Harness(model, [batch])
    set_selection(harness, attached(model, batch, **config))
    harness.sparsity.tensors.stand_in_on.fill_(1)
    fit_stand_ins(harness.lockstep, harness.batches, harness.layout, rank=8)
    fitted, tensors = get_state(model).estimator.compensation, harness.sparsity.tensors
    probe = torch.randn(7, 64, dtype=torch.float64)
    for index in (1, 2):
        known = fitted[index].to("cpu", torch.float64)
        theirs = known.forward(probe)
        ours = probe @ tensors.stand_in_down[index, 0].t() @ tensors.stand_in_up[index, 0].t()
        # The randomised SVD is run on moments that differ in their last digits.
        torch.testing.assert_close(ours + tensors.stand_in_bias[index, 0], theirs, rtol=2e-3, atol=2e-4)
        tensors.stand_in_down[index, 0] = known.down
        tensors.stand_in_up[index, 0] = known.up
        tensors.stand_in_bias[index, 0] = known.bias
    assert_equals_library(harness, Mode("forward", compensation=True), model, batch, **CLOSE)
