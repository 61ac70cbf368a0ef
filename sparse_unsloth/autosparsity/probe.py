"""The loss of a model under any recipe, by the same sparse forward that trains, without gradients and dropout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sparse_unsloth.attachment import attach, detach, get_state
from sparse_unsloth.autosparsity.journal import Journal
from sparse_unsloth.config import LayerSparsity, SparsityConfig
from sparse_unsloth.errors import CalibrationError
from sparse_unsloth.estimator import Estimator
from sparse_unsloth.functions.compensation import Compensation
from sparse_unsloth.layers import DecoderLayer
from sparse_unsloth.modes import training_flags
from sparse_unsloth.partition import TokenPartition
from sparse_unsloth.runtime import CONTEXT_ARGUMENT, SparseContext, SparsityState
from sparse_unsloth.selection import ChannelSelector

NOT_FOR_FORWARD = ("labels", "num_items_in_batch")
LAYOUT = ("attention_mask", "position_ids", "packed_seq_lengths")

Recipe = tuple[LayerSparsity, ...]
"""The sparsity of every layer."""


class Measured(NamedTuple):
    """Means over loss-bearing positions, nats: the loss of the labels, and the divergence from the dense model.

    The divergence ``KL(dense || sparse)`` is what sparsity would add to the loss of answers that the dense model itself
    gives. It has no sign to lose and little noise: one sparse layer changes the loss of SmolLM2-135M's few hundred
    answer tokens by -0.17 to 0.05 without order, its divergence grows from 0.002 with the sparsity.
    """

    loss: float
    divergence: float


class Change(NamedTuple):
    """Another sparsity for one part ("mlp", "self_attn") of one layer."""

    index: int
    part: str
    sparsity: float

    def apply(self, recipe: Recipe) -> Recipe:
        changed = recipe[self.index]._replace(**{self.part: self.sparsity})
        return (*recipe[: self.index], changed, *recipe[self.index + 1 :])


@dataclass(frozen=True)
class ProbeBatch:
    """A batch on the model's device, its roles, and the labels ``[n]`` of its loss-bearing rows."""

    inputs: dict[str, Any]
    partition: TokenPartition
    labels: Tensor


def prepare_batches(
    samples: Sequence[Mapping[str, Any]], device: torch.device, config: SparsityConfig, padding_masked: bool = True
) -> list[ProbeBatch]:
    """The samples that bear loss.

    Raises:
        CalibrationError: no samples, one without labels, none with a loss-bearing position, or none with a context
            token.
    """
    samples = list(samples)
    if not samples:
        raise CalibrationError("There are no samples to measure losses on; the data set is empty.")
    batches = []
    for number, sample in enumerate(samples):
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample.items()}
        labels = moved.get("labels")
        if labels is None:
            raise CalibrationError(
                f"Sample batch {number} has no labels (its keys: {', '.join(moved) or 'none'}), so it has no loss. "
                "Pass batches as the trainer's collator makes them."
            )
        partition = TokenPartition.from_labels(
            labels,
            **{name: moved.get(name) for name in LAYOUT},
            dense_tokens=config.dense_tokens,
            padding_masked=padding_masked,
        )
        if len(partition.loss):
            inputs = {name: value for name, value in moved.items() if name not in NOT_FOR_FORWARD}
            batches.append(ProbeBatch(inputs, partition, labels.flatten()[partition.loss + 1]))
    if not batches:
        raise CalibrationError(
            f"None of the {len(samples)} sample batches has a loss-bearing position, so no loss can be measured: every "
            "label is -100. Answers may have been cut off by max_length, or the completion column is empty."
        )
    if not any(batch.partition.num_context for batch in batches):
        raise CalibrationError(
            f"None of the {len(samples)} sample batches has a context token: every token bears loss, so nothing could "
            "be computed sparsely. Mask the prompts (completion_only_loss or assistant_only_loss in TRL, "
            "train_on_responses_only in Unsloth), or train densely."
        )
    return batches


class LossProbe:
    """Measures losses of a model that it attached once: a recipe is set by writing each layer's sparsity.

    Contexts are handed to the forward directly, so the model's own flags stay those of evaluation, and only the modules
    that ask for theirs before they compute sparsely say that they train. (Unsloth's forwards differ in evaluation, and
    have no dropout: there every flag is that of training.) The change of one part needs the layers from there on only:
    those below answer with what they gave under the reference recipe.

    Args:
        state: of the model, attached with every candidate part sparse.
        estimator: covers every candidate part.
        stand_ins: compensation by layer and MLP sparsity; empty without compensation.
        journal: what was measured before, and is measured now.
    """

    def __init__(
        self,
        state: SparsityState,
        estimator: Estimator | None,
        stand_ins: Mapping[tuple[int, float], Compensation],
        journal: Journal,
        progress: bool = True,
    ):
        self.layers: list[DecoderLayer] = state.layers
        self._state, self._estimator, self._stand_ins = state, estimator, stand_ins
        self._journal, self._progress = journal, progress
        if state.selector is None:
            state.estimator = estimator
            state.selector = ChannelSelector(state.config, state.layers, estimator)

    @property
    def dense(self) -> Recipe:
        return (LayerSparsity(0.0, 0.0),) * len(self.layers)

    def measure(self, recipe: Recipe, batches: Sequence[ProbeBatch], title: str) -> Measured:
        """What ``recipe`` gives on ``batches``."""
        sums = []
        for number, batch in enumerate(self._bar(batches, title, "batch")):
            name = f"{_digest(recipe)} {_batch_digest(batch)} {number}"
            if name not in self._journal:
                with self._running():
                    dense = self._dense(batch)
                    self._set(recipe)
                    self._journal.put(name, self._compare(batch, dense))
            sums.append(self._journal[name])
        return _mean(sums, batches)

    def measure_changes(
        self, reference: Recipe, changes: Sequence[Change], batches: Sequence[ProbeBatch], title: str
    ) -> dict[Change, Measured]:
        """What ``reference`` gives with each one of ``changes``."""
        sums: dict[Change, list[Sequence[float]]] = {change: [] for change in changes}
        with self._bar(None, title, "measurement", total=len(changes) * len(batches)) as bar:
            for number, batch in enumerate(batches):
                prefix = f"{_digest(reference)} {_batch_digest(batch)} {number}"
                names = {change: f"{prefix} {change.index}.{change.part}={change.sparsity}" for change in changes}
                missing = sorted(change for change, name in names.items() if name not in self._journal)
                bar.update(len(changes) - len(missing))
                if missing:
                    with self._running():
                        for change, values in self._replay(reference, missing, batch):
                            self._journal.put(names[change], values)
                            bar.update()
                for change, name in names.items():
                    sums[change].append(self._journal[name])
        return {change: _mean(values, batches) for change, values in sums.items()}

    def _replay(
        self, reference: Recipe, changes: Sequence[Change], batch: ProbeBatch
    ) -> Iterator[tuple[Change, list[float]]]:
        dense = self._dense(batch)
        outputs = self._record(reference, batch)
        for change in changes:
            self._set(change.apply(reference))
            with self._answering(outputs, change.index):
                yield change, self._compare(batch, dense)

    def _record(self, recipe: Recipe, batch: ProbeBatch) -> list[Any]:
        """What each layer returns under ``recipe``."""
        outputs: list[Any] = [None] * len(self.layers)

        def keep(index: int):
            def hook(module, args, output):
                outputs[index] = output

            return hook

        handles = [layer.module.register_forward_hook(keep(layer.index)) for layer in self.layers]
        try:
            self._set(recipe)
            self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @contextmanager
    def _answering(self, outputs: Sequence[Any], below: int) -> Iterator[None]:
        """The layers before ``below`` return what the last of them returned before."""
        modules = [layer.module for layer in self.layers[:below]]
        before = [module.__dict__.get("forward") for module in modules]
        try:
            for module in modules:
                module.forward = lambda *args, **kwargs: outputs[below - 1]
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = forward

    def _set(self, recipe: Recipe) -> None:
        for index, runtime in self._state.runtimes.items():
            runtime.sparsity = recipe[index]
        if self._stand_ins:
            self._estimator.compensation = {
                index: self._stand_ins[index, sparsity.mlp] for index, sparsity in enumerate(recipe) if sparsity.mlp
            }

    @contextmanager
    def _running(self) -> Iterator[None]:
        model, hooked = self._state.model, self._state.hooked
        with torch.no_grad(), training_flags(model, self._state.backend_name == "unsloth"):
            for module in hooked:
                module.training = True
            yield

    def _dense(self, batch: ProbeBatch) -> Tensor:
        self._set(self.dense)
        return self._forward(batch)

    def _compare(self, batch: ProbeBatch, dense: Tensor) -> list[float]:
        """Sums over the positions of one batch: loss and divergence of the recipe that is set."""
        sparse = self._forward(batch)
        loss = F.nll_loss(sparse, batch.labels.to(sparse.device), reduction="sum")
        return [loss.item(), F.kl_div(sparse, dense, reduction="sum", log_target=True).item()]

    def _forward(self, batch: ProbeBatch) -> Tensor:
        """Log-probabilities ``[n, vocab]`` of one batch's loss-bearing rows, fp32."""
        model, rows = self._state.model, batch.partition.loss
        head = model.get_output_embeddings()

        def narrow(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0]
            return (hidden.flatten(0, -2).index_select(0, rows.to(hidden.device))[None], *args[1:])

        handle = head.register_forward_pre_hook(narrow)
        try:
            context = SparseContext(batch.partition, scale=1.0 if batch.partition.num_context else 0.0)
            logits = model(**batch.inputs, use_cache=False, **{CONTEXT_ARGUMENT: context}).logits
        finally:
            handle.remove()
        if logits.shape[:-1] != (1, len(rows)):
            raise CalibrationError(
                f"The model's output head was not called once with every token (logits {list(logits.shape)} for "
                f"{len(rows)} loss-bearing positions), so its loss cannot be measured."
            )
        return logits[0].float().log_softmax(-1)

    def _bar(self, items, title: str, unit: str, **options):
        return tqdm(items, desc=title, unit=unit, disable=None if self._progress else True, **options)


@contextmanager
def attached(model: nn.Module, config: SparsityConfig) -> Iterator[SparsityState]:
    """``model`` attached with ``config`` inside, and as it was before afterwards.

    Raises:
        CalibrationError: it is attached already.
        AttachError: a part that the configuration makes sparse has no sparse path.
    """
    if get_state(model) is not None:
        raise CalibrationError("This model is attached already; call detach(model) first, then calibrate it.")
    attach(model, config)
    try:
        yield get_state(model)
    finally:
        detach(model)


def _mean(sums: Sequence[Sequence[float]], batches: Sequence[ProbeBatch]) -> Measured:
    positions = sum(len(batch.partition.loss) for batch in batches)
    return Measured(*(sum(column) / positions for column in zip(*sums, strict=True)))


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(repr([tuple(sparsity) for sparsity in recipe]).encode()).hexdigest()[:12]


def _batch_digest(batch: ProbeBatch) -> str:
    ids = batch.inputs.get("input_ids")
    text = repr(None if ids is None else (tuple(ids.shape), ids.flatten().tolist()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
