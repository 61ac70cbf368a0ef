"""Unsloth's own arms in the benches: what each sets, processes of their own, both ratios, and arms that fail."""

import argparse
import ast
import csv
import gc
import importlib.util
import inspect
import json
import os
import signal
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from sparse_unsloth.bench import arms, models, processes, runs, speed
from sparse_unsloth.bench.arms import (
    ARMS,
    DEFAULT_ARMS,
    FLAT,
    PADDED,
    STOCK,
    arm_again,
    arm_of,
    arms_of,
    what_ran,
    why_absent,
    why_idle,
)
from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.bench.processes import MARK, STOPPED, Budget, Parent, Process, processes_of, serve, warm_up
from sparse_unsloth.bench.shapes import Shape
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
from sparse_unsloth.cli import bench, main
from sparse_unsloth.errors import ConfigError

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


# -- What an arm is ---------------------------------------------------------------------------------------------------


def test_each_arm_sets_what_unsloth_reads():
    found = arms_of(DEFAULT_ARMS)
    assert list(found) == [
        "stock", "padded", "block-graphs", "skip-max", "skip-auto", "no-checkpointing", "padded+no-checkpointing"
    ]  # fmt: skip
    assert {name: dict(arm.env) for name, arm in found.items() if arm.env} == {
        "block-graphs": {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    }
    assert {name: dict(arm.lora) for name, arm in found.items() if arm.lora} == {
        "skip-max": {"checkpoint_skip_layers": "max"},
        "skip-auto": {"checkpoint_skip_layers": "auto"},
        "no-checkpointing": {"use_gradient_checkpointing": False},
        "padded+no-checkpointing": {"use_gradient_checkpointing": False},
    }
    padded = [name for name, arm in found.items() if arm.layout == PADDED]
    assert padded == ["padded", "block-graphs", "padded+no-checkpointing"]


def test_arms_are_joined():
    joined = arm_of("block-graphs+no-checkpointing")
    assert (joined.layout, joined.env, joined.lora) == (
        PADDED, {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}, {"use_gradient_checkpointing": False}
    )  # fmt: skip
    assert joined.needs == ARMS["block-graphs"].needs
    assert arms_of("") == {}
    with pytest.raises(ConfigError, match="there is no arm quick; arms are stock, padded"):
        arms_of("stock,quick")
    with pytest.raises(ConfigError, match="checkpoint_skip_layers to different values do not go together"):
        arm_of("skip-max+skip-auto")


def test_arms_that_need_the_same_share_a_process():
    methods = ["rows-25", "peft-dense", "dense-graphs"]
    found = processes_of([*arms_of(DEFAULT_ARMS)], methods)
    assert [(one.arms, one.methods) for one in found] == [
        (("stock", "padded"), ()),
        ((), ("rows-25", "dense-graphs")),
        ((), ("peft-dense",)),
        (("block-graphs",), ()),
        (("skip-max",), ()),
        (("skip-auto",), ()),
        (("no-checkpointing", "padded+no-checkpointing"), ()),
    ]
    users = dict.fromkeys(("UNSLOTH_BLOCK_COMPILE_LEGACY", "UNSLOTH_GC_KEEP_LAYERS", "UNSLOTH_BLOCK_CUDAGRAPHS"), "1")
    users |= {"PATH": "p", "UNSLOTH_DISABLE_STATISTICS": "1"}
    stock, graphs, ours = (found[place].environment(users) for place in (0, 3, 1))
    assert stock == {"PATH": "p", "UNSLOTH_DISABLE_STATISTICS": "1"}
    assert graphs == stock | {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    assert ours == users


def test_an_arm_that_this_unsloth_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama.py").write_text("def get_peft_model(model, r=16): ...")
    monkeypatch.setattr(arms, "version_of", lambda package: "2026.10.6")
    assert {name: why_absent(arm_of(name), tmp_path) for name in ARMS} == {
        "stock": None,
        "padded": None,
        "block-graphs": "not there: Unsloth 2026.10.6 has no UNSLOTH_BLOCK_CUDAGRAPHS",
        "skip-max": "not there: Unsloth 2026.10.6 has no checkpoint_skip_layers",
        "skip-auto": "not there: Unsloth 2026.10.6 has no checkpoint_skip_layers",
        "no-checkpointing": None,
    }
    monkeypatch.setattr(arms.importlib.util, "find_spec", lambda name: None)
    assert why_absent(arm_of("stock")) == "not there: Unsloth is not installed"


def test_graphs_without_compiled_layers_are_no_arm(monkeypatch):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x

    model = torch.nn.Sequential(Layer())
    assert why_idle(arm_of("padded"), model) is None
    assert why_idle(arm_of("block-graphs"), model).startswith("not there: Unsloth compiles no layer here (torch ")
    monkeypatch.setattr(Layer.forward, "_unsloth_block_compiled", True, raising=False)
    assert why_idle(arm_of("block-graphs"), model) is None


def test_an_arm_is_loaded_by_unsloth_alone(monkeypatch):
    calls = {}

    def from_pretrained(name, **given):
        calls["load"] = (name, given)
        return model, None

    def get_peft_model(model, **given):
        calls["lora"] = given
        return model

    model = make_lora(hidden_size=32, intermediate_size=64)
    fast = argparse.Namespace(from_pretrained=from_pretrained, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "unsloth", argparse.Namespace(FastLanguageModel=fast))
    args = argparse.Namespace(model="m", dtype="4bit", rank=8)
    expected = {
        "stock": {"use_gradient_checkpointing": "unsloth"},
        "skip-auto": {"use_gradient_checkpointing": "unsloth", "checkpoint_skip_layers": "auto"},
        "padded+no-checkpointing": {"use_gradient_checkpointing": False},
    }
    for name, lora in expected.items():
        loaded = models.load_arm(args, arm_of(name), 4096)
        assert calls["lora"] == {"r": 8, "lora_alpha": 8} | lora
        assert calls["load"] == ("m", {
            "max_seq_length": 4096, "dtype": torch.bfloat16, "load_in_4bit": True,
            "use_gradient_checkpointing": lora["use_gradient_checkpointing"],
        })  # fmt: skip
        assert all(bool(p.any()) for name, p in loaded.named_parameters() if "lora_" in name)
    assert "_sparse_backend" not in model.__dict__


class DemoDecoderLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = True

    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.fixture
def installed(monkeypatch):
    """What the arms read and call of the Unsloth that is installed, its own code, without the rest of it.

    Importing all of Unsloth takes half a minute.
    """
    found = importlib.util.find_spec("unsloth")
    if found is None or why_absent(arm_of("block-graphs+skip-max")):
        pytest.skip("this Unsloth does not have these arms, or is not installed")
    folder = Path(found.origin).parent / "models"
    spec = importlib.util.spec_from_file_location("unsloth.models._block_compile", folder / "_block_compile.py")
    blocks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(blocks)
    names = {"_skip_aware_flag", "_gc_keep_layers_env", "_AutoCheckpointSkip", "skip_checkpointing"}
    names |= {"_size_auto_checkpoint_skip_for_trainer", "_PAIRED_FORWARD_TRAINERS"}
    tree = ast.parse((folder / "_utils.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if names & {getattr(node, "name", ""), *map(target_of, targets_of(node))}]
    utils = types.ModuleType("unsloth.models._utils")
    vars(utils).update(os=os, torch=torch, find_decoder_layers=lambda model: list(model.layers))
    exec(compile(tree, str(folder / "_utils.py"), "exec"), vars(utils))
    assert names <= vars(utils).keys()
    offload = types.SimpleNamespace(CURRENT_GC_INDEX=0, FIRST_PASS=False, LAST_GC_INDEX=32)
    for name, module in {
        "unsloth": types.SimpleNamespace(models=types.SimpleNamespace(_utils=utils, _block_compile=blocks)),
        "unsloth.models": types.SimpleNamespace(_utils=utils, _block_compile=blocks),
        "unsloth.models._block_compile": blocks,
        "unsloth.models._utils": utils,
        "unsloth_zoo": types.SimpleNamespace(gradient_checkpointing=offload),
        "unsloth_zoo.gradient_checkpointing": offload,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("UNSLOTH_GC_KEEP_LAYERS", raising=False)
    return types.SimpleNamespace(blocks=blocks, utils=utils, offload=offload, folder=folder)


def targets_of(node):
    return node.targets if isinstance(node, ast.Assign) else []


def target_of(node):
    return getattr(node, "id", "")


def test_what_compiled_layers_did_is_read_off_the_unsloth_that_is_installed(installed, monkeypatch):
    monkeypatch.setattr(DemoDecoderLayer, "forward", DemoDecoderLayer.forward)  # and back afterwards
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(DemoDecoderLayer() for _ in range(3))
    assert why_idle(arm_of("block-graphs"), model) is not None
    assert what_ran(arm_of("padded"), model) == "no layer compiled"
    blocks = installed.blocks
    blocks._wrap(DemoDecoderLayer, dict(blocks._COMPILE_OPTIONS) | {"triton.cudagraphs": True})
    assert why_idle(arm_of("block-graphs"), model) is None
    for layer, mode in zip(model.layers, (blocks._FULL, blocks._SPLIT, blocks._OFF), strict=True):
        layer.__dict__.update(_unsloth_block_checked=3, _unsloth_block_mode=mode)
    assert what_ran(arm_of("block-graphs"), model) == "2 of 3 layers compiled, CUDA graphs of 0 shapes"
    inner = inspect.getclosurevars(inspect.getclosurevars(DemoDecoderLayer.forward).nonlocals["run"]).nonlocals
    inner["graph_shapes"].update({(1, length, 4) for length in range(9)})
    inner["graphs_off"][0] = True
    assert what_ran(arm_of("block-graphs"), model) == "2 of 3 layers compiled, CUDA graphs given up at 9 shapes"
    assert what_ran(arm_of("padded"), model) == "2 of 3 layers compiled"
    assert what_ran(arm_of("stock"), model) == ""
    monkeypatch.setattr(DemoDecoderLayer, "forward", lambda self, hidden_states: None)
    DemoDecoderLayer.forward._unsloth_block_compiled = True
    assert what_ran(arm_of("block-graphs"), model).endswith(
        ", CUDA graphs not seen into: this Unsloth keeps them elsewhere"
    )


def test_layers_are_kept_and_planned_anew_by_the_unsloth_that_is_installed(installed, monkeypatch):
    class Layer(DemoDecoderLayer):
        """Unsloth makes the flag a property of the class."""

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Layer() for _ in range(3))
    installed.utils.skip_checkpointing(model, "max")
    assert [layer.gradient_checkpointing for layer in model.layers] == [False] * 3
    assert what_ran(arm_of("skip-max"), model) == "3 layers not checkpointed"
    arm_again(arm_of("skip-max"), model, 4, 2048)
    assert [layer.gradient_checkpointing for layer in model.layers] == [False] * 3
    # On a GPU the next two steps choose; until then every layer is checkpointed again.
    planner = installed.utils._AutoCheckpointSkip(model, list(model.layers), model.layers[-1])
    install = classmethod(lambda cls, model: setattr(model, "_unsloth_auto_skip", planner))
    monkeypatch.setattr(installed.utils._AutoCheckpointSkip, "install", install)
    arm_again(arm_of("skip-auto"), model, 4, 2048)
    assert [layer.gradient_checkpointing for layer in model.layers] == [True] * 3
    assert (planner.target_batch, planner.target_seq) == (4, 2048)
    assert (installed.offload.FIRST_PASS, installed.offload.LAST_GC_INDEX) == (True, 0)
    assert what_ran(arm_of("skip-auto"), model) == "0 layers not checkpointed"


# -- Processes --------------------------------------------------------------------------------------------------------


def child(code: str) -> list[str]:
    """A command that stands in for a bench's child."""
    return [sys.executable, "-c", f"import json, os, sys, time, signal\nMARK = {MARK!r}\n{textwrap.dedent(code)}"]


def test_a_childs_rows_are_taken_and_its_lines_passed_on(capsys, monkeypatch):
    code = """
        print("loading")
        sys.stderr.write("bar: 10%\\rbar: 50%")
        sys.stderr.flush()
        words = sys.argv[1:]
        report = {"table": "speed", "row": {"words": words, "env": os.environ["A"]}}
        print("\\n" + MARK + json.dumps(report), flush=True)
        print("done")
    """
    reports = []
    monkeypatch.setenv("UNSLOTH_GC_KEEP_LAYERS", "max")
    process = Process(("stock", "padded"), (), {"A": "1"})
    assert Parent().run(process, child(code), reports.append) is None
    words = ["--child", "--arms", "stock,padded", "--methods", ""]
    assert reports == [{"table": "speed", "row": {"words": words, "env": "1"}}]
    printed = capsys.readouterr().out
    assert "loading" in printed
    assert "bar: 50%" in printed
    assert "bar: 10%" not in printed
    assert "done" in printed
    assert MARK not in printed
    assert "without UNSLOTH_GC_KEEP_LAYERS: arms are Unsloth's defaults" in printed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(MARK + json.dumps({'failed': 'RuntimeError: no memory'})); sys.exit(1)", "RuntimeError: no memory"),
        (
            "print('Fatal: bad driver', flush=True); os._exit(3)",
            "the process ended with exit code 3: Fatal: bad driver",
        ),
        ("import nowhere", "the process ended with exit code 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process ended with exit code -9: "),
        ("pass", None),
    ],
)
def test_why_a_child_failed(code, error):
    parent = Parent()
    assert parent.run(Process(("stock",)), child(code), print) == error
    assert parent.stopped is None


def test_a_child_reports_what_its_work_raises(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:

        def work():
            raise RuntimeError("out of luck\nsecond line")

        assert serve(work) == 1
        assert serve(lambda: None) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    assert printed.out == f'\n{MARK}{{"failed": "RuntimeError: out of luck"}}\n'
    assert "second line" in printed.err


SLOW = """
    def leave(*_):
        print(MARK + json.dumps({"row": "the last one"}), flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, leave)
    print(MARK + json.dumps({"row": "first"}), flush=True)
    time.sleep(60)
"""


def test_the_time_ends_a_child_which_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(processes, "LOADING", 0.1)
    parent, rows = Parent(seconds=processes.GRACE + 1.5), []
    began = time.time()
    assert parent.run(Process(("stock",)), child(SLOW), rows.append) is None
    assert time.time() - began < 20
    assert (parent.stopped, rows) == ("the time is up", [{"row": "first"}, {"row": "the last one"}])
    assert parent.run(Process(("padded",)), ["no such command"], rows.append) is None
    short = Parent(seconds=processes.GRACE + 0.05)
    assert short.run(Process(("padded",)), ["no such command"], rows.append) is None
    assert short.stopped == "the time is up"


def test_a_stopped_job_stops_its_child():
    rows = []

    def take(report):
        rows.append(report)
        if len(rows) == 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    with Parent().listening() as parent:
        assert parent.run(Process(("stock",)), child(SLOW), take) is None
    assert signal.getsignal(signal.SIGTERM) == before
    assert parent.stopped == "told to stop"
    assert rows == [{"row": "first"}, {"row": "the last one"}]


def test_a_child_begins_nothing_that_ends_too_late(capsys):
    budget = Budget(time.time() + 100)
    with budget.piece():
        pass
    budget._last = 200.0
    with pytest.raises(SystemExit) as caught, budget.piece():
        raise AssertionError("begun")
    assert caught.value.code == STOPPED
    assert "the next piece takes some 200 s" in capsys.readouterr().out
    with Budget(None).piece():
        pass


def test_warming_up_ends_when_steps_are_steady():
    times = iter([90.0, 30.0, 10.0, 11.0, 10.0])
    assert warm_up(lambda: next(times), least=2) == [90.0, 30.0]  # a second step that is quicker than all before
    times = iter([10.0, 90.0, 30.0, 11.0, 10.0])
    assert warm_up(lambda: next(times), least=2) == [10.0, 90.0, 30.0, 11.0]
    times = iter(range(1, 100))
    assert len(warm_up(lambda: next(times), least=1, most=5)) == 1
    times = iter([1.0, *[2.0] * 20])
    assert len(warm_up(lambda: next(times), least=2, most=5)) == 5


# -- The table --------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(runs, "why_absent", lambda arm: "not there: old" if arm.lora.get(arms.SKIP) == "auto" else None)
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
    assert runs.run_to_go_on_with([plan], common, later) == (f"{later} {NODE}" if change else begun)
    assert runs.run_to_go_on_with([plan], common, too_late) == f"{too_late} {NODE}"
    if not change:  # all of it is there
        append_rows(plan.path, [row(method="rows-25", median_ms="", note="out of memory")])
        assert runs.run_to_go_on_with([plan], common, later) == f"{later} {NODE}"


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
    monkeypatch.setattr(speed, "arm_again", lambda arm, model, *size: events.append(("plan", *size)))
    monkeypatch.setattr(speed, "what_ran", lambda arm, model: f"ran {arm.layout}")

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


# -- Micro-batches of all lengths -------------------------------------------------------------------------------------


@pytest.fixture
def mixed(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_mixed_lengths", ROOT / "benchmarks" / "mixed_lengths.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_mixed_lengths_and_shapes_share_processes(mixed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "device_name", lambda: "A GPU")
    monkeypatch.setattr(runs, "why_absent", lambda arm: None)
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
    monkeypatch.setattr(mixed, "arm_again", lambda *_: None)
    monkeypatch.setattr(mixed, "what_ran", lambda *_: "32 of 32 layers compiled")
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
