"""The state of an attached model: its layers, its estimator, its hooks, and where its training stands."""

from __future__ import annotations

import copy
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sparse_unsloth import forward, metrics, prefill
from sparse_unsloth.adapters import refuse_other_adapters
from sparse_unsloth.config import SparsityConfig
from sparse_unsloth.context import SparseContext
from sparse_unsloth.distributed import is_main
from sparse_unsloth.errors import AttachError
from sparse_unsloth.estimates import Estimator
from sparse_unsloth.explain.observer import Observer
from sparse_unsloth.functions.graphs import GraphCache
from sparse_unsloth.gradients import FirstBackward, LossRows
from sparse_unsloth.layer_runtime import LayerRuntime
from sparse_unsloth.layers import DecoderLayer, decoder_stack
from sparse_unsloth.memory_budget import CheckpointPlanner
from sparse_unsloth.metrics import ForwardCounts
from sparse_unsloth.nonfinite import ScoreWatch
from sparse_unsloth.partition import EVERY_TOKEN_BEARS_LOSS, ROLES_COME_FROM
from sparse_unsloth.preparation import prepare_for_all
from sparse_unsloth.selection import ChannelSelector

if TYPE_CHECKING:
    from sparse_unsloth.backends.replaced import Uncompiled
    from sparse_unsloth.loss import LossRemoval

logger = logging.getLogger("sparse_unsloth")


class SparsityState:
    """Everything that an attached model carries; kept outside the module tree, so nothing of it is ever saved.

    Attributes:
        model: the outermost model, where labels enter.
        config: the configuration.
        backend_name: the module of `sparse_unsloth.backends` whose hook points are used.
        hooked, handles: the modules whose forward was replaced, and what else was installed and can be removed.
        num_layers: decoder layers of the model.
        by_rows: the backward pass leaves out rows, instead of channels (`SparsityConfig.backward_rows`).
        recorded_dense: nothing is left out, and layers are recorded all the same (`SparsityConfig.cuda_graphs`).
        layer_sparsity: of context rows, by layer.
        runtimes: the layers that the configuration makes sparse, by index.
        whole_layers: of layers that are dense but have a whole-layer forward (`backends.unsloth_layer`), by index.
        uncompiled: what keeps hooked layers out of Unsloth's compiled regions, by index.
        whole_forwards: of all layers where the backend tries to run layers as a whole; each says what came of it.
        last_layer: the layer that leaves out rows without loss, sparse or not; None where none does.
        sparse_prefill, prefill_handles: whether prompts are sparse outside training too, and the hooks for it.
        adapter_folder: where the adapter was loaded from, None for a new one.
        observer: what `explain` reports (`SparsityConfig.explain_steps`).
        projections, proved: of each layer, by index, and what `lifetime` saw of them, when the model was attached.
        seen, reason: what `lifetime.why_dense` saw last, and what it made of that.
        inside: a forward of the model runs.
        driver: the callback, or whatever else sets the step; None outside training.
        graphs: what `SparsityConfig.cuda_graphs` records.
        estimator, selector: None until they are built (calibrated kinds may wait for the trainer's data).
        shared: every process has the estimator of rank 0.
        stack: every decoder layer by name, those that no sparse path is for among them.
        loss_rows, first_backward: what looks at backward passes (`sparse_unsloth.gradients`).
        gradients_seen: a sparse forward's backward pass gave every trained tensor of the sparse layers its gradient.
        context_seen: some forward that was to be sparse had context tokens; None before the first one.
        ran: parts that ran sparsely with gradients in this step.
        scale, step: the share of the configured sparsity in this step, and optimiser steps done (None: not counted).
        counts: what `metrics` sums up, since it was last asked.
    """

    def __init__(self, model: nn.Module, layers: list[DecoderLayer], config: SparsityConfig, backend_name: str):
        self.model = model
        self.backend_name = backend_name
        self.layers = layers
        self.config = config
        self.layer_sparsity = config.layer_sparsity(len(layers))
        self.by_rows = config.by_rows
        self.recorded_dense = config.cuda_graphs and not config.is_sparse(len(layers))
        self.runtimes = {
            layer.index: LayerRuntime(self, layer, sparsity)
            for layer, sparsity in zip(layers, self.layer_sparsity, strict=True)
            if any(sparsity) or (self.by_rows and not self._drops_rows_without_loss(layer))
        }
        self.whole_layers: dict[int, LayerRuntime] = {}
        self.whole_forwards: list[LayerRuntime] = []
        self.uncompiled: dict[int, Uncompiled] = {}
        self.last_layer: LayerRuntime | None = None
        self.projections = {layer.index: tuple(layer.projections().values()) for layer in layers}
        self.proved: list[Any] = []
        self.seen: list[Any] = []
        self.reason = ""
        self.inside = False
        self.driver: object | None = None
        self.sparse_prefill = False
        self.prefill_handles: list[RemovableHandle] = []
        self.adapter_folder: Path | None = None
        self.observer = Observer(config.explain_steps)
        self.estimator: Estimator | None = None
        self.selector: ChannelSelector | None = None
        self.planner: CheckpointPlanner | None = None
        self.watch = ScoreWatch()
        self.graphs: GraphCache | None = None
        self.shared = False
        self.hooked: list[nn.Module] = []
        self.handles: list[RemovableHandle | LossRemoval | Uncompiled] = []
        self.stack = decoder_stack(model, layers)
        self.loss_rows = LossRows(self, self.stack)
        self.first_backward: FirstBackward | None = None
        self.gradients_seen = False
        self.context_seen: bool | None = None
        self.ran: set[tuple[int, str]] = set()
        self.scale = 0.0
        self.step: int | None = None
        self._max_steps = 0
        self._verified = False
        self.sparse_forwards_in_step = 0
        self.paused_in_step: set[tuple[int, str]] = set()
        self.said: set[str] = set()
        self.counts = ForwardCounts()

    def __getstate__(self) -> dict[str, Any]:
        """Of a pickled model: the training that it is in belongs to this process."""
        return {**self.__dict__, "driver": None, "scale": 0.0, "step": None, "inside": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from sparse_unsloth.lifetime import set_up_process

        self.__dict__.update(state)
        set_up_process(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityState:
        """The copy has the same driver, which is not copied."""
        memo[id(self.driver)] = self.driver
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def backend(self) -> ModuleType:
        """The backend's module: ``install``, ``uninstall``, ``is_installed``, and how it loads models."""
        return importlib.import_module(f"sparse_unsloth.backends.{self.backend_name}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def runtime(self, layer: DecoderLayer) -> LayerRuntime | None:
        """What a hooked layer works with; None for a layer that nothing is hooked in."""
        if self.last_layer is not None and self.last_layer.layer is layer:
            return self.last_layer
        return self.runtimes.get(layer.index) or self.whole_layers.get(layer.index)

    def use(self, estimator: Estimator | None) -> None:
        """Chooses channels by ``estimator`` from now on; None for criteria that need none."""
        self.estimator = estimator
        self.selector = ChannelSelector(self.config, self.layers, estimator)

    def begin_training(self, driver: object, max_steps: int, train_dataset=None, collate_fn=None) -> None:
        """Called once per training by what drives the schedule; checks the hooks, calibrates if that still has to be.

        Of several processes every one must call it: the estimator of rank 0 becomes that of all.

        Raises:
            AttachError: a hook is gone, or FSDP sharded weights that the backend needs whole.
            EstimatorError: the estimator needs calibration samples and the data set gives none.
        """
        self.verify_hooks()
        prefill.switch(self, on=False)
        for layer in filter(self.runtime, self.layers):
            self.backend.refuse_sharded_weights(layer)
        if self.runtimes:
            prepare_for_all(self, train_dataset, collate_fn)
        if self.config.memory_budget is not None and self.planner is None:
            self.planner = CheckpointPlanner(self, self.config.memory_budget)
        self.driver, self._max_steps, self._verified = driver, max_steps, False
        self.gradients_seen, self.context_seen = False, None
        self.observer.clear()
        self.counts = ForwardCounts()

    def verify_hooks(self) -> None:
        """Raises AttachError if something replaced a sparse forward since it was installed."""
        lost = [module for module in self.hooked if not self.backend.is_installed(module)]
        if lost:
            raise AttachError(
                f"{len(lost)} of {len(self.hooked)} sparse forwards were replaced after attach() (first: "
                f"{type(lost[0]).__name__}). Load adapters and patch the model first, then attach it last."
            )

    def refuse_other_adapters(self) -> None:
        """Raises AttachError for adapters that are not LoRA, where layers are sparse or recorded."""
        layers = self.layers if self.recorded_dense else [runtime.layer for runtime in self.runtimes.values()]
        if layers:
            refuse_other_adapters(self.model, {layer.name: layer.module for layer in layers})

    def expected_parts(self) -> set[tuple[int, str]]:
        """``(layer index, "mlp" | "self_attn")`` of everything that the configuration makes sparse."""
        return {
            (index, part)
            for index, runtime in self.runtimes.items()
            for part, sparsity in runtime.sparsity._asdict().items()
            if sparsity > 0 or self.by_rows
        }

    def _drops_rows_without_loss(self, layer: DecoderLayer) -> bool:
        """Whether ``layer`` is the last one, and leaves context rows out of forward and backward already."""
        removes = self.backend_name == "unsloth" and self.config.exact_removal
        return removes and layer is self.layers[-1]

    def hooked_parts(self) -> set[tuple[int, str]]:
        """`expected_parts`, and what leaves out rows without loss in a dense last layer."""
        last = self.last_layer
        return self.expected_parts() | (set() if last is None else {(last.layer.index, part) for part in last.parts})

    def name_parts(self, parts: set[tuple[int, str]]) -> str:
        """The first few of ``parts`` as a user would look for them."""
        names = [f"{self.layers[index].name}.{part}" for index, part in sorted(parts)]
        return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")

    def set_step(self, step: int) -> None:
        """``step`` optimiser steps are done: sets the share of sparsity of the next one."""
        self.verify_step()
        self.scale, self.step = self.config.schedule.scale(step, self._max_steps), step
        self.observer.begin_step(step, self.scale > 0)
        self.sparse_forwards_in_step = 0
        self.paused_in_step: set[tuple[int, str]] = set()
        self.ran.clear()

    def look_back(self) -> None:
        """Between two forwards: judges the backward pass of the last one, where that is still to be done.

        Raises:
            AttachError: see `FirstBackward.close`.
        """
        self.loss_rows.collect()
        if self.first_backward is not None:
            watch, self.first_backward = self.first_backward, None
            self.gradients_seen = watch.close()

    def verify_step(self) -> None:
        """After the first sparse optimiser step: every hooked part ran sparsely with gradients; and see `look_back`.

        Raises:
            AttachError: some did not; the message names them.
        """
        self.look_back()
        if self.context_seen is False:
            self.say_once(
                f"Nothing of the first training step was sparse: {EVERY_TOKEN_BEARS_LOSS} Use {ROLES_COME_FROM}, or "
                "train dense (sparsity=None)."
            )
        # Without a driver it is not known where a step ends: a recompute may still be to come.
        ended = self.driver is not None or self.gradients_seen
        if self._verified or not self.sparse_forwards_in_step or not ended:
            return
        expected = self.expected_parts()
        missing = expected - self.ran - self.paused_in_step
        if missing:
            raise AttachError(
                f"{len(missing)} of {len(expected)} hooked parts did not run sparsely in a training step that had "
                f"context tokens: {self.name_parts(missing)}. Something replaced their forward after "
                "attach(), or does not call it. Attach last."
            )
        self._verified = True

    def end_training(self) -> None:
        """Forgets the driver; the next training brings its own."""
        self.look_back()
        if self.planner is not None:
            self.planner.restore()
            self.planner = None
        if self.graphs is not None:
            self.graphs.clear()
        self.driver, self.scale, self.step = None, 0.0, None

    def metrics(self) -> dict[str, float]:
        """See `metrics.metrics`."""
        return metrics.metrics(self)

    def few_sizes(self, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `forward.few_sizes`."""
        return forward.few_sizes(self, model, arguments)

    def open_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> SparseContext | None:
        """See `forward.open_forward`."""
        return forward.open_forward(self, model, args, kwargs)

    def close_forward(self, context: SparseContext | None) -> None:
        """See `forward.close_forward`."""
        forward.close_forward(self, context)

    def say_once(self, message: str) -> None:
        """Warns, on the main process, unless the same was said before."""
        if message not in self.said:
            self.said.add(message)
            if is_main():
                logger.warning(message)
