"""Counts the tokens of the micro-batches that a recipe will train on.

TRL makes these micro-batches itself, around a stand-in for the model: it applies template, loss setting, truncation and
packing to the data whatever the model is, so no weights are needed. They come from its data loader, in training order.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_unsloth.data.ledger import drop_without_loss, no_loss
from sparse_unsloth.errors import DataError
from sparse_unsloth.planning.work import PACKED, PADDED, PADDING_FREE, MicroBatch
from sparse_unsloth.tokens.batch import Batch, read_batch
from sparse_unsloth.tokens.partition import IGNORE_INDEX, TokenPartition
from sparse_unsloth.utils.progress import bar

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from sparse_unsloth.training.recipe import Recipe

PADDED_FAMILIES = ("gemma2", "gpt_oss")
"""Families whose batches Unsloth pads where nothing is said; all others it trains padding-free."""


@dataclass(frozen=True)
class Spread:
    """Mean, percentiles and maximum of a count of tokens."""

    mean: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> Spread:
        import numpy

        p10, p50, p90, p99 = (float(value) for value in numpy.percentile(counts, (10, 50, 90, 99)))
        return cls(sum(counts) / len(counts), p10, p50, p90, p99, max(counts))


@dataclass(frozen=True)
class TokenStatistics:
    """The tokens of a data set, counted under one template, loss setting and layout.

    Attributes:
        layout: "padded", "padding-free" or "packed".
        dataset_samples, samples: samples in the data set, and how many of them were read.
        dropped: samples that are not trained because ``max_length`` leaves no label in them (unpacked layouts only).
        without_loss: samples that are trained and have no label.
        truncated: samples as long as ``max_length``, so most likely cut.
        length, output: tokens of a sample, and those of them that have a label.
        context_share: context tokens over all tokens that are not padding.
        context, dense, padding: context, loss and padding tokens of all micro-batches.
        micro_batches: how many; ``rows``: tokens of one, on average.
    """

    layout: str
    dataset_samples: int
    samples: int
    dropped: int
    without_loss: int
    truncated: int
    length: Spread
    output: Spread
    context: int
    dense: int
    padding: int
    micro_batches: int

    @property
    def context_share(self) -> float:
        return self.context / (self.context + self.dense)

    @property
    def rows(self) -> float:
        return (self.context + self.dense + self.padding) / self.micro_batches

    def share(self, role: str) -> float:
        """The share of "context", "dense" or "padding" among all tokens, padding included."""
        return getattr(self, role) / (self.context + self.dense + self.padding)


def read_tokens(
    recipe: Recipe, data: Dataset, tokenizer: Any, backend: str, model_type: str, samples: int | None
) -> tuple[list[MicroBatch], TokenStatistics]:
    """The micro-batches of one epoch, or of a sample of it, and their statistics.

    Args:
        recipe: the training; its data arguments are not read.
        data: from `load_dataset_for`.
        tokenizer: the model's.
        backend: "unsloth" or "peft"; Unsloth trains padding-free unless told otherwise.
        model_type: from the model's configuration.
        samples: the most samples to read, drawn by the recipe's seed; None for all.

    Raises:
        DataError: the data set is empty, TRL cannot prepare it, or no sample has a label.
    """
    total = len(data)
    if total == 0:
        raise DataError(f"{recipe.data.dataset_name}: the data set is empty; there is nothing to train on.")
    if samples is not None and total > samples:
        data = data.shuffle(seed=recipe.training.seed).select(range(samples))
    looked_at = len(data)
    padding_free = is_padding_free(recipe, backend, model_type)
    with _stand_in_trainer(recipe.training, data, tokenizer, backend) as trainer:
        prepared = trainer.train_dataset
        if len(prepared) == 0:
            raise no_loss(recipe.data.dataset_name, looked_at, recipe.training.max_length)
        drop_without_loss(trainer, "train_dataset")
        prepared = trainer.train_dataset
        documents = list(_documents(prepared))
        if not any(outputs for _, outputs in documents):
            raise no_loss(recipe.data.dataset_name, looked_at, recipe.training.max_length)
        # An incomplete last batch would count as much as a complete one.
        trainer.args.dataloader_drop_last = len(prepared) >= recipe.training.per_device_train_batch_size
        if padding_free:
            trainer.data_collator = dataclasses.replace(trainer.data_collator, padding_free=True)
        batches = [
            _count(read_batch(batch), recipe.sparsity.dense_tokens, padding_masked=backend != "unsloth")
            for batch in bar(trainer.get_train_dataloader(), "Counting tokens", "batch")
        ]
    packed = recipe.training.packing
    lengths = [length for length, _ in documents]
    limit = recipe.training.max_length
    return batches, TokenStatistics(
        layout=PACKED if packed else PADDING_FREE if padding_free else PADDED,
        dataset_samples=total,
        samples=looked_at,
        dropped=0 if packed else looked_at - len(prepared),
        without_loss=sum(outputs == 0 for _, outputs in documents),
        truncated=sum(length == limit for length in lengths),
        length=Spread.of(lengths),
        output=Spread.of([outputs for _, outputs in documents]),
        context=sum(batch.context for batch in batches),
        dense=sum(batch.dense for batch in batches),
        padding=sum(batch.padding for batch in batches),
        micro_batches=len(batches),
    )


def is_padding_free(recipe: Recipe, backend: str, model_type: str) -> bool:
    """Whether unpacked micro-batches are flattened into one sequence: by default with Unsloth, else on request.

    False with packing, whose layout TRL's strategy decides.
    """
    if recipe.training.packing:
        return False
    if backend != "unsloth" or "padding_free" in recipe.given:
        return bool(recipe.training.padding_free)
    return model_type not in PADDED_FAMILIES


@contextlib.contextmanager
def _stand_in_trainer(training: SFTConfig, data: Dataset, tokenizer: Any, backend: str) -> Iterator[SFTTrainer]:
    """TRL's trainer of a tiny model, with ``data`` prepared as for the real training."""
    import torch
    from jinja2 import TemplateError
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTTrainer

    changes = {
        "activation_offloading": False, "dataloader_num_workers": 0, "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None, "eval_strategy": "no", "gradient_checkpointing": False, "loss_type": "nll",
        "model_init_kwargs": None, "report_to": [], "torch_compile": False, "use_cpu": True, "use_liger_kernel": False,
    }  # fmt: skip
    arguments = copy.copy(training)
    if backend == "unsloth" and not training.packing:
        # Unsloth decides the layout itself there, and TRL's check of max_length does not run.
        changes["padding_free"] = False
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), _quiet():
        for name, value in {**changes, "output_dir": folder}.items():
            setattr(arguments, name, value)
        config = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        )
        try:
            trainer = SFTTrainer(
                LlamaForCausalLM(config), arguments, train_dataset=data, processing_class=copy.deepcopy(tokenizer)
            )
        except (ValueError, RuntimeError, KeyError, TypeError, TemplateError) as error:
            raise DataError(f"TRL cannot prepare this data set: {error}") from error
        yield trainer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings about the stand-in model, which never runs."""
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _documents(prepared: Dataset) -> Iterator[tuple[int, int]]:
    """``(tokens, tokens with a label)`` of each sample; packed ones are split where their lengths are known."""
    for row in prepared:
        labels = row["labels"]
        start = 0
        for length in row.get("seq_lengths") or [len(labels)]:
            part = labels[start : start + length]
            yield length, sum(label != IGNORE_INDEX for label in part)
            start += length


def _count(batch: Batch, dense_tokens: str, padding_masked: bool) -> MicroBatch:
    return MicroBatch.of(TokenPartition.from_batch(batch, dense_tokens, padding_masked), batch)
