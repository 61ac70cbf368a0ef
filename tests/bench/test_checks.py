"""Tests that the equality checks before each timing pass on correct methods and find faults."""

import re
from functools import partial

import pytest
import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.bench import checks
from sparse_unsloth.bench.methods import sparsity_of
from sparse_unsloth.bench.reference import FAMILIES, float32_step
from sparse_unsloth.bench.shapes import Shape, make_batch
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.tokens.partition import TokenPartition

from tiny_models import always, loss_and_gradients, make_base, make_lora, pack_nf4


@pytest.fixture
def model():
    return make_lora(hidden_size=32, intermediate_size=64)


def test_checks_pass_where_nothing_is_wrong(model):
    plain = checks.plain_steps(model)
    assert re.fullmatch(
        r"whole step: loss 4\.\d+, float32 4\.\d+; gradients 0\.0\d+ from float32's",
        checks.check(model, "unsloth-dense", plain),
    )
    attach(model, always())
    found = checks.check(model, "sparse-o2", None)
    for name in ("layers.0.mlp", "layers.1.mlp", "layers.0.qkv", "layers.1.o"):
        assert f"{name} within" in found
    detach(model)
    for method in ("nothing-dropped", "unsloth-dense-exact"):
        attach(model, sparsity_of(method, 3))
        get_state(model).begin_training(driver="test", max_steps=100)
        get_state(model).set_step(0)
        assert "whole step: loss" in checks.check(model, method, plain)
        detach(model)


def test_rows_are_checked_in_three_ways(model, monkeypatch):
    plain = checks.plain_steps(model)
    attach(model, sparsity_of("rows-10", 3))
    found = checks.check(model, "rows-10", plain)
    for text in ("whole step: loss", "rows left out: gradients 0.", "layers.1.mlp through 39 context rows within"):
        assert text in found
    assert get_state(model).config.backward_rows == 0.1
    true = checks.backward_rows
    monkeypatch.setattr(checks, "backward_rows", lambda f, *rest: true(lambda x: f(x) + 0.1 * x.detach(), *rest))
    with pytest.raises(checks.CheckFailed, match="differs from the masked one"):
        checks.check(model, "rows-10", plain)


class Tiled(torch.autograd.Function):
    """As Unsloth's tiled MLP: backward computes the function again and leaves its weights' gradients where they go."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        y.backward(gradient)
        return None, x.grad


def test_rows_of_a_tiled_mlp_are_checked(model):
    for layer in find_layers(model):
        layer.mlp.forward = partial(Tiled.apply, layer.mlp.forward)
    plain = checks.plain_steps(model)
    attach(model, sparsity_of("rows-10", 3))
    assert "layers.1.mlp through 39 context rows within" in checks.check(model, "rows-10", plain)


@pytest.mark.parametrize("name", ["masked_mlp", "masked_linear"])
def test_a_wrong_layer_is_found(model, monkeypatch, name):
    attach(model, always())
    true = getattr(checks, name)

    def wrong(x, partition, *rest, **options):
        y = true(x, partition, *rest, **options)
        return 1.1 * y if isinstance(y, torch.Tensor) else (*y[:-1], 1.1 * y[-1])

    monkeypatch.setattr(checks, name, wrong)
    with pytest.raises(checks.CheckFailed, match=r"differs from the masked one by 0\."):
        checks.check(model, "sparse-o2", None)


@pytest.fixture
def plain(model):
    return checks.plain_steps(model)


def scaled(gradients, times, kind=""):
    return {name: value * (times if kind in name else 1) for name, value in gradients.items()}


def test_a_wrong_step_is_found(model, plain):
    loss, gradients = plain.bf16
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "from each other 0" in checks.check_model((loss, gradients), plain)
    for step, message in (
        ((loss * 1.01, gradients), r"loss 4\.\d+ is not the plain model's"),
        ((loss, {}), "other parameters"),
        (
            (loss, scaled(gradients, 1.1)),
            r"all gradients are 0\.1\d* of their norm from float32's, the plain model's 0",
        ),
        ((loss, scaled(gradients, 1.03, "k_proj.lora_B")), r"gradients of k_proj.lora_B are 0\.0"),
        ((loss, scaled(gradients, float("nan"), "layers.1.mlp.up_proj.lora_A")), "all gradients are nan"),
    ):
        with pytest.raises(checks.CheckFailed, match=message):
            checks.check_model(step, plain)
    assert issubclass(checks.CheckFailed, SparsityError)


def test_a_wrong_baseline_is_found(plain):
    (loss, gradients), exact = plain.bf16, plain.float32
    for step, message in (
        ((loss * 1.01, gradients), "is not float32's"),
        ((loss, scaled(gradients, 1.3)), r"gradients differ from float32's by 0\.3"),
    ):
        with pytest.raises(checks.CheckFailed, match=message):
            checks.check_plain(checks.PlainSteps(step, exact))


def test_without_a_float32_step_the_plain_model_is_the_measure(plain):
    loss, gradients = plain.bf16
    without = checks.PlainSteps(plain.bf16, None)
    assert "no float32 step" in checks.check_plain(without)
    assert "gradients within 0" in checks.check_model(plain.bf16, without)
    with pytest.raises(checks.CheckFailed, match=r"gradients differ from the plain model's by 0\.1"):
        checks.check_model((loss, scaled(gradients, 1.1)), without)
    assert checks.plain_steps(make_lora("gemma", hidden_size=32, intermediate_size=64)).float32 is None


@pytest.mark.parametrize("family", [*FAMILIES, "nf4"])
def test_the_float32_step_is_that_of_transformers(family):
    base = pack_nf4(make_base("llama")) if family == "nf4" else make_base(family, rope_parameters=ROPE[family])
    model = make_lora(base=base)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # as bf16 products see it
            parameter.data = parameter.data.bfloat16().float()
    batch = make_batch(Shape(2, 20, 6), 96, 0, "cpu")
    loss, gradients = float32_step(model, batch)
    expected = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected[0].item(), rel=1e-6 if family != "nf4" else 2e-3)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradients[name] - gradient).norm() <= (1e-5 if family != "nf4" else 0.02) * gradient.norm(), name


ROPE = {family: {"rope_type": "default", "rope_theta": 500.0} for family in FAMILIES} | {
    "llama": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip


def test_packed_batches_are_of_one_kind():
    """A graph captured for one batch is replayed for the other, whose documents begin elsewhere."""
    batches = [checks.packed_batch(100, seed, torch.device("cpu")) for seed in (0, 1)]
    layout = ("position_ids", "packed_seq_lengths")
    roles = [TokenPartition.from_labels(batch["labels"], **{name: batch[name] for name in layout}) for batch in batches]
    counts = {(rows.shape, rows.num_dense, rows.num_context, rows.num_padding) for rows in roles}
    assert counts == {((1, 512), 2 * 65, 512 - 2 * 65, 0)}
    assert not torch.equal(roles[0].dense, roles[1].dense)
