"""The loss of a model under any recipe, by the same sparse forward that trains, without gradients and dropout."""

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
from tqdm.auto import tqdm

from sparse_unsloth.attachment import attach, detach, get_state
from sparse_unsloth.autosparsity.journal import Journal
from sparse_unsloth.channels.estimator import Estimator
from sparse_unsloth.channels.selector import ChannelSelector
from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import CalibrationError
from sparse_unsloth.model.decoder_layer import DecoderLayer
from sparse_unsloth.model.training_flags import training_flags
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT, SparseContext
from sparse_unsloth.runtime.state import SparsityState
from sparse_unsloth.tokens.batch import read_batch
from sparse_unsloth.tokens.partition import TokenPartition
from sparse_unsloth.utils.tensor_file import raw_bytes

MAX_POSITIONS = 1024
"""Of a batch, at most so many loss-bearing positions, evenly spaced: their log-probabilities are kept."""


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


def with_sparsity(recipe: Recipe, parts: Iterable[tuple[int, str]], sparsity: float) -> Recipe:
    """``recipe`` with another sparsity for some parts, ``(layer index, field of LayerSparsity)``."""
    changed = list(recipe)
    for index, part in parts:
        changed[index] = changed[index]._replace(**{part: sparsity})
    return tuple(changed)


@dataclass(frozen=True)
class ProbeBatch:
    """A batch on the model's device, its roles, the loss-bearing rows ``[n]`` that are looked at, and their labels."""

    inputs: dict[str, Any]
    partition: TokenPartition
    rows: Tensor
    labels: Tensor

    @functools.cached_property
    def digest(self) -> str:
        """Of everything that decides its losses."""
        digest = hashlib.sha256()
        for name, value in sorted({**self.inputs, "labels": self.labels, "rows": self.rows}.items()):
            content = raw_bytes(value) if isinstance(value, Tensor) else repr(value).encode()
            digest.update(f"{name} {list(getattr(value, 'shape', ()))}".encode() + content)
        return digest.hexdigest()[:12]


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
    have no dropout: there every flag is that of training.) A recipe that differs from another needs the layers from the
    first difference on only: those below answer with what they gave under the other one.

    Args:
        state: of the model, attached with every candidate part sparse.
        estimator: covers every candidate part.
        journal: what was measured before, and is measured now.
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
        """``(layer index, "mlp" | "self_attn")`` of all that can be made sparse."""
        return self._candidates

    @property
    def dense(self) -> Recipe:
        return (LayerSparsity(0.0, 0.0),) * len(self.layers)

    def measure(
        self, recipes: Sequence[Recipe], batches: Sequence[ProbeBatch], title: str, reference: Recipe | None = None
    ) -> list[Measured]:
        """What each of ``recipes`` gives on ``batches``.

        Args:
            reference: recipes near this one (None: the dense model) need only the layers from the first that differs.
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
        outputs, dense = self._record(self.dense, batch)
        if reference != self.dense:
            outputs, _ = self._record(reference, batch)
        for name in sorted(recipes, key=lambda name: (first[name], name)):
            self._set(recipes[name])
            with self._answering(outputs, first[name]):
                sparse = self._forward(batch)
            loss = F.nll_loss(sparse, batch.labels.to(sparse.device), reduction="sum")
            yield name, [loss.item(), F.kl_div(sparse, dense, reduction="sum", log_target=True).item()]

    def _record(self, recipe: Recipe, batch: ProbeBatch) -> tuple[list[Any], Tensor]:
        """What each layer returns under ``recipe``, and the log-probabilities."""
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

    @contextmanager
    def _running(self) -> Iterator[None]:
        model, hooked = self._state.model, self._state.hooked
        with torch.no_grad(), training_flags(model, self._state.backend.name == "unsloth"):
            for module in hooked:
                module.training = True
            yield

    def _forward(self, batch: ProbeBatch) -> Tensor:
        """Log-probabilities ``[n, vocab]`` of one batch's loss-bearing rows, fp32."""
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
                f"{len(rows)} loss-bearing positions), so its loss cannot be measured."
            )
        return logits[0].float().log_softmax(-1)

    def _bar(self, title: str, total: int):
        return tqdm(total=total, desc=title, unit="forward", disable=None if self._progress else True)


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
    positions = sum(len(batch.labels) for batch in batches)
    return Measured(*(sum(column) / positions for column in zip(*sums, strict=True)))


def _first_difference(reference: Recipe, recipe: Recipe) -> int:
    """The layer below which both recipes are alike; the last one where they are alike throughout."""
    pairs = zip(reference, recipe, strict=True)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(recipe) - 1)


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(repr([tuple(sparsity) for sparsity in recipe]).encode()).hexdigest()[:12]
