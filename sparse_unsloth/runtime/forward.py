"""Opens, accompanies and closes each forward of an attached model, by hooks on the model and on its layers.

A training forward opens in four steps: read its batch, split its tokens by role, decide what is sparse, and make the
context that travels to the layers (`enter_forward`, `open_forward`).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.errors import AttachError, EstimatorError, SparsityError
from sparse_unsloth.exact.last_layer import enough_unused_rows, loss_is_fused
from sparse_unsloth.explain.observer import Observation
from sparse_unsloth.graphs.buckets import pad_dense_count, pad_length
from sparse_unsloth.graphs.packed_attention import packing_of
from sparse_unsloth.graphs.recorder import MAX_KEYS
from sparse_unsloth.model.row_parts import returns_router_logits
from sparse_unsloth.model.training_flags import in_backward
from sparse_unsloth.runtime.adapter_changes import why_dense
from sparse_unsloth.runtime.auto import before_forward
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext, runs_twice
from sparse_unsloth.runtime.gradients import FirstBackward
from sparse_unsloth.runtime.metrics import notice_nonfinite_scores
from sparse_unsloth.runtime.prompts import close_prefill, open_prefill
from sparse_unsloth.runtime.roles import AwaitedRoles, roles_of, when_known
from sparse_unsloth.runtime.state import LayerRuntime, SparsityState
from sparse_unsloth.tokens.batch import Batch, read_batch
from sparse_unsloth.tokens.partition import TokenPartition, every_row_dense, is_sequence_classifier
from sparse_unsloth.utils.distributed import rank

Parts = frozenset[tuple[int, str]]
"""Parts of layers: ``(layer index, "mlp" or "self_attn")``."""


def register_hooks(state: SparsityState) -> None:
    """Registers the hooks that open and close the model's forwards, and hand their contexts to the layers."""
    state.handles.append(state.model.register_forward_pre_hook(_enter_model, with_kwargs=True))
    if state.hooked:
        state.handles.append(state.model.register_forward_hook(_leave_model, with_kwargs=True))
    for layer in state.layers:
        layer.module.__dict__["_sparse_runtime"] = state.runtime(layer)
    last = state.loss_rows.last
    if last is not None and state.runtimes:
        state.handles.append(last.register_forward_hook(_leave_last_layer))
    for place, (name, module) in enumerate(state.stack.items()):
        enter = partial(_enter_layer, place, name, module is last)
        state.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if module.__dict__.get("_sparse_runtime") is not None:
            state.handles.append(module.register_forward_hook(_leave_layer, always_call=True))


def _enter_model(model: nn.Module, args: tuple, kwargs: dict[str, Any]):
    if CONTEXT_ARGUMENT in kwargs:
        return None
    state = model.__dict__["_sparsity_state"]
    if state.handing is not None and state.handing.restarts():
        return None
    state.inside = True
    return enter_forward(state, model, args, kwargs)


def enter_forward(
    state: SparsityState, model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a forward that begins, with its context; None where it runs unchanged.

    Raises:
        SparsityError: a training forward with a schedule that nothing drives.
        EstimatorError: the estimator still waits for calibration samples.
    """
    named = inspect.signature(type(model).forward).bind_partial(model, *args).arguments if args else {}
    if state.auto is not None and model.training:
        before_forward(state, {**named, **kwargs})
    if not (model.training or state.sparse_prefill) or not (
        state.runtimes or state.last_layer or state.dense_whole or state.planner
    ):
        return None
    given = batch = read_batch({**named, **kwargs})
    if state.graphs is not None and not args:
        batch = pad_to_bucket(state, model, given)
        kwargs = batch.arguments
    context = open_forward(state, model, batch)
    if context is None:
        return None
    if batch is not given:
        context.padded = batch.labels.shape, given.labels.shape[1]
    handed = {CONTEXT_ARGUMENT: context} if state.handing is None else state.handing.begin(context)
    return args, {**kwargs, **handed}


def _leave_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    state = model.__dict__["_sparsity_state"]
    state.inside = False
    context = kwargs.get(CONTEXT_ARGUMENT) if state.handing is None else state.handing.end()
    close_forward(state, context)
    if context is not None and context.padded is not None and hasattr(output, "items"):
        shape, length = context.padded
        for name, value in list(output.items()):  # logits of the length bucket's padding
            if isinstance(value, Tensor) and value.shape[:2] == shape:
                output[name] = value[:, :length]
    loss = None if model.training else getattr(output, "loss", None)
    if loss is not None and loss.requires_grad:
        loss.register_hook(partial(_say_evaluated, state))


def _say_evaluated(state: SparsityState, gradient: Any) -> None:
    state.warn_once(
        "A backward pass came from a forward in evaluation mode, where everything is dense. Call model.train() before "
        "training."
    )


def _enter_layer(place: int, name: str, last: bool, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Takes the forward's context out of a layer's arguments; ``place`` and ``name`` are the layer's in the stack.

    Raises:
        AttachError: the layer ran in this forward already, or its recompute reads an output that was left out.
    """
    if last:
        layer.__dict__.pop("_sparse_context", None)  # of a pass that did not come to its end
    runtime: LayerRuntime | None = layer.__dict__.get("_sparse_runtime")
    given = CONTEXT_ARGUMENT in kwargs
    context: SparseContext | None = kwargs.pop(CONTEXT_ARGUMENT, None)
    if not given and runtime is not None and runtime.state.handing is not None:
        context = runtime.state.handing.of_layer(name)
    if context is not None:
        if in_backward():
            _check_recompute(context, place, name, runtime)
        elif name in context.entered and runtime is not None:
            raise runs_twice(name)
        context.entered.add(name)
        if last and (context.loss_rows is not None or context.find_roles is not None):
            layer.__dict__["_sparse_context"] = context
    if runtime is not None:
        runtime.context = context
        if context is None and layer.training and not runtime.state.inside:
            _say_bypassed(runtime.state)
    return args, kwargs


def _check_recompute(context: SparseContext, place: int, name: str, runtime: LayerRuntime | None) -> None:
    """Raises AttachError where a recompute continues after a layer that left its output out (`exact_removal`)."""
    if name not in context.entered or not torch.is_grad_enabled():
        return
    before, this = context.recomputed, torch._C._current_graph_task_id()
    if before is not None and before[0] == this and before[1] == place - 1 and before[2]:
        raise AttachError(
            f"{name} and the layer before it are checkpointed together, so that its recompute reads an output that is "
            "left out there. Checkpoint every decoder layer by itself (gradient_checkpointing_enable()), or set "
            "exact_removal: false."
        )
    context.recomputed = this, place, runtime is not None and runtime.skips_unused_output(context)


def _leave_layer(layer: nn.Module, args: tuple, output: Any) -> None:
    runtime: LayerRuntime = layer.__dict__["_sparse_runtime"]
    if runtime.context is not None and runtime.context.first_backward is not None:
        runtime.context.first_backward.watch(runtime.layer.index, output)
    runtime.context = None


def _leave_last_layer(layer: nn.Module, args: tuple, output: Any) -> None:
    context: SparseContext | None = layer.__dict__.pop("_sparse_context", None)
    if context is None:
        return
    if context.loss_rows is not None:
        context.loss_rows.watch(context.partition, output)
    if context.find_roles is not None:
        context.find_roles(context, output)


def open_forward(state: SparsityState, model: nn.Module, batch: Batch) -> SparseContext | None:
    """The context of a forward that begins, or None where it must be dense; raises as `enter_forward`."""
    if _cannot_be_sparse(state, model, batch):
        return None
    if not model.training:
        return open_prefill(state, batch)
    if batch.labels is None and not torch.is_grad_enabled():
        return None  # no backward follows: log probabilities of a reference, or of an earlier policy
    if not in_backward():
        state.look_back() if state.driver is not None else state.verify_step()
    known = when_known(state, model, batch)
    if known is None:
        return None
    if known == "backward":
        return _await_roles(state, batch)
    if batch.is_context_parallel:
        _leave_out_for_split_rows(state)
    loss_only = state.last_layer is not None and loss_is_fused(model, batch)
    graphs = state.graphs is not None and not batch.is_context_parallel
    dense_whole = state.dense_whole and (graphs or state.config.fp8)
    if not (state.runtimes or loss_only or state.planner or dense_whole):
        return None
    decision = _decide(state, batch, roles_of(state, batch), graphs)
    return None if decision is None else _context_of(state, batch, *decision, loss_only, graphs)


def _await_roles(state: SparsityState, batch: Batch) -> SparseContext | None:
    """The context of a forward whose roles its backward pass tells; None: it is dense."""
    partition = TokenPartition.unknown(batch.inputs)
    scale = _current_scale(state, partition)
    state.counts.forwards += 1
    if scale <= 0:
        return None
    state.sparse_forwards_in_step += 1
    context = _context_of(state, batch, partition, scale, frozenset(), loss_only=False, graphs=False)
    context.find_roles, context.awaits_roles, context.loss_rows = AwaitedRoles(state, batch).watch, True, None
    return context


def _cannot_be_sparse(state: SparsityState, model: nn.Module, batch: Batch) -> bool:
    """Whether the adapters are in a state that has no sparse path, or the loss is of another kind; says so."""
    reason = why_dense(state)
    if state.is_routed and returns_router_logits(model, batch.arguments.get("output_router_logits")):
        reason = reason or (
            "output_router_logits was set after attaching, and the parts with routers give their logits no gradient: "
            "set it in the model's configuration, then attach."
        )
    if not reason:
        return False
    if not model.training:
        parts = state.expected_parts()
        state.warn_once(f"sparse_prefill: {len(parts)} parts ran dense ({state.name_parts(parts)}). {reason}")
    elif torch.is_grad_enabled():
        state.warn_once(f"{reason} Meanwhile nothing is left out: the model runs as it does without sparse paths.")
    if state.planner is not None:
        state.planner.restore()
    return True


def _decide(
    state: SparsityState, batch: Batch, partition: TokenPartition, graphs: bool
) -> tuple[TokenPartition, float, Parts] | None:
    """What a training forward leaves out, counted and planned for; None: nothing.

    Args:
        partition: the tokens' roles.
        graphs: layers may be captured and replayed.

    Returns:
        The roles by which layers compute, the share of the configured sparsity, and parts that are dense all the same.
        For captures and FP8 of a forward that leaves nothing out every row is dense, except with `fp8-context`.
    """
    by_roles = state.config.precision == "fp8-context"
    scale = _current_scale(state, partition) if state.runtimes else 0.0
    state.counts.forwards += 1
    state.counts.add(partition)
    if graphs and (by_roles or not state.dense_with_graphs):
        partition = pad_dense_count(partition, padding_is_context=state.row_sparse)
    if scale > 0 and not state.context_seen:
        state.context_seen = partition.num_context > 0
    if not partition.num_context:
        scale = 0.0
    if state.planner is not None and not batch.is_context_parallel:
        held = state.graphs.kept_memory if state.graphs is not None else 0
        state.planner.plan(partition, scale, held, batch.document_length)
    paused: Parts = frozenset()
    if scale > 0:
        if state.selector is None and not state.row_sparse:
            raise _no_estimator(state)
        state.counts.sparse_forwards += 1
        state.sparse_forwards_in_step += torch.is_grad_enabled()
        notice_nonfinite_scores(state)
        paused = state.watch.pause()
        state.paused_in_step |= paused
    elif graphs or state.config.fp8:
        partition, scale = partition if by_roles else every_row_dense(partition), 1.0
    elif state.last_layer is None:
        return None
    return partition, scale, paused


def _context_of(
    state: SparsityState,
    batch: Batch,
    partition: TokenPartition,
    scale: float,
    paused: Parts,
    loss_only: bool,
    graphs: bool,
) -> SparseContext:
    """The context by which the layers of this forward compute, with all that checks, observes or captures them."""
    context = SparseContext(partition, scale, loss_only and enough_unused_rows(partition), paused)
    context.dense = not partition.num_context
    sparse = scale > 0 and not context.dense
    if sparse and state.runtimes and torch.is_grad_enabled():
        if not state.gradients_seen and state.first_backward is None:
            state.first_backward = context.first_backward = FirstBackward(
                [(runtime.layer, runtime.sparsity) for runtime in state.runtimes.values()], state.row_sparse
            )
        usual = not context.loss_only and state.config.dense_tokens == "output"
        if usual and state.loss_rows.should_check():
            context.loss_rows = state.loss_rows
    graphs = graphs and scale > 0
    context.split, context.packing = batch.is_context_parallel, packing_of(batch)
    channel_sparse = sparse and not state.row_sparse and not state.dense_whole
    if channel_sparse and state.observer.should_observe(state.step) and not is_sequence_classifier(state.model):
        context.observation = _observe(state, partition, batch)
    elif graphs:
        _use_graphs(state, context, batch)
    return context


def _leave_out_for_split_rows(state: SparsityState) -> None:
    """Leaves out what would differ from rank to rank, or cannot be captured, under context parallelism."""
    if state.planner is not None:
        state.planner.restore()
    wanted = [name for name, used in (("cuda_graphs", state.graphs), ("memory_budget", state.planner)) if used]
    if wanted:
        state.warn_once(
            f"{' and '.join(wanted)}: sequences are split over several GPUs (context parallelism), so every layer is "
            "checkpointed as it was set, and nothing is captured."
        )


def _use_graphs(state: SparsityState, context: SparseContext, batch: Batch) -> None:
    """Lets the layers of this forward replay their graphs, or be captured, where its batch signature allows it."""
    if state.graphs.recaptures_too_often:
        state.warn_once(
            "cuda_graphs: weights change their addresses in every step (offloading, sharding, adapters that take "
            "turns), or forwards come without a backward through all layers, so nothing is captured any more. Set "
            "cuda_graphs: false, or keep the model on the GPU."
        )
    elif state.graphs.awaits_backward:
        state.warn_once(
            "cuda_graphs: a forward came before the backward of the one before it, which its graphs would overwrite, "
            "so it runs without them, with the same result. Such forwards replay graphs if backward comes after each."
        )
    elif state.graphs.should_replay(context.batch_key):
        context.graphs, context.captures = state.graphs, state.graphs.begin_forward()
        if state.planner is not None and state.graphs.kept_memory:  # which this forward uses
            scale = 0.0 if context.dense else context.scale
            state.planner.plan(context.partition, scale, document=batch.document_length)
    elif state.graphs.full:
        state.warn_once(
            f"cuda_graphs: {MAX_KEYS} batch signatures are captured (the shape of a micro-batch, and how many tokens "
            "have which role), and no more will be; other micro-batches run without graphs. Pack to one length, or pad "
            "to multiples of a large one (pad_to_multiple_of), so that fewer signatures occur."
        )


def close_forward(state: SparsityState, context: SparseContext | None) -> None:
    """Checks a forward that returned, and whether its channel scores are finite.

    Raises:
        SparsityError: the last layer skipped rows, but the forward did not end in the fused loss.
    """
    if context is None:
        return
    if context.prefill:
        close_prefill(state, context)
        return
    state.watch.look(context.selections)
    if torch.is_grad_enabled():
        state.counts.whole_layers, state.counts.captured_layers = len(context.whole), len(context.captured)
    installed = sum(not runtime.not_whole for runtime in state.whole_forwards)
    if context.scale > 0 and installed and not (context.whole or context.probe):
        state.warn_once(
            f"{installed} layers can run as a whole, but ran part by part: correct, and slower. They need training "
            "mode (model.train()), the norms' dtype for their hidden states (under autocast too), contiguous ones, no "
            "cache, no output_attentions, and one active, unmerged adapter."
        )
    if context.graphs is not None and context.graphs.unused:
        state.warn_once(
            "cuda_graphs: no layer was captured. Captures need exact_removal: true, one active, unmerged adapter, and "
            "attention that is captured too: under Unsloth no sliding window shorter than the sequence, with PEFT "
            "attn_implementation sdpa or eager, and no cache (use_cache=False). Without gradient checkpointing they "
            "need PyTorch 2.8 and no offloaded activations, with the non-reentrant one PyTorch 2.8."
        )
    if context.loss_only and not context.loss_reached:
        raise SparsityError(
            "This forward left rows without loss out of the last layer, but did not end in Unsloth's fused loss "
            "over the model's own output head, so what it returned may not be complete. Something replaced the "
            "head or the model's forward (loss_type='chunked_nll' of TRL before 1.15 does, for one); set "
            "exact_removal: false."
        )


def _say_bypassed(state: SparsityState) -> None:
    """Warns once that a training forward reached a hooked layer, but did not begin at the attached model."""
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
        state.warn_once(
            f"A training forward reached the decoder layers, but not through the attached {type(state.model).__name__} "
            "(a part of it was called, or its forward() directly), so nothing was left out. Call the model itself; "
            "detach(model) takes the sparse paths off."
        )


def _no_estimator(state: SparsityState) -> EstimatorError:
    if rank():
        return EstimatorError(
            f"Rank {rank()} has no estimator yet: rank 0 hands its own out when training begins. Train through a "
            "trainer that was built after attaching, or let every rank call get_state(model).begin_training(driver, "
            "max_steps) before its first step, with torch.distributed initialised."
        )
    return EstimatorError(
        f"The estimator of kind {state.config.estimator.kind!r} still waits for calibration samples. Train through a "
        "transformers or TRL trainer (it then takes the first training samples), or pass calibration_samples= to "
        "get_peft_model() or attach(), or set estimator kind 'svd', which needs none."
    )


def _observe(state: SparsityState, partition: TokenPartition, batch: Batch) -> Observation:
    sparsity = {
        (index, part): value
        for index, layer in enumerate(state.layer_sparsity)
        for part, value in layer._asdict().items()
    }
    return state.observer.open(state.step, partition, batch, state.layers, sparsity)


def pad_to_bucket(state: SparsityState, model: nn.Module, batch: Batch) -> Batch:
    """``batch``, padded to a length bucket where layers may be captured and only the fused loss reads the result."""
    if not model.training or not loss_is_fused(model, batch):
        return batch
    shape = getattr(batch.input_ids, "shape", None)
    repeated, state.last_shape = shape == state.last_shape, shape
    return pad_length(batch, getattr(model, "max_seq_length", None), repeated)


def _current_scale(state: SparsityState, partition: TokenPartition) -> float:
    if state.driver is not None:
        return state.scale
    schedule = state.config.schedule
    if schedule.start_step == 0 and schedule.end_step == 1.0 and isinstance(schedule.end_step, float):
        return 1.0
    if not torch.is_grad_enabled() or not len(partition.context):
        return 0.0
    raise SparsityError(
        f"This model trains with a sparsity schedule (start_step={state.config.start_step}, "
        f"end_step={state.config.end_step}), but nothing drives it. Build the trainer after attaching: it then gets "
        "a SparsityCallback by itself; or add SparsityCallback() to its callbacks. In a training loop of your own "
        "call state = get_state(model); state.begin_training(driver, max_steps) once and state.set_step(step) "
        "before each optimiser step; or set start_step: 0 and end_step: 1.0, which needs no driver."
    )
