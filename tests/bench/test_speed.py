"""Tests the benchmark without a GPU: arguments, shapes, limits, rows, drawing; no test depends on time."""

import argparse
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_unsloth import get_state
from sparse_unsloth.bench import checks, processes, profiling, runs, speed
from sparse_unsloth.bench.methods import (
    LLAMA_3_8B,
    METHODS,
    OURS,
    TARGETS,
    backend_of,
    flop_limit,
    methods_of,
    sparsity_of,
)
from sparse_unsloth.bench.shapes import SHAPES, Shape, custom_name, make_batch, shapes_of
from sparse_unsloth.bench.table import (
    COLUMNS,
    SPEED,
    append_rows,
    compare,
    read_profile_rows,
    read_rows,
    read_table,
    report,
)
from sparse_unsloth.cli import bench, main
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE
from sparse_unsloth.tokens.partition import TokenPartition

from tiny_models import make_lora

ROOT = Path(__file__).resolve().parents[2]
TRUE_TIME = speed.Run._time
"""Where `run` has put another."""


def row(method, shape="wizardlm", date="2026-01-01T00:00:00+00:00", ms=100.0, **changes):
    common = dict.fromkeys(COLUMNS[:7], "x") | dict.fromkeys(COLUMNS[COLUMNS.index("arm") :], "")
    common |= {"date": date, "model": "llama8b", "dtype": "4bit", "tokens": 8192}
    figures = {"median_ms": ms, "p20_ms": ms - 1, "p80_ms": ms + 1, "peak_gib": ms / 10}
    return common | figures | {"shape": shape, "method": method} | changes


# -- Words and shapes -------------------------------------------------------------------------------------------------


def test_help_lists_methods_and_shapes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for word in (*METHODS, *SHAPES, "--context-share"):
        assert word in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods unsloth-dense,sparse-o3", "there is no method sparse-o3"),
        ("--shapes wizard", "there is no shape 'wizard'"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert main(["bench", "--model", "m", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--context-share 1.5", "--context-share: must be a number of at least 0 and below 1, given '1.5'"),
        ("--tokens 1", "--tokens: must be an integer from 2 on, given '1'"),
        ("--rounds 0", "--rounds: must be an integer from 1 on, given '0'"),
        ("--warmup -1", "--warmup: must be an integer from 0 on, given '-1'"),
        ("--seconds nan", "--seconds: must be a number of at least 0, given 'nan'"),
        ("--stepps 3", "unrecognized arguments: --stepps 3; did you mean --steps?"),
    ],
)
def test_wrong_values(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--model", "m", *words.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_no_gpu(capsys):
    assert main(["bench", "--model", "m"]) == 1
    assert "CUDA GPU" in capsys.readouterr().err


def test_shapes():
    assert list(shapes_of(None)) == list(shapes_of("all")) == list(SHAPES)
    assert "host" not in shapes_of("all")
    assert shapes_of("host,long8k") == {"host": Shape(1, 256, 64), "long8k": SHAPES["long8k"]}
    assert shapes_of(None, tokens=4096) == {"custom-4096-0.75": Shape(1, 4096, 1024)}
    assert list(shapes_of("wizardlm", context_share=0.5)) == ["wizardlm", "custom-8192-0.5"]
    assert shapes_of(custom_name(100, 0.9)) == {"custom-100-0.9": Shape(1, 100, 10)}
    assert shapes_of("custom-100-0")["custom-100-0"].context_tokens == 0


@pytest.mark.parametrize("shape", [Shape(3, 20, 5), Shape(2, 8, 8)])
def test_batches_have_the_context_rows_that_the_limits_count(shape):
    first, again, other = (make_batch(shape, 50, seed, "cpu") for seed in (1, 1, 2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert (first["labels"] != -100).sum() == shape.batch * shape.outputs
    assert len(TokenPartition.from_labels(first["labels"]).context) == shape.context_tokens


def test_methods_through_the_peft_backend():
    assert methods_of("dense,rows-25,peft-dense", "peft") == ["peft-dense-exact", "peft-rows-25", "peft-dense"]
    assert methods_of("dense,rows-25,peft-dense") == ["unsloth-dense-exact", "rows-25", "peft-dense"]
    assert methods_of("unsloth-dense,nothing-dropped", "peft") == ["unsloth-dense", "peft-nothing-dropped"]
    for method in OURS:
        ours = f"peft-{method}"
        assert backend_of(ours) == "peft"
        assert sparsity_of(ours, 32) == sparsity_of(method, 32) is not None
    assert sparsity_of("peft-dense-exact", 32) == sparsity_of("unsloth-dense-exact", 32)
    with pytest.raises(ConfigError, match="there is no method peft-rows-26"):
        methods_of("rows-26", "peft")


def test_every_method_has_a_sparsity_that_is_one():
    assert methods_of("sparse-o1,sparse-o1") == ["sparse-o1"]
    for method in METHODS:
        sparsity = sparsity_of(method, 32)
        config = SparsityConfig.from_any(sparsity or "dense")
        sparse = any(map(any, config.layer_sparsity(32))) or config.backward_rows < 1
        dense = ("unsloth-dense", "peft-dense", "unsloth-dense-exact", "dense-graphs", "dense-fp8-graphs")
        assert sparse == (method not in dense)
        assert config.precision == ("fp8" if "fp8" in method else "bf16")
        assert config.cuda_graphs == method.endswith("-graphs")
    assert SparsityConfig.from_any(sparsity_of("sparse-25", 32)).layer_sparsity(32)[:2] == [(0, 0), (0.75, 0)]


# -- Limits and ratios ------------------------------------------------------------------------------------------------


def test_counted_limits_are_near_the_stated_ones(monkeypatch):
    from sparse_unsloth.bench import methods

    stated = dict(TARGETS)
    monkeypatch.setattr(methods, "TARGETS", {})
    for (shape, method), (target, limit) in stated.items():
        counted = flop_limit(shape, method, LLAMA_3_8B)
        assert target < limit
        assert counted == pytest.approx(limit, rel=0.15), (shape, method)
        assert 1 < flop_limit(shape, "unsloth-dense-exact", LLAMA_3_8B) < counted
        assert flop_limit(shape, "unsloth-dense", LLAMA_3_8B) == 1
        assert flop_limit(shape, method, LLAMA_3_8B, checkpointing=False) > 1


def test_limits_without_checkpointing():
    """Nothing runs twice."""
    for shape in SHAPES:
        dense, rows_25, rows_10 = (
            [flop_limit(shape, method, LLAMA_3_8B, checkpointing) for checkpointing in (True, False)]
            for method in ("unsloth-dense", "rows-25", "rows-10")
        )
        assert dense == [1, 1]
        assert 1 < rows_25[0] < rows_10[0]
        assert rows_25[1] < rows_10[1] < rows_10[0]
    shown = compare([row("unsloth-dense", checkpointing="False"), row("sparse-o2", checkpointing="False")], LLAMA_3_8B)
    assert shown[1].target is None
    assert shown[1].limit == flop_limit("wizardlm", "sparse-o2", LLAMA_3_8B, checkpointing=False) != 2.41


@pytest.mark.parametrize("checkpointing", [False, True])
def test_limits_of_rows_with_peft_are_counted_by_hand(checkpointing):
    """wizardlm, rows-25: of 8192 rows 4 x 513 lose nothing, and ceil(4 x 1535 / 4) are chosen; every logit is computed.

    A projection ``[in, out]`` costs a row ``in out + 16 (in + out)`` multiplications forward, in the recompute as many,
    and backward once the former and twice the latter. Of O and the MLP backward and recompute take chosen rows alone.
    Without checkpointing the first layer's input needs no gradient. Attention has two products forward, two in the
    recompute, five backward, each of half of the scores.
    """
    rows, chosen, hidden, inner, keys = 8192, 4 * 513 + 1535, 4096, 14336, 1024
    qkv = [(hidden, hidden), (hidden, keys), (hidden, keys)]
    others = [(hidden, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]

    def once(projections, lora):
        return sum(a * b + lora * 16 * (a + b) for a, b in projections)

    def step(through):
        layer = rows * once(qkv + others, 1) + rows * once(qkv, 2) + through * once(others, 2)
        layer += checkpointing * (rows * once(qkv, 1) + through * once(others, 1))
        layer += (7 + 2 * checkpointing) * 4 * 2048 * 2049 // 2 * hidden
        first = 0 if checkpointing else rows * sum(a * b + 16 * a for a, b in qkv)
        return 32 * layer - first + 2 * rows * hidden * 128256

    counted = flop_limit("wizardlm", "peft-rows-25", LLAMA_3_8B, checkpointing)
    assert counted == pytest.approx(step(rows) / step(chosen), rel=1e-6)
    assert counted < flop_limit("wizardlm", "rows-25", LLAMA_3_8B, checkpointing)


def test_ratios():
    rows = [row("unsloth-dense", ms=200.0), row("sparse-o2", ms=100.0), row("sparse-o2", "host", ms=50.0)]
    dense, sparse, host = compare(rows, LLAMA_3_8B)
    assert (dense.speedup, sparse.speedup, sparse.memory, host.speedup) == (2 / 2, 2.0, 0.5, None)
    assert (sparse.target, sparse.limit) == (2.0, 2.41)
    assert sparse.of_limit == pytest.approx(2 / 2.41)
    assert sparse.tokens_per_second == pytest.approx(81920)
    assert host.limit is None
    assert compare(rows, None)[1].of_limit is None
    line = report(rows, LLAMA_3_8B, METHODS)
    assert "2.00x the speed of dense, target 2x reached, 83% of the FLOP limit 2.41x, 0.50x the peak memory" in line
    assert line.count("\n") == 0
    assert report(rows, LLAMA_3_8B, ["sparse-o1"]) == ""


# -- The table --------------------------------------------------------------------------------------------------------


def test_rows_are_appended(tmp_path):
    table = tmp_path / "results" / "speed.csv"
    append_rows(table, [row("unsloth-dense")])
    before = table.read_text()
    append_rows(table, [row("sparse-o2"), row("sparse-o1")])
    assert table.read_text().startswith(before)
    assert read_rows(table) == [row("unsloth-dense"), row("sparse-o2"), row("sparse-o1")]
    with pytest.raises(ValueError, match="must have the columns"):
        append_rows(table, [row("sparse-o2") | {"loss": 1}])
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="other columns"):
        append_rows(table, [row("sparse-o2")])


def test_the_committed_table_can_be_read_and_drawn(tmp_path):
    table = tmp_path / "speed.csv"
    for name in ("speed.csv", "speed-profile.csv"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks" / "results" / name).read_bytes())
    draw = load("plot_speed")
    draw.main([str(table)])
    assert (tmp_path / "speed.md").read_text() == (ROOT / "benchmarks" / "results" / "speed.md").read_text()


def test_drawing_shows_the_newest_run(tmp_path):
    table = tmp_path / "speed.csv"
    new = "2026-02-02T00:00:00+00:00"
    append_rows(
        table,
        [
            row("sparse-o2", date=new, ms=30.0),
            row("unsloth-dense", date=new, ms=60.0),
            row("peft-dense", date=new, ms=80.0),
            row("peft-sparse-o2", date=new, ms=40.0),
            row("sparse-o2", "custom-8192-0.5", date=new, ms=77.0),
            row("unsloth-dense", ms=999.0),
            row("unsloth-dense", dtype="bf16", ms=555.0),
        ],
    )
    load("plot_speed").main([str(table)])
    text = (tmp_path / "speed.md").read_text()
    assert "999.0" not in text
    assert "| wizardlm | sparse-o2 | 30.0 | 29.0 to 31.0 | 273067 | 3.00 | 0.50 | 2.00x |  | 2.00x | 2.41x |" in text
    assert "555.0" in text
    assert "sparse-o2 over dense PEFT: wizardlm 2.00x." in text
    assert text.index("| wizardlm | unsloth-dense") < text.index("| wizardlm | sparse-o2") < text.index("custom-8192")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_measured_again_counts_for_the_rows_after_it(tmp_path):
    table = tmp_path / "speed.csv"
    first = [row("unsloth-dense", ms=60.0), row("sparse-o2", ms=30.0), row("rows-25", ms=40.0)]
    append_rows(table, [*first, row("unsloth-dense", ms=90.0), row("sparse-50", ms=45.0)])
    compared = {one.row["method"]: one.speedup for one in compare(read_rows(table), None)}
    assert compared == {"unsloth-dense": 1, "sparse-o2": 2, "rows-25": 1.5, "sparse-50": 2}
    load("plot_speed").main([str(table)])
    found = [line.split(" | ") for line in (tmp_path / "speed.md").read_text().splitlines() if "| wizardlm" in line]
    assert [(cells[1], cells[7]) for cells in found] == [
        ("unsloth-dense", ""), ("sparse-o2", "2.00x"), ("rows-25", "1.50x"), ("unsloth-dense", ""),
        ("sparse-50", "2.00x"),
    ]  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# -- A run, its model and clock replaced ------------------------------------------------------------------------------


@pytest.fixture
def model():
    return make_lora(hidden_size=32, intermediate_size=64)


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Makes runs on the tiny model whose steps take 10 ms in the first round and 30 ms in the second."""
    monkeypatch.setattr(speed, "describe", lambda *_: dict.fromkeys(COLUMNS[:7], "x"))
    turns = []

    def time(self, name, layout, shape):
        assert (get_state(model) is not None) == (name not in self.args.arms and sparsity_of(name, 3) is not None)
        turns.append((name, shape))
        self.peaks[name, layout, shape] = 1.0
        self.times[name][layout, shape] += [10.0 if turns.count((name, shape)) == 1 else 30.0]

    monkeypatch.setattr(speed.Run, "_time", time)

    def make(*words):
        out = tmp_path / "speed.csv"
        args = bench.parse(["--model", "m", "--date", "today", "--out", str(out), "--arms", "", *words])
        plan = runs.Plan(out, SPEED, runs.pieces_of(args, speed.cases_of(args)), "a run", {"date": "today"})
        made = speed.Run(args, model, plan.write, processes.Budget(args.deadline))
        made.turns, made.plan = turns, plan
        return made

    return make


def measure(run):
    return run.measure(run.plan.left())


def written(run):
    return [(r["method"], r["shape"], r["median_ms"], r["p20_ms"]) for r in read_rows(run.args.out)]


def test_methods_take_turns_and_share_the_date(run, model):
    made = run("--shapes", "host,wizardlm", "--rounds", "2", "--methods", "unsloth-dense,sparse-o2")
    assert measure(made)
    assert [method for method, _ in made.turns[::2]] == ["unsloth-dense", "sparse-o2"] * 2
    assert written(made) == [
        (method, shape, 20.0, 14.0) for method in ("unsloth-dense", "sparse-o2") for shape in ("host", "wizardlm")
    ]
    assert {r["date"] for r in read_rows(made.args.out)} == {"today"}
    assert get_state(model) is None


def test_a_method_that_fails_its_check_has_no_rows(run, monkeypatch, capsys):
    true = checks.masked_mlp
    monkeypatch.setattr(checks, "masked_mlp", lambda *args, **options: true(*args, **options) * 1.1)
    made = run("--shapes", "wizardlm", "--methods", "unsloth-dense,sparse-50,unsloth-dense-exact")
    assert not measure(made)
    assert [method for method, *_ in written(made)] == ["unsloth-dense", "unsloth-dense-exact"]
    assert "sparse-50: padded wizardlm: NOT TIMED: CheckFailed: " in capsys.readouterr().out
    (failed,) = (r for r in read_table(made.args.out, COLUMNS) if not r["median_ms"])
    assert (failed["method"], failed["note"][:23]) == ("sparse-50", "NOT TIMED: CheckFailed:")


def test_a_stopped_job_keeps_what_it_measured(run, monkeypatch):
    time = speed.Run._time

    def stop(self, name, layout, shape):
        if len(self.turns) == 3:
            raise SystemExit(143)
        time(self, name, layout, shape)

    monkeypatch.setattr(speed.Run, "_time", stop)
    made = run("--shapes", "host,wizardlm", "--rounds", "2", "--methods", "unsloth-dense,sparse-50")
    with pytest.raises(SystemExit):
        measure(made)
    assert [row[:2] for row in written(made)] == [
        ("unsloth-dense", "host"),
        ("unsloth-dense", "wizardlm"),
        ("sparse-50", "host"),
    ]


def test_a_shape_without_memory_is_left_out(run, monkeypatch, capsys):
    time = speed.Run._time

    def full(self, name, layout, shape):
        if shape == "long16k":
            raise torch.OutOfMemoryError
        time(self, name, layout, shape)

    monkeypatch.setattr(speed.Run, "_time", full)
    made = run("--shapes", "long16k,wizardlm", "--methods", "unsloth-dense")
    assert not measure(made)
    assert [row[:2] for row in written(made)] == [("unsloth-dense", "wizardlm")]
    assert "long16k: out of memory" in capsys.readouterr().out
    assert made.plan.left() == []


def test_runs_of_one_command():
    first = ["--model", "m", "--shapes", "wizardlm", "--steps", "5"]
    second = ["--dtype", "bf16", "--shapes", "all"]
    runs = bench.parse_runs([*first, "--then", *second, "--then", "--checkpointing", "False"])
    assert [(run.dtype, run.checkpointing, len(run.shapes), run.steps) for run in runs] == [
        ("4bit", "unsloth", 1, 5),
        ("bf16", "unsloth", 6, 5),
        ("bf16", "False", 6, 5),
    ]
    assert len({run.date for run in runs}) == 1
    assert runs[1].words == [*first, *second]


# -- The profile ------------------------------------------------------------------------------------------------------


def test_overlapping_kernels_count_once():
    assert profiling.covered([]) == 0
    assert profiling.covered([(5, 6), (0, 2), (1, 3), (1.5, 2.5), (3, 4)]) == 5


def test_a_profile_without_kernels():
    found = profiling.profile(lambda: torch.ones(8).sum().item(), num_layers=4)
    assert "step 8.0 ms (not profiled); kernels run in 0.0 ms of it, 0%" in found.text
    assert "aten::sum" in found.text
    assert (found.step_ms, found.kinds, found.idle_ms) == (8.0, {}, 8.0)


def test_kernels_are_counted_by_kind():
    """Every kernel of this package has a kind; names of others as an H100 printed them."""
    sources = "\n".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    ours = set(re.findall(r"launch\((\w+_kernel),", sources))
    assert [name for name in ours if profiling.kind_of(name) == profiling.OTHER] == []
    for name, kind in (
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("Memcpy DtoH (Device -> Pinned)", "copies to and from the host"),
        ("_rms_layernorm_backward", "norms, residual sums"),
        ("_nf4_dequant_kernel", "dequantisation"),
        ("_DWf_DW_dfg_kernel", "gated unit"),
        ("triton_red_fused__log_softmax__log_softmax_backward_data", "loss"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add>", profiling.OTHER),
    ):
        assert profiling.kind_of(name) == kind
    events = [("nvjet_a", 0, 3000), ("nvjet_b", 1000, 2000), ("glu_fwd_kernel", 0, 500)]
    assert profiling.by_kind(events) == {"matrix products": (4.0, 2), "gated unit": (0.5, 1)}


def test_a_profile_lies_beside_the_table(run, monkeypatch, tmp_path):
    kinds = {"matrix products": (60.0, 7), "gated unit": (20.0, 3)}
    found = profiling.Profile(100.0, kinds, 15.0, "text")
    monkeypatch.setattr(profiling, "profile", lambda *_: found)
    common = dict.fromkeys(COLUMNS[:7], "x")
    for date, step in (("2026-01-01", 200.0), ("2026-01-02", 100.0)):
        monkeypatch.setattr(speed, "describe", lambda args, date=date: common | {"date": date})
        monkeypatch.setattr(profiling, "profile", lambda *_, step=step: replace(found, step_ms=step))
        words = ["--shapes", "host,wizardlm", "--profile", "wizardlm", "--methods", "unsloth-dense,sparse-50"]
        made = run(*words)
        made.plan = replace(made.plan, run=date, common=common | {"date": date})
        made.write = made.plan.write
        assert measure(made)
    rows = read_profile_rows(tmp_path / "speed-profile.csv")
    assert [(r["kind"], r["ms"], r["launches"]) for r in rows if r["date"] == "2026-01-02"][:4] == [
        ("whole step", 100.0, 10), ("matrix products", 60.0, 7), ("gated unit", 20.0, 3), ("no kernel running", 15.0, 0)
    ]  # fmt: skip
    load("plot_speed").main([str(tmp_path / "speed.csv")])
    text = (tmp_path / "speed.md").read_text()
    assert "## x, x, x, checkpointing x, wizardlm" in text
    assert "| | unsloth-dense | sparse-50 |" in text
    assert "| whole step | 100.0 (10) | 100.0 (10) |" in text
    assert "| matrix products | 60.0 (7) | 60.0 (7) |" in text
    assert "| no kernel running | 15.0 | 15.0 |" in text
    assert text.count("2026-01-02, commit x.") == 1


def test_graphs_are_captured_before_steps_count(run, monkeypatch):
    """Graphs are captured for each shape again, for its times and for its profile."""
    steps, counted = [], []
    graphs = argparse.Namespace(memory=lambda: 2**30)
    monkeypatch.setattr(speed.Run, "_time", TRUE_TIME)
    monkeypatch.setattr(speed.Run, "_fresh_graphs", lambda self: steps.clear() or graphs)
    monkeypatch.setattr(speed.Stepper, "__call__", lambda self: steps.append(self.shape) or 1.0)
    monkeypatch.setattr(speed.torch.cuda, "reset_peak_memory_stats", lambda: counted.append(len(steps)))
    found = profiling.Profile(1.0, {}, 0.0, "")
    monkeypatch.setattr(profiling, "profile", lambda *_: counted.append(len(steps)) or found)
    words = ["--profile", "host", "--warmup", "1", "--steps", "2", "--methods", "unsloth-dense"]
    made = run("--shapes", "host,wizardlm", *words)
    assert measure(made)
    assert counted == [RUNS_BEFORE_CAPTURE + 2, RUNS_BEFORE_CAPTURE + 2, RUNS_BEFORE_CAPTURE + 1]
    assert made.peaks["unsloth-dense", "padded", "host"] >= 1


def test_shapes_to_profile():
    words = ["--model", "m", "--shapes", "wizardlm,csr170k"]
    assert bench.parse(words).profile == []
    assert bench.parse([*words, "--profile", "--steps", "3"]).profile == ["wizardlm"]
    assert [args.profile for args in bench.parse_runs([*words, "--profile", "csr170k", "--then", "--profile="])] == [
        ["csr170k"], []
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--profile names host, which is none of the shapes wizardlm, csr170k"):
        bench.parse([*words, "--profile", "host"])
