"""Tests what needs no GPU in the scripts of long sequences and of several GPUs: plans, batches, tables."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sparse_unsloth.bench.shapes import Shape, make_batch
from sparse_unsloth.tokens.partition import TokenPartition

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("batch", "packed", "shape"), [(4, 64, (1, 64)), (6, 64, (2, 48)), (5, 32, (5, 16)), (1, 8, (1, 16))]
)
def test_packed_documents_fill_rows_and_keep_their_roles(batch, packed, shape):
    padded = make_batch(Shape(batch, 16, 3), 100, 0, "cpu")
    found = make_batch(Shape(batch, 16, 3, packed=packed), 100, 0, "cpu")
    assert tuple(found["input_ids"].shape) == shape
    assert torch.equal(found["input_ids"].flatten(), padded["input_ids"].flatten())
    layout = {name: found[name] for name in ("position_ids", "packed_seq_lengths")}
    ours = TokenPartition.from_labels(found["labels"], **layout)
    theirs = TokenPartition.from_labels(padded["labels"])
    assert torch.equal(ours.dense, theirs.dense)
    assert torch.equal(ours.context, theirs.context)


def test_the_plan_of_long_sequences():
    long = load("long_sequence")
    cells = long.plan(
        [8192, 131072], ["unsloth-dense", "sparse-o2"], ["single", "packed", "longest"], ["unsloth", "budget"]
    )
    assert len(set(cells)) == len(cells)
    assert [(cell.layout, cell.method) for cell in cells[:2]] == [("single", "unsloth-dense"), ("single", "sparse-o2")]
    assert all(cell.layout == "single" and cell.tokens == 131072 for cell in cells[-3:]), "the slowest come last"
    assert {cell.method for cell in cells if cell.checkpointing == "budget"} == {"sparse-o2"}
    assert sum(cell.layout == "longest" for cell in cells) == 3
    assert long.plan([8192], ["sparse-o2"], ["packed"], ["none"]) == [long.Cell("packed", "none", "sparse-o2", 8192)]


def row(layout, method, tokens, milliseconds, peak, mode="unsloth", outcome="3 steps", date="2026-01-01"):
    return {
        "date": date, "commit": "abc", "device": "GPU", "versions": "torch=2", "model": "llama8b", "dtype": "4bit",
        "checkpointing": mode, "tiled": "False", "layout": layout, "method": method, "tokens": tokens,
        "median_ms": milliseconds, "p20_ms": milliseconds, "p80_ms": milliseconds, "peak_gib": peak, "outcome": outcome,
    }  # fmt: skip


def test_the_table_of_long_sequences_compares_within_layout_and_length(tmp_path):
    load("long_sequence")
    draw = load("plot_long_sequence")
    rows = [
        row("single", "unsloth-dense", 8192, 900.0, 8.0, date="2025-01-01"),
        row("single", "unsloth-dense", 8192, 800.0, 8.0),
        row("single", "sparse-o2", 8192, 400.0, 6.0),
        row("packed", "sparse-o2", 8192, 320.0, 6.0, mode="budget", outcome="3 steps; 30 layers kept"),
        row("packed", "unsloth-dense", 8192, 640.0, 8.0),
        row("packed", "sparse-o2", 16384, 700.0, 8.0),
        row("packed", "unsloth-dense", 16384, 0.0, 0.0, outcome="out of memory"),
        row("longest", "unsloth-dense", 100_000, 5000.0, 70.0),
        row("longest", "sparse-o2", 150_000, 5000.0, 70.0),
    ]
    text = draw.markdown(rows)
    assert "| single | 8192 | unsloth | no | sparse-o2 | 400 | 20480 | 2.00x | 6.0 | 0.75x | 3 steps |" in text
    assert "| packed | 8192 | budget | no | sparse-o2 | 320 | 25600 | 2.00x | 6.0 | 0.75x | 3 steps; 30 layers" in text
    assert "| packed | 16384 | unsloth | no | sparse-o2 | 700 | 23406 |  | 8.0 |  | 3 steps |" in text
    assert "| packed | 16384 | unsloth | no | unsloth-dense |  |  |  |  |  | out of memory |" in text
    assert "| longest | 150000 | unsloth | no | sparse-o2 | 5000 | 30000 | 1.50x | 70.0 |  | 3 steps |" in text
    assert "900" not in text
    rows[2]["commit"] = "def"
    (tmp_path / "long_sequence-notes.md").write_text("What was found.\n")
    draw.main(tmp_path / "long_sequence.csv", rows)
    text = (tmp_path / "long_sequence.md").read_text()
    assert "| sparse-o2 | 400 | 20480 | 2.00x* | 6.0 | 0.75x | 3 steps |" in text
    assert "commit abc and def" in text
    assert text.index("What was found.") < text.index("| layout |")
    assert (tmp_path / "long_sequence.png").stat().st_size > 1000


def test_the_table_of_several_gpus(tmp_path):
    multi = load("multi_gpu")
    path = tmp_path / "multi_gpu.csv"
    common = {"date": "d", "commit": "c", "device": "H100", "versions": "v", "model": "llama8b", "dtype": "4bit"}
    lines = [",".join(multi.COLUMNS)]
    for method, gpus, took in (
        ("unsloth-dense", 1, 100),
        ("unsloth-dense", 2, 110),
        ("sparse-o2", 1, 50),
        ("sparse-o2", 2, 50),
    ):
        cells = {
            **common, "checkpointing": "unsloth", "engine": "ddp", "method": method, "shape": "wizardlm", "gpus": gpus,
            "tokens": 8192, "median_ms": took, "p20_ms": took, "p80_ms": took, "peak_gib": 7.5,
        }  # fmt: skip
        lines.append(",".join(str(cells[name]) for name in multi.COLUMNS))
    path.write_text("\n".join(lines) + "\n")
    text = multi.table(path)
    assert "| unsloth-dense | wizardlm | 2 | 110.0 | 148945 | 7.50 | 90.9% |  |" in text
    assert "| sparse-o2 | wizardlm | 2 | 50.0 | 327680 | 7.50 | 100.0% | 2.20x |" in text
    assert "| sparse-o2 | wizardlm | 1 | 50.0 | 163840 | 7.50 |  | 2.00x |" in text
    multi.main(["--draw", str(path)])
    assert text in (tmp_path / "multi_gpu.md").read_text()
