"""Tests rows of arms: both ratios, the report, older tables."""

import csv

import pytest

from sparse_unsloth.bench.arms import FLAT, LIGER, PADDED, STOCK
from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.bench.table import (
    COLUMNS,
    SPEED,
    append_rows,
    read_rows,
    read_table,
    report,
    table_of_run,
    with_ratios,
)
from sparse_unsloth.errors import ConfigError

NODE = "host-7"
DATE = "2026-11-30T06:00:00+00:00"


def row(arm="", method="unsloth-dense", ms=100.0, **changes):
    made = dict.fromkeys(COLUMNS, "") | {
        "date": DATE, "commit": "abc", "device": "A GPU", "model": "llama8b", "dtype": "4bit", "shape": "wizardlm",
        "checkpointing": "unsloth", "tokens": "8192", "p20_ms": str(ms), "p80_ms": str(ms), "peak_gib": "8.0",
        "median_ms": str(ms), "layout": PADDED, "run": f"{DATE} {NODE}", "arm": arm, "method": method,
    }  # fmt: skip
    return made | changes


def test_every_row_has_both_ratios():
    rows = [
        row(STOCK, ms=300.0, layout=FLAT),
        row("padded", ms=200.0),
        row("skip-max", ms=240.0, layout=FLAT),
        row("block-graphs", median_ms="", note="failed: RuntimeError: no"),
        row(method="rows-25", ms=100.0),
        row(method="rows-25", ms=400.0, checkpointing="False"),
        row(method="rows-25", ms=50.0, run="another"),
        row(method="rows-25", ms=50.0, shape="math10k"),
        row(method="rows-25", ms=50.0, dtype="bf16"),
    ]
    found = with_ratios(rows, SPEED)
    assert [(one["over_stock"], one["over_best_arm"], one["best_arm"]) for one in found] == [
        ("1.000", "0.667", "padded"),
        ("1.500", "1.000", "padded"),
        ("1.250", "0.833", "padded"),
        ("", "", ""),
        ("3.000", "2.000", "padded"),
        ("0.750", "0.500", "padded"),
        *[("", "", "")] * 3,
    ]
    text = table_of_run(found[:5], SPEED)
    assert text.splitlines()[2:] == [
        "| wizardlm | stock | flat | 300.0 | 1.00x | 0.67x | padded | 8.0 |  |",
        "| wizardlm | padded | padded | 200.0 | 1.50x | 1.00x | padded | 8.0 |  |",
        "| wizardlm | skip-max | flat | 240.0 | 1.25x | 0.83x | padded | 8.0 |  |",
        "| wizardlm | block-graphs | padded |  |  |  |  | 8.0 | failed: RuntimeError: no |",
        "| wizardlm | rows-25 | padded | 100.0 | 3.00x | 2.00x | padded | 8.0 |  |",
    ]


def test_the_report_names_stock_and_the_best_arm(tmp_path):
    table = tmp_path / "speed.csv"
    rows = [row(STOCK, ms=300.0, layout=FLAT), row("padded", ms=200.0), row(method="rows-25", ms=100.0)]
    append_rows(table, with_ratios(rows, SPEED))
    line = report(read_rows(table, arms=True), LLAMA_3_8B, ["rows-25"])
    assert "3.00x the speed of stock, 2.00x of the best arm (padded), " in line
    assert line.count("\n") == 0
    # What fits step times sees the padded arm as the dense method that it is, and no other arm.
    assert [(one["method"], one["median_ms"]) for one in read_rows(table)] == [("unsloth-dense", 200), ("rows-25", 100)]


def test_peft_with_liger_is_the_baseline_without_stock():
    rows = [
        row("peft", "peft-dense", ms=400.0),
        row(LIGER, "peft-dense", ms=300.0),
        row(method="peft-rows-25", ms=100.0),
    ]
    rows = [one | {"median_ms": float(one["median_ms"]), "peak_gib": 8.0, "tokens": 8192} for one in rows]
    assert "3.00x the speed of liger, " in report(rows, LLAMA_3_8B, ["peft-rows-25"])
    stock = row(STOCK, ms=150.0) | {"median_ms": 150.0, "peak_gib": 8.0, "tokens": 8192}
    assert "1.50x the speed of stock, " in report([*rows, stock], LLAMA_3_8B, ["peft-rows-25"])


def test_a_table_gets_columns_that_were_added_at_its_end(tmp_path):
    table = tmp_path / "speed.csv"
    append_rows(table, [row(method="rows-10")])
    more = (*COLUMNS, "further")
    append_rows(table, [row() | {"further": "x"}], more)
    assert [one["further"] for one in read_table(table, more)] == ["", "x"]
    with pytest.raises(ConfigError, match="other columns"):
        read_table(table, COLUMNS)


def test_the_limit_is_that_of_the_baseline():
    """Stock Unsloth recomputes, our method without checkpointing does not."""
    rows = [
        row(STOCK, median_ms=300.0, peak_gib=8.0, tokens=8192),
        row(method="rows-25", median_ms=100.0, peak_gib=8.0, tokens=8192, checkpointing="False"),
    ]
    stock, ours = speed_compare(rows)
    assert stock.limit is None
    assert ours.limit == pytest.approx(1.5 * speed_compare([row(**PLAIN), *rows[1:]])[1].limit, rel=0.1)


PLAIN = {"median_ms": 300.0, "peak_gib": 8.0, "tokens": 8192, "checkpointing": "False"}


def speed_compare(rows):
    from sparse_unsloth.bench.table import compare

    return compare(rows, LLAMA_3_8B)


def test_a_table_without_arms_gets_their_columns(tmp_path):
    table = tmp_path / "speed.csv"
    old = {name: text for name, text in row(method="rows-10").items() if name in COLUMNS[:14]}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS[:14])
        writer.writeheader()
        writer.writerow(old)
    assert read_table(table, COLUMNS) == [dict.fromkeys(COLUMNS, "") | old]
    append_rows(table, [row("padded")])
    assert read_table(table, COLUMNS) == [dict.fromkeys(COLUMNS, "") | old, row("padded")]
    assert [one["method"] for one in read_rows(table)] == ["rows-10", "unsloth-dense"]
    assert not list(tmp_path.glob("*.new"))
