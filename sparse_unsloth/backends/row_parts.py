"""Finds the row parts of decoder layers of any kind, in one forward of a few tokens, and proves them.

A row part is a module whose output has the residual stream's width and that computes some rows alone as it computes
them among others: an MLP, a mixture of experts. In a module that mixes tokens it is the output projection, whose output
is that module's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import Uncompiled
from sparse_unsloth.backends.peft.compiled import probe_arguments, stance
from sparse_unsloth.backends.probes import allowed
from sparse_unsloth.errors import AttachError, SparsityError
from sparse_unsloth.layer.probe import TOLERANCE, difference
from sparse_unsloth.model.adapters import refuse_foreign_leaves, refuse_other_adapters
from sparse_unsloth.model.decoder_layer import AnyLayer, first_tensor, layers_of_any_kind
from sparse_unsloth.model.row_parts import RowLayer, RowPart, has_matrix, returns_router_logits, rows_of
from sparse_unsloth.model.training_flags import training_mode
from sparse_unsloth.rows.routing import KeptChoices
from sparse_unsloth.utils.progress import bar

PROBE_SHAPE = (2, 5)
"""Batch and sequence of the forward; layers see both dimensions or ten rows."""
NUM_ROWS = 10
OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "dense", "c_proj", "wo"}
"""Names of a mixer's output projection, where its output is scaled or gated afterwards."""
SIMPLE = bool | int | float | str | None
"""Arguments that a row part may take besides tensors of rows."""
MLPS = {"mlp", "feed_forward", "ffn"}
"""Names of an MLP, in layers that no forward of tokens alone reaches (those of images)."""


@dataclass
class Call:
    """One call of a module.

    Attributes:
        order: of all calls; ``count``: how many there were of this module.
        inputs: the tensors among its arguments, by number or name; ``others``: its other arguments.
        output: its first tensor.
    """

    order: int
    inputs: dict[int | str, Tensor]
    others: dict[int | str, Any]
    output: Tensor | None = None
    count: int = 1


@dataclass
class Calls:
    """The calls of all modules in a few layers, in one forward.

    Attributes:
        with_router_logits: the forward returns them, so a router may be in no row part.
    """

    of: dict[nn.Module, Call] = field(default_factory=dict)
    with_router_logits: bool = False

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(enumerate(args)), **kwargs}
        inputs = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in given.items() if name not in inputs}
        before = self.of.get(module)
        self.of[module] = Call(len(self.of), inputs, others, count=1 + (before.count if before else 0))

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        first = first_tensor(output)
        self.of[module].output = None if first is None else first.detach().clone()


def find_row_layers(model: nn.Module) -> tuple[list[AnyLayer], dict[str, str]]:
    """The decoder layers of ``model`` that have row parts, and the others, by name: why.

    Raises:
        AttachError: there are none, or the model is on the meta device; and see `layers_of_any_kind`.
    """
    layers = layers_of_any_kind(model)
    refuse_other_adapters(model, layers)
    unknown = {layer.name: layer.module for layer in layers if isinstance(layer, RowLayer)}
    if unknown:
        refuse_meta(model)
        described = _describe(model, unknown, next((one.hidden_size for one in layers if one.name not in unknown), 0))
        layers = [described.get(layer.name, layer) for layer in layers]
    found = [layer for layer in layers if layer.row_parts]
    left_out = {layer.name: _why_none(layer) for layer in layers if not layer.row_parts}
    if not found:
        raise AttachError(
            f"{type(layers[0].module).__name__} has no part that works row by row: {next(iter(left_out.values()))}. "
            "Train it dense (sparsity=None)."
        )
    return [replace(layer, index=index) for index, layer in enumerate(found)], left_out


def refuse_meta(model: nn.Module) -> None:
    """Raises AttachError where there are no weights to probe."""
    if next(model.parameters()).device.type == "meta":
        raise AttachError("The model is on the meta device; load its weights first, then attach.")


def _why_none(layer: RowLayer) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in layer.dense.items())
    return f"{type(layer.module).__name__}: {reasons or 'it has no weights'}"


def _describe(model: nn.Module, layers: Mapping[str, nn.Module], width: int) -> dict[str, RowLayer]:
    """``layers``, by name, with their row parts; ``width`` is the residual stream's, 0 where these layers tell it."""
    calls = _watch(model, layers.values())
    calls.with_router_logits = returns_router_logits(model)
    ran = [call.output for layer in layers.values() if (call := calls.of.get(layer)) and call.output is not None]
    width = ran[0].shape[-1] if ran else width
    found = {}
    for name, layer in bar(layers.items(), "Finding row parts", "layer"):
        dense: dict[str, str] = {}
        if layer in calls.of:
            parts = [part for child in _children(layer) for part in _parts_of(*child, layer, calls, width, dense)]
            parts.sort(key=lambda part: calls.of[part.module].order)
        else:
            parts = list(_parts_by_name(layer, width, dense))
        if parts:
            parts[-1] = replace(parts[-1], selects_rows=True)
        found[name] = RowLayer(0, name, layer, tuple(parts), dense, layer in calls.of)
    return found


def probe_tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Token ids of ``shape`` that stand for no image, sound or other special input of ``model``."""
    config = model.config
    special = {
        value
        for part in (config, *(config.__dict__.values()))
        for name, value in getattr(part, "__dict__", {}).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    count = shape[0] * shape[1]
    ids = [token for token in range(count + len(special)) if token not in special][:count]
    return torch.tensor(ids, device=next(model.parameters()).device).view(shape)


def _watch(model: nn.Module, layers: Iterable[nn.Module]) -> Calls:
    """The calls of the modules in ``layers``, in a training forward of a few tokens."""
    calls, handles, uncompiled = Calls(), [], []
    for layer in layers:
        uncompiled.append(Uncompiled(layer))
        for module in layer.modules():
            if has_matrix(module):
                handles.append(module.register_forward_pre_hook(calls.begin, with_kwargs=True))
                handles.append(module.register_forward_hook(calls.end))
    tokens, layer = probe_tokens(model, PROBE_SHAPE), next(iter(layers))
    try:
        with torch.no_grad(), training_mode(model), torch.compiler.set_stance(stance(layer)):
            model(input_ids=tokens, use_cache=False, **probe_arguments(layer))
    finally:
        for handle in (*handles, *uncompiled):
            handle.remove()
    return calls


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    return ((f"{prefix}{name}", child) for name, child in module.named_children() if has_matrix(child))


def _parts_of(
    name: str, module: nn.Module, layer: nn.Module, calls: Calls, width: int, dense: dict[str, str]
) -> Iterator[RowPart]:
    """The row parts in a child of a decoder layer; says in ``dense`` why there are none."""
    call = calls.of.get(module)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        reasons: dict[str, str] = {}
        for child in _children(module, f"{name}."):
            yield from _parts_of(*child, layer, calls, width, reasons)
        if reasons:  # of many experts, say, that of the first
            dense[name] = next(iter(reasons.values()))
    elif call is None:
        dense[name] = "its forward does not run"
    elif call.output is None or call.output.shape[-1] != width or rows_of(call.output) != NUM_ROWS:
        dense[name] = f"its output is not of the hidden size, {width}"
    else:
        problem = _why_not_by_row(call)
        if not problem:
            part, problem = _proved(RowPart(name, module, tuple(call.inputs)), layer, call)
            experts = _beside_router(part, layer, calls, width) if part is not None and part.is_routed else []
            if experts:
                yield from experts
                return
            if part is not None and part.is_routed and calls.with_router_logits:
                part, problem = None, "the loss reads its router's logits (output_router_logits)"
            if part is not None:
                yield part
                return
        output = _output_projection(name, module, calls, width)
        part, problem = (None, problem) if output is None else _proved(output, layer, calls.of[output.module])
        if part is not None:
            yield part
        else:
            dense[name] = problem


def _beside_router(mixture: RowPart, layer: nn.Module, calls: Calls, width: int) -> list[RowPart]:
    """The row parts within a mixture of experts that hold most of it, without its router; none where there are not.

    The router then computes nothing twice, and its logits keep their gradient, which an auxiliary loss needs.
    """
    found = [
        part
        for child in _children(mixture.module, f"{mixture.name}.")
        for part in _parts_of(*child, layer, calls, width, {})
        if not part.is_routed
    ]
    sizes = [sum(one.numel() for one in part.module.parameters()) for part in (mixture, *found)]
    return found if 2 * sum(sizes[1:]) > sizes[0] else []


def _why_not_by_row(call: Call) -> str:
    """Why the arguments of ``call`` are not those of a function of rows; "" if they are."""
    if call.count > 1:
        return "it runs more than once in a forward"
    if not call.inputs or any(rows_of(tensor) != NUM_ROWS for tensor in call.inputs.values()):
        return "it takes tensors that are no rows"
    others = [name for name, value in call.others.items() if not isinstance(value, SIMPLE)]
    return f"it takes {', '.join(map(str, others))}" if others else ""


def _output_projection(name: str, mixer: nn.Module, calls: Calls, width: int) -> RowPart | None:
    """The module within ``mixer`` whose output is that of ``mixer``, or the last one with the name of such a one."""
    output = calls.of[mixer].output
    ran = [
        (f"{name}.{inner}", module, call)
        for inner, module in mixer.named_modules()
        if inner and (call := calls.of.get(module)) and call.output is not None and not _why_not_by_row(call)
    ]
    ran = [one for one in ran if rows_of(one[2].output) == NUM_ROWS and one[2].output.shape[-1] == width]
    if not ran:
        return None
    same = [one for one in ran if torch.equal(one[2].output.reshape(output.shape), output)]
    last = max(ran, key=lambda one: one[2].order)
    named = [one for one in ran if one[0].rpartition(".")[2] in OUTPUT_PROJECTIONS and one[2] is last[2]]
    chosen = (same or named or [None])[0]
    return None if chosen is None else RowPart(chosen[0], chosen[1], tuple(chosen[2].inputs))


def _parts_by_name(layer: nn.Module, width: int, dense: dict[str, str]) -> Iterator[RowPart]:
    """The row parts of a layer that a forward of tokens alone does not reach."""
    generator = torch.Generator().manual_seed(0)
    for name, child in _children(layer):
        candidates = [(name, child)] if name in MLPS else list(_children(child, f"{name}."))
        inner = next((one for one in candidates if one[0].rpartition(".")[2] in OUTPUT_PROJECTIONS | MLPS), None)
        if inner is None:
            dense[name] = "no forward of tokens alone reaches it, and it has no output projection that is known by name"
            continue
        parameter = next(child.parameters())
        x = torch.randn(*PROBE_SHAPE, getattr(inner[1], "in_features", width), generator=generator)
        call = Call(0, {0: x.to(parameter.device, _float_dtype(child))}, {})
        part, problem = _proved(RowPart(*inner), layer, call)
        if part is None:
            dense[name] = problem
        else:
            yield part


def _float_dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def _proved(part: RowPart, layer: nn.Module, call: Call) -> tuple[RowPart | None, str]:
    """``part`` with what its proof tells, and ""; or None, and why it is none."""
    device, problem, is_routed = next(iter(call.inputs.values())).device, "", False
    before = _random_state(device)
    try:
        with training_mode(layer):
            is_routed = _prove(part, call)
    except torch.OutOfMemoryError:
        raise
    except (AttachError, SparsityError) as error:
        problem = str(error)
    except Exception as error:
        problem = f"it does not run with some of its rows alone ({type(error).__name__})"
    if not all(map(torch.equal, before, _random_state(device))):
        problem = "it draws random numbers (dropout, or a router's noise), and backward computes some rows again"
    return (None, problem) if problem else (replace(part, is_routed=is_routed), "")


def _prove(part: RowPart, call: Call) -> bool:
    """Proves that ``part`` computes some rows alone as among others; whether it makes choices for each row.

    Raises:
        AttachError: it does not, or changes its input, or depends on trained tensors elsewhere.
        SparsityError: see `KeptChoices`.
    """
    rows = torch.arange(1, NUM_ROWS, 2, device=next(iter(call.inputs.values())).device)
    kept: list[Tensor] = []
    inputs = {name: tensor.clone() for name, tensor in call.inputs.items()}
    with torch.enable_grad(), KeptChoices(kept, NUM_ROWS):
        whole = first_tensor(_run(part.module, inputs, call.others))
    if any(tensor._version for tensor in inputs.values()):
        raise AttachError("it changes its input in place, which backward reads again")
    refuse_foreign_leaves(part.name, whole, (one for one in part.module.parameters() if one.requires_grad))
    some = {name: _chosen(tensor, rows) for name, tensor in call.inputs.items()}
    with torch.no_grad(), KeptChoices(kept, NUM_ROWS, rows):
        alone = first_tensor(_run(part.module, some, call.others))
    whole = whole.detach().flatten(0, -2)[rows]
    error = difference(alone.reshape(whole.shape), whole)
    tolerance = TOLERANCE[whole.dtype] if whole.dtype == torch.float64 else allowed(whole.dtype)
    if not error <= tolerance:
        raise AttachError(f"it mixes rows: some, computed alone, differ by {error:.2g} (allowed {tolerance})")
    return bool(kept)


def _chosen(tensor: Tensor, rows: Tensor) -> Tensor:
    chosen = tensor.flatten(0, -2)[rows]
    return chosen if tensor.ndim == 2 else chosen[None]


def _run(module: nn.Module, inputs: dict[int | str, Tensor], others: dict[int | str, Any]) -> Any:
    given = {**inputs, **others}
    places = sorted(name for name in given if isinstance(name, int))
    return module(*(given[place] for place in places), **{name: given[name] for name in given if name not in places})


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
