"""Drives a sparse model's schedule from a transformers ``Trainer``, and so from TRL's and Unsloth's trainers.

This module imports transformers; ``sparse_unsloth`` imports this module only when it is used.
"""

import logging
from pathlib import Path

from transformers.trainer_callback import TrainerCallback

from sparse_unsloth.explain.records import RECORDS_FILE, append, by_layer, means
from sparse_unsloth.runtime.auto import plan_from_data
from sparse_unsloth.runtime.cosine import GradientCosine, begin_cosine
from sparse_unsloth.runtime.merging import MicroBatchMerger, begin_merging, trainer_with_own_loss, why_not_planned
from sparse_unsloth.runtime.metrics import metrics
from sparse_unsloth.runtime.roles import OWN_LOSSES
from sparse_unsloth.runtime.state import SparsityState, get_state
from sparse_unsloth.tokens.partition import is_sequence_classifier
from sparse_unsloth.utils.distributed import is_main

logger = logging.getLogger(__name__)


class SparsityCallback(TrainerCallback):
    """Tells a sparse model the optimiser step, and logs metrics of sparsity.

    Every ``Trainer`` built after a model was attached has one already (``register_with_trainers``). On a model that is
    not attached it does nothing; of several instances in one trainer only the first one drives.

    The metrics (``sparsity/...``) join the trainer's training log lines, those with a ``loss``, so every ``report_to``
    integration and ``trainer.state.log_history`` show them. An instance added by hand runs after the integrations,
    which then miss the metrics: attach before building the trainer.

    Records of channel selections, or of the energy in chosen rows (``explain_steps``), go to ``explain.jsonl`` in the
    trainer's output folder, for `sparse-unsloth explain`. Their means join the next log line, and the values of each
    layer where the trainer reports to an integration. The trainer's ``log_history`` has both.

    A model that was attached with preset `auto` is planned when training begins (`runtime.auto`).
    Where the configuration or the plan says so, micro-batches of an optimiser step run as one (`runtime.merging`).

    The schedule is a function of ``state.global_step``, so a run resumed from a checkpoint continues it.
    """

    def __init__(self):
        self._sparsity: SparsityState | None = None  # the state of the model that this instance drives
        self._trainer_state = None
        self._merger: MicroBatchMerger | None = None
        self._cosine: GradientCosine | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._end_helpers()  # of a training that was interrupted
        sparsity = None if model is None else get_state(model)
        if sparsity is None or not self._may_drive(sparsity.driver, state):
            return
        if sparsity.auto is not None:
            plan_from_data(
                sparsity,
                getattr(train_dataloader, "dataset", None),
                getattr(train_dataloader, "collate_fn", None),
                batch_size=args.train_batch_size,
                micro_batches=(state.max_steps - state.global_step) * args.gradient_accumulation_steps,
                step=args.gradient_accumulation_steps,
                no_merging=why_not_planned(sparsity, state),
                resumed=state.global_step,
                own_loss=trainer_with_own_loss(state),
            )
        sparsity.begin_training(
            self,
            state.max_steps,
            train_dataset=getattr(train_dataloader, "dataset", None),
            collate_fn=getattr(train_dataloader, "collate_fn", None),
        )
        self._sparsity, self._trainer_state = sparsity, state
        self._merger, self._cosine = begin_merging(sparsity, state), begin_cosine(sparsity)
        if state.global_step == 0 and state.is_world_process_zero:
            Path(args.output_dir, RECORDS_FILE).unlink(missing_ok=True)  # of an earlier run
        _warn_if_never_sparse(sparsity, state.max_steps)
        _warn_of_unknown_quality(sparsity, trainer_with_own_loss(state))

    def on_step_begin(self, args, state, control, **kwargs):
        if (sparsity := self._driven) is not None:
            sparsity.set_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if (sparsity := self._driven) is not None:
            sparsity.verify_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        sparsity = self._driven
        if sparsity is None or logs is None or "loss" not in logs:
            return
        figures, records = metrics(sparsity), sparsity.observer.take()
        details = {}
        if self._merger is not None:
            figures |= self._merger.take()
        if self._cosine is not None:
            figures |= self._cosine.take()
        if records:
            figures |= means(records[-1])
            details = by_layer(records[-1])
            if state.is_world_process_zero:
                append(Path(args.output_dir), records)
        logs.update(figures | (details if args.report_to else {}))
        figures |= details
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs):
        if (sparsity := self._driven) is not None:
            records = sparsity.observer.take()
            if records and state.is_world_process_zero:
                append(Path(args.output_dir), records)
            sparsity.end_training()
        self._end_helpers()
        self._sparsity = self._trainer_state = None

    def _end_helpers(self) -> None:
        for helper in (self._merger, self._cosine):
            if helper is not None:
                helper.remove()
        self._merger = self._cosine = None

    @property
    def _driven(self) -> SparsityState | None:
        """The state that this instance drives."""
        return self._sparsity if self._sparsity is not None and self._sparsity.driver is self else None

    def _may_drive(self, driver: object, trainer_state: object) -> bool:
        """Whether this instance may drive: a driver of another trainer was interrupted before on_train_end."""
        if isinstance(driver, SparsityCallback) and driver is not self:
            return driver._trainer_state is not trainer_state
        return driver is None or driver is self


def register_with_trainers() -> None:
    """Adds a ``SparsityCallback`` to every transformers ``Trainer`` built from now on; may be called more than once.

    It runs before the trainer's ``report_to`` integrations, so that these see the metrics.
    """
    from transformers import trainer

    if SparsityCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(SparsityCallback)


def unregister_from_trainers() -> None:
    """Undoes ``register_with_trainers`` for trainers built from now on."""
    from transformers import trainer

    if SparsityCallback in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.remove(SparsityCallback)


def _warn_if_never_sparse(sparsity: SparsityState, max_steps: int) -> None:
    config = sparsity.config
    if is_main() and config.is_sparse(len(sparsity.layers)) and not config.schedule.sparse_steps(max_steps):
        logger.warning(
            "The whole training will be dense: none of its %d optimiser steps lies between start_step=%r and "
            "end_step=%r. Train longer, or set start_step and end_step to fit.",
            max_steps,
            config.start_step,
            config.end_step,
        )


def _warn_of_unknown_quality(sparsity: SparsityState, own_loss: str) -> None:
    """Warns of rows that are left out by hand where no result says that the quality stays."""
    if not sparsity.row_sparse or not (own_loss or is_sequence_classifier(sparsity.model)):
        return
    if own_loss:
        found = f"{own_loss} computes a loss of its own: {OWN_LOSSES}"
    else:
        found = (
            "A classifier's loss reads one row of a sequence: what row sparsity does to the quality of such a training "
            "was not measured."
        )
    sparsity.warn_once(f"{found} sparsity='dense' trains exactly.")
