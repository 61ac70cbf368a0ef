"""Captured layers in every form of norms and LoRA by a stand-in for `GraphCapture`."""

import pytest
import torch

from sparse_unsloth.graphs import layer as graphed_layer
from sparse_unsloth.graphs.layer import GraphedPass
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.graphs.rows import row_sparse_whole_layer
from sparse_unsloth.ops.decoder_layer import RowOrder, lora_tensors_of
from sparse_unsloth.rows.choice import RowChoice

from planned_layers import assert_close, attend, compute, make_layer, outcome, roles
from recorded_layers import Rerun, share_memory

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it"
)
ROWS = "ccdpcdc dccpdcc", "dcccpdc cdccpdc"


def attention(x, projected, tensors):
    return attend(*projected)


def whole(plan, x, graphed):
    capture = graphed.capture
    for part, choose in (("self_attn", plan.choose_attention), ("mlp", plan.choose_mlp)):
        graphed_layer.reserve(capture.graphs, 0, part, choose(None))
    return graphed_layer.whole_layer(x, plan, graphed, attention, {})


def whole_by_rows(plan, x, graphed):
    partition = roles(ROWS[0].replace("p", "c"))
    choice = RowChoice(partition, 1.0)
    return row_sparse_whole_layer(x, plan, graphed, attention, {}, choice, choice.as_partition())


def opened(graphs, which):
    return GraphedPass(graphs.open(0, "batch", which, [], ()), None, None)


CALLS = 3


@pytest.mark.parametrize(
    ("function", "form", "ranks", "sparse"),
    [
        (whole, "output norms", "some", True),
        (whole, "multiplied", "unequal", False),
        (whole, "output norms alone", "none", True),
        (whole_by_rows, "output norms", "some", False),
    ],
)
def test_replays_equal_the_functions(function, form, ranks, sparse, monkeypatch):
    layer, recorder = make_layer(form, ranks, sparse), Rerun()
    share_memory(monkeypatch, recorder)
    graphs = GraphCache(recorder)
    for step, text in enumerate(ROWS):
        if sparse:
            rows = RowOrder(roles(text), True)
            layer = layer.with_plan(attention=rows, mlp=rows)
        expected = outcome(layer, compute)
        with torch.no_grad():
            plan = layer.with_plan(keep=False).plan
            assert_close([function(plan, layer.x, opened(graphs, "forward"))], expected[:1])
        graphed = opened(graphs, "recompute")
        recompute = layer.with_plan(output_unused=True, keep=False)
        _, *ours = outcome(recompute, lambda plan, x, graphed=graphed: function(plan, x, graphed))
        assert_close(ours, expected[1:])
        assert recorder.recorded == CALLS
        assert recorder.replayed == CALLS * step
        with torch.no_grad():
            layer.x.mul_(-0.8)
            for lora in lora_tensors_of(layer.plan.projections):
                lora.mul_(1.2)
