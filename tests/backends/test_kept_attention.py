"""Our own whole layers, in Triton's interpreter, keep attention: output norms, windows, soft caps."""

import pytest
import torch

from sparse_unsloth import detach
from sparse_unsloth.runtime import checkpoint_planner

from family_models import make_family
from keeping_models import Kernels, attach_keeping, keep_attention_alone
from masked_models import every_step
from tiny_models import loss_and_gradients
from whole_layers import SMALL, small_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it there")
LAYERS = 2


@pytest.mark.parametrize(
    ("family", "attention", "keeps"),
    [("Gemma3", "sdpa", True), ("Qwen3", "sdpa", True), ("Gemma2", "eager", False)],
)
def test_gradients_are_the_same(monkeypatch, family, attention, keeps):
    """Gemma 2's eager attention has its soft cap; it calls no kernel."""
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    keep_attention_alone(monkeypatch)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    sizes = {**SMALL, "num_hidden_layers": LAYERS, **(kinds if family == "Gemma3" else {})}
    model = make_family(family, torch.float32, None, **sizes)
    model.config._attn_implementation = attention
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    batch, found = small_batch(), {}
    for allowed in (False, True):
        monkeypatch.setattr(checkpoint_planner, "KEEPS_ATTENTION", allowed)
        state = attach_keeping(model.train(), every_step())
        loss_and_gradients(model, batch)  # shows which layers run whole
        with Kernels() as kernels:
            loss, gradients = loss_and_gradients(model, batch)
        found[allowed] = loss, gradients, kernels.calls["forward"]
        if allowed:
            assert state.planner.attention_kept == frozenset(range(LAYERS))
            loss_and_gradients(model, batch)
            assert bool(state.planner.attention_kept) == keeps
        detach(model)
    assert torch.equal(found[True][0], found[False][0])
    assert all(torch.equal(found[True][1][name], gradient) for name, gradient in found[False][1].items())
    assert [found[False][2], found[True][2]] == ([2 * LAYERS, LAYERS] if keeps else [0, 0])
