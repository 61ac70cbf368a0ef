"""`prepare_heads`: against transformers, by gradcheck, and the kernels' path against the plain one."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_unsloth.kernels import rotary
from sparse_unsloth.ops.head_rotary import HeadForm, prepare_heads, reference_heads
from sparse_unsloth.ops.norms import Norm

BATCH, SEQUENCE, HEADS, KV_HEADS, HEAD_DIM = 2, 3, 4, 2, 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {
    "llama": ("halves", 12), "stablelm": ("halves", 8), "helium": ("interleaved", 12), "glm": ("interleaved", 8),
    "cohere": ("pairs", 12), "ernie4_5": ("interleaved", 12),
}  # fmt: skip


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def make_inputs(width=HEAD_DIM, batch=BATCH, dtype=torch.float64, angle_dtype=None):
    """Queries, keys, cosines and sines; each angle is there for one pair alone."""
    query, key = (draw(BATCH, SEQUENCE, n * HEAD_DIM, dtype=dtype, seed=n) for n in (HEADS, KV_HEADS))
    angles = draw(batch, SEQUENCE, width, seed=1)
    return query, key, *(turn(angles).to(angle_dtype or dtype) for turn in (torch.cos, torch.sin))


def head_norm(seed=7, dtype=torch.float64, **options):
    return Norm(draw(HEAD_DIM, dtype=dtype, seed=seed), 1e-5, **options)


UNFUSED = {
    "after the rotation": HeadForm(HEAD_DIM, "halves", head_norm(7), head_norm(8), norm_after_rotation=True),
    "of all heads": HeadForm(
        HEAD_DIM, "halves", Norm(draw(HEADS * HEAD_DIM), 1e-5), Norm(draw(KV_HEADS * HEAD_DIM), 1e-5)
    ),
    "a weight per head": HeadForm(
        HEAD_DIM, "pairs", Norm(draw(HEADS, HEAD_DIM), 1e-5), Norm(draw(KV_HEADS, HEAD_DIM), 1e-5)
    ),
    "centred": HeadForm(HEAD_DIM, "halves", head_norm(7, centred=True), None),
    "bias": HeadForm(HEAD_DIM, "halves", None, head_norm(8, centred=True, bias=draw(HEAD_DIM, seed=9))),
}
FUSED = {
    "halves": HeadForm(HEAD_DIM),
    "halves, norms": HeadForm(HEAD_DIM, "halves", head_norm(7), head_norm(8)),
    "pairs, norms with an offset": HeadForm(HEAD_DIM, "pairs", head_norm(7, offset=1.0), head_norm(8, offset=1.0)),
    "interleaved, one norm": HeadForm(HEAD_DIM, "interleaved", None, head_norm(8)),
    "norms alone": HeadForm(HEAD_DIM, "none", head_norm(7), Norm(None, 1e-5)),
}


def in_dtype(form, dtype):
    norms = (
        norm and Norm(norm.weight if norm.weight is None else norm.weight.to(dtype), norm.eps, norm.offset)
        for norm in (form.query_norm, form.key_norm)
    )
    return HeadForm(form.head_dim, form.rotation, *norms)


@pytest.fixture
def launches(monkeypatch):
    """The kernels run, on a CPU by the interpreter; their names."""
    found, launch = [], rotary.launch
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    monkeypatch.setattr(rotary, "launch", lambda kernel, *rest: (found.append(kernel.__name__), launch(kernel, *rest)))
    return found


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(family, batch):
    rotation, width = FAMILIES[family]
    query, key, cosines, sines = make_inputs(width, batch)
    if rotation == "pairs":  # Cohere gives each angle twice in a row, the others all of them twice
        cosines, sines = (one[..., ::2].repeat_interleave(2, -1) for one in (cosines, sines))
    else:
        cosines, sines = (one[..., : width // 2].repeat(1, 1, 2) for one in (cosines, sines))
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    heads = [x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in (query, key)]
    turned, rest = zip(*((x[..., :width], x[..., width:]) for x in heads), strict=True)  # as StableLM's attention does
    expected = module.apply_rotary_pos_emb(*turned, cosines, sines)
    ours = prepare_heads(query, key, cosines, sines, HeadForm(HEAD_DIM, rotation))
    tolerance = 1e-6 if family in ("cohere", "ernie4_5") else 1e-12  # these two compute in fp32
    for left, right, kept in zip(ours, expected, rest, strict=True):
        right = torch.cat((right.double(), kept), -1).transpose(1, 2)
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", (FUSED | UNFUSED).values(), ids=FUSED | UNFUSED)
def test_gradcheck(form):
    query, key, cosines, sines = make_inputs(width=8)
    inputs = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: prepare_heads(q, k, cosines, sines, form), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("name", FUSED)
def test_kernels_equal_the_plain_path(name, batch, dtype, launches):
    """Values and gradients, with inputs that are slices of one tensor, from gradients that are transposed."""
    form, angle_dtype = in_dtype(FUSED[name], dtype), dtype if batch == 1 else torch.float32
    query, key, cosines, sines = make_inputs(8, batch, dtype, angle_dtype)
    wide = torch.cat((query, key, key), -1).requires_grad_()
    parts = wide.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)[:2]
    ours = prepare_heads(*parts, cosines, sines, form)
    dy = [draw(*y.transpose(1, 2).shape, dtype=dtype, seed=3).transpose(1, 2) for y in ours]
    gradient = torch.autograd.grad(ours, wide, dy)[0]
    assert launches == ["rotary_forward_kernel", "rotary_backward_kernel"]

    exact = [x.double().requires_grad_() for x in (query, key)]
    expected = reference_heads(*exact, cosines.double(), sines.double(), in_dtype(form, torch.float64))
    right = torch.cat(torch.autograd.grad(expected, exact, [one.double() for one in dy]), -1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for left, other in (*zip(ours, expected, strict=True), (gradient[..., : right.shape[-1]], right)):
        assert left.shape == other.shape
        assert left.dtype == dtype
        assert (left.double() - other).norm() < tolerance * other.norm()
    assert all(one.is_contiguous() for one in ours)


@pytest.mark.parametrize("form", UNFUSED.values(), ids=UNFUSED)
def test_other_forms_run_in_plain_pytorch(form, launches):
    inputs = make_inputs(dtype=torch.float32)
    ours, expected = prepare_heads(*inputs, form), reference_heads(*inputs, form)
    assert not launches
    for left, right in zip(ours, expected, strict=True):
        assert left.is_contiguous()
        assert torch.equal(left, right)


def test_float64_and_no_form_run_in_plain_pytorch(launches):
    query, key, cosines, sines = make_inputs()
    query, key = torch.cat((query, key), -1).split((HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM), -1)
    plain, none = HeadForm(HEAD_DIM), HeadForm(HEAD_DIM, "none")
    for *angles, form in ((cosines, sines, plain), (None, None, plain), (cosines, sines, none)):
        ours = prepare_heads(query, key, *angles, form)
        assert [(y.shape[-2:], y.dtype) for y in ours] == [((n, HEAD_DIM), torch.float64) for n in (HEADS, KV_HEADS)]
        assert all(y.is_contiguous() for y in ours)
    assert torch.equal(ours[0].flatten(-2), query)
    assert not launches


def test_angles_of_another_length_are_refused(launches):
    query, key, cosines, sines = make_inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="must match the size"):
        prepare_heads(query, key, cosines[:, :2], sines[:, :2], HeadForm(HEAD_DIM))


def test_one_output_may_be_unused(launches):
    query, key, cosines, sines = make_inputs(dtype=torch.float32)
    query, key = query.requires_grad_(), key.requires_grad_()
    prepare_heads(query, key, cosines, sines, HeadForm(HEAD_DIM))[0].sum().backward()
    assert query.grad.abs().sum() > 0
    assert not key.grad.any()


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype, kernels, monkeypatch):
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", kernels)
    form = in_dtype(FUSED["halves, norms"], dtype)
    results = []
    for enabled in (False, True):
        query, key, cosines, sines = make_inputs(dtype=dtype)
        inputs = query.requires_grad_(), key.requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            outputs = prepare_heads(*inputs, cosines, sines, form)
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])))
    for left, right in zip(*results, strict=True):
        assert left.dtype == dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", FUSED)
def test_nothing_is_read_on_the_host(name, monkeypatch):
    """Fake tensors hold no values, so a step that could not be captured in a CUDA graph fails."""
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    monkeypatch.setattr(rotary, "launch", lambda *rest: None)
    inputs, form = make_inputs(dtype=torch.float32), in_dtype(FUSED[name], torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        query, key, cosines, sines = (mode.from_tensor(x) for x in inputs)
        outputs = prepare_heads(query.requires_grad_(), key.requires_grad_(), cosines, sines, form)
        gradients = torch.autograd.grad(outputs, (query, key), [torch.ones_like(y) for y in outputs])
    assert [dx.shape for dx in gradients] == [query.shape, key.shape]
