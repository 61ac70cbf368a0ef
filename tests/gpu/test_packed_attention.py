"""Our attention on the GPU: the kernel for documents and windows, a recording of it, SDPA and the soft cap."""

import pytest
import torch

from sparse_unsloth.graphs import packed_attention as ours
from sparse_unsloth.graphs.capture import GraphCapture
from sparse_unsloth.layer.attention import MASK, OFFSETS, causal
from sparse_unsloth.tokens.batch import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [(300, 1, 500, 223), (1024,), (100, 0, 200), (7,) * 100])
def test_kernel(heads, lengths, window):
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, count, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    ]
    batch = Batch(torch.zeros(1, 1024, device="cuda"), packed_seq_lengths=torch.tensor(lengths))
    packing = ours.packing_of(batch)

    def run(attention, dtype, **more):
        leaves = [values.detach().to(dtype).requires_grad_() for values in inputs]
        output = attention(*leaves, packing.offsets, window=window, **more)
        return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]

    expected = run(ours._by_mask, torch.float32)
    for longest in (None, packing.longest):
        found = run(ours.packed_attention, torch.bfloat16, longest=longest)
        for name, one, right in zip(("output", "q", "k", "v"), found, expected, strict=True):
            error = ((one.float() - right).norm() / right.norm()).item()
            assert error < ours.TOLERANCE, f"{name}: {error:.3f}"


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)])
def test_recording(heads):
    assert ours.why_not_captured(*heads, 128, torch.empty(0, device="cuda", dtype=torch.bfloat16), GraphCapture()) == ""
    reason = ours.why_not_captured(*heads, 128, torch.empty(0, device="cuda"), GraphCapture())
    assert "float32" in reason


def outcome(call, leaves, tensors, gradient):
    leaves = [values.detach().requires_grad_() for values in leaves]
    output = call.compute(*leaves, tensors)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("length", "window", "told"),
    [(300, None, ""), (256, None, ""), (300, 100, ""), (300, None, MASK), (300, 64, OFFSETS)],
)
@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 64), ((4, 4), 128), ((4, 2), 256)])
def test_attention_and_a_recording_of_it(heads, head_dim, length, window, told, softcap):
    """In bf16 against the masked definition in fp32; replays read new tensors."""
    torch.manual_seed(0)
    batch = 1 if told == OFFSETS else 3
    like = {"device": "cuda", "dtype": torch.bfloat16}
    shapes = [(batch, length, count, head_dim) for count in (heads[0], heads[1], heads[1])]
    leaves = [torch.randn(shape, **like).transpose(1, 2) for shape in shapes]
    gradient = torch.randn(shapes[0], **like)
    offsets = [
        torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([0, 90, 300, 300], [0, 5, 280, 300])
    ]
    masks = [ours.visible(length, offsets[0].device, None, reach).expand(batch, 1, -1, -1) for reach in (None, 50)]
    told_by = {MASK: masks, OFFSETS: offsets}.get(told, [None])
    place = None if told_by[0] is None else told_by[0].clone()
    call = causal(head_dim**-0.5, {told: place} if told else {}, window, softcap, True)
    run = lambda: outcome(call, leaves, call.tensors, gradient)  # noqa: E731
    for _ in range(2):
        run()
    _, replay = GraphCapture().capture(run)
    for one in told_by:
        if place is not None:
            place.copy_(one)
        seen = one if told == MASK else ours.visible(length, leaves[0].device, one, window)
        definition = causal(head_dim**-0.5, {MASK: seen}, None, softcap, True)
        expected = outcome(definition, [x.float() for x in leaves], {MASK: seen}, gradient)
        for name, found, right in zip(("output", "q", "k", "v"), replay(), expected, strict=True):
            error = ((found.float() - right).norm() / right.norm()).item()
            assert error < ours.TOLERANCE, f"{name}: {error:.3f}"
