"""Whole layers whose products with frozen weights are in FP8, as a CPU emulates them, through the PEFT backend."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparse_unsloth import attach, detach, get_state
from sparse_unsloth.backends import whole_layer
from sparse_unsloth.errors import AttachError
from sparse_unsloth.ops import fp8

from recorded_layers import Rerun, share_memory
from tiny_models import loss_and_gradients, make_base, make_batch, pack_nf4
from unsloth_stand_in import assert_same
from whole_layers import SMALL

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)
BATCH = make_batch(lengths=((8, 2),))
SPARSITY = {"dense": {"preset": "dense"}, "rows": {"backward_rows": 0.5}}


def make_model(rank=8, four_bit=False, **changes):
    base = make_base(use_cache=False, **{**SMALL, "num_hidden_layers": 1, **changes})
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(pack_nf4(base) if four_bit else base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.train()


def step(model, **sparsity):
    attach(model, sparsity)
    outcome = loss_and_gradients(model, BATCH)
    detach(model)
    return outcome


def cosine(ours, others):
    flat = [torch.cat([gradients[name].flatten() for name in sorted(gradients)]) for _, gradients in (ours, others)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    recorder = Rerun()
    share_memory(monkeypatch, recorder)
    return recorder


@pytest.mark.parametrize("rules", SPARSITY)
def test_gradients_are_near_those_in_bf16(rules, monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    model = make_model(four_bit=rules == "rows", hidden_size=64)
    expected = loss_and_gradients(model, BATCH) if rules == "dense" else step(model, **SPARSITY[rules])
    report = attach(model, {**SPARSITY[rules], "precision": "fp8"})
    assert (report.precision, report.bf16_layers, report.whole_layers) == ("fp8", {}, 1)
    assert "precision fp8: products of all tokens with frozen weights in FP8, approximate" in str(report)
    assert 0.98 < cosine(loss_and_gradients(model, BATCH), expected) < 0.99999
    if rules == "rows":  # without context tokens nothing is left out, and products are in FP8 all the same
        counts, original = [], fp8.scaled_product
        monkeypatch.setattr(fp8, "scaled_product", lambda x, *others: counts.append(len(x)) or original(x, *others))
        loss_and_gradients(model, {**BATCH, "labels": BATCH["input_ids"]})
        assert counts == [10] * 8


def test_captured_layers_compute_the_same(recorder):
    """A weight that changes has other scales, at other addresses: its layer is captured again."""
    model = make_model()
    attach(model, {"precision": "fp8", "cuda_graphs": True})
    first, *_, replayed = (loss_and_gradients(model, BATCH) for _ in range(3))
    assert recorder.replayed
    assert_same(replayed, first)
    recorded, weight = recorder.recorded, model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    with torch.no_grad():
        weight.mul_(2)
    ours = loss_and_gradients(model, BATCH)
    assert recorder.recorded > recorded
    detach(model)
    assert_same(ours, step(model, precision="fp8"))


def test_context_alone(recorder, monkeypatch):
    """Only its products are in FP8; with graphs some context tokens are computed as loss tokens."""
    model, counts, original = make_model(), [], fp8.scaled_product
    exact = loss_and_gradients(model, BATCH)
    monkeypatch.setattr(fp8, "scaled_product", lambda x, *others: counts.append(len(x)) or original(x, *others))
    attach(model, {"precision": "fp8-context", "cuda_graphs": True})
    counts.clear()
    ours, *_, replayed = (loss_and_gradients(model, BATCH) for _ in range(3))
    assert set(counts) == {9}  # 7 of 10 tokens, and two of padding to a length bucket
    assert 0.99 < cosine(ours, exact) < 0.99999
    assert recorder.replayed
    assert_same(replayed, ours)


def test_layers_that_do_not_run_as_a_whole_are_named(monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    model = make_model(num_hidden_layers=2)
    model.get_base_model().model.layers[1].input_layernorm.weight.requires_grad_(True)
    report = attach(model, {"precision": "fp8"})
    assert list(report.bf16_layers) == ["base_model.model.model.layers.1"]
    assert "layer 1: in bf16 (" in str(report)
    detach(model)


def test_refusals(monkeypatch):
    with pytest.raises(AttachError, match=r"precision: fp8 needs layers that run as a whole.*kernels do not run here"):
        attach(make_model(), {"precision": "fp8"})
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    for model, reason in (
        (make_model(rank=4), r"layers\.0\.\S+ has LoRA of rank 4"),
        (
            make_model(intermediate_size=72),
            r"layers\.0\.mlp\.gate_proj is 72 x 32, and FP8 products need multiples of 16",
        ),
    ):
        with pytest.raises(AttachError, match=f"{reason}.*Set precision: bf16"):
            attach(model, {"precision": "fp8"})
        assert get_state(model) is None
    monkeypatch.setattr(whole_layer, "FP8_DIFFERENCE", 1e-9)
    with pytest.raises(AttachError, match=r"none does: its FP8 products differ .* \(1 layers\)"):
        attach(make_model(), {"precision": "fp8"})
