"""Checks methods on the loaded model for equality with their reference; a method that fails is not timed."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import original_forward
from sparse_unsloth.backends.row_hooks import trained
from sparse_unsloth.bench.forced import Streams
from sparse_unsloth.bench.methods import EQUAL_TO_PLAIN, NEAR_PLAIN, PLAIN, without_backend
from sparse_unsloth.bench.models import as_collated
from sparse_unsloth.bench.reference import FAMILIES, float32_step
from sparse_unsloth.bench.shapes import Shape, make_batch
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE
from sparse_unsloth.model.decoder_layer import MLP_PROJECTIONS
from sparse_unsloth.ops.linear import SelectedProjection, masked_linear, sparse_linear
from sparse_unsloth.ops.mlp import GatedMlp, masked_mlp, sparse_mlp
from sparse_unsloth.ops.projection import Projection, read_projection
from sparse_unsloth.rows.backward import BackwardRows, backward_rows
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.runtime.state import LayerRuntime, get_state
from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition

TOLERANCE = 0.03
"""The allowed relative error of a tensor between two orders of bf16 arithmetic."""
FURTHER = 1.25
"""The allowed ratio of a step's distance from float32 to the plain model's, over all gradients. Between two orders of
bf16 arithmetic it was 1.00 to 1.15 with 16 layers, 256 wide, and 0.94 with 6 layers of Llama-3-8B's sizes."""
FURTHER_KIND = 1.6
"""The same ratio for one kind of matrix in all layers (1.0 to 1.3), so that a fault in one of fourteen kinds shows."""
PLAIN_TOLERANCE = 0.25
"""The allowed error of the plain model's gradients: bf16 loses some 4 % in 6 layers of Llama-3-8B's sizes."""
STEP_TOLERANCE = 0.05
"""The allowed difference of a step's gradients where float32's are unknown (families that `reference` lacks)."""
REPLAY_TOLERANCE = 0.01
"""The allowed difference of gradients of the same kernels and inputs: attention's backward adds in any order."""
LOSS_TOLERANCE = 2e-3
FP8_TOLERANCE = 0.25
"""The allowed distance of gradients in FP8 from bf16's where every layer starts from the same (`Streams`), of all
layers together: each product is off by 4 % of its norm, and a gradient passes several in a layer. One kind of matrix
may be off by twice as much. `FP8_LOSS_TOLERANCE` is for the loss."""
FP8_LOSS_TOLERANCE = 0.02
FP8_REPLAY_TOLERANCE = 0.5
"""The most that replays in FP8 may differ by, where two runs without capture differ by half of it."""
SMALL = Shape(2, 256, 64)
DOCUMENTS = 192, 320
"""Tokens of the packed documents of a small sequence, in either order; each has the loss tokens of `SMALL`."""
LAYERS = 2
"""The number of checked layers of each kind."""


Step = tuple[float, dict[str, Tensor]]
"""Loss, and gradients by the parameter's name."""
MakeBatch = Callable[[int, int, torch.device], dict[str, Tensor]]
"""Makes a batch for a size of vocabulary, a seed and a device."""


@dataclass(frozen=True)
class PlainSteps:
    """A step of the model before anything was attached, in bf16 as it trains and in float32 (None: unknown).

    Attributes:
        streams: what the bf16 step gave to each layer; methods in FP8 need it.
    """

    bf16: Step
    float32: Step | None
    streams: Streams | None = None


class CheckFailed(SparsityError):
    """A method gives wrong results."""


def check(model: nn.Module, method: str, plain: PlainSteps | None) -> str:
    """Checks the attached ``model``; returns the errors as text.

    Args:
        plain: `plain_steps` of the model before it was attached; sparse methods do not need it.

    Raises:
        CheckFailed: the results differ.
    """
    if method in PLAIN:
        return check_plain(plain)
    state = get_state(model)
    found = [] if state.graphs is None else [check_graphs(model)]
    if state.row_sparse:
        return "; ".join([*found, check_rows(model, plain)])
    for part, function in (("mlp", check_mlp), ("self_attn", check_attention)):
        runtimes = [runtime for runtime in state.runtimes.values() if getattr(runtime.sparsity, part) > 0]
        found += [function(runtime) for runtime in runtimes[:LAYERS]]
    if without_backend(method) in (*EQUAL_TO_PLAIN, *NEAR_PLAIN):
        found.append(_check_step(model, plain))
    if not found:
        raise CheckFailed(f"nothing of {method} was checked: it makes no layer sparse")
    return "; ".join(found)


def plain_steps(model: nn.Module, make: MakeBatch | None = None, streams: bool = False) -> PlainSteps:
    """Runs a step of one small batch on the model with nothing attached.

    Args:
        make: `small_batch` (None), or another layout of its tokens.
        streams: whether methods in FP8 will be checked.
    """
    exact = None
    if model.config.model_type in FAMILIES:
        exact = float32_step(model, make_batch(SMALL, model.config.vocab_size, 0, next(model.parameters()).device))
    given = Streams()
    with given.recorded(model) if streams else contextlib.nullcontext():
        step = loss_and_gradients(model, 0, make or small_batch)
    return PlainSteps(step, exact, given if streams else None)


def check_mlp(runtime: LayerRuntime) -> str:
    """Compares one layer's sparse MLP with its masked reference, forward and every gradient."""
    layer = runtime.layer
    projections = [read_projection(getattr(layer.mlp, name)) for name in MLP_PROJECTIONS]
    mlp = GatedMlp(*projections, layer.activation)
    x, partition = _input(layer.hidden_size, projections[0])
    context = x.flatten(0, 1)[partition.context]
    channels = runtime.state.selector.mlp(layer, context, runtime.sparsity.mlp).channels
    return _compare(
        f"{layer.name}.mlp",
        projections,
        x,
        lambda source: [sparse_mlp(source, partition, channels, mlp)],
        lambda source: [masked_mlp(source, partition, channels, mlp)],
    )


def check_rows(model: nn.Module, plain: PlainSteps) -> str:
    """Compares the loss with the plain model's, gradients with no row left out too, and one MLP's with masked rows."""
    state = get_state(model)
    config = state.config
    loss, few = loss_and_gradients(model)
    _check_loss(loss, plain.bf16[0], "the plain model's", _fp8_layers(model) > 0)
    state.config = config.model_copy(update={"backward_rows": 1 - 1e-9})
    try:
        found = [_check_step(model, plain)]
    finally:
        state.config = config
    exact = plain.bf16[1] if plain.float32 is None else plain.float32[1]
    found.append(f"rows left out: gradients {_distance(few, exact):.2g} of their norm away")
    for runtime in list(state.runtimes.values())[:LAYERS]:
        layer = runtime.layer
        projections = [read_projection(getattr(layer.mlp, name)) for name in MLP_PROJECTIONS]
        x, partition = _input(layer.hidden_size, projections[0])
        choice = RowChoice(partition, config.backward_rows)
        found.append(
            _compare(
                f"{layer.name}.mlp through {choice.num_context} context rows",
                projections,
                x,
                lambda source, mlp=layer.mlp, choice=choice: [
                    backward_rows(partial(original_forward, mlp), [source], trained(mlp), BackwardRows(choice))
                ],
                # The second call, when the rows are chosen.
                lambda source, mlp=layer.mlp, choice=choice: [_through(choice.rows, original_forward(mlp, source))],
            )
        )
    return "; ".join(found)


def _through(rows: Tensor, y: Tensor) -> Tensor:
    """Returns ``y [..., width]``, whose gradient is passed on in ``rows`` only."""
    flat = y.flatten(0, -2)
    return flat.detach().index_copy(0, rows, flat.index_select(0, rows)).view(y.shape)


def check_graphs(model: nn.Module) -> str:
    """Compares captured steps, and replays on other batches, with the same steps before the capture.

    Row-sparse layers choose other rows where something rounds differently, and attention within packed documents adds
    in no fixed order. They are therefore compared with the captured functions, run without capture, twice. FP8 rounds
    the last bits of that to whole steps: 32 layers of an 8B differed by 0.083 when they were run twice.
    """
    state = get_state(model)
    found = _check_replays(model, small_batch, uncaptured=state.row_sparse)
    if state.graphs.captures_documents:
        found += f"; packed, {_check_replays(model, packed_batch, uncaptured=True)}"
    return found


def _check_replays(model: nn.Module, make: MakeBatch, uncaptured: bool) -> str:
    graphs, fp8_layers = get_state(model).graphs, _fp8_layers(model)
    expected, noise = _uncaptured_steps(model, make) if uncaptured else (None, 0.0)
    began = graphs.serial
    before = [loss_and_gradients(model, seed, make) for seed in range(RUNS_BEFORE_CAPTURE)]
    if graphs.serial != began:
        raise CheckFailed("the first steps were captured, without a warm-up")
    worst = 0.0
    for number in range(2 * RUNS_BEFORE_CAPTURE):
        loss, gradients = loss_and_gradients(model, number % RUNS_BEFORE_CAPTURE, make)
        plain_loss, plain = (expected or before)[number % RUNS_BEFORE_CAPTURE]
        _check_loss(loss, plain_loss, "the one without graphs", fp8_layers > 0)
        if gradients.keys() != plain.keys():
            raise CheckFailed("other parameters have gradients than without graphs")
        worst = max(worst, _distance(gradients, plain))
    if graphs.serial == began:
        raise CheckFailed("no layer was captured")
    most = FP8_REPLAY_TOLERANCE if fp8_layers else TOLERANCE
    if not worst <= max(REPLAY_TOLERANCE, min(2 * noise, most)):
        raise CheckFailed(
            f"replayed gradients differ by {worst:.3f} of their norm from those without graphs, those by {noise:.3f} "
            "when they are taken twice"
        )
    twice = f" (without capture, twice: {noise:.1e})" if noise else ""
    return f"{2 * RUNS_BEFORE_CAPTURE} steps captured and replayed: gradients within {worst:.1e}{twice}"


class Immediate:
    """Replaces `GraphCapture`: runs a function whenever its graph would be replayed."""

    def capture(
        self, function: Callable[[], Iterable[Tensor]], kept: bool = False
    ) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
        return list(function()), lambda: list(function())

    def forget(self) -> None:
        """Does nothing: no graph is held."""

    def memory(self, kept_alone: bool = False) -> int:
        """No bytes, as no graph is held."""
        return 0

    @staticmethod
    def kept_state(state: object) -> None:
        """Does nothing: every call computes new tensors."""


def _uncaptured_steps(model: nn.Module, make: MakeBatch) -> tuple[list[Step], float]:
    """Runs the steps of `check_graphs` by the captured functions, without capture; all graphs are dropped.

    Returns the steps, and the distance of the gradients of two such runs: some kernels add in no fixed order.
    """
    graphs = get_state(model).graphs
    graphs.clear()
    recorder, graphs.recorder = graphs.recorder, Immediate()
    try:
        for seed in range(RUNS_BEFORE_CAPTURE):
            loss_and_gradients(model, seed, make)
        steps, again = (
            [loss_and_gradients(model, seed, make) for seed in range(RUNS_BEFORE_CAPTURE)] for _ in range(2)
        )
        return steps, max(_distance(a[1], b[1]) for a, b in zip(again, steps, strict=True))
    finally:
        graphs.clear()
        graphs.recorder = recorder


def check_attention(runtime: LayerRuntime) -> str:
    """Compares one layer's sparse Q, K, V and O with their masked reference, forward and every gradient."""
    layer, attention = runtime.layer, runtime.layer.self_attn
    query, key, value, output = (read_projection(getattr(attention, f"{name}_proj")) for name in "qkvo")
    x, partition = _input(layer.hidden_size, query)
    context = x.flatten(0, 1)[partition.context]
    chosen = runtime.state.selector.attention(layer, context, runtime.sparsity.self_attn)
    inputs = [
        SelectedProjection(projection, out_index=index)
        for projection, index in ((query, chosen.q), (key, chosen.k), (value, chosen.v))
    ]
    found = []
    for name, parts, width in (
        ("qkv", inputs, layer.hidden_size),
        ("o", [SelectedProjection(output, in_index=chosen.o)], layer.num_heads * layer.head_dim),
    ):
        x, _ = _input(width, query)
        found.append(
            _compare(
                f"{layer.name}.{name}",
                [part.projection for part in parts],
                x,
                lambda source, parts=parts: sparse_linear(source, partition, parts),
                lambda source, parts=parts: masked_linear(source, partition, parts),
            )
        )
    return "; ".join(found)


def small_batch(vocab_size: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Makes a batch of the shape `SMALL`."""
    return make_batch(SMALL, vocab_size, seed, device)


def flat_batch(vocab_size: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Makes a batch with the tokens of `small_batch` in one sequence, as Unsloth lays them out."""
    return make_batch(replace(SMALL, packed=SMALL.tokens), vocab_size, seed, device)


def packed_batch(vocab_size: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Makes a sequence of two documents, whose order depends on ``seed``; the counts of token roles do not."""
    lengths = torch.tensor(DOCUMENTS if seed % 2 else DOCUMENTS[::-1], dtype=torch.int32)
    ids = torch.randint(10, vocab_size, (1, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    answers = positions >= lengths.repeat_interleave(lengths)[None] - SMALL.outputs
    batch = {"input_ids": ids, "labels": ids.where(answers, IGNORE_INDEX)}
    batch |= {"position_ids": positions, "packed_seq_lengths": lengths}
    return {name: value.to(device) for name, value in batch.items()}


def loss_and_gradients(model: nn.Module, seed: int = 0, make: MakeBatch = small_batch) -> Step:
    """Returns the loss of the small batch of this ``seed``, and every trained parameter's gradient on the CPU."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**as_collated(model, make(model.config.vocab_size, seed, device))).loss
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def check_plain(plain: PlainSteps) -> str:
    """Checks the baseline: its distance from float32 must be that of rounding."""
    loss, gradients = plain.bf16
    if plain.float32 is None:
        return f"loss {loss:.5f}; no float32 step of this family to compare with"
    exact_loss, exact = plain.float32
    _check_loss(loss, exact_loss, "float32's")
    error = _distance(gradients, exact)
    if not error <= PLAIN_TOLERANCE:
        raise CheckFailed(f"gradients differ from float32's by {error:.3f} of their norm")
    return f"whole step: loss {loss:.5f}, float32 {exact_loss:.5f}; gradients {error:.2g} from float32's"


def _check_step(model: nn.Module, plain: PlainSteps) -> str:
    step = loss_and_gradients(model)
    return check_fp8(model, step, plain) if _fp8_layers(model) else check_model(step, plain)


def check_fp8(model: nn.Module, ours: Step, plain: PlainSteps) -> str:
    """Checks a step's loss, and the gradients of a further step in which every layer starts from what bf16 gave it."""
    (loss, gradients), (plain_loss, plain_gradients) = ours, plain.bf16
    _check_loss(loss, plain_loss, "the plain model's", fp8=True)
    with plain.streams.forced(model):
        _, by_layer = loss_and_gradients(model)
    if by_layer.keys() != plain_gradients.keys():
        raise CheckFailed("other parameters have gradients than in the plain model")
    error, through = _distance(by_layer, plain_gradients), _distance(gradients, plain_gradients)
    whose = "of their norm from bf16's, where every layer starts from the same"
    if not error <= FP8_TOLERANCE:
        raise CheckFailed(f"all gradients are {error:.3g} {whose} (FP8 may add {FP8_TOLERANCE})")
    kinds = {kind: _distance(by_layer, plain_gradients, names) for kind, names in _by_kind(plain_gradients).items()}
    worst = max(kinds, key=kinds.__getitem__)
    if not kinds[worst] <= 2 * FP8_TOLERANCE:
        raise CheckFailed(f"gradients of {worst} are {kinds[worst]:.3g} {whose} (FP8 may add {2 * FP8_TOLERANCE})")
    return (
        f"whole step in FP8: loss {loss:.5f}, plain {plain_loss:.5f}; gradients {error:.2g} {whose} (at most "
        f"{kinds[worst]:.2g}: {worst}), {through:.2g} where errors grow over the layers"
    )


def check_model(ours: Step, plain: PlainSteps) -> str:
    """Checks that loss and gradients of a step are as near to float32's as the plain model's, in total and by kind.

    Rounding grows over the layers: with 32 layers two correct steps differ by 10 %, so their distance from each other
    says little.
    """
    (loss, gradients), (plain_loss, plain_gradients) = ours, plain.bf16
    _check_loss(loss, plain_loss, "the plain model's")
    if gradients.keys() != plain_gradients.keys():
        raise CheckFailed("other parameters have gradients than in the plain model")
    apart = _distance(gradients, plain_gradients)
    if plain.float32 is None:
        if not apart <= STEP_TOLERANCE:
            raise CheckFailed(f"gradients differ from the plain model's by {apart:.3f} of their norm")
        return f"whole step: loss {loss:.5f} of {plain_loss:.5f}, gradients within {apart:.1e}"
    exact_loss, exact = plain.float32
    error, least = _distance(gradients, exact), _distance(plain_gradients, exact)
    _check_further("all gradients", error, least, FURTHER)
    for kind, names in _by_kind(exact).items():
        of_kind = [_distance(step, exact, names) for step in (gradients, plain_gradients)]
        _check_further(f"gradients of {kind}", *of_kind, FURTHER_KIND)
    return (
        f"whole step: loss {loss:.5f}, plain {plain_loss:.5f}, float32 {exact_loss:.5f}; gradients {error:.2g} from "
        f"float32's, the plain model's {least:.2g}, from each other {apart:.2g}"
    )


def _fp8_layers(model: nn.Module) -> int:
    state = get_state(model)
    return sum(not runtime.not_whole for runtime in state.whole_forwards) if state.config.fp8 else 0


def _check_loss(loss: float, expected: float, whose: str, fp8: bool = False) -> None:
    if not abs(loss - expected) <= (FP8_LOSS_TOLERANCE if fp8 else LOSS_TOLERANCE) * abs(expected):
        raise CheckFailed(f"loss {loss:.5f} is not {whose} {expected:.5f}")


def _check_further(what: str, error: float, least: float, times: float) -> None:
    # Where the plain model is hardly off at all, rounding may still differ by as much as one bf16 digit.
    if not error <= max(times * least, 2**-8):
        raise CheckFailed(f"{what} are {error:.3g} of their norm from float32's, the plain model's {least:.3g}")


def _by_kind(gradients: dict[str, Tensor]) -> dict[str, list[str]]:
    """Groups names by projection and matrix: ``q_proj.lora_A`` and thirteen more."""
    kinds = defaultdict(list)
    for name in gradients:
        kinds[re.search(r"\w+_proj\.lora_[AB]", name)[0]].append(name)
    return kinds


def _distance(step: dict[str, Tensor], exact: dict[str, Tensor], names: Iterable[str] | None = None) -> float:
    """Returns the norm of the difference, relative to the norm of ``exact``."""
    names = list(exact) if names is None else names
    return _norm(step[name] - exact[name] for name in names) / max(_norm(exact[name] for name in names), 1e-12)


def _input(width: int, projection: Projection) -> tuple[Tensor, TokenPartition]:
    """Draws random rows ``[batch, length, width]`` of the small shape, and their roles."""
    device = projection.base.device
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(SMALL.batch, SMALL.length, width, generator=generator).to(device, torch.bfloat16)
    return x, TokenPartition.from_labels(make_batch(SMALL, 100, 0, device)["labels"])


def _compare(name: str, projections: list[Projection], x: Tensor, ours: Callable, masked: Callable) -> str:
    """Compares outputs, and gradients of input and LoRA, of two functions of ``x``; returns the largest error.

    Gradients are read from ``.grad``, because Unsloth's tiled MLP writes LoRA's there. The input is a view, like a
    norm's output, because that MLP writes into it, which autograd forbids for leaves.
    """
    loras = [tensor for projection in projections for tensor in (projection.lora.A, projection.lora.B)]
    results = []
    for function in (ours, masked):
        source = x.clone()[None][0].requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = list(function(source))
        for lora in loras:
            lora.grad = None
        sum(output.float().square().sum() for output in outputs).backward()
        results.append([*outputs, source.grad, *(lora.grad for lora in loras)])
    for lora in loras:
        lora.grad = None
    errors = [_norm([a.float() - b.float()]) / max(_norm([b]), 1e-6) for a, b in zip(*results, strict=True)]
    if not max(errors) <= TOLERANCE:
        raise CheckFailed(f"{name}: the sparse function differs from the masked one by {max(errors):.3f} of its norm")
    return f"{name} within {max(errors):.1e}"


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.detach().float().square().sum().item() for tensor in tensors) ** 0.5
