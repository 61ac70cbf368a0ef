"""Runs decoder layers as whole layers, in both backends: dense, by channels or by rows, captured in CUDA graphs or not.

The instance's forward is replaced. Two functions compute everything but attention (docs/how-it-works.md, section 7),
and `sparse_unsloth.layer.attention` computes attention between them, of what the backend reads from the layer's
arguments. Where they do not apply, the layer's own forward runs, with the hooks of its parts. The result is the same up
to rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparse_unsloth.backends.patching import plain_forward, replace_forward, restore_forward, runs
from sparse_unsloth.backends.peft.compiled import stance
from sparse_unsloth.backends.probes import allowed
from sparse_unsloth.config.layer_rules import PARTS
from sparse_unsloth.config.sparsity import Precision
from sparse_unsloth.errors import AttachError
from sparse_unsloth.graphs import layer as graphed_layer
from sparse_unsloth.graphs.passes import LayerCapture
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.graphs.rows import row_sparse_whole_layer
from sparse_unsloth.layer.attention import AttentionCall, attend
from sparse_unsloth.layer.checkpoint import checkpointed
from sparse_unsloth.layer.fast import FastLayer
from sparse_unsloth.layer.probe import difference
from sparse_unsloth.layer.spec import LayerSpec
from sparse_unsloth.model.decoder_layer import DecoderLayer, first_tensor
from sparse_unsloth.model.training_flags import checkpoint_hook, in_backward
from sparse_unsloth.ops.decoder_layer import LayerPlan, RowOrder, lora_tensors_of, post_attention, pre_attention
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.ops.fp8 import scale_tensors
from sparse_unsloth.ops.kept_attention import AttentionKeeper
from sparse_unsloth.ops.norms import Norm
from sparse_unsloth.ops.projection import Projection
from sparse_unsloth.ops.stored_rows import post_attention_by_rows
from sparse_unsloth.runtime.context import SparseContext
from sparse_unsloth.runtime.state import LayerRuntime

SKIPS_UNUSED_ROWS = "it skips unused rows instead (exact_removal)"
WRAPPED = "something wraps its forward (accelerate's hooks of a model on several devices, say)"
NO_KERNELS = "Triton's kernels do not run here"
FP8_DIFFERENCE = 0.2
"""How far a layer's FP8 output may be from its bf16 output in the probe, relative: each product is off by 0.04."""


def install(runtimes: Iterable[LayerRuntime]) -> None:
    """Replaces the forward of layers that can run as whole layers, after their parts are hooked.

    The probe forward proves them afterwards. ``not_whole`` of each runtime says why a layer cannot.
    """
    for runtime in runtimes:
        state = runtime.state
        if state.row_sparse and runtime.layer.index not in state.runtimes:
            runtime.not_whole = SKIPS_UNUSED_ROWS
            continue
        if not isinstance(runtime.layer, DecoderLayer):
            runtime.not_whole = f"our functions do not compute {type(runtime.layer.module).__name__}"
            continue
        if "forward" in runtime.layer.module.__dict__:
            runtime.not_whole = WRAPPED
            continue
        try:
            state.backend.check_not_sharded(runtime.layer)
            runtime.fast = FastLayer(runtime.layer)
        except AttachError as error:
            runtime.not_whole = str(error)
        else:
            replace_forward(runtime.layer.module, layer_forward, runtime)


def uninstall(runtime: LayerRuntime) -> None:
    """Restores a layer's own forward; hooks of its parts stay where the parts are sparse or skip unused rows."""
    module, state = runtime.layer.module, runtime.state
    if not runs(module, layer_forward):
        return
    restore_forward(module)
    module.__dict__["_sparse_runtime"] = runtime  # the layer's hooks read it
    state.hooked.remove(module)


def why_not_captured(runtime: LayerRuntime) -> str:
    """Why CUDA graphs cannot hold the layer; "" where they can."""
    return runtime.not_whole if use_kernels(next(runtime.layer.module.parameters())) else NO_KERNELS


def layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a decoder layer in training forwards without a cache."""
    runtime: LayerRuntime = self._sparse_runtime
    if runtime.context is not None and runtime.context.probe:
        return _prove(runtime, hidden_states, kwargs)
    hook = checkpoint_hook() if torch.is_grad_enabled() else None
    if runtime.context is not None:
        _note_joined(runtime, hidden_states, hook)
    by_itself = runtime.state.config.exact_removal and hook is not None
    output = None if args else (_compute_checkpointed if by_itself else _compute)(runtime, hidden_states, kwargs)
    if output is None:
        return plain_forward(self, hidden_states, *args, **kwargs)
    return (output,) if runtime.fast.returns_tuple else output


def _prove(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
    """Compares the layer as a whole with its own forward in the probe forward, with every channel kept.

    Where it fails or differs, ``runtime.not_whole`` says so, and attaching restores the layer's own forward.

    Returns:
        The output of the layer's own forward.
    """
    context, module = runtime.context, runtime.layer.module
    output = plain_forward(module, hidden_states, **arguments)
    runtime.fast.returns_tuple = not isinstance(output, Tensor)
    reached, loss_only = set(context.ran), context.loss_only
    context.loss_only = False  # whole layers compute every row
    try:
        skips_rows = loss_only and runtime.loss_only_parts
        expected = plain_forward(module, hidden_states, **arguments) if skips_rows else output
        runtime.not_whole = _why_different(runtime, hidden_states, arguments, first_tensor(expected))
    finally:
        context.loss_only = loss_only
    if runtime.not_whole:
        context.ran = reached
    return output


def _why_different(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any], expected: Tensor) -> str:
    """How the layer as a whole differs from ``expected``, in a sentence; "" where it does not."""
    module, context = runtime.layer.module, runtime.context
    try:
        call = runtime.state.backend.read_attention(runtime, hidden_states, arguments)
        if call is None:
            return f"our attention does not take the arguments of {type(module).__name__}"
        runtime.context = None  # the hooks of its parts compute densely
        with torch.compiler.set_stance(stance(module)):  # Unsloth compiles Gemma 2's attention, for minutes
            runtime.fast.prove(lambda x: plain_forward(module, x, **arguments), hidden_states, call)
        runtime.context = context
        ours = _compute(runtime, hidden_states, arguments, "bf16")
        precision = runtime.state.config.precision
        rounded = ours if ours is None or precision == "bf16" else _compute(runtime, hidden_states, arguments)
    except torch.OutOfMemoryError:
        raise
    except AttachError as error:
        return str(error)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"our functions failed on {type(module).__name__}: {type(error).__name__}: {first[:200]}"
    finally:
        runtime.context = context
    if ours is None:
        return f"our functions do not take hidden states of {expected.dtype} on {expected.device.type} with these norms"
    tolerance = allowed(ours.dtype)
    if not difference(ours, expected) <= tolerance:
        return f"the forward of {type(module).__name__} differs from our functions (by more than {tolerance}, relative)"
    if not difference(rounded, ours) <= (FP8_DIFFERENCE if precision != "bf16" else 0):
        return f"its FP8 products differ from those in bf16 by more than {FP8_DIFFERENCE}, relative"
    return ""


def _note_joined(runtime: LayerRuntime, hidden_states: Tensor, hook: Callable | None) -> None:
    """Notes in a first forward that a checkpoint holds this layer and the one before it, and will run both again.

    Args:
        hook: see `checkpoint_hook`. Under reentrant checkpointing the first layer's input alone requires gradients.
    """
    if in_backward():
        return
    context, index = runtime.context, runtime.layer.index
    if hook is not None:
        before, context.checkpoint = context.checkpoint, weakref.ref(hook)
        joined = before is not None and before() is hook
    else:
        joined = not torch.is_grad_enabled() and not hidden_states.requires_grad
    if joined and index - 1 in context.whole:
        context.memo(index).joined = context.memo(index - 1).joined = True


def _compute_checkpointed(runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """`_compute` inside non-reentrant gradient checkpointing (see `sparse_unsloth.layer.checkpoint`)."""
    if runtime.fast.projections() is None or _read(runtime, hidden_states, arguments) is None:
        return None
    context = runtime.context

    def run(x: Tensor) -> Tensor:
        before, runtime.context = runtime.context, context
        try:
            return _compute(runtime, x, arguments)
        finally:
            runtime.context = before

    def parameters() -> list[Tensor]:
        return lora_tensors_of(runtime.fast.projections())

    memo = context.memo(runtime.layer.index)
    restores = in_backward() and memo.with_gradients is False and not memo.joined
    return checkpointed(hidden_states, None if restores else run, run, parameters)


def _compute(
    runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any], precision: Precision | None = None
) -> Tensor | None:
    """The layer's output by the two functions, captured or not; None where its own forward must run.

    Args:
        precision: None: as configured.
    """
    read = _read(runtime, hidden_states, arguments)
    if read is None:
        return None
    norms, call = read
    context, state, index = runtime.context, runtime.state, runtime.layer.index
    memo, keep = context.memo(index), torch.is_grad_enabled()
    recompute = memo.is_recompute()
    projections = memo.projections if recompute and state.backend.keeps_weights else None
    if projections is None:
        projections = runtime.fast.projections(state.adapter_version)
        if projections is None:
            return None
    memo.projections = None if recompute else projections
    unused = recompute and state.config.exact_removal and not memo.joined
    plan = _plan(runtime, norms, projections, keep, unused, precision or state.config.precision)
    keeper = _keeper(runtime, call, hidden_states, recompute)
    context.whole.add(index)
    for part in PARTS:
        if runtime.by_rows or runtime.is_sparse(part):
            runtime.record_run(part)
    if in_backward():  # a recompute is captured if its first forward was
        memo.captured = memo.captured and _is_captured_again(runtime)
    else:
        memo.captured = call.capturable and _can_be_captured(runtime)
    output = _captured(runtime, hidden_states, plan, call, keeper) if memo.captured else None
    memo.captured = output is not None
    if output is None:
        output = _uncaptured(runtime, plan, call, hidden_states, keeper)
        if state.graphs is not None and not (plan.output_unused or runtime.by_rows):
            _reserve(runtime, state.graphs)
    if keeper is not None:
        memo.attention = None if recompute else keeper.kept
    if state.planner is not None and not in_backward():
        state.planner.note_whole(index, call.window, call.keepable and (keeper is None or keeper.kept is not None))
    return output


def _keeper(
    runtime: LayerRuntime, call: AttentionCall, hidden_states: Tensor, recompute: bool
) -> AttentionKeeper | None:
    """Keeps attention in a first forward, where the planner has memory for it; gives it in the recompute."""
    kept, planner = runtime.context.memo(runtime.layer.index).attention, runtime.state.planner
    if recompute:
        return None if kept is None else AttentionKeeper(kept)
    if planner is None or runtime.layer.index not in planner.attention_kept or not call.keepable:
        return None
    first = hidden_states.requires_grad and not (torch.is_grad_enabled() or in_backward())  # so backward will come
    return AttentionKeeper() if first else None


def _uncaptured(
    runtime: LayerRuntime,
    plan: LayerPlan,
    call: AttentionCall,
    hidden_states: Tensor,
    keeper: AttentionKeeper | None = None,
) -> Tensor:
    """The layer's output, without CUDA graphs."""
    context, index = runtime.context, runtime.layer.index
    *projected, residual = pre_attention(hidden_states, plan)
    attention_output = attend(runtime.fast.present_spec(), projected, call, call.tensors, keeper)
    if not runtime.by_rows:
        return post_attention(attention_output, residual, plan)
    choice = context.row_choice(index, runtime.state.config.backward_rows, runtime.state.observer.energy)
    chosen = None if context.awaits_roles else RowOrder(context.chosen_rows(choice), False)
    return post_attention_by_rows(attention_output, residual, plan, choice, chosen)


def _uncaptured_later(
    runtime: LayerRuntime,
    context: SparseContext,
    plan: LayerPlan,
    call: AttentionCall,
    hidden_states: Tensor,
    loras: Sequence[Tensor],
) -> Tensor:
    """`_uncaptured` with these LoRA matrices in the backward pass of ``context``, whatever forward runs."""
    before, runtime.context = runtime.context, context
    try:
        _drop_overwritten(runtime)
        return _uncaptured(runtime, plan.with_loras(loras), call, hidden_states)
    finally:
        runtime.context = before


def _is_captured_again(runtime: LayerRuntime) -> bool:
    """Whether the recompute of a layer is captured or replayed, whose first forward was."""
    context, state = runtime.context, runtime.state
    if context.captures is not None:
        context.captures.awaited.discard(runtime.layer.index)
    if context.memo(runtime.layer.index).joined:
        state.warn_once(
            "cuda_graphs: decoder layers are checkpointed together, so what one keeps for its backward must outlive "
            "the recompute of the next one: their recomputes run without CUDA graphs. Checkpoint every layer by "
            "itself (gradient_checkpointing_enable())."
        )
        return False
    return not _drop_overwritten(runtime)


def _drop_overwritten(runtime: LayerRuntime) -> bool:
    """Drops channel selections that a later forward's graphs have overwritten, so that they are made again."""
    context = runtime.context
    if context.captures is None or not context.captures.overwritten:
        return False
    dropped = [context.selections.pop((runtime.layer.index, part), None) for part in PARTS]
    return any(one is not None for one in dropped)


def _read(
    runtime: LayerRuntime, hidden_states: Tensor, arguments: dict[str, Any]
) -> tuple[list[Norm | None], AttentionCall] | None:
    """The layer's norms, and what attention computes; None where this is no call that our functions compute."""
    context, layer = runtime.context, runtime.layer
    if context is None or context.scale <= 0 or (context.loss_only and runtime.loss_only_parts):
        return None
    training = layer.module.training and layer.self_attn.training and layer.mlp.training
    norms = runtime.fast.norms()
    if not training or norms is None or arguments.get("output_attentions"):
        return None
    if not _fits_kernels(hidden_states, norms):
        return None
    call = runtime.state.backend.read_attention(runtime, hidden_states, arguments)
    if call is None:
        return None
    runtime.check_rows(layer.module, hidden_states)
    return norms, call


def _fits_kernels(hidden_states: Tensor, norms: list[Norm | None]) -> bool:
    """Whether the kernels of the two functions can take ``hidden_states`` and compute what ``norms`` do to them."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    weighed = [norm for norm in norms if norm is not None and norm.weight is not None]
    same = dtype == hidden_states.dtype and all(
        norm.weight.dtype == dtype or (norm.weight.dtype == torch.float32 and norm.keeps_dtype) for norm in weighed
    )
    return same and hidden_states.is_contiguous() and use_kernels(hidden_states)


def _plan(
    runtime: LayerRuntime,
    norms: list[Norm | None],
    projections: list[Projection],
    keep: bool,
    unused: bool,
    precision: Precision,
) -> LayerPlan:
    context, rows = runtime.context, runtime.by_rows
    attention, mlp = (
        RowOrder(context.partition, True)
        if precision == "fp8-context" or (not rows and runtime.is_sparse(part))
        else RowOrder(context.every_row_dense(), False)
        for part in ("self_attn", "mlp")
    )
    choose = _no_choice if rows else runtime.select_for_context
    planner = runtime.state.planner
    return LayerPlan(
        *norms,
        residual_multiplier=runtime.fast.spec.residual_multiplier,
        attention=attention,
        mlp=mlp,
        projections=projections,
        activation=runtime.layer.activation,
        choose_attention=partial(choose, "self_attn"),
        choose_mlp=partial(choose, "mlp"),
        output_unused=unused,
        keep=keep,
        keep_context=planner is None or runtime.layer.index not in planner.context_again,
        precision=precision,
    )


def _no_choice(part: str, rows: Tensor | None) -> NoReturn:
    raise AssertionError("a dense part chooses no channels")


def _can_be_captured(runtime: LayerRuntime) -> bool:
    """Whether this first forward of the layer is captured or replayed, as far as the model's forward tells."""
    context, index = runtime.context, runtime.layer.index
    if context.graphs is None or not runtime.state.config.exact_removal:
        return False
    selects = not runtime.by_rows and any(map(runtime.is_sparse, PARTS))
    return not selects or (index, context.batch_key) in context.graphs.reserved


def _captured(
    runtime: LayerRuntime, hidden_states: Tensor, plan: LayerPlan, call: AttentionCall, keeper: AttentionKeeper | None
) -> Tensor | None:
    """The layer's output from CUDA graphs of the whole layer; None where this call is not captured."""
    context, state, index = runtime.context, runtime.state, runtime.layer.index
    share = state.config.backward_rows if runtime.by_rows else None
    kind = getattr(runtime.layer.self_attn, "layer_type", ""), call.window  # each has its own tensors
    named = {f"{name}, {kind}": tensor for name, tensor in call.tensors.items()}
    shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in named.items())
    # Not `keep_context`: a pass is replayed as it was captured, for the memory is there.
    which = share, plan.attention.sparse, plan.mlp.sparse, plan.output_unused, call.window, shapes, keeper is not None
    spec, names = runtime.fast.present_spec(), tuple(call.tensors)
    capture = _open_capture(runtime, plan, which, spec)
    if capture is None:
        return None

    def attention(x: Tensor, projected: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        given, kept = tensors[: len(names)], tensors[len(names) :]
        keeps = AttentionKeeper(keeper.kept.with_tensors(kept)) if kept else keeper
        return attend(spec, projected, call, dict(zip(names, given, strict=True)), keeps)

    later = partial(_uncaptured_later, runtime, context, plan, call)
    forms, key = context.graphs.kept_forms, (index, context.batch_key, which)
    graphed = graphed_layer.GraphedPass(capture, context.captures, later, keeper, forms.get(key))
    if runtime.by_rows:
        choice = context.row_choice(index, share, state.observer.energy)
        chosen = context.chosen_rows(choice)
        output = row_sparse_whole_layer(hidden_states, plan, graphed, attention, named, choice, chosen)
    else:
        output = graphed_layer.whole_layer(hidden_states, plan, graphed, attention, named)
    if output is None:
        if not plan.output_unused:  # a capture that failed computed none of the selections that it made
            for part in PARTS:
                context.selections.pop((index, part), None)
        return None
    context.captured.add(index)
    if keeper is not None and keeper.kept is not None and not plan.output_unused:
        forms[key] = keeper.kept.with_tensors(())
    if not plan.output_unused:
        if plan.keep or capture.selections:
            context.captures.awaited.add(index)
        for part, chosen in capture.selections.items():
            context.selections[index, part] = chosen
    return output


def _open_capture(runtime: LayerRuntime, plan: LayerPlan, which: tuple, spec: LayerSpec) -> LayerCapture | None:
    """The capture of one pass ``which`` through a layer; its graphs hold while these weights keep their addresses.

    Returns:
        None where a forward that keeps its intermediates runs without capture (`GraphCache.open_kept`).
    """
    context, index = runtime.context, runtime.layer.index
    tensors, constants = runtime.fast.weights(plan, spec)
    if plan.precision != "bf16":
        tensors = [*tensors, *scale_tensors(plan.projections)]
    selector = runtime.state.selector if plan.attention.sparse or plan.mlp.sparse else None
    constants = *constants, len(tensors), selector
    open_pass = context.graphs.open_kept if plan.keep and not plan.output_unused else context.graphs.open
    return open_pass(index, context.batch_key, which, tensors, constants)


def _reserve(runtime: LayerRuntime, graphs: GraphCache) -> None:
    """Allocates memory for the layer's channel selections, if the next forward of this batch signature is captured."""
    context, index = runtime.context, runtime.layer.index
    if (index, context.batch_key) in graphs.reserved or not graphs.captures_next(context.batch_key):
        return
    for part in PARTS:
        if runtime.is_sparse(part):
            graphed_layer.reserve(graphs, index, part, context.selections[index, part])
    graphs.reserved.add((index, context.batch_key))
