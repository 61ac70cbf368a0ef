"""Runs micro-batches of an optimiser step as one, in the trainer's own loop (docs/how-it-works.md, section 5.4).

The loop keeps its micro-batches, and calls ``training_step`` for each: steps, schedules, logs, counts of tokens and
checkpoints stay as they are. Those of a group give a loss of zero, but the last one, which runs all of them joined.
Two methods of the trainer's instance are replaced while it trains, and no class is.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unsloth.runtime.checkpoint_planner import CheckpointPlanner
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.runtime.together import apart, average, ddp_of, try_together
from sparse_unsloth.tokens.merge import Extent, agreed, extents, grouped, join, starts, tokens_of, why_alone

MEMORY_SHARE = 0.85
"""Of a GPU's memory, where there is no `memory_budget`; the rest is for fragmentation and CUDA's own context."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-3, torch.float16: 3e-3}
"""How far apart two sums of the same losses may be, relative to them, by the dtype of the weights or of autocast.

SmolLM2-135M on a CPU, four documents of 256 tokens: 2e-7 in float32 and 7e-4 in bfloat16; if they see each other 1e-2.
"""
SUPERVISED = {"Trainer": "transformers", "SFTTrainer": "trl", "_UnslothSFTTrainer": "UnslothSFTTrainer"}
"""Classes whose training step is known, with the first part of their module's name."""
METHODS = ("get_batch_samples", "training_step")
COUNTED = ("_metrics", "_total_train_tokens")
"""What TRL's ``compute_loss`` adds to."""
DIFFERS, UNKNOWN, SAME, TOO_LARGE = range(4)
"""Verdicts of the proof; UNKNOWN: there is no loss to compare, TOO_LARGE: memory ran out."""


class MicroBatchMerger:
    """Replaces two methods of a trainer until `remove`.

    The first group that is merged is proved, by one forward more for each of its micro-batches: without gradients, the
    joined one has to give the sum of their losses. So a model whose documents see each other, or whose loss is a mean
    over a micro-batch, trains as it did.

    Args:
        trainer: a transformers ``Trainer`` that is about to train; `why_not_merged` found nothing.
        state: of its model, with a training begun.
    """

    def __init__(self, trainer: Any, state: SparsityState):
        self._trainer, self._state = trainer, state
        self._limit = math.inf  # what memory or the proof left of it
        self._own_planner = None
        if state.planner is None and _device(state).type == "cuda":
            budget = state.config.memory_budget
            self._own_planner = state.plan_checkpoints(MEMORY_SHARE if budget is None else budget)
        self._groups: dict[int, list[Mapping[str, Any]]] = {}  # by the id of a micro-batch; empty for all but the last
        self._proved = False
        self._ran = self._merged = 0
        self._originals = {name: getattr(trainer, name) for name in METHODS}
        for name in METHODS:
            setattr(trainer, name, getattr(self, name))

    def remove(self) -> None:
        """Gives the trainer its own methods back."""
        for name in METHODS:
            vars(self._trainer).pop(name, None)

    def take(self) -> dict[str, float]:
        """The mean number of micro-batches in a forward since the last call, as a metric."""
        ran, merged = self._ran, self._merged
        self._ran = self._merged = 0
        return {"sparsity/merged_micro_batches": merged / ran} if ran and self._state.config.merge_micro_batches else {}

    @property
    def _most(self) -> float:
        """Micro-batches in a group, at most; a plan of `auto` may change it between two optimiser steps."""
        asked = self._state.config.merge_micro_batches
        return min(self._limit, math.inf if asked is True else asked or 1)

    def _at_most(self, number: int) -> None:
        """Merges no more than ``number`` from now on, and tells the plan so."""
        self._limit = number  # larger groups of this step run one by one: some of their micro-batches were passed over
        if self._state.auto is not None:
            self._state.auto.merge_at_most(number)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """The trainer's: the micro-batches of an optimiser step, and its divisor. Decides which ones run as one."""
        batches, num_items = self._originals["get_batch_samples"](*args, **kwargs)
        self._groups = {}
        if self._most == 1:
            return batches, num_items
        found, reason = extents(batches) if batches else ([], "")
        if num_items is None and not reason:
            reason = "the trainer does not count the labels of a step, so the loss is a mean over a micro-batch"
        groups = [[number] for number in range(len(batches))]
        if found and not reason:
            groups = grouped(found, self._most, self._fits, self._trainer.accelerator.num_processes == 1)
            if len(groups) == len(found) > 1:
                self._say_alone(why_alone(found, keeps_layers(self._state)), " of some steps")
        if reason:
            self._say_alone(reason)
        for group in groups if self._trainer.accelerator.num_processes == 1 else self._agree(groups):
            *waiting, last = sorted(group)
            if waiting:
                self._groups |= {id(batches[number]): [] for number in waiting}
                self._groups[id(batches[last])] = [batches[number] for number in (*waiting, last)]
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's: forward and backward of one micro-batch, of none, or of a group; returns its loss."""
        group = self._groups.pop(id(inputs), None)
        if group is not None and not group:
            return torch.zeros((), device=self._trainer.args.device)
        if group is None or len(group) > self._limit:
            return self._run(group or [inputs], model, num_items_in_batch)
        joined = join(group)
        verdict = SAME if self._proved else self._prove(group, joined, num_items_in_batch)
        self._proved = verdict == SAME
        loss = self._attempt(joined, model, num_items_in_batch) if verdict == SAME else None
        if loss is not None:
            self._ran, self._merged = self._ran + 1, self._merged + len(group)
            return loss
        if verdict == DIFFERS:
            self._at_most(1)
            self._say_alone(
                "joined they do not give the sum of their losses. Causes: documents of a row that see each other, a "
                "loss that is a mean over its micro-batch, an auxiliary loss"
            )
        elif verdict != UNKNOWN:
            self._at_most(max(1, len(group) // 2))
            self._state.warn_once(
                f"merge_micro_batches: {len(group)} micro-batches together ran out of memory. They ran again one by "
                f"one, and {f'at most {self._most} run' if self._most > 1 else 'none runs'} together from now on."
            )
        return self._run(group, model, num_items_in_batch)

    def _run(self, batches: Sequence[Any], model: nn.Module, num_items: Any) -> Tensor:
        """The micro-batches one by one; the sum of their losses. The last one's gradients are synchronised as asked."""
        losses = []
        for number, inputs in enumerate(batches, start=1):
            waits = number < len(batches)
            with self._trainer.accelerator.no_sync(model=model) if waits else contextlib.nullcontext():
                losses.append(self._originals["training_step"](model, inputs, num_items))
        self._ran, self._merged = self._ran + len(batches), self._merged + len(batches)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _attempt(self, joined: dict[str, Any], model: nn.Module, num_items: Any) -> Tensor | None:
        """The loss of the joined micro-batches; None where memory ran out, with everything as it was before."""
        accelerator = self._trainer.accelerator
        trained = [tensor for part in self._trainer.optimizer.param_groups for tensor in part["params"]]
        before = [tensor.grad for tensor in trained]
        for tensor in trained:
            tensor.grad = None
        with apart(accelerator, model):
            step = partial(self._originals["training_step"], model, joined, num_items)
            loss = self._unless_too_large(step, model)
        for tensor, gradient in zip(trained, before, strict=True):
            if loss is None:
                tensor.grad = gradient
            elif gradient is not None:
                tensor.grad = gradient if tensor.grad is None else gradient.add_(tensor.grad)
        if loss is not None and accelerator.sync_gradients:
            average(model)
        return loss

    def _prove(self, group: Sequence[Mapping[str, Any]], joined: dict[str, Any], num_items: Any) -> int:
        """Whether the joined micro-batches have the sum of the losses of ``group``, on every process.

        Nothing is left out in these forwards.
        """
        trainer = self._trainer

        def loss_of(batch: Mapping[str, Any]) -> Tensor:
            inputs = {**trainer._prepare_inputs(batch), CONTEXT_ARGUMENT: None}
            return trainer.compute_loss(trainer.model, inputs, num_items_in_batch=num_items).double()

        trainer.model.train()
        counted = self._counted()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            alone = sum(map(loss_of, group))
            together = self._unless_too_large(partial(loss_of, joined))
        vars(trainer).update(counted)
        if together is None:
            return TOO_LARGE
        size, apart = alone.abs().item(), (alone - together).abs().item()
        dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point()}
        dtypes |= {torch.bfloat16} if trainer.args.bf16 or trainer.args.fp16 else set()
        tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]) for dtype in dtypes)
        verdict = UNKNOWN if size == 0 or not math.isfinite(size) else SAME if apart <= tolerance * size else DIFFERS
        return min(self._gather([verdict])[0])

    def _unless_too_large(self, function: Callable[[], Tensor], model: nn.Module | None = None) -> Tensor | None:
        """What ``function`` returns; None where memory ran out in it, on this process or another one.

        Then all counts are as they were before. Arguments as of `try_together`.
        """
        counts, counted = replace(self._state.counts), self._counted()
        result = try_together(self._trainer.accelerator, function, model)
        if result is None:
            self._state.counts = counts
            vars(self._trainer).update(counted)
            self._free_memory()
        return result

    def _free_memory(self) -> None:
        """Frees what a forward that did not come to its end still holds, and what is reserved for others like it."""
        if self._state.graphs is not None:
            self._state.graphs.clear()
        zoo = sys.modules.get("unsloth_zoo.gradient_checkpointing")
        if zoo is not None:  # its buffers take a forward without a backward for one that is still to come
            zoo.reset_unsloth_gradient_checkpointing_buffers()
        if _device(self._state).type == "cuda":
            torch.cuda.empty_cache()

    def _counted(self) -> dict[str, Any]:
        """What TRL has counted for its logs."""
        return {name: copy.deepcopy(vars(self._trainer)[name]) for name in COUNTED if name in vars(self._trainer)}

    def _fits(self, group: Sequence[Extent]) -> bool:
        """Whether ``group`` can be joined and fits into the memory."""
        state = self._state
        held = state.graphs.kept_memory if state.graphs else 0
        return fits(group, state.planner or self._own_planner, keeps_layers(state), held)

    def _say_alone(self, reason: str, which: str = "") -> None:
        self._state.warn_once(f"merge_micro_batches: micro-batches{which} run one by one: {reason}.")

    def _agree(self, groups: list[list[int]]) -> list[list[int]]:
        """Groups that every process can run: all have to call ``compute_loss``, which communicates, equally often."""
        return agreed(self._gather(starts(groups)))

    def _gather(self, values: list[int]) -> list[tuple[int, ...]]:
        """For each of ``values`` those of all processes."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1 or not values:
            return [(value,) for value in values]
        everyone = accelerator.gather(torch.tensor(values, device=accelerator.device)).view(-1, len(values))
        return [tuple(column) for column in everyone.T.tolist()]


def begin_merging(state: SparsityState, trainer_state: Any) -> MicroBatchMerger | None:
    """Merges micro-batches of the training that begins, if `SparsityConfig.merge_micro_batches` asks for it.

    Where it cannot be exact, a warning says why, and the trainer is left as it is. Under `auto` the merger also begins
    where the plan does not merge but may come to it.

    Args:
        state: of the model, with the training begun.
        trainer_state: the ``TrainerState`` of the trainer whose callbacks are being called.
    """
    asked = state.config.merge_micro_batches
    if not asked and not (state.auto is not None and state.auto.may_merge):
        return None
    trainer, reason = _checked(state, trainer_state)
    if reason:
        state.warn_once(f"merge_micro_batches: micro-batches run one by one: {reason}.")
        return None
    if asked and "_metrics" in vars(trainer):
        state.warn_once(
            "merge_micro_batches: TRL's entropy and mean_token_accuracy are means over the tokens of merged "
            "micro-batches, no longer over micro-batches; every other figure is logged as without it."
        )
    return MicroBatchMerger(trainer, state)


def why_not_planned(state: SparsityState, trainer_state: Any) -> str:
    """Why `auto` may not merge micro-batches of the training that begins; "" where it may. Arguments as above."""
    return _checked(state, trainer_state)[1]


def trainer_with_own_loss(trainer_state: Any) -> str:
    """The class name of the trainer if its loss is not the model's own by labels, else "".

    Such are a ``compute_loss`` or ``compute_loss_func`` of its own, label smoothing, and TRL's "dft".

    Args:
        trainer_state: as above.
    """
    trainer = _trainer_of(trainer_state)
    if trainer is None:
        return ""
    function = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    own = function or getattr(trainer.args, "loss_type", "") == "dft" or _has_its_own(trainer, "compute_loss")
    return type(trainer).__name__ if own else ""


def _has_its_own(trainer: Any, method: str) -> bool:
    """Whether ``method`` is not that of transformers' Trainer or an SFTTrainer."""
    owner = next((cls for cls in type(trainer).__mro__ if method in vars(cls)), type(trainer))
    return method in vars(trainer) or owner.__module__.split(".")[0] != SUPERVISED.get(owner.__name__)


def is_planned(state: SparsityState) -> bool:
    """Whether `auto` decides how many micro-batches run as one."""
    return state.auto is not None and "merge_micro_batches" not in state.auto.asked.model_fields_set


def keeps_layers(state: SparsityState) -> bool:
    """Whether a merged micro-batch has to keep as many layers' activations as the largest of it would alone.

    A plan weighed that already; by hand merging comes second.
    """
    return state.config.memory_budget is not None and not is_planned(state)


def fits(group: Sequence[Extent], planner: CheckpointPlanner | None, keeps: bool, held: int = 0) -> bool:
    """Whether micro-batches can be joined, and fit into the memory as one.

    Args:
        planner: knows the memory; None: any number fits.
        keeps: see `keeps_layers`.
        held: as in `CheckpointPlanner.plan`.
    """
    tokens = tokens_of(group)
    if tokens is None or planner is None:
        return tokens is not None
    return planner.fits(tokens, max(one.rows * one.length for one in group) if keeps else None, held)


def why_not_merged(trainer: Any, state: SparsityState) -> str:
    """Why micro-batches of this trainer's steps may not be merged, whatever they hold; "" where they may."""
    args, accelerator, config = trainer.args, trainer.accelerator, trainer.model.config
    for name in ("compute_loss", *METHODS):
        if _has_its_own(trainer, name):
            return f"the {name} of this {type(trainer).__name__} is not that of transformers' Trainer or an SFTTrainer"
    kind, parallel = accelerator.distributed_type.value, getattr(accelerator, "parallelism_config", None)
    if args.n_gpu > 1 or parallel is not None or kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return f"this was built for one process and for DDP, not for {kind} or other ways to split the work"
    ddp = ddp_of(getattr(trainer, "model_wrapped", None))
    if accelerator.num_processes > 1 and (ddp is None or ddp._comm_hooks):
        return "gradients of several processes are averaged as DDP does it, and here another way is set"
    if args.gradient_accumulation_steps == 1:
        return "gradient_accumulation_steps is 1, so that a step has only one"
    if state.config.is_sparse(len(state.layers)) and not state.row_sparse:
        return "channels are selected for each micro-batch, and a merged one would have others"
    if trainer.label_smoother is not None:
        return "label_smoothing_factor makes another loss"
    if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
        return "the model does not take num_items_in_batch, so its loss is a mean over a micro-batch"
    if getattr(config, "is_encoder_decoder", False):
        return "the model has an encoder"
    if getattr(trainer, "neftune_noise_alpha", None):
        return "neftune_noise_alpha adds other noise to merged ones"
    dropped = any(isinstance(module, nn.Dropout) and module.p > 0 for module in trainer.model.modules())
    if dropped or getattr(config.get_text_config(), "attention_dropout", 0):
        return "dropout (lora_dropout, attention_dropout) would draw other numbers for merged ones"
    known = _device(state).type == "cuda" or state.config.memory_budget is not None
    if state.config.merge_micro_batches is True and not known:
        return "without a GPU it is not known how many fit; give their number, or a memory_budget in GiB"
    return ""


def _checked(state: SparsityState, trainer_state: Any) -> tuple[Any, str]:
    """The trainer that is calling, and why its micro-batches may not be merged."""
    trainer = _trainer_of(trainer_state)
    return trainer, "its trainer was not found" if trainer is None else why_not_merged(trainer, state)


def _trainer_of(trainer_state: Any) -> Any:
    """The trainer with this state that is calling; None where no caller is one.

    transformers hands everything but the trainer to a callback, so it is looked for in the calling methods.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(type(owner), "training_step") and getattr(owner, "state", None) is trainer_state:
            return owner
        frame = frame.f_back
    return None


def _device(state: SparsityState) -> torch.device:
    return next(state.layers[0].module.parameters()).device
