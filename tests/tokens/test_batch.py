"""Every layout is read alike, once per forward, and nowhere but in `sparse_unsloth/tokens`."""

import ast
from pathlib import Path

import pytest
import torch

from sparse_unsloth import attach, get_state
from sparse_unsloth.runtime import forward
from sparse_unsloth.tokens.batch import LAYOUTS, Batch, read_batch
from sparse_unsloth.tokens.partition import TokenPartition, partition_of

import classifier_models
from tiny_models import always, loss_and_gradients, make_batch, make_lora

PACKAGE = Path(__file__).resolve().parents[2] / "sparse_unsloth"
LABELS = torch.tensor([[-100, -100, 5, -100, 7, -100, -100]])  # documents of 3, 2 tokens; 2 of padding
IDS = torch.arange(7)[None]
POSITIONS, LENGTHS = torch.tensor([[0, 1, 2, 0, 1, 0, 0]]), torch.tensor([3, 2])
RIGHT, LEFT = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
SHIFTED = torch.tensor([[-100, 5, -100, 7, -100, -100, -100]])

# -- Layouts: arguments, layout, starts of sequences, and rows that are loss tokens, context and padding ---------------

EXPECTED = {
    "padded right": ({"attention_mask": RIGHT}, "padded", [0], [1, 2, 3, 4], [0], [5, 6]),
    "padded left": ({"attention_mask": LEFT}, "padded", [0, 2], [1, 2, 3, 4], [5, 6], [0]),
    "no mask": ({}, "padded", [0], [1, 2, 3, 4], [0, 5, 6], []),
    "positions": ({"position_ids": POSITIONS}, "position_ids", [0, 3, 5, 6], [1, 2, 3, 4], [0], [5, 6]),
    "flat positions": ({"position_ids": POSITIONS[0]}, "position_ids", [0, 3, 5, 6], [1, 2, 3, 4], [0], [5, 6]),
    "lengths": ({"packed_seq_lengths": LENGTHS}, "packed_seq_lengths", [0, 3, 5], [1, 2, 3, 4], [0], [5, 6]),
    "lengths and positions": (
        {"packed_seq_lengths": LENGTHS.int(), "position_ids": torch.arange(7)},
        "packed_seq_lengths", [0, 3, 5], [1, 2, 3, 4], [0], [5, 6],
    ),
    "running sums": (
        {"cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32), "max_length_q": 3},
        "cu_seq_lens_q", [0, 3, 5], [1, 2, 3, 4], [0], [5, 6],
    ),
    "running sums and positions": (
        {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "position_ids": POSITIONS},
        "position_ids", [0, 3, 5, 6], [1, 2, 3, 4], [0], [5, 6],
    ),
    "part of a sequence": (
        {"shift_labels": SHIFTED.roll(-1), "position_ids": torch.arange(7, 14), "attention_mask": RIGHT},
        "shift_labels", [0], [0, 2, 4], [1, 3], [5, 6],
    ),
}  # fmt: skip


def rows(mask):
    return mask.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("given", [{"input_ids": IDS}, {"inputs_embeds": torch.zeros(1, 7, 4)}], ids=["ids", "embeds"])
@pytest.mark.parametrize("expected", EXPECTED.values(), ids=EXPECTED)
def test_layouts(expected, given):
    arguments, layout, starts, *roles = expected
    arguments = {"labels": LABELS, "use_cache": False, **given, **arguments}
    batch = read_batch(arguments)
    assert batch.layout == layout
    assert batch.is_packed == (layout in ("packed_seq_lengths", "cu_seq_lens_q"))
    assert batch.is_context_parallel == (layout == "shift_labels")
    assert batch.lengths is None or batch.lengths.tolist() == [3, 2]
    assert rows(batch.sequence_starts) == starts
    assert batch.sequence_starts is batch.sequence_starts
    partition = TokenPartition.from_batch(batch)
    assert [part.tolist() for part in (partition.dense, partition.context, partition.padding)] == roles
    assert batch.without_labels == {name: value for name, value in arguments.items() if name != "labels"}
    moved = batch.to(torch.device("meta"))
    assert moved.labels.is_meta
    assert moved.arguments["use_cache"] is False
    assert not batch.labels.is_meta


def test_a_document_whose_first_token_is_labelled():
    """No token of the document before it bears its loss, however the documents are told apart."""
    labels = torch.tensor([[-100, 5, 6, 7]])
    for told in ({"packed_seq_lengths": [2, 2]}, {"cu_seq_lens_q": [0, 2, 4]}, {"position_ids": [0, 1, 0, 1]}):
        batch = read_batch({"labels": labels, **{name: torch.tensor(value) for name, value in told.items()}})
        assert TokenPartition.from_batch(batch).loss.tolist() == [0, 2]
    assert TokenPartition.from_batch(Batch(labels)).loss.tolist() == [0, 1, 2]


def test_without_labels():
    batch = read_batch({"input_ids": IDS, "attention_mask": LEFT})
    assert batch.labels is None
    assert batch.layout == "padded"
    assert rows(batch.sequence_starts) == [0, 2]
    assert read_batch({"use_cache": True}).inputs is None


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.rand(2, 3)], ids=["one label", "several labels"])
def test_classification_labels(labels):
    ids = torch.tensor([[4, 5, 6, 2], [4, 5, 2, 2]])
    batch = read_batch({"input_ids": ids, "labels": labels, "attention_mask": (ids != 2).long()})
    assert rows(batch.sequence_starts) == [0, 4]
    partition = partition_of(classifier_models.make_classifier(), batch)
    assert [part.tolist() for part in (partition.dense, partition.context)] == [[2, 5], [0, 1, 4]]


def test_a_changed_batch_has_the_same_tensors_as_its_arguments():
    batch = read_batch({"input_ids": IDS, "labels": LABELS, "packed_seq_lengths": LENGTHS, "use_cache": True})
    assert rows(batch.sequence_starts) == [0, 3, 5]
    changed = batch.changed(packed_seq_lengths=torch.tensor([4, 3]))
    assert rows(changed.sequence_starts) == [0, 4]
    assert changed.arguments["packed_seq_lengths"] is changed.packed_seq_lengths
    assert (changed.labels, changed.arguments["use_cache"]) == (LABELS, True)
    assert batch.arguments["packed_seq_lengths"] is LENGTHS


# -- Once, and in one place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("config", [always(explain_steps=1), {"backward_rows": 0.25}], ids=["channels", "rows"])
def test_a_batch_is_read_once_in_a_forward(config, positional, monkeypatch):
    model, batch, read = make_lora(), make_batch(), []
    attach(model, {**config, "start_step": 0, "end_step": 1.0})
    get_state(model).begin_training("test", 10)
    monkeypatch.setattr(forward, "read_batch", lambda arguments: read.append(arguments) or read_batch(arguments))
    for number in range(1, 4):
        get_state(model).set_step(number - 1)
        if positional:
            model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss.backward()
        else:
            loss_and_gradients(model, batch)
        assert len(read) == number
        assert read[-1]["input_ids"] is batch["input_ids"]
    assert get_state(model).counts.sparse_forwards == 3
    model.eval()(**batch)
    assert len(read) == 3, "an evaluation has no roles to read"


KEYS = {*LAYOUTS, "attention_mask", "labels", "seq_lengths"}
EXCEPTIONS = {
    "backends/unsloth/attention.py": "hands a layer's arguments on to Unsloth's attention",
    "layer/attention.py": "hands a layer's arguments on to transformers' attention",
    "layer/probe.py": "hands a layer's arguments on to its reference",
    "exact/loss.py": "shift_labels is a flag of Unsloth's fused loss",
    "bench/checks.py": "makes its own batches",
    "bench/models.py": "makes its own batches",
    "bench/reference.py": "an independent reference, for batches that bench makes",
    "data/columns.py": "columns of a data set",
    "data/ledger.py": "columns of a data set",
    "forecast/tokens.py": "columns of a data set",
    "evaluation/glue.py": "columns of a data set",
    "study/classification.py": "trains plain models on samples of its own",
    "training/run.py": "columns of a data set",
}


def readers(package: Path) -> list[str]:
    """Where a file outside `tokens` names one of `KEYS`, unless to make a batch (``{key: 1}``, ``batch[key] = 1``)."""
    found = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if name.startswith("tokens/"):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        makes = {key for node in nodes if isinstance(node, ast.Dict) for key in node.keys}
        makes |= {node.slice for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)}
        found += [
            f"{name}:{node.lineno}: {node.value}"
            for node in nodes
            if isinstance(node, ast.Constant) and node.value in KEYS and node not in makes
        ]
    return found


def test_nothing_else_reads_a_batch():
    found = readers(PACKAGE)
    assert {line.partition(":")[0] for line in found} == EXCEPTIONS.keys(), found


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("mask = kwargs.get('attention_mask')", True),
        ("labels = batch['labels'][:, 1:]", True),
        ("lengths = kwargs.pop('packed_seq_lengths', None)", True),
        ("given = {name: kwargs.get(name) for name in ('position_ids', 'input_ids')}", True),
        ("packed = 'packed_seq_lengths' in kwargs", True),
        ("model(**{'labels': labels, **kwargs})", False),
        ("batch['labels'] = labels", False),
        ("rows = batch.labels, batch.get('past_key_values')", False),
    ],
)
def test_a_reader_is_found(tmp_path, code, reads):
    for folder in ("tokens", "runtime"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "planted.py").write_text(f"def f(batch, kwargs, labels):\n    {code}\n")
    assert [line.partition(":")[0] for line in readers(tmp_path)] == ["runtime/planted.py"] * reads
