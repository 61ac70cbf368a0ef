"""Whole layers, compared with the same layers hooked part by part, through Triton's interpreter.

The layers are transformers', with a class forward like Unsloth's; tests/gpu/test_unsloth.py compares Unsloth's own
layers on the GPU.
"""

import copy

import pytest
import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.errors import AttachError

from tiny_models import always, loss_and_gradients, make_lora
from unsloth_stand_in import assert_same, decoder_layers, packed_batch
from whole_layers import RULES, FastLayer, fast_forward, make_model, small_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)


def spy(monkeypatch):
    """The layers whose function after attention ran, in order."""
    ran = []
    original = whole_layer.post_attention
    monkeypatch.setattr(
        whole_layer, "post_attention", lambda a, residual, plan: ran.append(plan) or original(a, residual, plan)
    )
    return ran


@pytest.mark.parametrize(
    ("rules", "checkpointing"),
    [("both", True), ("no dense rows", "reentrant"), ("nothing dropped", False)],
)
def test_whole_layers_equal_hooked_parts(stand_in, monkeypatch, rules, checkpointing):
    model = make_model(stand_in, checkpointing)
    configuration = {**always(**RULES[rules]), "exact_removal": False}
    attach(model, configuration)
    expected = loss_and_gradients(model, small_batch())
    detach(model)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    ran = spy(monkeypatch)
    attach(model, configuration)
    ran.clear()
    ours = loss_and_gradients(model, small_batch())
    assert len(ran) == (6 if checkpointing else 3)
    assert get_state(model).ran == get_state(model).expected_parts()
    assert_same(ours, expected)


def test_a_recompute_leaves_the_mlp_out(stand_in, monkeypatch):
    """With `exact_removal`; gradients equal those of a step without checkpointing."""
    outcomes = []
    for choice, checkpointing in (("torch", False), ("triton", "reentrant")):
        monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", choice)
        model = make_model(stand_in, checkpointing)
        attach(model, {**always(**RULES["both"]), "exact_removal": False})
        get_state(model).config = get_state(model).config.model_copy(update={"exact_removal": True})
        ran = spy(monkeypatch)
        outcomes.append(loss_and_gradients(model, small_batch()))
        assert [plan.output_unused for plan in ran].count(True) == (3 if checkpointing else 0)
    assert_same(*reversed(outcomes))


def test_grouped_biases_and_packed_rows(stand_in, monkeypatch):
    """Qwen2's biases on Q, K, V stay dense."""
    outcomes = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", choice)
        model = make_model(stand_in)
        with torch.no_grad():
            for layer in decoder_layers(model):
                for name in ("q_proj", "k_proj", "v_proj"):
                    base = getattr(layer.self_attn, name).base_layer
                    values = torch.linspace(-0.2, 0.2, base.out_features)
                    base.bias = torch.nn.Parameter(values, requires_grad=False)
        attach(model, {**always(**RULES["both"]), "exact_removal": False})
        outcomes.append(loss_and_gradients(model, small_batch(packed_batch)))
    assert_same(*reversed(outcomes))


def test_other_calls_run_the_layers_own_forward(stand_in, monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    model, batch = make_model(stand_in), small_batch()
    forwards = [layer.forward for layer in decoder_layers(model)]
    expected = model(**batch).loss
    attach(model, {**always(**RULES["both"]), "exact_removal": False})
    ran = spy(monkeypatch)
    model.eval()
    torch.testing.assert_close(model(**batch).loss, expected)
    model.train()
    with model.disable_adapter():
        model(**batch)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    decoder_layers(model)[0].input_layernorm.weight.requires_grad_(True)
    assert not ran
    model(**batch)
    assert len(ran) == 2
    copied = copy.deepcopy(model)
    assert decoder_layers(copied)[1].forward.__self__ is decoder_layers(copied)[1]
    detach(model)
    for layer, forward in zip(decoder_layers(model), forwards, strict=True):
        assert layer.forward == forward
        assert not {name for name in layer.self_attn.__dict__ if name.startswith("_sparse")}
        assert "_sparse_runtime" not in layer.__dict__


@pytest.mark.parametrize("why", ["trained norm", "no lora on v"])
def test_layers_that_have_no_such_form_are_hooked_part_by_part(stand_in, why):
    targets = ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] + ["v_proj"] * (why != "no lora on v")
    model = make_model(stand_in, lora=lambda base: make_lora(base=base, targets=targets))
    if why == "trained norm":
        for layer in decoder_layers(model):
            layer.input_layernorm.weight.requires_grad_(True)
    attach(model, {**always(mlp={"all": 0.5}, self_attn={}), "exact_removal": False})
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_a_layer_that_computes_something_else_runs_part_by_part(stand_in, monkeypatch, caplog):
    """A later Unsloth may put more into the class's forward; the parts are still computed right."""
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")

    def other_forward(self, hidden_states, **kwargs):
        return (1.1 * fast_forward(self, hidden_states, **kwargs)[0],)

    monkeypatch.setattr(FastLayer, "forward", other_forward)
    model = make_model(stand_in)
    configuration = {**always(**RULES["nothing dropped"]), "exact_removal": False}
    expected = loss_and_gradients(model, small_batch())
    report = attach(model, configuration)
    assert report.whole_layers == 0
    assert all(why.startswith("its forward differs from every layer") for why, _ in report.not_whole)
    assert "part by part: its forward differs from every layer" in caplog.text
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "torch")  # quicker than the interpreter
    assert_same(loss_and_gradients(model, small_batch()), expected)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    with pytest.raises(AttachError, match=r"no layer .* can be captured: its forward differs from every"):
        detach(model) or attach(model, {**configuration, "cuda_graphs": True})
    assert get_state(model) is None


def test_a_layer_whose_attention_takes_other_arguments_runs_part_by_part(stand_in, monkeypatch):
    """An error in the probe of our functions must not stop a training that needs them only for speed."""
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    monkeypatch.setattr(whole_layer, "post_attention", lambda *given: {}["moved"])
    model = make_model(stand_in)
    expected = loss_and_gradients(model, small_batch())
    report = attach(model, {**always(**RULES["nothing dropped"]), "exact_removal": False})
    assert report.not_whole == (("our functions failed on FastLayer: KeyError: 'moved'", 3),)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "torch")  # quicker than the interpreter
    assert_same(loss_and_gradients(model, small_batch()), expected)
