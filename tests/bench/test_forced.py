"""Tests of steps in which every layer starts from what another step gave it, and of the check of FP8 that uses them."""

import re

import pytest
import torch

from sparse_unsloth import attach
from sparse_unsloth.bench import checks
from sparse_unsloth.bench.forced import Streams
from sparse_unsloth.bench.shapes import Shape

from tiny_models import make_lora


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(checks, "SMALL", Shape(1, 32, 8))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_forced_step_is_the_recorded_one_whatever_other_layers_do(reentrant):
    model = make_lora()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    streams = Streams()
    with streams.recorded(model):
        loss, gradients = checks.loss_and_gradients(model)
    layers = model.get_base_model().model.layers
    assert sorted(streams.inputs) == sorted(streams.gradients) == list(range(len(layers)))

    def wrong(module, args, output):
        return output + 1 if isinstance(output, torch.Tensor) else (output[0] + 1, *output[1:])

    handle = layers[0].register_forward_hook(wrong)
    changed = checks.loss_and_gradients(model)
    with streams.forced(model):
        forced = checks.loss_and_gradients(model)
    handle.remove()
    assert checks._distance(changed[1], gradients) > 0.1
    assert forced[0] == loss
    assert checks._distance(forced[1], gradients) == 0
    again = checks.loss_and_gradients(model)
    assert (again[0], checks._distance(again[1], gradients)) == (loss, 0)  # nothing is forced any more


def rounding(model, scale=1.0):
    """Rounds the inputs of products with frozen weights to e4m3, by one scale a row; returns what undoes it."""

    def rounded(module, args):
        (x,) = args
        rows = x.detach().float()
        step = rows.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        near = scale * step * (rows / step).to(torch.float8_e4m3fn).float()
        return (x + (near - rows).to(x.dtype),)

    layers = [module for name, module in model.named_modules() if name.endswith("base_layer")]
    return [layer.register_forward_pre_hook(rounded) for layer in layers]


def test_fp8_is_checked_layer_by_layer(monkeypatch):
    model = make_lora(hidden_size=64, intermediate_size=128)
    plain = checks.plain_steps(model, streams=True)
    assert checks.plain_steps(model).streams is None
    attach(model, {"preset": "dense"})
    monkeypatch.setattr(checks, "_fp8_layers", lambda model: 3)
    handles = rounding(model)
    found = checks.check(model, "unsloth-dense-exact", plain)
    error = float(re.search(r"in FP8: loss \S+, plain \S+; gradients (\S+) of their norm", found)[1])
    assert 0.01 < error < 0.1
    for handle in handles:
        handle.remove()
    rounding(model, scale=1.4)
    with pytest.raises(checks.CheckFailed, match=r"all gradients are 0\.\d+ of their norm from bf16's, where every"):
        checks.check(model, "unsloth-dense-exact", plain)
