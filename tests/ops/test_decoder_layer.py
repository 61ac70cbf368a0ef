"""The two functions of a layer against the masked layer in plain PyTorch: every form of norms, LoRA and rows."""

from dataclasses import replace

import pytest
import torch

from sparse_unsloth.kernels import norms
from sparse_unsloth.ops import decoder_layer
from sparse_unsloth.ops.decoder_layer import lora_tensors_of, padded_loras

from planned_layers import NORMS, RANKS, assert_close, compute, expected, make_layer, outcome

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("form", "ranks"),
    [*((form, "equal") for form in NORMS), *(("plain", one) for one in RANKS if one != "equal"),
     ("output norms", "some")],
)  # fmt: skip
def test_a_layer_equals_the_masked_one(form, ranks, sparse):
    layer = make_layer(form, ranks, sparse)
    assert_close(outcome(layer, compute), expected(layer))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("form", ["plain", "output norms", "output norms alone", "multiplied"])
def test_a_recompute_whose_output_is_unused_has_the_same_gradients(form, sparse):
    layer = make_layer(form, "some", sparse)
    (output, *ours), (_, *others) = (
        outcome(one, compute) for one in (layer.with_plan(output_unused=True, keep=False), layer)
    )
    assert not output.any()
    assert_close(ours, others)


@pytest.mark.parametrize("parts", ["attention", "mlp"])
def test_one_part_may_be_sparse(parts):
    sparse, dense = make_layer("output norms"), make_layer(sparse=False).plan
    layer = sparse.with_plan(**{part: getattr(dense, part) for part in ("attention", "mlp") if part != parts})
    assert_close(outcome(layer, compute), expected(layer))


@pytest.mark.parametrize(("form", "count"), [("plain", 5), ("output norms", 6), ("output norms alone", 5)])
def test_norms_take_few_launches(form, count, monkeypatch):
    """Two in the forward before each part, and one after the MLP; as many in the backward, less the plain last one."""
    launched, original = [], norms.launch
    monkeypatch.setattr(norms, "launch", lambda *given: launched.append(given[0].__name__) or original(*given))
    outcome(make_layer(form, sparse=False), compute)
    assert len(launched) == count, launched


def test_equal_ranks_are_not_padded():
    projections = make_layer().plan.projections
    assert all(one is other for one, other in zip(padded_loras(projections), lora_tensors_of(projections), strict=True))


def test_only_real_matrices_are_leaves():
    plan = make_layer(ranks="some").plan
    loras = lora_tensors_of(plan.projections)
    assert [len(lora) for lora in loras] == [4, 32, 2, 16, 5, 32]
    others = [lora.detach().clone() for lora in loras]
    replaced = plan.with_loras(others)
    assert all(one is other for one, other in zip(lora_tensors_of(replaced.projections), others, strict=True))
    assert [one.lora is None for one in replaced.projections] == [one.lora is None for one in plan.projections]
    assert [len(A) for A in padded_loras(plan.projections[:3])[::2]] == [4, 4, 4]
    assert [len(A) for A in padded_loras(plan.projections[3:4])[::2]] == [decoder_layer.RANK_WITHOUT_LORA]


@pytest.mark.parametrize("fault", ["offset", "multiplier", "output norm", "padding"])
def test_planted_faults_are_found(fault, monkeypatch):
    layer = make_layer("multiplied output norms" if fault == "multiplier" else "output norms", "some")
    plan = layer.plan
    wrong = {
        "offset": {"mlp_norm": replace(plan.mlp_norm, offset=0.0)},
        "multiplier": {"residual_multiplier": 0.2},
        "output norm": {"attention_output_norm": None},
        "padding": {},
    }[fault]
    if fault == "padding":  # what is between the ranks is not zero
        pad = torch.nn.functional.pad
        monkeypatch.setattr(decoder_layer.F, "pad", lambda *given: pad(*given, value=0.1))
    with pytest.raises(AssertionError):
        assert_close(outcome(layer.with_plan(**wrong), compute), expected(layer))
    monkeypatch.undo()
    assert_close(outcome(layer, compute), expected(layer))
