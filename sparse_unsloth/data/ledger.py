"""Counts what happens to every sample and column of a data set, so that nothing is left out silently."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparse_unsloth.data.json_rows import decode
from sparse_unsloth.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    from datasets import Dataset

logger = logging.getLogger(__name__)

TRAINING, HELD_OUT = "training", "held-out"
WITHOUT_LOSS = "without a loss token within max_length"
TWO_BEGINNINGS = (
    "the token that begins a sequence stands there twice: the text has it, and the tokenizer adds it. Take it out of "
    "the text, or out of the chat template"
)
NO_END = (
    "no special token ends the text, so that the model does not learn to stop. Let the chat template, or the text "
    "itself, end in the end-of-sequence token (TRL adds it to columns called text and completion, Unsloth to the last)"
)
UNKNOWN_TOKENS = "the tokenizer does not know part of the text, and puts its unknown token there"
MANY_REASONS = 5


@dataclass
class Split:
    """The samples of one split.

    Attributes:
        read: the number of samples that were read from the file or the hub's split.
        left_out: the number of samples that are not trained, by reason.
        notes: the number of samples with a change or a remark, by its text.
        set_aside: samples held out for evaluation, and those beyond ``dataset_size``.
        kept: samples that are trained or evaluated.
        cut: samples as long as ``max_length``, so most likely truncated.
    """

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    set_aside: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    cut: int = 0

    def add_notes(self, notes: Iterable[str | None]) -> None:
        """Counts notes; each is one line or several."""
        self.notes.update(line for note in notes if note for line in note.split("\n"))

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read, "left_out": dict(self.left_out.most_common()), "changed": dict(self.notes.most_common()),
            **self.set_aside, "kept": self.kept, "as_long_as_max_length": self.cut,
        }  # fmt: skip


@dataclass
class Ledger:
    """What happened to the samples and columns of one run's data; written to the log and to ``metrics.json``.

    Attributes:
        dataset: its name.
        splits: "training" and, where there is one, "held-out".
        used: the columns that samples are made of, by their role.
        unused: all other columns.
        others: further lines of the log.
    """

    dataset: str = ""
    splits: dict[str, Split] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set, repr=False)

    def split(self, name: str) -> Split:
        return self.splits.setdefault(name, Split())

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for ``metrics.json``; ``facts`` are the lines of the log."""
        return {
            **{name: split.as_dict() for name, split in self.splits.items()},
            "columns": {"used": self.used, "not_used": self.unused},
            "facts": [line for _, line in self._facts()],
        }

    def log(self) -> None:
        """Logs one line for each fact that was not logged yet."""
        from sparse_unsloth.utils.distributed import is_main

        if not is_main():
            return
        for level, line in self._facts():
            if line not in self._told:
                self._told.add(line)
                logger.log(level, "%s: %s", self.dataset, line)

    def _facts(self) -> Iterator[tuple[int, str]]:
        if self.used:
            made = "; ".join(f"{role} from {' and '.join(columns)}" for role, columns in self.used.items())
            # The columns in use are named where unused ones are left over.
            yield logging.WARNING if self.unused else logging.INFO, f"columns used: {made}"
        if self.unused:
            yield logging.WARNING, f"columns not used: {', '.join(self.unused)}"
        yield from ((logging.WARNING, line) for line in self.others)
        for name, split in self.splits.items():
            where = "" if name == TRAINING else f"{name} split: "
            reasons = Counter({reason: count for reason, count in split.left_out.items() if reason != WITHOUT_LOSS})
            if reasons:
                yield logging.WARNING, f"{where}{left_out(reasons, split.read)}"
            if dropped := split.left_out[WITHOUT_LOSS]:
                yield logging.WARNING, f"{where}{without_loss(dropped, dropped + split.kept)}"
            if split.cut:
                yield logging.WARNING, f"{where}{most_likely_cut(split.cut, split.kept)}"
            for note, count in split.notes.most_common():
                yield logging.WARNING, f"{where}{count:,} of {split.read:,} samples: {note}"


def left_out(reasons: Counter[str], samples: int) -> str:
    """Formats ``312 of 4,800 samples left out: 290 longer than max_length, 22 without an answer``."""
    told = [f"{count:,} {reason}" for reason, count in reasons.most_common(MANY_REASONS)]
    others = reasons.most_common()[MANY_REASONS:]
    if others:
        told.append(f"{sum(count for _, count in others):,} for {len(others)} other reasons (see metrics.json)")
    return f"{sum(reasons.values()):,} of {samples:,} samples left out: {', '.join(told)}"


def without_loss(dropped: int, samples: int) -> str:
    """Returns the warning of `estimate` and `train` about samples whose loss tokens `max_length` cuts away."""
    return (
        f"{dropped} of {samples} samples are left out: they have no loss token within max_length. Raise "
        "max_length, or shorten the prompts."
    )


def most_likely_cut(cut: int, samples: int) -> str:
    return (
        f"{cut} of {samples} samples are as long as max_length, so most likely cut: what is cut off is answer, unless "
        "truncation_mode says otherwise."
    )


def no_loss(dataset: str, samples: int, max_length: int | None, split: str = TRAINING) -> DataError:
    """Returns the error of `estimate` and `train` for a split without a loss token."""
    which = "" if split == TRAINING else f"{split} "
    return DataError(
        f"{dataset}: none of {samples} {which}samples has a loss token. Either the prompts alone fill max_length "
        f"({max_length}), so that truncation leaves no answer: raise max_length; or no token has a label: look at the "
        "answer column, the chat template and completion_only_loss / assistant_only_loss."
    )


# -- Before TRL: rows into samples ------------------------------------------------------------------------------------

Outcome = tuple[dict[str, Any] | None, str | None, str | None]
"""``(sample, why it is left out, notes on changes)``; an unchanged sample is the row itself."""
LONG = "longer than max_length"
_NOTES_COLUMN = "sparse_unsloth: told"


@dataclass(frozen=True)
class Reading:
    """How the rows of a split become samples.

    Attributes:
        read: reads one row; None passes every row.
        fits: whether a sample is short enough; None accepts every length.
        made, gone: the features of the columns that ``read`` makes, and the columns that are removed; without features
            all are inferred.
        used, unused: columns, see `Ledger`.
        encoded: columns that hold JSON text in the rows; ``read`` gets the parsed values of the used ones.
        version: to be raised when the same rows give other samples, so that cached samples are not reused.
    """

    read: Callable[[dict[str, Any]], Outcome] | None = None
    fits: Callable[[dict[str, Any]], bool] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    used: dict[str, list[str]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    encoded: frozenset[str] = frozenset()
    version: int = 2

    def sample(self, row: dict[str, Any]) -> Outcome:
        """Reads one row into a sample, ignoring its length."""
        if to_decode := self.encoded.difference(self.unused):
            row = {**row, **{name: decode(row[name]) for name in to_decode}}
        return (row, None, None) if self.read is None else self.read(row)

    def outcome(self, row: dict[str, Any]) -> Outcome:
        """Reads one row into a sample; a sample that is too long is left out."""
        sample, reason, note = self.sample(row)
        if reason is None and self.fits is not None and not self.fits(sample):
            reason = LONG
        return sample, reason, note

    def samples(self, data: Dataset, split: Split) -> Dataset:
        """Makes and counts the samples of ``data``. The decision on each row is cached with the data."""
        from datasets import Features, Value

        split.read += len(data)
        to_decode = self.encoded.difference(self.unused)
        if (self.read is None and self.fits is None and not to_decode) or len(data) == 0:
            return data

        def decide(row: dict[str, Any]) -> dict[str, Any]:
            sample, reason, note = self.outcome(row)
            return {"reason": reason, "note": note, "changed": reason is None and sample is not row}

        kinds = Features({"reason": Value("string"), "note": Value("string"), "changed": Value("bool")})
        decided = data.map(decide, remove_columns=data.column_names, features=kinds, desc="Reading samples")
        reasons = decided["reason"][:]
        split.left_out.update(reason for reason in reasons if reason is not None)
        split.add_notes(note for note, reason in zip(decided["note"][:], reasons, strict=True) if reason is None)
        if any(reason is not None for reason in reasons):
            data = data.select([index for index, reason in enumerate(reasons) if reason is None])
        if not any(decided["changed"][:]):
            return data
        features = None
        if self.made:
            from datasets import Json

            stay = {name: kind for name, kind in data.features.items() if name not in self.gone}
            stay |= {name: Json() for name in to_decode if name in stay}
            features = Features(stay | self.made)
        return data.map(
            lambda row: self.sample(row)[0],
            remove_columns=data.column_names,
            features=features,
            desc="Making samples",
        )

    def stream(self, rows: Any, size: int, split: Split) -> Iterator[dict[str, Any]]:
        """Yields the first ``size`` samples of ``rows``, each with a JSON note on the rows left out before it.

        ``split`` counts too, in case no sample is left; otherwise `counted` replaces its counts. Columns whose values
        differ in their schema are written as JSON.
        """
        held, kept = None, 0
        left: Counter[str] = Counter()
        told = {"used": self.used, "unused": self.unused}
        shapeless = [name for name, kind in self.made.items() if _is_shapeless(kind)]
        for row in rows:
            sample, reason, note = self.outcome(row)
            if reason is not None:
                left[reason] += 1
                split.left_out[reason] += 1
                continue
            sample = {name: value for name, value in sample.items() if name not in self.unused}
            if held is not None:
                yield {**held, _NOTES_COLUMN: json.dumps(told)}
                told = {}
            texts = {name: json.dumps(sample[name], default=str) for name in shapeless if name in sample}
            held, kept = {**sample, **texts}, kept + 1
            told |= {"left": left, "note": note, "json": list(texts)}
            left = Counter()
            if kept == size:
                break
        if held is not None:
            yield {**held, _NOTES_COLUMN: json.dumps(told | {"behind": left})}


def counted(data: Dataset, ledger: Ledger, split: Split) -> Dataset:
    """Moves the notes that `Reading.stream` wrote from the samples into ``split``; returns the bare samples."""
    import datasets

    if _NOTES_COLUMN not in data.column_names:
        return data
    split.left_out.clear()
    all_told = [json.loads(told) for told in data[_NOTES_COLUMN]]
    for told in all_told:
        split.left_out.update(told["left"])
        split.left_out.update(told.get("behind", {}))
        split.add_notes([told["note"]])
    split.read = len(data) + split.left_out.total()
    first = all_told[0]
    ledger.used, ledger.unused = ledger.used or first["used"], ledger.unused or first["unused"]
    data = data.remove_columns(_NOTES_COLUMN)
    shapeless = sorted({name for told in all_told for name in told["json"]})
    if not shapeless:
        return data
    turns = datasets.List(datasets.Json())
    kinds = {name: datasets.Json() if name in ("tools", "chat_template_kwargs") else turns for name in shapeless}
    return data.map(
        lambda row: {name: json.loads(row[name]) for name in shapeless},
        features=datasets.Features({**data.features, **kinds}),
    )


def _is_shapeless(kind: Any) -> bool:
    import datasets

    return hasattr(datasets, "Json") and isinstance(getattr(kind, "feature", kind), datasets.Json)


# -- After TRL: the samples that it prepared --------------------------------------------------------------------------


def settle(trainer: Any, ledger: Ledger, max_length: int | None) -> None:
    """Counts the samples that TRL prepared, removes rows without a loss token, and logs every fact.

    Args:
        trainer: an ``SFTTrainer`` before its training.
        ledger: the ledger of its data.
        max_length: the recipe's; Unsloth changes the trainer's.

    Raises:
        DataError: a split has no loss token at all.
    """
    arguments = trainer.args
    packed_too = arguments.packing if arguments.eval_packing is None else arguments.eval_packing
    for name, attribute, packed in (
        (TRAINING, "train_dataset", arguments.packing),
        (HELD_OUT, "eval_dataset", packed_too),
    ):
        found = drop_without_loss(trainer, attribute) if name in ledger.splits else None
        if found is None:
            continue
        split, (lengths, documents, rows) = ledger.split(name), found
        given = split.kept
        if not rows.any():
            raise no_loss(ledger.dataset, given, max_length, name)
        split.notes.update(_token_notes(trainer, attribute, packed, max_length))
        if not packed or arguments.packing_strategy == "bfd":  # every document is a sample
            split.kept = int(documents.sum())
            if given > split.kept:
                split.left_out[WITHOUT_LOSS] += given - split.kept
            if max_length is not None:
                split.cut = int((lengths[documents] == max_length).sum())
        elif not rows.all():
            split.notes[f"{(~rows).sum()} of {len(rows)} packed rows hold no loss token and are left out"] = given
    ledger.log()


def _token_notes(trainer: Any, attribute: str, packed: bool, max_length: int | None) -> dict[str, int]:
    """Counts samples with a double beginning of sequence, without an end of sequence, or with unknown tokens, by note.

    Samples as long as ``max_length`` were probably truncated, so a missing end is not counted for them.
    """
    import numpy

    data, tokenizer = getattr(trainer, attribute), getattr(trainer.processing_class, "tokenizer", None)
    tokenizer = trainer.processing_class if tokenizer is None else tokenizer
    begin, unknown, end = tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id
    if packed and ("seq_lengths" not in data.column_names or trainer.args.packing_strategy != "bfd"):
        return {}  # documents are cut, and joined
    special = {
        *tokenizer.all_special_ids,
        *(i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special),
    }
    special = numpy.asarray(sorted(special - ({begin, unknown} - {end})), int)
    found: Counter[str] = Counter()
    for table in data.with_format("arrow").iter(1000):
        ids = numpy.asarray(table["input_ids"].combine_chunks().flatten())
        column = table["seq_lengths"].combine_chunks().flatten() if packed else None
        sizes = numpy.asarray(table["input_ids"].combine_chunks().value_lengths() if column is None else column)
        last = sizes.cumsum()
        sizes, last = sizes[sizes > 1], last[sizes > 1]
        first = last - sizes
        if begin is not None and begin != end:
            found[TWO_BEGINNINGS] += int(((ids[first] == begin) & (ids[first + 1] == begin)).sum())
        # After the token that ends a turn templates may write a line break.
        ends = numpy.isin(ids[last[:, None] - numpy.minimum([1, 2, 3], sizes[:, None])], special).any(1)
        found[NO_END] += int((~ends & (sizes < (max_length or sizes + 1))).sum())
        if unknown is not None and unknown not in (begin, end, tokenizer.pad_token_id):
            total = numpy.concatenate([[0], (ids == unknown).cumsum()])
            found[UNKNOWN_TOKENS] += int((total[last] > total[first]).sum())
    return {note: count for note, count in found.items() if count}


def drop_without_loss(trainer: Any, attribute: str) -> tuple[numpy.ndarray, ...] | None:
    """Removes rows without a loss token from a trainer's data: the mean loss of a batch of them would be NaN.

    Returns:
        Tokens of each document, whether each document has a loss token, whether each row has one; None where rows are
        tokenised during training.
    """
    data = getattr(trainer, attribute)
    labels = None if data is None else _label_columns(trainer, data)
    if labels is None:
        return None
    lengths, documents, rows = _loss_tokens(data, labels)
    if not rows.all():
        setattr(trainer, attribute, data.select(rows.nonzero()[0]))
    return lengths, documents, rows


def _label_columns(trainer: Any, data: Any) -> list[str] | None:
    """Returns the columns that mark loss tokens; [] where all tokens are; None where rows are tokenised later."""
    from datasets import Dataset

    if not isinstance(data, Dataset) or "input_ids" not in data.column_names:
        return None
    if "labels" in data.column_names:
        return ["labels"]
    masks = ["completion_mask"] if getattr(trainer, "completion_only_loss", True) else []
    return [name for name in (*masks, "assistant_masks") if name in data.column_names]


def _loss_tokens(data: Dataset, labels: list[str]) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Returns ``(tokens of each document, whether each document has a loss token, whether each row has one)``.

    Packed rows hold several documents. No token predicts the first token of a document, so its label does not count.
    """
    import numpy

    is_packed = "seq_lengths" in data.column_names
    columns = ["input_ids", *labels, *(["seq_lengths"] if is_packed else [])]
    arrow = data.select_columns(columns).with_format("arrow")
    lengths, documents, rows = [numpy.zeros(0, int)], [numpy.zeros(0, bool)], [numpy.zeros(0, bool)]
    for table in arrow.iter(1000):
        sizes = numpy.asarray(table["input_ids"].combine_chunks().value_lengths())
        bears = numpy.ones(sizes.sum(), bool)
        for name in labels:
            values = numpy.asarray(table[name].combine_chunks().flatten())
            bears &= values != -100 if name == "labels" else values != 0
        parts = numpy.asarray(table["seq_lengths"].combine_chunks().flatten()) if is_packed else sizes
        ends = parts.cumsum()
        bears[(ends - parts)[parts > 0]] = False
        total = numpy.concatenate([[0], bears.cumsum()])
        lengths.append(parts)
        documents.append(total[ends] > total[ends - parts])
        ends = sizes.cumsum()
        rows.append(total[ends] > total[ends - sizes])
    return numpy.concatenate(lengths), numpy.concatenate(documents), numpy.concatenate(rows)
