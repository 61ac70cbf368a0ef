"""Hooks and whole layers under the gates and compiled regions of Unsloth 2026.10.8 and later."""

import functools
from pathlib import Path

import pytest

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends.patching import BLOCK_MODE, plain_forward
from sparse_unsloth.backends.unsloth.contract import find_unsloth
from sparse_unsloth.runtime.metrics import metrics

from masked_models import every_step, masked_gradients
from tiny_models import always, loss_and_gradients
from unsloth_stand_in import assert_same, decoder_layers
from whole_layers import RULES, FastLayer, make_model, small_batch

SETTINGS = {
    "rows": every_step(),
    "channels": always(**RULES["both"]),
    "nothing dropped": always(**RULES["nothing dropped"]),
}


class CompiledForwardRan(Exception):
    pass


def gated(forward):
    """Gates patched methods like Unsloth: the class's forward is no longer the function of its module."""

    @functools.wraps(forward)
    def gate(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return gate


def compiled(forward):
    """Stands for Unsloth's compiled regions: fails where one would run our hooks, unless the layer's switch is off."""

    @functools.wraps(forward)
    def region(self, *args, **kwargs):
        if self.__dict__.get(BLOCK_MODE) == 0:
            return forward(self, *args, **kwargs)
        if any(name.startswith("_sparse_original") for part in self.modules() for name in part.__dict__):
            raise CompiledForwardRan("'NoneType' object has no attribute 'run'")
        return forward(self, *args, **kwargs)

    region._unsloth_block_original = forward
    return region


WRAPPERS = {"gated": gated, "compiled": lambda forward: compiled(gated(forward))}


@pytest.fixture(params=list(WRAPPERS))
def wrapped(request, stand_in, monkeypatch):
    monkeypatch.setattr(FastLayer, "forward", WRAPPERS[request.param](FastLayer.forward))
    return stand_in


@pytest.mark.parametrize(("wrapped", "mode"), [("compiled", "rows"), ("gated", "channels")], indirect=["wrapped"])
def test_each_mode_runs_whole_layers(wrapped, monkeypatch, mode):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    model, batch = make_model(wrapped, "reentrant"), small_batch()
    plain = loss_and_gradients(model, batch)
    report = attach(model, {**SETTINGS[mode], "exact_removal": False})
    assert (report.whole_layers, report.not_whole) == (3, ())
    assert all("forward" in layer.__dict__ for layer in decoder_layers(model))
    ours = loss_and_gradients(model, batch)
    assert metrics(get_state(model))["sparsity/whole_layers"] == 3
    detach(model)
    assert not any(BLOCK_MODE in layer.__dict__ or "forward" in layer.__dict__ for layer in decoder_layers(model))
    if mode == "rows":
        assert_same(ours, masked_gradients(model, batch))
    else:
        assert (ours[0] - plain[0]).abs() > 1e-6


def test_layers_that_run_part_by_part_are_not_compiled_either(wrapped):
    """Without kernels no layer runs as a whole layer, so hooks run inside the class forward."""
    model, batch = make_model(wrapped, "reentrant"), small_batch()
    plain = loss_and_gradients(model, batch)
    report = attach(model, {**SETTINGS["nothing dropped"], "exact_removal": False})
    assert report.whole_layers == 0
    assert_same(loss_and_gradients(model, batch), plain)


def test_layers_without_hooks_stay_compiled(wrapped):
    """The switch belongs to each layer, and is restored."""
    model = make_model(wrapped, "reentrant")
    layers = decoder_layers(model)
    layers[0].__dict__[BLOCK_MODE] = 2
    attach(model, {**always(mlp={"0-1": 0.5}, self_attn={}), "exact_removal": False})
    assert [layer.__dict__.get(BLOCK_MODE) for layer in layers] == [0, 0, None]
    detach(model)
    assert [layer.__dict__.get(BLOCK_MODE) for layer in layers] == [2, None, None]


def test_the_plain_forward_is_beneath_every_region():
    class Layer:
        def forward(self, x):
            return x + 1

    Layer.forward = compiled(compiled(gated(Layer.forward)))
    assert plain_forward(Layer(), 1) == 2


@pytest.mark.skipif(
    not (find_unsloth() or Path()).joinpath("models/_block_compile.py").is_file(),
    reason="an Unsloth that compiles decoder layers is not installed",
)
@pytest.mark.installed_unsloth("compiled")
def test_the_installed_unsloths_own_wrappers(unsloth_case):
    ((found,), _) = unsloth_case
    assert len(found) == 2 * 2 * 3
    for name, outcome in found.items():
        wrapper, layout, mode = name.split(", ")
        assert outcome["traced"] == [], (name, outcome)
        assert outcome["error"] < 1e-4, (name, outcome)
        whole = {"dense": 0, "rows": 2, "channels": 3}[mode]
        assert outcome["whole"] == whole, (name, outcome)
        left_alone = [0, 1] if (wrapper, layout, mode) == ("compiled", "padded", "dense") else []
        assert outcome["compiled"] == left_alone, (name, outcome)
