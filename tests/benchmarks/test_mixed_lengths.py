"""Tests arms on micro-batches of all lengths: shared processes, failures, warming up."""

import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sparse_unsloth.bench import runs, speed
from sparse_unsloth.bench.arms import FLAT, PADDED
from sparse_unsloth.bench.processes import Budget, Parent
from sparse_unsloth.bench.table import read_table

from tiny_models import make_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mixed(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_mixed_lengths", ROOT / "benchmarks" / "mixed_lengths.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_mixed_lengths_and_shapes_share_processes(mixed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "device_name", lambda: "A GPU")
    monkeypatch.setattr(runs, "why_not_installed", lambda arm: None)
    started = []

    def run(self, process, command, take):
        started.append((process.arms, process.methods))
        args = mixed.parse([*command[2:], *process.words()])
        assert command[:2] == [sys.executable, mixed.__file__]
        for name, plan in mixed.plans_of(args).items():
            for piece in plan.left():
                if mixed.is_of(piece, args):
                    slow = 4.0 if piece["arm"] == "stock" else 2.0 if piece["arm"] else 1.0
                    figures = {"round_s": slow} if name == "mixed" else {"median_ms": 100 * slow}
                    take({"table": name, "row": piece | figures | {"peak_gib": 5.0}})
        return None

    monkeypatch.setattr(Parent, "run", run)
    words = ["--model", "m", "--out", str(tmp_path), "--steps", "10", "--arms", "stock,skip-max", "--layouts", "flat"]
    words += ["--methods", "rows-25", "--shapes", "host"]
    assert mixed.main(words) == 0
    assert started == [(("stock",), ()), ((), ("rows-25",)), (("skip-max",), ())]
    printed = capsys.readouterr().out
    assert "| 4 | 10 | rows-25 | flat | 100.0 | 4.00x | 2.00x | skip-max | 5.0 |  |" in printed
    assert "| 16 | 10 | stock | flat | 400.0 | 1.00x | 0.50x | skip-max | 5.0 |  |" in printed
    assert "| host | rows-25 | padded | 100.0 | 4.00x | 2.00x | skip-max | 5.0 |  |" in printed
    assert mixed.main([*words, "--methods", "rows-25,rows-10"]) == 0
    assert started[3:] == [((), ("rows-10",))]
    rows = read_table(tmp_path / "mixed_lengths.csv", mixed.COLUMNS)
    assert len({one["run"] for one in rows}) == 1
    assert [one["over_best_arm"] for one in rows if one["method"] == "rows-10"] == ["2.000", "2.000"]
    capsys.readouterr()
    assert mixed.main(["--out", str(tmp_path), "--table"]) == 0
    assert capsys.readouterr().out.count("| rows-10 | flat | 100.0 | 4.00x | 2.00x | skip-max | 5.0 |") == 2


def test_micro_batches_of_a_failing_arm_are_rows_too(mixed, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "check_arm", lambda model, arm: "well")
    monkeypatch.setattr(mixed, "replan_arm", lambda *_: None)
    monkeypatch.setattr(mixed, "arm_notes", lambda *_: "32 of 32 layers compiled")
    model, rows = make_lora(hidden_size=32, intermediate_size=64), []

    def measure(model, piece, batches):
        assert ("packed_seq_lengths" in batches[0]) == (piece["layout"] == FLAT)
        assert len(batches) == 3
        if piece["documents"] == "16":
            raise torch.OutOfMemoryError if piece["arm"] == "stock" else RuntimeError("broken")
        return {"round_s": 0.3, "recorded_share": 0, "kinds": 0, "recording_s": 0, "warmup_s": 1, "peak_gib": 1,
                "used_gib": 1}  # fmt: skip

    monkeypatch.setattr(mixed, "measure", measure)
    words = ["--model", "m", "--out", str(tmp_path), "--steps", "3", "--arms", "stock,padded,block-graphs"]
    args = mixed.parse([*words, "--methods", ""])
    mixed.time_all(model, mixed.plans_of(args)["mixed"].left(), rows.append, Budget(None), set())
    found = [(one["arm"], one["documents"], one.get("round_s"), one["note"][:40]) for one in rows]
    assert found == [
        ("stock", "4", 0.3, "32 of 32 layers compiled"),
        ("stock", "16", None, "out of memory"),
        ("padded", "4", 0.3, "32 of 32 layers compiled"),
        ("padded", "16", None, "NOT TIMED: RuntimeError: broken"),
        ("block-graphs", "4", None, "not there: Unsloth compiles no layer her"),
        ("block-graphs", "16", None, "not there: Unsloth compiles no layer her"),
    ]


def test_rounds_of_an_arm_warm_up_before_one_counts(mixed, monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 3 * 2**30))
    model = make_lora(hidden_size=32, intermediate_size=64)
    for layout, seconds, counted, rounds in (
        (FLAT, [9.0, 3.0, 1.0], 3.0, 2),
        (PADDED, [9.0, 3.0, 1.0, 5.0], 1.0, 3),
        (PADDED, [3.0, 9.0, 4.0, 3.1], 3.1, 4),
    ):
        left, frozen = iter(seconds), []

        def round_of(*_, left=left, frozen=frozen):
            frozen.append(gc.get_freeze_count() > 0)  # as in the trainer that users run
            return next(left), 0

        monkeypatch.setattr(mixed, "round_of", round_of)
        found = mixed.measure(model, {"arm": "padded", "layout": layout}, [{}] * 4)
        assert (found["round_s"], found["warmup_s"]) == (counted, sum(seconds[: rounds - 1]))
        assert found["used_gib"] == 2
        assert (frozen, gc.get_freeze_count()) == ([True] * rounds, 0)
