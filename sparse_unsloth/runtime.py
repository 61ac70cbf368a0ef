"""What travels with one forward, what a hooked layer reads of it, and the state of an attached model."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_unsloth.calibration import sequence_starts
from sparse_unsloth.config import OUTPUT, LayerSparsity, SparsityConfig
from sparse_unsloth.distributed import has_group, is_main, rank, world_size
from sparse_unsloth.errors import AttachError, EstimatorError, SparsityError
from sparse_unsloth.estimator import Estimator, obtain_estimator
from sparse_unsloth.explain.observer import Observation, Observer
from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.last_layer import every_row_dense, loss_is_fused, rows_with_loss, worth_removing
from sparse_unsloth.layers import DecoderLayer
from sparse_unsloth.memory_budget import CheckpointPlanner
from sparse_unsloth.nonfinite import PAUSE, ScoreWatch
from sparse_unsloth.partition import TokenPartition, is_sequence_classifier, partition_of
from sparse_unsloth.refresh import KeptSelections
from sparse_unsloth.selection import AttentionSelection, ChannelSelector, MlpSelection
from sparse_unsloth.sharing import shared_estimator

if TYPE_CHECKING:
    from sparse_unsloth.loss import LossRemoval

logger = logging.getLogger("sparse_unsloth")

CONTEXT_ARGUMENT = "sparse_context"
"""The keyword argument by which a `SparseContext` travels from the outermost model to each decoder layer."""


class SparseContext:
    """One forward: its partition, its share of the configured sparsity, and the channels that its layers chose.

    It travels as a keyword argument, so a recompute under gradient checkpointing sees the object of its own forward and
    finds there the channels that the first pass chose.

    Attributes:
        partition: the roles of the rows.
        scale: share of the configured sparsity; at 0 every layer is dense.
        loss_only: the last layer leaves out the rows without loss.
        loss_reached: set by the loss that makes this right.
        probe: the forward that attaching proves the hooks by; it keeps every channel.
        step: optimiser steps done, or None where nothing counts them.
        observation: where this forward is one that `explain` looks at.
        paused: parts that are dense all the same (`sparse_unsloth.nonfinite`).
    """

    def __init__(
        self,
        partition: TokenPartition,
        scale: float,
        loss_only: bool = False,
        step: int | None = None,
        paused: frozenset[tuple[int, str]] = frozenset(),
    ):
        self.partition = partition
        self.scale = scale
        self.loss_only = loss_only
        self.paused = paused
        self.loss_reached = False
        self.probe = False
        self.step = step
        self.observation: Observation | None = None
        self.selections: dict[tuple[int, str], MlpSelection | AttentionSelection] = {}
        self.ran: set[tuple[int, str]] = set()
        self._memos: dict[int, dict[str, Any]] = {}
        self._derived: dict[str, TokenPartition] = {}

    def memo(self, index: int) -> dict[str, Any]:
        """What the MLP of layer ``index`` keeps from this forward to its recompute."""
        return self._memos.setdefault(index, {})

    def rows_with_loss(self, sparse: bool) -> TokenPartition:
        """The partition of the last layer behind its keys and values, where it is sparse or dense."""
        key = f"loss rows, sparse={sparse}"
        if key not in self._derived:
            self._derived[key] = rows_with_loss(self.partition, sparse)
        return self._derived[key]

    def every_row_dense(self) -> TokenPartition:
        """The partition of what the last layer computes densely for all rows."""
        if "every row" not in self._derived:
            self._derived["every row"] = every_row_dense(self.partition)
        return self._derived["every row"]


DENSE = LayerSparsity(0.0, 0.0)


class LayerRuntime:
    """A hooked decoder layer: how sparse it is, and the context of the forward that runs through it now.

    ``sparsity`` is that of context rows, ``output`` that of output tokens, a tier of their own where it is above 0.
    ``parts`` are those that leave out rows without loss, in the last layer, where a forward may
    (`SparseContext.loss_only`). ``handed`` holds Q, K, V while a whole layer's forward has computed them.
    """

    def __init__(
        self, state: SparsityState, layer: DecoderLayer, sparsity: LayerSparsity, output: LayerSparsity = DENSE
    ):
        self.state = state
        self.layer = layer
        self.sparsity = sparsity
        self.output = output
        self.context: SparseContext | None = None
        self.parts: tuple[str, ...] = ()
        self.handed: tuple[Tensor, Tensor, Tensor] | None = None

    def is_sparse(self, part: str) -> bool:
        """Whether ``part`` ("mlp" or "self_attn") selects channels in the forward that runs now."""
        context = self.context
        if context is None or context.scale <= 0:
            return False
        if getattr(self.sparsity, part) <= 0 and getattr(self.output, part) <= 0:
            return False
        return not context.paused or (self.layer.index, part) not in context.paused

    def partition(self, part: str, module: nn.Module) -> TokenPartition | None:
        """The rows that ``part`` computes, or None where ``module``'s own function does.

        That is so whenever the module's own ``training`` flag is off. In the last layer these are the rows of the MLP
        and of the O projection; its keys and values need every row.
        """
        context, sparse = self.context, self.is_sparse(part)
        if context is None or not module.training:
            return None
        if part in self.parts and context.loss_only and not self._mlp_scores_every_row(part):
            return context.rows_with_loss(sparse)
        return context.partition if sparse else None

    def _mlp_scores_every_row(self, part: str) -> bool:
        """Whether ``part`` is the attention whose output the MLP of this layer chooses its channels by, for every row.

        It is with ``dense_tokens="none"``: rows with loss are context then, and their channels are chosen among all.
        """
        return part == "self_attn" and self.is_sparse("mlp") and not len(self.context.partition.dense)

    def mlp_channels(self, hidden_states: Tensor, partition: TokenPartition) -> tuple[Tensor | None, Tensor | None]:
        """int64 ``[k]``: the MLP channels that context rows and output tokens keep in this forward; None: all of them.

        Args:
            hidden_states: the MLP's input, ``[..., hidden_size]``.
            partition: what `partition` gave for the MLP.
        """
        chosen, output = self._tiers("mlp", hidden_states, partition)
        if output is None:
            # Without context rows there is nothing to choose, and nothing that the choice would change.
            return (partition.dense[:0] if chosen is None else chosen.channels), None
        return (None if chosen is None else chosen.channels), output.channels

    def attention_channels(
        self, partition: TokenPartition, hidden_states: Tensor | None = None
    ) -> tuple[AttentionSelection | None, AttentionSelection | None]:
        """The attention channels of context rows and of output tokens, None: all of them; arguments as `mlp_channels`.

        ``hidden_states`` is the input of Q, K, V.

        Raises:
            AttachError: without ``hidden_states``, when Q, K, V have not chosen yet.
        """
        return self._tiers("self_attn", hidden_states, partition)

    def mlp_of_context(self, context_rows: Tensor) -> MlpSelection:
        """The MLP's selection of this forward, from its input on the context rows alone, ``[n, hidden_size]``."""
        return self._selection("mlp", "mlp", context_rows, self.sparsity.mlp, None)

    def attention_of_context(self, context_rows: Tensor | None) -> AttentionSelection:
        """The attention's likewise; None once Q, K, V have chosen."""
        return self._selection("self_attn", "self_attn", context_rows, self.sparsity.self_attn, None)

    def record_run(self, part: str) -> None:
        """Notes that ``part`` ran by our functions, and in this step if sparse with gradients (see `verify_step`)."""
        self.context.ran.add((self.layer.index, part))
        if torch.is_grad_enabled() and self.is_sparse(part):
            self.state.ran.add((self.layer.index, part))

    def compensation(self) -> Compensation | None:
        """The stand-in for this layer's dropped MLP channels, where one was fitted; a ramp drops others: None."""
        estimator = self.state.estimator
        if estimator is None or self.context.scale != 1.0:
            return None
        return estimator.compensation.get(self.layer.index)

    def _tiers(self, part: str, hidden_states: Tensor | None, partition: TokenPartition):
        context, output = None, None
        if len(partition.context) and getattr(self.sparsity, part) > 0:
            rows = self.context.partition.context
            context = self._selection(part, part, hidden_states, getattr(self.sparsity, part), rows)
        if partition.output is not None and len(partition.output) and getattr(self.output, part) > 0:
            # By the tokens that bear loss, because the last layer may compute no others (exact removal).
            whole = self.context.partition
            rows = whole.output_loss if len(whole.output_loss) else whole.output
            output = self._selection(part, f"{OUTPUT}{part}", hidden_states, getattr(self.output, part), rows)
        return context, output

    @torch.no_grad()
    def _selection(self, part: str, name: str, hidden_states: Tensor | None, sparsity: float, rows: Tensor | None):
        """The choice by ``rows`` of ``hidden_states``; None: these are the tier's rows alone."""
        key = (self.layer.index, name)
        chosen = self.context.selections.get(key)
        if chosen is None:
            if hidden_states is None:
                raise AttachError(f"{self.layer.name}: o_proj ran before q_proj, k_proj and v_proj chose channels.")
            sparsity, step = sparsity * self.context.scale, self.context.step
            chosen = self.state.kept.find(key, step, sparsity)
            if chosen is None:
                select = self.state.selector.mlp if part == "mlp" else self.state.selector.attention
                chosen = select(self.layer, hidden_states, sparsity, rows)
                self.state.kept.put(key, step, sparsity, chosen)
            if part == "mlp" and chosen.order is not None:
                memo = self.context.memo(self.layer.index)
                (memo if name == part else memo.setdefault("output", {}))["order"] = chosen.order
            self.context.selections[key] = chosen
        if self.context.observation is not None and hidden_states is not None:
            self.state.observer.see(self.context.observation, self.layer, name, hidden_states, chosen, rows is None)
        return chosen


class SparsityState:
    """Everything that an attached model carries; kept outside the module tree, so nothing of it is ever saved.

    Attributes:
        model: the outermost model, where labels enter.
        config: the configuration.
        backend_name: the module of `sparse_unsloth.backends` whose hook points are used.
        hooked, handles: the modules whose forward was replaced, and what else was installed and can be removed.
        num_layers: decoder layers of the model.
        layer_sparsity, output_sparsity: of context rows and of output tokens, by layer; ``tiers``: the second is not 0.
        runtimes: the layers that the configuration makes sparse, by index.
        whole_layers: of layers that are dense but have a whole-layer forward (`backends.unsloth_layer`), by index.
        last_layer: the layer that leaves out rows without loss, sparse or not; None where none does.
        kept: selections that hold for several optimiser steps (`SparsityConfig.refresh_steps`).
        observer: what `explain` reports (`SparsityConfig.explain_steps`).
        driver: the callback, or whatever else sets the step; None outside training.
        estimator, selector: None until they are built (calibrated kinds may wait for the trainer's data).
    """

    def __init__(self, model: nn.Module, layers: list[DecoderLayer], config: SparsityConfig, backend_name: str):
        self.model = model
        self.backend_name = backend_name
        self.layers = layers
        self.config = config
        self.layer_sparsity = config.layer_sparsity(len(layers))
        self.output_sparsity = config.output_layer_sparsity(len(layers))
        self.tiers = any(map(any, self.output_sparsity))
        self.runtimes = {
            layer.index: LayerRuntime(self, layer, sparsity, output)
            for layer, sparsity, output in zip(layers, self.layer_sparsity, self.output_sparsity, strict=True)
            if any(sparsity)
        }
        self.whole_layers: dict[int, LayerRuntime] = {}
        self.last_layer: LayerRuntime | None = None
        self.driver: object | None = None
        self.kept = KeptSelections(config.refresh_steps)
        self.observer = Observer(config.explain_steps)
        self.estimator: Estimator | None = None
        self.selector: ChannelSelector | None = None
        self.planner: CheckpointPlanner | None = None
        self.watch = ScoreWatch()
        self._shared = False
        self.hooked: list[nn.Module] = []
        self.handles: list[RemovableHandle | LossRemoval] = []
        self.ran: set[tuple[int, str]] = set()
        self._scale = 0.0
        self._step: int | None = None
        self._max_steps = 0
        self._verified = False
        self._sparse_forwards_in_step = 0
        self._paused_in_step: set[tuple[int, str]] = set()
        self._said: set[str] = set()
        self._reset_counts()

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

    def prepare(self, samples: list[Mapping[str, Any]] | None, last_chance: bool = False) -> None:
        """Builds, loads or calibrates the estimator if that can be done now.

        Args:
            samples: batches as the model receives them, or None.
            last_chance: without samples, fall back to what needs none (kind "auto") instead of waiting for them.

        Raises:
            EstimatorError: the estimator cannot be had (see `obtain_estimator`).
        """
        if self.selector is not None or not self.runtimes:
            return
        if self.config.criterion != "estimator":
            self._use(None)
        elif last_chance or is_main():  # rank 0 makes it once for all, see `begin_training`
            estimator = self._obtain(samples, wait=not last_chance)
            if estimator is not None:
                self._use(estimator)

    def _use(self, estimator: Estimator | None) -> None:
        self.estimator = estimator
        self.selector = ChannelSelector(self.config, self.layers, estimator)

    def _obtain(self, samples: list[Mapping[str, Any]] | None, wait: bool) -> Estimator | None:
        return obtain_estimator(
            self.model,
            self.layers,
            self.layer_sparsity,
            self.config.estimator,
            samples=samples,
            wait=wait,
            dense_tokens=self.config.dense_tokens,
            seed=self.config.seed,
        )

    def _prepare_for_all(self, train_dataset, collate_fn) -> None:
        """`prepare`, once for all processes."""
        if world_size() == 1 or not has_group() or self.config.criterion != "estimator":
            if self.selector is None:
                self.prepare(self._samples_of(train_dataset, collate_fn), last_chance=True)
            return
        if self._shared:
            return
        self._use(
            shared_estimator(
                self.layers,
                self.layer_sparsity,
                self.estimator,
                lambda: self._samples_of(train_dataset, collate_fn),
                lambda samples: self._obtain(samples, wait=False),
            )
        )
        self._shared = True

    def begin_training(self, driver: object, max_steps: int, train_dataset=None, collate_fn=None) -> None:
        """Called once per training by what drives the schedule; checks the hooks, calibrates if that still has to be.

        Of several processes every one must call it: the estimator of rank 0 becomes that of all.

        Raises:
            AttachError: a hook is gone, or FSDP sharded weights that the backend needs whole.
            EstimatorError: the estimator needs calibration samples and the data set gives none.
        """
        self.verify_hooks()
        for layer in filter(self.runtime, self.layers):
            self.backend.refuse_sharded_weights(layer)
        if self.runtimes:
            self._prepare_for_all(train_dataset, collate_fn)
        if self.config.memory_budget is not None and self.planner is None:
            self.planner = CheckpointPlanner(self, self.config.memory_budget)
        self.driver, self._max_steps, self._verified = driver, max_steps, False
        self.kept.clear()
        self.observer.clear()
        self._reset_counts()

    def verify_hooks(self) -> None:
        """Raises AttachError if something replaced a sparse forward since it was installed."""
        lost = [module for module in self.hooked if not self.backend.is_installed(module)]
        if lost:
            raise AttachError(
                f"{len(lost)} of {len(self.hooked)} sparse forwards were replaced after attach() (first: "
                f"{type(lost[0]).__name__}). Load adapters and patch the model first, then attach it last."
            )

    def expected_parts(self) -> set[tuple[int, str]]:
        """``(layer index, "mlp" | "self_attn")`` of everything that the configuration makes sparse."""
        return {
            (index, part)
            for index, runtime in self.runtimes.items()
            for part, sparsity in runtime.sparsity._asdict().items()
            if sparsity > 0
        }

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
        self._scale, self._step = self.config.schedule.scale(step, self._max_steps), step
        self.observer.begin_step(step, self._scale > 0)
        self._sparse_forwards_in_step = 0
        self._paused_in_step: set[tuple[int, str]] = set()
        self.ran.clear()

    def verify_step(self) -> None:
        """After the first sparse optimiser step: every hooked part ran sparsely with gradients.

        Raises:
            AttachError: some did not; the message names them.
        """
        if self._verified or not self._sparse_forwards_in_step:
            return
        expected = self.expected_parts()
        missing = expected - self.ran - self._paused_in_step
        if missing:
            raise AttachError(
                f"{len(missing)} of {len(expected)} hooked parts did not run sparsely in a training step that had "
                f"context tokens: {self.name_parts(missing)}. Something replaced their forward after "
                "attach(), merged or disabled their adapter, or several adapters are active. Attach last, with one "
                "active adapter."
            )
        self._verified = True

    def end_training(self) -> None:
        """Forgets the driver; the next training brings its own."""
        if self.planner is not None:
            self.planner.restore()
            self.planner = None
        self.driver, self._scale, self._step = None, 0.0, None
        self.kept.clear()

    def metrics(self) -> dict[str, float]:
        """What sparsity did since the last call; empty counts give zeros, a model without sparse layers nothing."""
        if not self.runtimes:
            return {}
        tokens = max(self._context_tokens + self._dense_tokens, 1)
        mean = [sum(values) / self.num_layers for values in zip(*self.layer_sparsity, strict=True)]
        figures = {
            "sparsity/enabled": float(self._scale > 0),
            "sparsity/scale": self._scale,
            "sparsity/context_share": self._context_tokens / tokens,
            "sparsity/sparse_forwards": self._sparse_forwards / max(self._forwards, 1),
            "sparsity/mean_mlp": mean[0] * self._scale,
            "sparsity/mean_self_attn": mean[1] * self._scale,
        }
        self._notice_nonfinite_scores()
        if self.watch.events:
            figures["sparsity/nonfinite"] = float(self.watch.events)
            self.watch.events = 0
        if self.planner is not None:
            figures["sparsity/kept_layers"] = float(self.planner.num_kept)
        if self.tiers:
            means = [sum(values) / self.num_layers for values in zip(*self.output_sparsity, strict=True)]
            figures |= {
                "sparsity/mean_output_mlp": means[0] * self._scale,
                "sparsity/mean_output_self_attn": means[1] * self._scale,
            }
        self._reset_counts()
        return figures

    def open_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> SparseContext | None:
        """The context of a forward that begins, or None where it must be dense.

        Raises:
            SparsityError: a training forward with a schedule that nothing drives.
            EstimatorError: the estimator still waits for calibration samples.
        """
        if not model.training or not (self.runtimes or self.last_layer):
            return None
        if args:
            kwargs = {**inspect.signature(type(model).forward).bind_partial(model, *args).arguments, **kwargs}
        scale = self._current_scale() if self.runtimes else 0.0
        if kwargs.get("labels") is None:
            if self.planner is not None:
                self.planner.restore()
            if self.runtimes:
                self._say_once(
                    "A training forward came without labels (label smoothing, compute_loss_func and some trainers "
                    "take them away), so its tokens have no roles and it ran dense."
                )
            return None
        loss_only = self.last_layer is not None and loss_is_fused(model, kwargs)
        if not (self.runtimes or loss_only):
            return None
        partition = self._partition(kwargs)
        if self.planner is not None:
            self.planner.plan(partition, scale if len(partition.context) else 0.0)
        self._forwards += 1
        self._context_tokens += len(partition.context)
        self._dense_tokens += len(partition.dense)
        if not (len(partition.context) or (self.tiers and len(partition.output))):
            scale = 0.0
        paused: frozenset[tuple[int, str]] = frozenset()
        if scale > 0:
            if self.selector is None:
                if rank():
                    raise EstimatorError(
                        f"Rank {rank()} has no estimator yet: rank 0 hands its own out when training begins. Train "
                        "through a trainer that was built after attaching, or let every rank call "
                        "get_state(model).begin_training(driver, max_steps) before its first step, with "
                        "torch.distributed initialised."
                    )
                raise EstimatorError(
                    f"The estimator of kind {self.config.estimator.kind!r} still waits for calibration samples. Train "
                    "through a transformers or TRL trainer (it then takes the first training samples), or pass "
                    "calibration_samples= to get_peft_model() or attach(), or set estimator kind 'svd', which needs "
                    "none."
                )
            if self._step is None and self.config.refresh_steps > 1:
                self._say_once(
                    f"refresh_steps is {self.config.refresh_steps}, but nothing counts the optimiser steps (no "
                    "trainer, no set_step()), so channels are chosen anew in every forward."
                )
            self._sparse_forwards += 1
            self._sparse_forwards_in_step += torch.is_grad_enabled()
            self._notice_nonfinite_scores()
            paused = self.watch.pause()
            self._paused_in_step |= paused
        elif self.last_layer is None:
            return None
        context = SparseContext(partition, scale, loss_only and worth_removing(partition), self._step, paused)
        if scale > 0 and self.observer.wants(self._step) and not is_sequence_classifier(self.model):
            context.observation = self._observe(partition, scale, kwargs)
        return context

    def close_forward(self, context: SparseContext | None) -> None:
        """Checks a forward that ended well, and has its scores looked at.

        Raises:
            SparsityError: rows were left out for a loss that did not come.
        """
        if context is None:
            return
        self.watch.look(context)
        if context.loss_only and not context.loss_reached:
            raise SparsityError(
                "This forward left rows without loss out of the last layer, but did not end in Unsloth's fused loss "
                "over the model's own output head, so what it returned may not be complete. Something replaced the "
                "head or the model's forward (loss_type='chunked_nll' of TRL before 1.15 does, for one); set "
                "exact_removal: false."
            )

    def _observe(self, partition: TokenPartition, scale: float, arguments: Mapping[str, Any]) -> Observation:
        layout = (arguments.get(name) for name in ("attention_mask", "position_ids", "packed_seq_lengths"))
        starts = sequence_starts(arguments["labels"], *layout)
        tiers = (("", self.layer_sparsity), (OUTPUT, self.output_sparsity))
        sparsity = {
            (index, f"{prefix}{part}"): value * scale
            for prefix, layers in tiers
            for index, layer in enumerate(layers)
            for part, value in layer._asdict().items()
        }
        return self.observer.open(self._step, partition, starts, self.layers, sparsity)

    def _notice_nonfinite_scores(self) -> None:
        """Reads the flags of earlier forwards, which are here: the rows of this one waited for the GPU."""
        found = self.watch.collect()
        self.kept.drop(found)
        if found and "non-finite" not in self._said:
            self._said.add("non-finite")
            logger.warning(
                f"Rank {rank()}: NaN or inf in the scores of {len(found)} parts ({self.name_parts(found)}), so in the "
                "activations or in the estimator. Context rows took their lowest-numbered channels in that forward; "
                f"these parts are dense in the next {PAUSE} forwards, and again whenever it happens (logged as "
                "sparsity/nonfinite). If the loss is NaN too, lower the learning rate, or use bf16 in place of fp16."
            )

    def _partition(self, arguments: Mapping[str, Any]) -> TokenPartition:
        """The roles of the rows; a model without sparse layers only needs to know which rows bear loss."""
        if is_sequence_classifier(self.model):
            return partition_of(self.model, arguments, self.config.dense_tokens)
        layout = {"packed_seq_lengths": arguments.get("packed_seq_lengths")}
        if self.runtimes:
            layout |= {name: arguments.get(name) for name in ("attention_mask", "position_ids")}
        return TokenPartition.from_labels(
            arguments["labels"],
            **layout,
            dense_tokens=self.config.dense_tokens,
            # Unsloth drops the mask in training, and tokens attend to padding on their left.
            padding_masked=self.backend_name != "unsloth",
            tiers=self.tiers,
        )

    def _current_scale(self) -> float:
        if self.driver is not None:
            return self._scale
        schedule = self.config.schedule
        if schedule.start_step == 0 and schedule.end_step == 1.0 and isinstance(schedule.end_step, float):
            return 1.0
        if not torch.is_grad_enabled():
            return 0.0
        raise SparsityError(
            f"This model trains with a sparsity schedule (start_step={self.config.start_step}, "
            f"end_step={self.config.end_step}), but nothing drives it. Build the trainer after attaching: it then gets "
            "a SparsityCallback by itself; or add SparsityCallback() to its callbacks. In a training loop of your own "
            "call state = get_state(model); state.begin_training(driver, max_steps) once and state.set_step(step) "
            "before each optimiser step; or set start_step: 0 and end_step: 1.0, which needs no driver."
        )

    def _samples_of(self, train_dataset, collate_fn) -> list[Mapping[str, Any]] | None:
        """Batches of the first samples of the trainer's data set, or None where it has none to give."""
        count = self.config.estimator.calibration_samples
        if train_dataset is None or collate_fn is None or count == 0:
            return None
        rows = []
        for row in train_dataset:
            rows.append(row)
            if len(rows) == count:
                break
        size = 8
        return [collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)] or None

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            if is_main():
                logger.warning(message)

    def _reset_counts(self) -> None:
        self._forwards = self._sparse_forwards = self._context_tokens = self._dense_tokens = 0
