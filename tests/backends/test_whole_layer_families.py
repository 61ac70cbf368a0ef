"""Whole layers of many families in the PEFT backend, through Triton's interpreter, and what has no such form."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.backends.patching import runs
from sparse_unsloth.layer.attention import by_interface
from sparse_unsloth.ops.norms import Norm

from family_models import make_family
from masked_models import every_step, masked_gradients
from recorded_layers import Rerun, share_memory, step_as_recorded
from tiny_models import always, loss_and_gradients
from unsloth_stand_in import assert_same, decoder_layers
from whole_layers import SMALL, small_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; the acceptance run covers it"
)
TWO = {**SMALL, "num_hidden_layers": 2}
ONE = {"num_hidden_layers": 1}
"""For families whose layers are all of one kind: the interpreter takes seconds for a layer."""
NOTHING = {"mlp": {"all": 1e-9}, "self_attn": {"all": 1e-9}, "exact_removal": False}
FAMILIES = {
    "Llama": {},
    "Mistral": ONE,
    "Ministral3": ONE,
    "Qwen2": ONE,
    "Qwen3": ONE,
    "Gemma": ONE,
    "Gemma2": {},
    "Gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "Granite": ONE,
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Olmo2": ONE,
    "Exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")


def make(family, checkpointing=False, targets=None, **changes):
    model = make_family(family, torch.float32, targets, **{**TWO, **FAMILIES.get(family, {}), **changes})
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_proved_and_exact(family):
    """With every channel kept: the loss and all gradients of the model before attaching."""
    model, batch = make(family), small_batch()
    expected = loss_and_gradients(model, batch)
    report = attach(model, {**always(), **NOTHING})
    assert (report.whole_layers, report.not_whole) == (len(decoder_layers(model)), ())
    assert all(runs(layer, whole_layer.layer_forward) for layer in decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)
    detach(model)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("Llama", False), ("Llama", True), ("Gemma2", False), ("Gemma2", "reentrant"), ("Granite", True)],
)
def test_rows_are_chosen_as_masks_say(family, checkpointing):
    """Stored without gradient checkpointing, recomputed with it."""
    model, batch = make(family, checkpointing), small_batch()
    expected = masked_gradients(model, batch, whole=True)
    report = attach(model, every_step())
    assert report.whole_layers == len(decoder_layers(model))
    assert_same(loss_and_gradients(model, batch), expected)
    assert get_state(model).ran == get_state(model).expected_parts()


def test_lora_on_some_projections():
    model, batch = make("Qwen3", targets=["q_proj", "v_proj", "down_proj"]), small_batch()
    expected = loss_and_gradients(model, batch)
    assert attach(model, {**always(), **NOTHING}).whole_layers == 1
    assert_same(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize(
    ("family", "why"),
    [("Cohere", "its attention and MLP are computed side by side"), ("StableLm", "it has layer norms")],
)
def test_layers_of_another_form_run_part_by_part(family, why):
    model, batch = make(family), small_batch()
    expected = loss_and_gradients(model, batch)
    report = attach(model, {**always(), **NOTHING})
    assert report.whole_layers == 0
    assert [reason.partition(": ")[2].startswith(why) for reason, _ in report.not_whole] == [True] * 2
    assert_same(loss_and_gradients(model, batch), expected)


def test_a_wrapped_layer_keeps_its_wrapper():
    """accelerate's hooks move the inputs of a layer that lies on another device."""
    model, batch, calls = make("Llama"), small_batch(), []
    for layer in decoder_layers(model):
        layer.forward = partial(lambda plain, *args, **kwargs: calls.append(1) or plain(*args, **kwargs), layer.forward)
    expected = loss_and_gradients(model, batch)
    report = attach(model, {**always(), **NOTHING})
    assert report.not_whole == ((whole_layer.WRAPPED, 2),)
    calls.clear()
    assert_same(loss_and_gradients(model, batch), expected)
    assert len(calls) == 2


def test_a_layer_that_computes_something_else_is_named(monkeypatch):
    model, batch = make("Llama"), small_batch()
    layer = type(decoder_layers(model)[0])
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, **given: 1.1 * original(self, x, **given))
    expected = loss_and_gradients(model, batch)
    report = attach(model, {**always(), **NOTHING})
    assert report.not_whole[0][0].startswith("its forward differs from every layer")
    assert report.whole_layers == 0
    assert_same(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize(
    ("family", "checkpointing", "rules", "calls"),
    [("Gemma3", True, "rows", 3), ("Gemma3", False, "dense", 2)],
)
def test_layers_are_captured(monkeypatch, family, checkpointing, rules, calls):
    """Replays give the gradients of the uncaptured layer, also with two masks and two rotary embeddings."""
    recorder = Rerun()
    share_memory(monkeypatch, recorder)
    model, batch = make(family, checkpointing), small_batch()
    setting = every_step() if rules == "rows" else {"preset": "dense"}
    batch["use_cache"] = False
    expected = step_as_recorded(model, batch, {**setting, "cuda_graphs": True})
    attach(model, {**setting, "cuda_graphs": True})
    for step in range(3):
        assert_same(loss_and_gradients(model, batch), expected)
        assert (recorder.recorded > 0) == (step > 0)
    assert recorder.replayed == recorder.recorded == 2 * calls


def test_a_cache_is_filled():
    """As in a model whose use_cache is on: nothing reads it in training, but it comes with the output."""
    model, batch = make("Llama"), small_batch()
    attach(model, {**always(), **NOTHING})
    cache = model(**batch, use_cache=True).past_key_values
    assert get_state(model).counts.whole_layers == 2
    assert [cache.get_seq_length(layer) for layer in range(2)] == [batch["labels"].shape[1]] * 2


def test_a_soft_cap_that_the_attention_function_ignores():
    """transformers' SDPA does; the layer is the same all the same."""
    model = make("Gemma2", attn_logit_softcapping=0.25)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    batch = small_batch()
    expected = loss_and_gradients(model, batch)
    assert attach(model, {**always(), **NOTHING}).whole_layers == 2
    assert_same(loss_and_gradients(model, batch), expected)


def test_logits_have_the_length_of_the_batch(monkeypatch):
    """Batches are padded to length buckets for capture; metrics compare logits with labels."""
    share_memory(monkeypatch, Rerun())
    model, batch = make("Llama"), {name: values[:, :7] for name, values in small_batch().items()}
    expected = model(**batch)
    attach(model, {"preset": "dense", "cuda_graphs": True})
    for _ in range(2):
        output = model(**batch)
        assert output.logits.shape[:2] == batch["labels"].shape
        torch.testing.assert_close(output.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.loss, expected.loss)
    assert [key[0][1] > 7 for key in get_state(model).graphs.captured_keys] == [True]


@pytest.mark.parametrize("name", ["is_causal", "position_bias", "past_key_values"])
def test_arguments_that_no_graph_holds_keep_attention_out(name):
    module, tables = (
        SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa")),
        (torch.zeros(2), torch.ones(2)),
    )
    spec = SimpleNamespace(rotation="halves", query_scaling=None, scaling=1.0, window=None)
    given = {"position_embeddings": tables, "position_ids": torch.zeros(1)}
    call = by_interface(spec, module, {**given, name: None})
    assert (call.tensors.keys(), call.capturable) == ({"cosines", "sines"}, True)
    assert not by_interface(spec, module, {**given, name: False}).capturable


def test_arguments_reach_attention_without_capture(monkeypatch):
    """Unsloth's functions read the documents' lengths; a captured call reads its fixed tensors alone."""
    seen = []

    def interface(module, query, *others, **arguments):
        seen.append(arguments.get("packed_seq_lengths"))
        return query, None

    monkeypatch.setattr("sparse_unsloth.layer.attention._interface", lambda module: interface)
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    spec = SimpleNamespace(rotation="none", query_scaling=None, scaling=1.0, window=None)
    call = by_interface(spec, module, {"packed_seq_lengths": (3, 5)})
    for tensors in (call.tensors, dict(call.tensors)):
        call.compute(*torch.zeros(3, 1), tensors)
    assert seen == [(3, 5), None]


@pytest.mark.parametrize(("dtype", "keeps", "fits"), [("16", True, True), ("32", True, True), ("32", False, False)])
def test_norms_of_another_dtype_than_the_stream(dtype, keeps, fits):
    """A float32 norm that keeps the stream's dtype runs whole, as under Unsloth; one that widens it does not."""
    norm = Norm(torch.ones(4, dtype=getattr(torch, f"float{dtype}")), 1e-5, keeps_dtype=keeps)
    assert whole_layer._fits_kernels(torch.ones(2, 4).half(), [None, norm]) is fits
