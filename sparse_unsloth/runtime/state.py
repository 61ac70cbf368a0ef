"""Holds the state of an attached model and of each of its hooked layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.channels.score_watch import ScoreWatch
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.channels.sharing import obtain_for_all_ranks
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import AttachError
from sparse_unsloth.explain.observer import Observer
from sparse_unsloth.graphs.recorder import GraphCache
from sparse_unsloth.layer.attention import AttentionCall
from sparse_unsloth.layer.fast import FastLayer
from sparse_unsloth.model.decoder_layer import AnyLayer, decoder_stack, left_out_layers
from sparse_unsloth.model.training_flags import in_backward
from sparse_unsloth.ops.selection import AttentionSelection, MlpSelection
from sparse_unsloth.planning.progress import AutoPlan
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.runtime.checkpoint_planner import CheckpointPlanner
from sparse_unsloth.runtime.context import ForwardCounts, SparseContext, runs_twice, wrong_rows
from sparse_unsloth.runtime.gradients import FirstBackward, LossRows
from sparse_unsloth.runtime.handing import Handing
from sparse_unsloth.tokens.partition import EVERY_TOKEN_BEARS_LOSS, ROLES_COME_FROM, TokenPartition
from sparse_unsloth.utils.distributed import has_group, is_main, world_size

logger = logging.getLogger("sparse_unsloth")


@dataclass(frozen=True)
class Backend:
    """The hook points of one training library, "peft" or "unsloth". It holds functions alone, so it can be pickled.

    Attributes:
        install, uninstall, is_installed: for the parts of a layer, and for one hooked module.
        check_not_sharded: raises AttachError where the layer's functions would not find whole weights.
        read_attention: what attention computes in a call of a layer's forward, by hidden states and keyword arguments;
            None where that call is not for our functions.
        keeps_weights: whether nothing replaces weights between a forward and its recompute, as FSDP does.
    """

    name: str
    install: Callable[[LayerRuntime], None]
    uninstall: Callable[[nn.Module], None]
    is_installed: Callable[[nn.Module], bool]
    check_not_sharded: Callable[[AnyLayer], None]
    read_attention: Callable[[LayerRuntime, Tensor, dict[str, Any]], AttentionCall | None]
    keeps_weights: bool


class SparsityState:
    """Everything that an attached model carries. It is kept outside the module tree, so it is never saved.

    Attributes:
        model: the outermost model, where labels enter.
        backend, set_up_process: the hook points in use; what prepares a process that loads the model.
        handing: gives the layers their context; None where the model passes it on.
        hooked, handles: the modules whose forward was replaced; other things to undo, each with ``remove()``.
        row_sparse: the model trains with row sparsity (`SparsityConfig.backward_rows`).
        dense_with_graphs, dense_whole: nothing is sparse, and layers are captured; are captured or multiply in FP8.
        layer_sparsity: the sparsity of each layer.
        runtimes: the layers that the configuration makes sparse, by index.
        left_out: decoder layers without a sparse path, by name: why; ``is_routed``: a row part holds a router.
        whole_layers: dense layers that run as whole layers, by index.
        uncompiled: keeps hooked layers out of Unsloth's compiled regions, by index.
        whole_forwards: all layers, where they may run as whole layers; each holds the outcome.
        last_layer: the last layer, where it skips unused rows; else None.
        sparse_prefill, prefill_handles: whether prompts are sparse outside training, and the hooks for it.
        adapter_folder: where the adapter was loaded from; None for a new one.
        observer: collects what `explain` reports (`SparsityConfig.explain_steps`).
        projections: those of each layer when it was attached, by index.
        proved_adapters, known_adapters, adapter_version, last_adapter_version: see `adapter_changes`.
        inside: whether a forward of the model is running.
        driver: what sets the step (the callback, say); None outside training.
        graphs: the CUDA graphs of `SparsityConfig.cuda_graphs`; None without. ``last_shape``: of the last training
            batch that captured layers may run on.
        planner: decides which layers are checkpointed (`SparsityConfig.memory_budget`); None without.
        auto: the plan of preset `auto`; None where the configuration decided all.
        estimator, selector: None until built, from the trainer's data perhaps; ``shared``: every process has rank 0's.
        stack: every decoder layer by name, also those without a sparse path.
        loss_rows, first_backward: check backward passes (`runtime.gradients`).
        gradients_seen: the backward pass of a sparse forward gave every trained tensor of the sparse layers a gradient.
        context_seen: whether a sparse forward had context tokens; None before the first one.
        ran: parts that ran sparsely with gradients in this step.
        scale, step: the schedule's factor in this step, and the optimiser steps done (None: not counted).
        counts: what `metrics` sums up.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AnyLayer],
        config: SparsityConfig,
        backend: Backend,
        set_up_process: Callable[[SparsityState], None],
    ):
        self.model = model
        self.backend, self.set_up_process = backend, set_up_process
        self.layers = layers
        self.config = config
        self.layer_sparsity = config.layer_sparsity(len(layers))
        self.row_sparse = config.row_sparse
        self.dense_with_graphs = config.cuda_graphs and not config.is_sparse(len(layers))
        self.dense_whole = (config.cuda_graphs or config.fp8) and not config.is_sparse(len(layers))
        # Under row sparsity Unsloth's last layer skips unused rows instead.
        skips_rows = layers[-1] if backend.name == "unsloth" and config.exact_removal else None
        self.runtimes = {
            layer.index: LayerRuntime(self, layer, sparsity)
            for layer, sparsity in zip(layers, self.layer_sparsity, strict=True)
            if any(sparsity) or (self.row_sparse and layer is not skips_rows)
        }
        self.is_routed = self.row_sparse and any(part.is_routed for layer in layers for part in layer.row_parts)
        self.whole_layers: dict[int, LayerRuntime] = {}
        self.whole_forwards: list[LayerRuntime] = []
        self.uncompiled: dict[int, Any] = {}
        self.last_layer: LayerRuntime | None = None
        self.projections = {layer.index: tuple(layer.projections().values()) for layer in layers}
        self.proved_adapters, self.known_adapters = [], []
        self.adapter_version = self.last_adapter_version = 0
        self.inside = self.sparse_prefill = self.shared = self.gradients_seen = self._verified = False
        self.driver: object | None = None
        self.prefill_handles: list[RemovableHandle] = []
        self.adapter_folder: Path | None = None
        self.observer = Observer(config.explain_steps)
        self.estimator: Estimator | None = None
        self.selector: ChannelSelector | None = None
        self.planner: CheckpointPlanner | None = None
        self.auto: AutoPlan | None = None
        self.watch = ScoreWatch()
        self.graphs: GraphCache | None = None
        self.last_shape: torch.Size | None = None
        self.hooked: list[nn.Module] = []
        self.handles: list[Any] = []
        self.handing: Handing | None = None
        self.stack = decoder_stack(model, layers)
        self.left_out = left_out_layers(self.stack, layers)
        self.loss_rows = LossRows(model, self.stack, self.warn_once)
        self.first_backward: FirstBackward | None = None
        self.context_seen: bool | None = None
        self.ran: set[tuple[int, str]] = set()
        self.scale = 0.0
        self.step: int | None = None
        self._max_steps = 0
        self.sparse_forwards_in_step = 0
        self.paused_in_step: set[tuple[int, str]] = set()
        self.warned: set[str] = set()
        self.counts = ForwardCounts()

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling, without the training, which belongs to this process."""
        return {**self.__dict__, "driver": None, "scale": 0.0, "step": None, "inside": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.set_up_process(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityState:
        """Copies everything but the driver, which both share."""
        memo[id(self.driver)] = self.driver
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def runtime(self, layer: AnyLayer) -> LayerRuntime | None:
        """The runtime of a hooked layer; None for a layer without hooks."""
        if self.last_layer is not None and self.last_layer.layer is layer:
            return self.last_layer
        return self.runtimes.get(layer.index) or self.whole_layers.get(layer.index)

    def use(self, estimator: Estimator | None) -> None:
        """Selects channels by ``estimator`` from now on; None for criteria that need none."""
        self.estimator = estimator
        self.selector = ChannelSelector(self.config, self.layers, estimator)

    def begin_training(self, driver: object, max_steps: int, train_dataset=None, collate_fn=None) -> None:
        """Begins a training: checks the hooks, and calibrates if there is no estimator yet.

        The driver of the schedule calls it once per training, on every process: all take over rank 0's estimator.

        Raises:
            AttachError: a hook is gone, or FSDP sharded weights that the backend needs whole.
            EstimatorError: the estimator needs calibration samples and the data set gives none.
        """
        self.verify_hooks()
        self.end_prefill()
        for layer in filter(self.runtime, self.layers):
            self.backend.check_not_sharded(layer)
        if self.runtimes and not (self.row_sparse or self.shared):
            shares = self.config.criterion == "estimator" and world_size() > 1 and has_group()
            if shares or self.selector is None:
                model = self.model, self.layers, self.layer_sparsity, self.config
                self.use(obtain_for_all_ranks(*model, self.estimator, train_dataset, collate_fn))
            self.shared = shares
        if self.config.memory_budget is not None and self.planner is None:
            self.planner = self.plan_checkpoints(self.config.memory_budget)
        self.driver, self._max_steps, self._verified = driver, max_steps, False
        self.gradients_seen, self.context_seen = False, None
        self.observer.clear()
        self.counts = ForwardCounts()

    def end_prefill(self) -> None:
        """Computes prompts densely from now on."""
        for handle in self.prefill_handles:
            handle.remove()
        self.prefill_handles.clear()
        self.sparse_prefill = False

    def verify_hooks(self) -> None:
        """Raises AttachError if something replaced a sparse forward since it was installed."""
        lost = [module for module in self.hooked if not self.backend.is_installed(module)]
        if lost:
            raise AttachError(
                f"{len(lost)} of {len(self.hooked)} sparse forwards were replaced after attach() (first: "
                f"{type(lost[0]).__name__}). Load adapters and patch the model first, then attach it last."
            )

    def expected_parts(self) -> set[tuple[int, str]]:
        """``(layer index, name)`` of every part that is to be sparse in each step: layers of images alone have none."""
        if self.row_sparse:
            layers = [runtime.layer for runtime in self.runtimes.values() if getattr(runtime.layer, "is_reached", True)]
            return {(layer.index, part.name) for layer in layers for part in layer.row_parts}
        return {
            (index, part)
            for index, runtime in self.runtimes.items()
            for part, sparsity in runtime.sparsity._asdict().items()
            if sparsity > 0
        }

    def plan_checkpoints(self, budget: float) -> CheckpointPlanner:
        """A planner for this model within ``budget`` (`SparsityConfig.memory_budget`)."""
        hooked = {id(module) for module in self.hooked}
        rows = self.runtimes.values() if self.row_sparse else ()
        return CheckpointPlanner(
            self.model,
            self.layers,
            self.layer_sparsity,
            budget,
            row_layers={runtime.layer.index: id(runtime.layer.module) in hooked for runtime in rows},
            backward_rows=self.config.backward_rows,
            fused_loss=self.backend.name == "unsloth",
            config=self.config,
        )

    def hooked_parts(self) -> set[tuple[int, str]]:
        """`expected_parts`, and the parts of the last layer that skip unused rows."""
        last = self.last_layer
        skipping = () if last is None else last.loss_only_parts
        return self.expected_parts() | {(last.layer.index, part) for part in skipping}

    def name_parts(self, parts: set[tuple[int, str]]) -> str:
        """The module names of the first six of ``parts``, for messages."""
        names = [f"{self.layers[index].name}.{part}" for index, part in sorted(parts)]
        return ", ".join(names[:6] + ["..."] * (len(names) > 6))

    def set_step(self, step: int) -> None:
        """Sets the schedule's factor for the next optimiser step; ``step`` steps are done."""
        self.verify_step()
        self.scale, self.step = self.config.schedule.scale(step, self._max_steps), step
        self.observer.begin_step(step, self.scale > 0)
        self.sparse_forwards_in_step = 0
        self.paused_in_step: set[tuple[int, str]] = set()
        self.ran.clear()

    def look_back(self) -> None:
        """Ends the checks of the last forward's backward pass; called between two forwards.

        Raises:
            AttachError: see `FirstBackward.close`.
        """
        self.loss_rows.collect()
        if self.first_backward is not None:
            watch, self.first_backward = self.first_backward, None
            self.gradients_seen = watch.close()

    def verify_step(self) -> None:
        """Checks after the first sparse optimiser step that every sparse part ran sparsely with gradients.

        Raises:
            AttachError: some did not, which the message names; and see `look_back`.
        """
        self.look_back()
        if self.context_seen is False:
            self.warn_once(
                f"Nothing of the first training step was sparse: {EVERY_TOKEN_BEARS_LOSS} Use {ROLES_COME_FROM}, or "
                "train dense (sparsity=None)."
            )
        # Without a driver the end of a step is not known: a recompute may still follow.
        ended = self.driver is not None or self.gradients_seen
        if self._verified or not self.sparse_forwards_in_step or not ended:
            return
        expected = self.expected_parts()
        missing = expected - self.ran - self.paused_in_step
        if missing:
            raise AttachError(
                f"{len(missing)} of {len(expected)} hooked parts did not run sparsely in a training step that had "
                f"context tokens: {self.name_parts(missing)}. Something replaced their forward after attach(), does "
                "not call it, or left the layers in evaluation mode. Attach last, and call model.train()."
            )
        self._verified = True

    def end_training(self) -> None:
        """Ends a training: drops its driver, CUDA graphs and checkpointing plan."""
        self.look_back()
        if self.planner is not None:
            self.planner.restore()
            self.planner = None
        if self.graphs is not None:
            self.graphs.clear()
        self.driver, self.scale, self.step = None, 0.0, None
        if self.auto is not None:  # the next training is planned anew
            self.auto.decision = self.auto.watch = self.auto.micro_batches = None

    def warn_once(self, message: str) -> None:
        """Warns on the main process, once for each message."""
        if message not in self.warned:
            self.warned.add(message)
            if is_main():
                logger.warning(message)


def get_state(model: nn.Module) -> SparsityState | None:
    """The state of an attached model, inside DDP and ``torch.compile`` wrappers too; None if it is not attached."""
    while model is not None:
        state = getattr(model, "__dict__", {}).get("_sparsity_state")
        if state is not None:
            return state
        modules = getattr(model, "_modules", {})
        model = modules.get("module") or modules.get("_orig_mod")
    return None


class LayerRuntime:
    """A hooked decoder layer: its sparsity, and the context of the forward that runs through it now.

    Attributes:
        sparsity: the share of channels that context tokens leave out, by part.
        loss_only_parts: the parts of the last layer that skip unused rows, where a forward allows it
            (`SparseContext.loss_only`).
        not_whole: why the layer runs part by part; "" where it runs as a whole layer.
        fast: reads what the fast functions need of it; None where they do not compute such a layer.
        not_captured: why CUDA graphs do not hold it; "" where they do.
    """

    def __init__(self, state: SparsityState, layer: AnyLayer, sparsity: LayerSparsity):
        self.state = state
        self.layer = layer
        self.sparsity = sparsity
        self.context: SparseContext | None = None
        self.loss_only_parts: tuple[str, ...] = ()
        self.not_whole = ""
        self.fast: FastLayer | None = None
        self.not_captured = ""

    def is_sparse(self, part: str) -> bool:
        """Whether ``part`` ("mlp" or "self_attn") selects channels in the forward that runs now."""
        context = self.context
        if context is None or context.scale <= 0 or context.dense or getattr(self.sparsity, part) <= 0:
            return False
        return not context.paused or (self.layer.index, part) not in context.paused

    @property
    def by_rows(self) -> bool:
        """Whether backward goes through chosen rows of this layer as a whole, in the forward that runs now."""
        return self.state.row_sparse and not self.context.dense

    def row_choice(self, module: nn.Module, *inputs: Tensor) -> RowChoice | None:
        """The row choice of this layer's backward pass; None where ``module``'s own function runs unchanged.

        Raises:
            AttachError: see `check_rows`.
        """
        context = self.context
        if context is None or context.scale <= 0 or not (self.by_rows and module.training):
            return None
        for rows in inputs:
            self.check_rows(module, rows)
        return context.row_choice(self.layer.index, self.state.config.backward_rows, self.state.observer.energy)

    def check_rows(self, module: nn.Module, rows: Tensor) -> None:
        """Raises AttachError unless ``rows [..., width]``, the input of ``module``, match the labels in number."""
        shape, expected = rows.shape[:-1], self.context.partition.shape
        sizes = [size for size in shape if size != 1]
        if sizes in ([size for size in expected if size != 1], [expected[0] * expected[1]]):
            return
        named = self.layer.module.named_modules()
        where = next((f".{name}" for name, child in named if child is module and name), "")
        raise wrong_rows(f"{self.layer.name}{where}", shape, expected)

    def partition(self, part: str, module: nn.Module, rows: Tensor) -> TokenPartition | None:
        """The token roles by which our functions compute ``part``; None where ``module``'s own function runs.

        The module's own function runs whenever its ``training`` flag is off, except in a sparse prefill. In the last
        layer the roles are those of the MLP and of the O projection; its keys and values need every row.

        Raises:
            AttachError: see `check_rows`; ``rows`` is the input of ``module``.
        """
        context, sparse = self.context, self.is_sparse(part)
        if context is None or not (module.training or context.prefill):
            return None
        found = context.partition if sparse else None
        if part in self.loss_only_parts and context.loss_only and not self._mlp_selects_by_every_row(part):
            found = context.rows_with_loss(sparse)
        if found is not None:
            self.check_rows(module, rows)
        return found

    def _mlp_selects_by_every_row(self, part: str) -> bool:
        """Whether ``part`` is attention, and the sparse MLP after it needs its output for every row.

        This is so with ``dense_tokens="none"``, where every row is a context token that the MLP's scores look at.
        """
        return part == "self_attn" and self.is_sparse("mlp") and not len(self.context.partition.dense)

    def mlp_channels(self, hidden_states: Tensor, partition: TokenPartition) -> Tensor:
        """int64 ``[k]``: the MLP channels that context tokens keep in this forward.

        Args:
            hidden_states: the MLP's input, ``[..., hidden_size]``.
            partition: the result of `partition` for the MLP.
        """
        chosen = self._select_from_all("mlp", hidden_states, partition)
        # Without context tokens the selection changes nothing.
        return partition.dense[:0] if chosen is None else chosen.channels

    def attention_channels(
        self, partition: TokenPartition, hidden_states: Tensor | None = None
    ) -> AttentionSelection | None:
        """The attention channels that context tokens keep; None: all of them. Arguments as in `mlp_channels`.

        ``hidden_states`` is the input of Q, K, V, and None for O, which reuses their selection.

        Raises:
            AttachError: ``hidden_states`` is None, and Q, K, V have not selected yet.
        """
        return self._select_from_all("self_attn", hidden_states, partition)

    def select_for_context(self, part: str, context_rows: Tensor | None) -> MlpSelection | AttentionSelection:
        """The selection of ``part`` from its input on context tokens, ``[n, hidden_size]`` (None in a recompute)."""
        return self._select(part, context_rows, None)

    def record_run(self, part: str) -> None:
        """Notes for this forward that our functions computed ``part``, and for `verify_step` if sparse with gradients.

        Raises:
            AttachError: it ran in this forward already, and this is no recompute.
        """
        whole = self.context.probe and "_sparse_original" in self.layer.module.__dict__  # runs both ways in the probe
        if (self.layer.index, part) in self.context.ran and not (in_backward() or whole):
            raise runs_twice(f"{self.layer.name}.{part}")
        self.context.ran.add((self.layer.index, part))
        row_sparse = self.by_rows and self.layer.index in self.state.runtimes
        if torch.is_grad_enabled() and (row_sparse or self.is_sparse(part)):
            self.state.ran.add((self.layer.index, part))

    def skips_unused_output(self, context: SparseContext) -> bool:
        """Whether a recompute of this layer skips the MLP's output, which is unused (`exact_removal`)."""
        memo = context.memo(self.layer.index)
        if memo.joined:
            return False
        rows = self.state.row_sparse or memo.with_gradients is False
        ran, whole = (self.layer.index, "mlp") in context.ran, self.fast is not None and not self.not_whole
        return rows and ran and self.state.config.exact_removal and (whole or self.layer.adds_mlp_output)

    def _select_from_all(self, part: str, hidden_states: Tensor | None, partition: TokenPartition):
        """The selection from the context rows of ``hidden_states``; None without context tokens or in a dense part."""
        if not len(partition.context) or getattr(self.sparsity, part) <= 0:
            return None
        return self._select(part, hidden_states, self.context.partition.context)

    def _select(self, part: str, hidden_states: Tensor | None, rows: Tensor | None):
        """The selection from ``rows`` of ``hidden_states``; None: ``hidden_states`` are the context rows alone."""
        key = (self.layer.index, part)
        chosen = self.context.selections.get(key)
        if chosen is None:
            if hidden_states is None:
                raise AttachError(f"{self.layer.name}: o_proj ran before q_proj, k_proj and v_proj chose channels.")
            select = self.state.selector.mlp if part == "mlp" else self.state.selector.attention
            # Tensors that the selector keeps (constant selections, factors on the device) must serve trainings too.
            with torch.inference_mode(False), torch.no_grad():
                chosen = select(self.layer, hidden_states, getattr(self.sparsity, part), rows)
            if part == "mlp" and chosen.order is not None:
                self.context.memo(self.layer.index).order = chosen.order
            self.context.selections[key] = chosen
        if self.context.observation is not None and hidden_states is not None:
            self.state.observer.see(self.context.observation, self.layer, part, hidden_states, chosen, rows is None)
        return chosen
