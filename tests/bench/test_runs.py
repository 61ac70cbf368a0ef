"""Tests a bench of several arms and methods: failures, resumption, omissions, and what a child times."""

import gc
import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

from sparse_unsloth.bench import arms, runs, speed
from sparse_unsloth.bench.arms import FLAT, PADDED, STOCK, arm_of
from sparse_unsloth.bench.processes import MARK, Parent
from sparse_unsloth.bench.shapes import Shape
from sparse_unsloth.bench.table import COLUMNS, SPEED, append_rows, read_table, with_ratios
from sparse_unsloth.cli import bench, main

from tiny_models import make_lora

ROOT = Path(__file__).resolve().parents[2]
NODE = "host-7"
DATE = "2026-11-30T06:00:00+00:00"


@pytest.fixture(autouse=True)
def node(monkeypatch):
    monkeypatch.setattr(runs.platform, "node", lambda: NODE)


def row(arm="", method="unsloth-dense", ms=100.0, **changes):
    made = dict.fromkeys(COLUMNS, "") | {
        "date": DATE, "commit": "abc", "device": "A GPU", "model": "llama8b", "dtype": "4bit", "shape": "wizardlm",
        "checkpointing": "unsloth", "tokens": "8192", "p20_ms": str(ms), "p80_ms": str(ms), "peak_gib": "8.0",
        "median_ms": str(ms), "layout": PADDED, "run": f"{DATE} {NODE}", "arm": arm, "method": method,
    }  # fmt: skip
    return made | changes


# -- The bench, its children stood in for -----------------------------------------------------------------------------

STAND_IN = """
import json, sys
words = sys.argv[1:]
last = lambda name: words[len(words) - 1 - words[::-1].index(name) + 1]
arms, methods = last("--arms"), last("--methods")
if "skip-max" in arms:
    sys.exit("Unsloth: cannot do that\\nRuntimeError: no layers")
TIMES = {"stock": 300.0, "padded": 200.0, "block-graphs": 250.0, "rows-25": 100.0, "no-checkpointing": 220.0}
for name in [*arms.split(","), *methods.split(",")]:
    if name:
        arm = name if name in arms else ""
        for shape in last("--shapes").split(","):
            print(MARK + json.dumps({"table": "speed", "row": {
                "model": "m", "dtype": last("--dtype"), "arm": arm, "method": "unsloth-dense" if arm else name,
                "layout": "flat" if name in ("stock", "no-checkpointing") else "padded", "tokens": "8192",
                "checkpointing": "False" if name == "no-checkpointing" else "unsloth", "shape": shape,
                "median_ms": TIMES[name], "p20_ms": 1.0, "p80_ms": 1.0, "peak_gib": 8.0, "warmup_s": 3.0, "note": "",
            }}), flush=True)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose children are stand-ins; what they were asked for."""
    started = []
    file = tmp_path / "child.py"
    file.write_text(f"MARK = {MARK!r}\n{STAND_IN}")
    true = Parent.run

    def run(self, process, command, take):
        started.append((process.arms, process.methods))
        return true(self, process, command, take)

    monkeypatch.setattr(Parent, "run", run)
    monkeypatch.setattr(bench, "own_command", lambda words: [sys.executable, str(file), *words])
    monkeypatch.setattr(bench, "device_name", lambda: "A GPU")
    monkeypatch.setattr(bench, "model_shape", lambda model: None)
    monkeypatch.setattr(
        runs, "why_not_installed", lambda arm: "not there: old" if arm.lora.get(arms.SKIP) == "auto" else None
    )
    return started


WORDS = ["--model", "m", "--dtype", "4bit", "--shapes", "wizardlm,math10k", "--methods", "rows-25"]


def test_a_failing_arm_becomes_a_row_and_the_bench_goes_on(gpu, tmp_path, capsys):
    words = [*WORDS, "--out", str(tmp_path / "speed.csv"), "--arms", "stock,padded,skip-max,skip-auto,no-checkpointing"]
    assert main(["bench", *words]) == 1
    assert gpu == [(("stock", "padded"), ()), ((), ("rows-25",)), (("skip-max",), ()), (("no-checkpointing",), ())]
    rows = [one for one in read_table(tmp_path / "speed.csv", COLUMNS) if one["shape"] == "wizardlm"]
    found = {one["arm"] or one["method"]: one for one in rows}
    assert {name: (one["median_ms"], one["over_stock"], one["over_best_arm"]) for name, one in found.items()} == {
        "stock": ("300.0", "1.000", "0.667"),
        "padded": ("200.0", "1.500", "1.000"),
        "skip-max": ("", "", ""),
        "skip-auto": ("", "", ""),
        "no-checkpointing": ("220.0", "1.364", "0.909"),
        "rows-25": ("100.0", "3.000", "2.000"),
    }
    assert found["skip-max"]["note"] == "failed: the process ended with exit code 1: RuntimeError: no layers"
    assert found["skip-auto"]["note"] == "not there: old"
    assert {(one["device"], one["best_arm"]) for one in rows} == {("A GPU", "padded"), ("A GPU", "")}
    assert found["stock"]["torch"] == arms.version_of("torch")
    printed = capsys.readouterr().out
    assert "| wizardlm | rows-25 | padded | 100.0 | 3.00x | 2.00x | padded | 8.0 |  |" in printed
    assert "rows-25              math10k       3.00x the speed of stock, 2.00x of the best arm (padded)" in printed


def test_a_call_goes_on_where_the_one_before_stopped(gpu, tmp_path, capsys, monkeypatch):
    words = ["bench", *WORDS, "--out", str(tmp_path / "speed.csv"), "--arms", "stock,padded"]
    assert main([*words, "--seconds", "20", "--date", DATE]) == 1  # too short to begin anything
    assert read_table(tmp_path / "speed.csv", COLUMNS) == []
    assert "stopped, the time is up: 6 times are left; call again to go on" in capsys.readouterr().out
    assert main([*words, "--methods", "", "--date", DATE]) == 0
    gpu.clear()
    assert main([*words, "--seconds", "500", "--date", "2026-11-30T07:30:00+00:00"]) == 0
    assert gpu == [((), ("rows-25",))]
    rows = read_table(tmp_path / "speed.csv", COLUMNS)
    assert {one["run"] for one in rows} == {f"{DATE} {NODE}"}
    assert [one["over_best_arm"] for one in rows if one["method"] == "rows-25"] == ["2.000", "2.000"]
    capsys.readouterr()
    monkeypatch.undo()  # no GPU is needed for it
    assert main(["bench", "--out", str(tmp_path / "speed.csv"), "--table"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Run {DATE} {NODE}: A GPU, m in 4bit, Unsloth ")
    assert printed.count("| rows-25 | padded | 100.0 | 3.00x | 2.00x | padded |") == 2
    assert main(["bench", "--out", str(tmp_path / "speed.csv"), "--table", "--run", "x"]) == 2
    assert "has no run x" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"device": "Another GPU"},
        {"commit": "older"},
        {"versions": "torch=2.13"},
        {"run": f"{DATE} another-host"},
        {"run": "of the user's"},
        {},
    ],
)
def test_what_was_measured_elsewhere_is_another_run(tmp_path, change):
    common = {"commit": "abc-dirty", "device": "A GPU", "versions": ""}  # the table is one of the repository's files
    args = bench.parse(["--model", "llama8b", "--shapes", "wizardlm", "--arms", "stock", "--methods", "rows-25"])
    plan = runs.Plan(tmp_path / "speed.csv", SPEED, runs.pieces_of(args, speed.cases_of(args)))
    append_rows(plan.path, [row("stock", layout=FLAT) | change])
    begun = f"{DATE} {NODE}"
    later, too_late = "2026-11-30T07:59:00+00:00", "2026-11-30T08:01:00+00:00"
    assert runs.run_to_resume([plan], common, later) == (f"{later} {NODE}" if change else begun)
    assert runs.run_to_resume([plan], common, too_late) == f"{too_late} {NODE}"
    if not change:  # all of it is there
        append_rows(plan.path, [row(method="rows-25", median_ms="", note="out of memory")])
        assert runs.run_to_resume([plan], common, later) == f"{later} {NODE}"


def test_arms_are_timed_once_for_further_runs(gpu, tmp_path, capsys):
    """The arms of a dtype are those of all its runs, whatever the checkpointing of the methods."""
    words = [*WORDS, "--out", str(tmp_path / "speed.csv"), "--arms", "stock,padded"]
    main(["bench", *words, "--then", "--checkpointing", "False", "--then", "--dtype", "bf16", "--methods", ""])
    assert gpu == [
        (("stock", "padded"), ()), ((), ("rows-25",)), ((), ("rows-25",)), (("stock", "padded"), ())
    ]  # fmt: skip
    assert len({one["run"] for one in read_table(tmp_path / "speed.csv", COLUMNS)}) == 1


def test_arms_are_drawn_beside_the_methods_of_their_run(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmarks_plot_speed", ROOT / "benchmarks" / "plot_speed.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    table = tmp_path / "speed.csv"
    rows = [
        row(method="rows-25", ms=999.0, run="older", date="2026-11-29T06:00:00+00:00"),
        row("padded", ms=999.0, run="older", date="2026-11-29T06:00:00+00:00"),
        row(method="rows-25", ms=100.0),
        row("no-checkpointing", ms=200.0, layout=FLAT, checkpointing="False"),
        row(method="rows-25", ms=125.0, layout=FLAT),
        row(STOCK, ms=300.0, layout=FLAT),
        row("skip-max", median_ms="", note="out of memory"),
    ]
    append_rows(table, with_ratios(rows, SPEED))
    draw.main([str(table)])
    text = (tmp_path / "speed.md").read_text()
    prefix = "| wizardlm "
    assert [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)] == [
        "| no-checkpointing | 200.0 | 200.0 to 200.0 | 40960 | 8.00 | 1.00 | 1.50x | 1.00x |  |  |  |",
        "| stock | 300.0 | 300.0 to 300.0 | 27307 | 8.00 |  |  | 0.67x |  |  |  |",
        "| rows-25 | 100.0 | 100.0 to 100.0 | 81920 | 8.00 | 1.00 | 3.00x | 2.00x |  | 1.52x | 197% |",
        "| rows-25 (flat) | 125.0 | 125.0 to 125.0 | 65536 | 8.00 | 1.00 | 2.40x | 1.60x |  | 1.52x | 157% |",
    ]
    assert text.count("## A GPU") == 1


def test_wrong_words(capsys):
    for words, message in (
        ("--model m --arms quick", "there is no arm quick"),
        ("--model m --layouts wide", "--layouts names wide; layouts are flat and padded"),
        ("--shapes all", "bench needs --model"),
    ):
        assert main(["bench", *words.split()]) == 2
        assert message in capsys.readouterr().err


# -- A child ----------------------------------------------------------------------------------------------------------


def test_a_child_times_what_its_process_has_left(monkeypatch, tmp_path, capsys):
    """Each arm in its layout, checked first, planned anew for each shape; one that fails does not end the others."""
    steps, events = [], []
    model = make_lora(hidden_size=32, intermediate_size=64)
    monkeypatch.setattr(
        runs, "load_arm", lambda args, arm, length: events.append(("load", dict(arm.lora), length)) or model
    )
    monkeypatch.setattr(
        speed.Stepper, "__call__", lambda self: steps.append(gc.get_freeze_count() > 0 and self.shape) or 7.0
    )
    monkeypatch.setattr(speed.torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(speed, "replan_arm", lambda arm, model, *size: events.append(("plan", *size)))
    monkeypatch.setattr(speed, "arm_notes", lambda arm, model: f"ran {arm.layout}")

    def check_arm(model, arm):
        events.append(("check", arm.layout))
        if arm.layout == PADDED:
            raise RuntimeError("no triton\nat all")
        return "as it should be"

    monkeypatch.setattr(speed, "check_arm", check_arm)
    table = tmp_path / "speed.csv"
    append_rows(table, [row(STOCK, layout=FLAT, model="m", shape="math10k")])
    before = signal.getsignal(signal.SIGTERM)
    words = ["--model", "m", "--shapes", "math10k,wizardlm,host", "--out", str(table), "--run", f"{DATE} {NODE}"]
    try:
        assert main(["bench", *words, "--child", "--arms", "stock,padded", "--methods", "", "--warmup", "0"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert events == [
        ("load", {}, 2048), ("check", FLAT), ("plan", 4, 2048), ("plan", 1, 256), ("check", PADDED)
    ]  # fmt: skip
    assert steps == [Shape(4, 2048, 512, 8192)] * (speed.WARM_ARM + 8) + [Shape(1, 256, 64, 256)] * (speed.WARM_ARM + 8)
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line[len(MARK) :]) for line in printed if line.startswith(MARK)]
    assert {one["table"] for one in rows} == {"speed"}
    found = [(one["row"]["arm"], one["row"]["shape"], one["row"].get("median_ms"), one["row"]["note"]) for one in rows]
    assert found == [
        ("stock", "wizardlm", 7.0, "ran flat"),
        ("stock", "host", 7.0, "ran flat"),
        *(("padded", shape, None, "NOT TIMED: RuntimeError: no triton") for shape in ("math10k", "wizardlm", "host")),
    ]


def test_arms_are_checked_on_batches_of_their_layout(monkeypatch):
    """Padded ones run the layers that Unsloth compiles, flat ones do not; both have the same exact step."""
    from sparse_unsloth.bench import checks

    model, seen = make_lora(hidden_size=32, intermediate_size=64), []
    true = checks.loss_and_gradients

    def step(model, seed, make):
        seen.append(make(100, seed, torch.device("cpu")))
        return true(model, seed)

    monkeypatch.setattr(checks, "loss_and_gradients", step)
    for name in ("stock", "padded"):
        assert "from float32's" in speed.check_arm(model, arm_of(name))
    flat, padded = seen
    assert (flat["input_ids"].shape, padded["input_ids"].shape) == ((1, 512), (2, 256))
    assert flat["packed_seq_lengths"].tolist() == [256, 256]
    assert torch.equal(flat["input_ids"].flatten(), padded["input_ids"].flatten())
    assert torch.equal(flat["labels"].flatten(), padded["labels"].flatten())
    monkeypatch.setattr(checks, "loss_and_gradients", lambda *_: (1.0, {}))
    with pytest.raises(checks.CheckFailed):
        speed.check_arm(model, arm_of("stock"))
