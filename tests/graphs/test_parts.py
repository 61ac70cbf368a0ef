"""Parts of a layer around attention that is not captured, in every form, by a stand-in for `GraphCapture`."""

from functools import partial

import pytest
import torch

from sparse_unsloth.graphs import parts
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.ops.decoder_layer import RowOrder, lora_tensors_of

from planned_layers import assert_close, compute, make_layer, outcome, roles
from recorded_layers import Rerun, share_memory

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)


def captured(graphs, which):
    """The two functions of `graphs.parts` in a pass ``which``, as `compute` takes them."""
    capture = graphs.open(0, which, [], ())
    return {
        "before": partial(parts.pre_attention, capture=capture),
        "after": partial(parts.post_attention, capture=capture),
    }


@pytest.mark.parametrize(
    ("form", "ranks", "sparse"),
    [("output norms", "some", True), ("output norms", "unequal", False), ("output norms alone", "none", True),
     ("multiplied", "some", True), ("multiplied", "equal", False), ("weightless", "equal", True)],
)  # fmt: skip
def test_replays_equal_the_functions(form, ranks, sparse, monkeypatch):
    layer, recorder = make_layer(form, ranks, sparse), Rerun()
    share_memory(monkeypatch, recorder)
    graphs = GraphCache(recorder)
    for step, text in enumerate(("ccdpcdc dccpdcc", "dcccpdc cdccpdc")):
        if sparse:
            rows = RowOrder(roles(text), True)
            layer = layer.with_plan(attention=rows, mlp=rows)
        expected = outcome(layer, compute)
        with torch.no_grad():
            plan = layer.with_plan(keep=False).plan
            assert_close([compute(plan, layer.x, **captured(graphs, "forward"))], expected[:1])
        functions = captured(graphs, "recompute")
        recompute = layer.with_plan(output_unused=True, keep=False)
        _, *ours = outcome(recompute, lambda plan, x, functions=functions: compute(plan, x, **functions))
        assert_close(ours, expected[1:])
        assert recorder.recorded == 8
        assert recorder.replayed == 8 * step
        with torch.no_grad():
            layer.x.mul_(-0.8)
            for lora in lora_tensors_of(layer.plan.projections):
                lora.mul_(1.2)
