"""Preset `auto` turns CUDA graphs on when training begins, by a stand-in for `GraphCapture`; and off again."""

from types import SimpleNamespace

import pytest
import torch

from sparse_unsloth.attachment import attach, get_state
from sparse_unsloth.planning import progress
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.runtime import auto

from tiny_models import loss_and_gradients, make_base, make_lora
from unsloth_stand_in import assert_same
from whole_layers import SMALL, small_batch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)
LAUNCH_BOUND = StepTime(products=1, attention=1, rows=1, sparse_rows=1, host_layer=30, host_sparse_part=1)


def make_model():
    model = make_lora(base=make_base(num_hidden_layers=2, use_cache=False, **SMALL))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


@pytest.fixture
def clock(monkeypatch):
    """``clock.seconds`` pass between two forwards on a device that is launch-bound and could capture."""
    ticking = SimpleNamespace(now=0.0, seconds=0.0)

    def read():
        ticking.now += ticking.seconds
        return ticking.now

    fitted = SimpleNamespace(step_time=LAUNCH_BOUND, device="a GPU", backend="peft", dtype="bf16")
    monkeypatch.setattr(auto, "clock", read)
    monkeypatch.setattr(auto, "_fitted", lambda state: fitted)
    monkeypatch.setattr(auto, "_why_no_graphs", lambda state: "")
    monkeypatch.setattr(progress, "WARM_UP", 1)  # the interpreter takes seconds for a step
    monkeypatch.setattr(progress, "MEASURED", 1)
    return ticking


@pytest.mark.slow
def test_graphs_are_captured_exact_and_given_up_where_they_do_not_pay(recorder, clock, capsys):
    batch = small_batch()
    expected = loss_and_gradients(make_model(), batch)
    model = make_model()
    attach(model)
    state = get_state(model)
    for _ in range(3):
        assert_same(loss_and_gradients(model, batch), expected)
    assert (state.config.cuda_graphs, state.config.backward_rows) == (True, 1.0)
    assert "CUDA graphs      on " in capsys.readouterr().out
    assert (recorder.recorded > 0, recorder.replayed > 0) == (True, True)
    assert state.counts.captured_layers == 2
    clock.seconds = 1e4  # far longer than the host would take without graphs
    assert_same(loss_and_gradients(model, batch), expected)
    said = capsys.readouterr().out
    assert "auto, mended" in said
    assert "the GPU is the limit, not its host" in said
    assert (state.config.cuda_graphs, state.graphs, state.hooked) == (False, None, [])
