"""Measures the loss of a model under any recipe by the masked forward of training, without gradients and dropout."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_unsloth.attachment import attach, detach, get_state
from sparse_unsloth.autosparsity.journal import Journal
from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import CalibrationError
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.model.training_flags import training_mode
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.tokens.partition import TokenPartition
from sparse_unsloth.utils.progress import bar
from sparse_unsloth.utils.tensor_file import raw_bytes

MAX_POSITIONS = 1024
"""Of a batch, at most so many loss positions, evenly spaced: their log-probabilities are kept."""


Recipe = tuple[LayerSparsity, ...]
"""The sparsity of every layer."""


class Measured(NamedTuple):
    """Means over loss positions, in nats: the loss of the labels, and the divergence from the dense model.

    The divergence ``KL(dense || sparse)`` is the expected increase of the loss on answers sampled from the dense model.
    It is positive and has little noise: one sparse layer changes the loss of SmolLM2-135M's few hundred answer tokens
    by -0.17 to 0.05 irregularly, while its divergence grows from 0.002 with the sparsity.
    """

    loss: float
    divergence: float


def with_sparsity(recipe: Recipe, parts: Iterable[tuple[int, str]], sparsity: float) -> Recipe:
    """``recipe`` with another sparsity for some parts, ``(layer index, field of LayerSparsity)``."""
    changed = list(recipe)
    for index, part in parts:
        changed[index] = changed[index]._replace(**{part: sparsity})
    return tuple(changed)


@dataclass(frozen=True)
class ProbeBatch:
    """A batch on the model's device, its token roles, the loss positions ``[n]`` that are used, and their labels."""

    inputs: dict[str, Any]
    partition: TokenPartition
    rows: Tensor
    labels: Tensor

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything that decides the batch's losses."""
        digest = hashlib.sha256()
        for name, value in sorted({**self.inputs, "labels": self.labels, "rows": self.rows}.items()):
            content = raw_bytes(value) if isinstance(value, Tensor) else repr(value).encode()
            digest.update(f"{name} {list(getattr(value, 'shape', ()))}".encode() + content)
        return digest.hexdigest()[:12]


def prepare_batches(
    samples: Sequence[Mapping[str, Any]], device: torch.device, config: SparsityConfig, padding_masked: bool = True
) -> list[ProbeBatch]:
    """The samples that have loss positions.

    Raises:
        CalibrationError: no samples, one without labels, none with a loss position, or none with a context
            token.
    """
    samples = list(samples)
    if not samples:
        raise CalibrationError("There are no samples to measure losses on; the data set is empty.")
    batches = []
    for number, sample in enumerate(samples):
        batch = read_batch(sample).to(device)
        if batch.labels is None:
            raise CalibrationError(
                f"Sample batch {number} has no labels (its keys: {', '.join(sample) or 'none'}), so it has no loss. "
                "Pass batches as the trainer's collator makes them."
            )
        partition = TokenPartition.from_batch(batch, config.dense_tokens, padding_masked)
        if len(partition.loss):
            rows = partition.loss[:: -(-len(partition.loss) // MAX_POSITIONS)]
            batches.append(ProbeBatch(batch.without_labels, partition, rows, batch.labels.flatten()[rows + 1]))
    if not batches:
        raise CalibrationError(
            f"None of the {len(samples)} sample batches has a loss position, so no loss can be measured: every "
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
    """Measures losses of an attached model under recipes, which it sets by writing each layer's sparsity.

    The model stays in evaluation mode; only hooked modules, whose training flag makes them sparse, are in training
    mode. (Under Unsloth, whose forwards differ in evaluation and have no dropout, every module is.) For a recipe that
    differs from a reference, layers below the first difference return their stored output.

    Args:
        state: of the model, attached with every candidate part sparse.
        estimator: covers every candidate part.
        journal: stores the measurements.
    """

    def __init__(self, state: SparsityState, estimator: Estimator | None, journal: Journal, progress: bool = True):
        self.layers: list[DecoderLayer] = state.layers
        self._state = state
        self._journal, self._progress = journal, progress
        self._candidates = state.expected_parts()
        if state.selector is None:
            state.estimator = estimator
            state.selector = ChannelSelector(state.config, state.layers, estimator)

    @property
    def candidates(self) -> set[tuple[int, str]]:
        """``(layer index, "mlp" | "self_attn")`` of every part that can be made sparse."""
        return self._candidates

    @property
    def dense(self) -> Recipe:
        return (LayerSparsity(0.0, 0.0),) * len(self.layers)

    def measure(
        self, recipes: Sequence[Recipe], batches: Sequence[ProbeBatch], title: str, reference: Recipe | None = None
    ) -> list[Measured]:
        """Measures each of ``recipes`` on ``batches``.

        Args:
            title: the progress bar's title.
            reference: recipes run only the layers from their first difference to this one on; None: the dense model.
        """
        reference = self.dense if reference is None else reference
        sums: list[list[Sequence[float]]] = [[] for _ in recipes]
        with self._bar(title, len(recipes) * len(batches)) as bar:
            for batch in batches:
                names = [f"{_digest(recipe)} {batch.digest}" for recipe in recipes]
                missing = {
                    name: recipe for name, recipe in zip(names, recipes, strict=True) if name not in self._journal
                }
                bar.update(len(recipes) - len(missing))
                if missing:
                    with self._running():
                        for name, values in self._replay(reference, missing, batch):
                            self._journal.put(name, values)
                            bar.update()
                for name, values in zip(names, sums, strict=True):
                    values.append(self._journal[name])
        return [_mean(values, batches) for values in sums]

    def _replay(
        self, reference: Recipe, recipes: Mapping[str, Recipe], batch: ProbeBatch
    ) -> Iterator[tuple[str, list[float]]]:
        first = {name: _first_difference(reference, recipe) for name, recipe in recipes.items()}
        outputs, dense = self._layer_outputs(self.dense, batch)
        if reference != self.dense:
            outputs, _ = self._layer_outputs(reference, batch)
        for name in sorted(recipes, key=lambda name: (first[name], name)):
            self._set(recipes[name])
            with self._stored_outputs(outputs, first[name]):
                sparse = self._forward(batch)
            loss = F.nll_loss(sparse, batch.labels.to(sparse.device), reduction="sum")
            yield name, [loss.item(), F.kl_div(sparse, dense, reduction="sum", log_target=True).item()]

    def _layer_outputs(self, recipe: Recipe, batch: ProbeBatch) -> tuple[list[Any], Tensor]:
        """The output of each layer under ``recipe``, and the log-probabilities."""
        outputs: list[Any] = [None] * len(self.layers)

        def keep(index: int):
            def hook(module, args, output):
                outputs[index] = output

            return hook

        handles = [layer.module.register_forward_hook(keep(layer.index)) for layer in self.layers]
        try:
            self._set(recipe)
            return outputs, self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _stored_outputs(self, outputs: Sequence[Any], below: int) -> Iterator[None]:
        """Makes the layers before layer ``below`` return the stored output of the last of them."""
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

    @contextmanager
    def _running(self) -> Iterator[None]:
        model, hooked = self._state.model, self._state.hooked
        with torch.no_grad(), training_mode(model, self._state.backend.name == "unsloth"):
            for module in hooked:
                module.training = True
            yield

    def _forward(self, batch: ProbeBatch) -> Tensor:
        """Log-probabilities ``[n, vocab]`` at one batch's loss positions, fp32."""
        model, rows = self._state.model, batch.rows
        head = model.get_output_embeddings()

        def narrow(module: nn.Module, args: tuple) -> tuple:
            hidden = args[0]
            return (hidden.flatten(0, -2).index_select(0, rows.to(hidden.device))[None], *args[1:])

        handle = head.register_forward_pre_hook(narrow)
        try:
            context = SparseContext(batch.partition, scale=1.0)
            logits = model(**batch.inputs, use_cache=False, **{CONTEXT_ARGUMENT: context}).logits
        finally:
            handle.remove()
        if logits.shape[:-1] != (1, len(rows)):
            raise CalibrationError(
                f"The model's output head was not called once with every token (logits {list(logits.shape)} for "
                f"{len(rows)} loss positions), so its loss cannot be measured."
            )
        return logits[0].float().log_softmax(-1)

    def _bar(self, title: str, total: int):
        return bar(None, title, "forward", total=total, shown=self._progress)


@contextmanager
def attached(model: nn.Module, config: SparsityConfig) -> Iterator[SparsityState]:
    """Attaches ``model`` with ``config`` inside the context, and detaches it afterwards.

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
    positions = sum(len(batch.labels) for batch in batches)
    return Measured(*(sum(column) / positions for column in zip(*sums, strict=True)))


def _first_difference(reference: Recipe, recipe: Recipe) -> int:
    """The first layer in which the recipes differ; the last layer where they are equal."""
    pairs = zip(reference, recipe, strict=True)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(recipe) - 1)


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(repr([tuple(sparsity) for sparsity in recipe]).encode()).hexdigest()[:12]
