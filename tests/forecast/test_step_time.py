"""Tests that the model of step times finds known coefficients, takes the right rows, and is stored in the package."""

import csv
import functools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.bench.shapes import HOST, SHAPES
from sparse_unsloth.bench.table import append_rows, read_rows
from sparse_unsloth.costs.memory import (
    Forward,
    StepMemory,
    fused_logits,
    layer_activations,
    logit_bytes,
    peak_memory,
    plain_logits,
)
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.forecast import speed_table
from sparse_unsloth.forecast.speed_table import (
    fit_table,
    memory_of_row,
    plan_of_row,
    save,
    usable_rows,
    work_of_row,
)
from sparse_unsloth.planning.fits import STORED, choose, load
from sparse_unsloth.planning.step_time import GRAPHS_HOST, GRAPHS_RECOMPUTE, StepTime, fit
from sparse_unsloth.planning.work import MicroBatch, Work, batch_work
from sparse_unsloth.tokens.partition import TokenPartition

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "speed.csv"
TRUE = StepTime(products=1.5, attention=3.0, rows=70, sparse_rows=25, host_layer=2.0, host_sparse_part=1.5)
METHODS = ("unsloth-dense", "unsloth-dense-exact", "sparse-o1", "sparse-o2", "sparse-25")


@pytest.fixture(scope="module", autouse=True)
def fitted_once():
    """Fits without one step each, a second for 35 steps, are made once for all tests with the same steps."""
    known = functools.cache(speed_table.leave_one_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_table, "leave_one_out", lambda steps: known(tuple(steps)))
        yield


def row(shape, method, milliseconds=None, **changes):
    """A row of the table, of a GPU that behaves as `TRUE` says."""
    made = {
        "date": "2026-11-24T12:00:00+00:00", "commit": "abc", "device": "A GPU", "versions": "", "model": "llama8b",
        "dtype": "4bit", "checkpointing": "unsloth", "shape": shape, "method": method, "tokens": 8192,
        "p20_ms": 0.0, "p80_ms": 0.0, "peak_gib": 7.6,
    }  # fmt: skip
    made |= changes
    return made | {"median_ms": TRUE(work_of_row(made, LLAMA_3_8B)) if milliseconds is None else milliseconds}


def rows(shapes=(*SHAPES, *HOST), methods=METHODS, **changes):
    return [row(shape, method, **changes) for shape in shapes for method in methods]


def test_the_larger_of_host_and_device_counts():
    work = Work(products=10**14, attention=10**13, rows=10**9, sparse_rows=10**9, layers=32, sparse_parts=40)
    assert TRUE.device(work) == pytest.approx(150 + 30 + 70 + 25)
    assert TRUE.host(work) == pytest.approx(64 + 60)
    assert TRUE.device(work) <= TRUE(work) < 1.01 * TRUE.device(work)
    small = Work(10**11, 10**10, 10**6, 10**6, 32, 40)
    assert TRUE(small) == pytest.approx(TRUE.host(small), rel=0.01)


def test_fit_predicts_a_machine_of_its_own_kind():
    (fitted,) = fit_table(rows())
    assert fitted.step_time.products == pytest.approx(TRUE.products, rel=0.1)
    assert fitted.errors.step_worst < 0.05
    assert fitted.errors.speedup_worst < 0.05
    assert (fitted.device, fitted.backend, fitted.dtype, fitted.rows) == ("A GPU", "unsloth", "4bit", 35)


def test_fit_of_few_rows_stays_near_rough_values():
    steps = [(work_of_row(one, LLAMA_3_8B), one["median_ms"]) for one in rows(["wizardlm"], METHODS[:1])]
    assert fit(steps)(steps[0][0]) == pytest.approx(steps[0][1], rel=0.02)


def test_errors_are_of_rows_that_the_fit_did_not_see():
    """One wrong row is an error of its own size; a fit that had seen it would come nearer."""
    table = rows()
    wrong = next(one for one in table if (one["shape"], one["method"]) == ("wizardlm", "sparse-o2"))
    wrong["median_ms"] *= 2
    (fitted,) = fit_table(table)
    assert fitted.errors.step_worst == pytest.approx(0.5, abs=0.05)


def test_steps_with_graphs():
    """They have their own host time, the fit does not see them, and the newest of each shape counts."""
    work = Work(products=10**14, attention=10**13, rows=10**9, sparse_rows=10**9, layers=32, sparse_parts=40)
    assert TRUE.device(work) <= TRUE.with_graphs(work) < 1.01 * TRUE.device(work)
    small = Work(10**11, 10**10, 10**6, 10**6, 32, 40)
    assert TRUE.with_graphs(small) == pytest.approx(32 * GRAPHS_HOST, rel=0.01)
    again = replace(small, recomputed=20)
    assert TRUE.with_graphs(again) == pytest.approx(32 * GRAPHS_HOST + 20 * GRAPHS_RECOMPUTE, rel=0.01)
    methods = ("dense-graphs", "sparse-o2-graphs", "rows-25-graphs")
    steps = [row(shape, method, 0.0) for shape in ("wizardlm", "custom-1024-0.75") for method in methods]
    for step in steps:
        step["median_ms"] = TRUE.with_graphs(work_of_row(step, LLAMA_3_8B)) / 1.25
    older = [step | {"median_ms": 1.0, "date": "2026-11-23T12:00:00+00:00"} for step in steps]
    (plain,), (fitted,) = fit_table(rows()), fit_table([*rows(), *steps, *older])
    assert fitted.step_time == plain.step_time
    assert (plain.errors.recorded_median, plain.errors.recorded_worst) == (None, None)
    assert fitted.errors.recorded_median == pytest.approx(0.25, abs=0.05)
    assert fitted.errors.recorded_worst < 0.4


@pytest.mark.parametrize(("layout", "count"), [("padded", 16), ("flat", 24)])
def test_captured_steps_of_all_lengths_are_as_measured(layout, count, monkeypatch):
    """``mixed_lengths.csv``, within a tenth; `GRAPHS_RECOMPUTE` was read off its shortest step."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from mixed_lengths import make_batches

    measured = {}
    with (TABLE.parent / "mixed_lengths.csv").open(newline="") as file:
        for one in csv.DictReader(file):
            checkpointed = one["checkpointing"] == "unsloth"
            if one["layout"] == layout and one["method"].endswith("-graphs") and checkpointed:
                measured[one["method"]] = 1000 * float(one["round_s"]) / int(one["steps"])  # the newest is the last
    assert len(measured) >= 2
    predict, errors = choose(load(), "unsloth", "4bit").step_time, {}
    for method, milliseconds in measured.items():
        plan, _, removal = plan_of_row(row("wizardlm", method, 0.0), LLAMA_3_8B)
        works = [
            batch_work(
                plan, micro_batch(batch).padded_to_bucket("padded" if layout == "padded" else "padding-free"), removal
            )
            for batch in make_batches(layout, 4, count, LLAMA_3_8B.vocab_size)
        ]
        errors[method] = sum(map(predict.with_graphs, works)) / count / milliseconds - 1
    assert max(map(abs, errors.values())) < 0.1, errors


def micro_batch(batch):
    roles = TokenPartition.from_labels(**{name: values for name, values in batch.items() if name != "input_ids"})
    lengths = batch.get("packed_seq_lengths")
    lengths = [roles.shape[1]] * roles.shape[0] if lengths is None else lengths.tolist()
    return MicroBatch(roles.num_dense, roles.num_context, roles.num_padding, len(roles.loss), tuple(lengths))


def test_newest_rows_count_and_older_code_does_not():
    """The dense baseline does not depend on this package's code, so its older rows stay. Other arms do not count."""
    old = {"date": "2026-11-22T03:00:00+00:00", "commit": "old"}
    table = [
        row("wizardlm", "sparse-o2", 500.0, **old),
        row("math10k", "sparse-o2", 400.0, **old),
        row("math10k", "unsloth-dense", 700.0, **old),
        row("wizardlm", "sparse-o2", 300.0),
        row("wizardlm", "unsloth-dense", 600.0),
        row("wizardlm", "peft-sparse-50", 350.0),
        row("wizardlm", "nothing-dropped", 650.0),
        row("wizardlm", "peft-nothing-dropped", 650.0),
        row("wizardlm", "peft-dense-graphs", 250.0),
        row("wizardlm", "hooks-dense", 650.0),  # a method that is gone
        row("codefeedback", "unsloth-dense", 690.0, arm="padded", layout="padded"),
        row("wizardlm", "peft-dense", 800.0, arm="peft", layout="padded"),
    ]
    newer = {"date": "2026-11-25T12:00:00+00:00"}
    table += [
        row("wizardlm", "peft-dense", 650.0, arm="liger", layout="padded", **newer),
        row("wizardlm", "unsloth-dense", 500.0, arm="skip-max", layout="flat", **newer),
        row("wizardlm", "unsloth-dense", 590.0, arm="block-graphs", layout="padded", **newer),
        row("wizardlm", "sparse-o2", 290.0, arm="", layout="flat", **newer),
    ]
    used = {(one["shape"], one["method"]): one["median_ms"] for one in usable_rows(table)}
    assert used == {
        ("wizardlm", "sparse-o2"): 300.0,
        ("wizardlm", "unsloth-dense"): 600.0,
        ("wizardlm", "peft-sparse-50"): 350.0,
        ("math10k", "unsloth-dense"): 700.0,
        ("codefeedback", "unsloth-dense"): 690.0,
        ("wizardlm", "peft-dense"): 800.0,
    }
    assert used == {(one["shape"], one["method"]): one["median_ms"] for one in usable_rows(reversed(table))}


def test_each_device_backend_and_dtype_has_its_own_fit():
    table = [*rows(), *rows(dtype="bf16"), *rows(device="Other"), *rows(methods=("peft-dense", "peft-sparse-o2"))]
    table += rows(model="unknown", device="Unknown")
    fits = {(one.device, one.backend, one.dtype) for one in fit_table(table)}
    assert fits == {
        ("A GPU", "unsloth", "4bit"),
        ("A GPU", "unsloth", "bf16"),
        ("Other", "unsloth", "4bit"),
        ("A GPU", "peft", "4bit"),
    }
    assert fit_table(rows(methods=["unsloth-dense"])) == []


def test_choice_of_the_measurements():
    fits = fit_table([*rows(), *rows(dtype="bf16", device="Newer", date="2026-11-24T18:00:00+00:00")])
    assert choose(fits, "unsloth", "4bit").device == "A GPU"
    assert choose(fits, "unsloth", "bf16").device == "Newer"
    assert choose(fits, "unsloth", "4bit", "newer").dtype == "bf16"
    assert choose(fits, "peft", "4bit") is None
    with pytest.raises(ConfigError, match="known are A GPU, Newer"):
        choose(fits, "unsloth", "4bit", "h100")


def test_stored_fit_is_that_of_the_table(monkeypatch):
    """Run ``python benchmarks/fit_step_times.py`` after rows were appended."""
    tables = fit_table(script(monkeypatch).rows_to_fit(TABLE)), load()
    fresh, stored = (json.loads(json.dumps([asdict(one) for one in fits])) for fits in tables)
    assert len(fresh) == len(stored) > 0
    for mine, its in zip(fresh, stored, strict=True):
        assert mine.pop("step_time") == pytest.approx(its.pop("step_time"), rel=0.02)
        assert mine.pop("errors") == pytest.approx(its.pop("errors"), abs=0.01)
        assert mine == its


def test_saved_fits_read_back(tmp_path):
    fits = fit_table(rows())
    save(fits, tmp_path / "fits.json")
    assert load(tmp_path / "fits.json") == fits


def test_stored_fits_are_of_the_kind_that_is_shipped():
    packaging = (ROOT / "pyproject.toml").read_text()
    assert f'"sparse_unsloth.planning" = ["{STORED.name}"]' in packaging
    assert '"sparse_unsloth.planning"' in packaging.partition("packages = ")[2].splitlines()[0]


def script(monkeypatch):
    """``benchmarks/fit_step_times.py``, imported."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.delitem(sys.modules, "fit_step_times", raising=False)
    import fit_step_times

    return fit_step_times


def test_script_refits(tmp_path, monkeypatch, capsys):
    """Without steps whose backward pass goes through chosen rows only."""
    append_rows(tmp_path / "speed.csv", rows())
    stored = tmp_path / "fits.json"
    fit_step_times = script(monkeypatch)
    monkeypatch.setattr(fit_step_times, "save", lambda fits: save(fits, stored))
    fit_step_times.main([str(tmp_path / "speed.csv")])
    assert "A GPU, unsloth, 4bit: 35 rows" in capsys.readouterr().out
    assert load(stored) == fit_table(read_rows(tmp_path / "speed.csv"))
    append_rows(tmp_path / "speed.csv", rows(methods=["rows-25"]))
    fit_step_times.main([str(tmp_path / "speed.csv")])
    assert load(stored) == fit_table(rows())


@pytest.mark.parametrize("dtype", ["4bit", "bf16"])
@pytest.mark.parametrize(
    ("shape", "method", "measured"),
    [
        ("wizardlm", "rows-25", 1.53),
        ("math10k", "rows-25", 1.56),
        ("codefeedback", "rows-25", 1.35),
        ("csr170k", "rows-25", 1.78),
        ("long8k", "rows-25", 1.54),
        ("long16k", "rows-25", 1.51),
        ("wizardlm", "rows-10", 1.65),
        ("codefeedback", "rows-10", 1.38),
        ("long8k", "rows-10", 1.69),
    ],
)
def test_speed_of_few_rows_against_measured_ones(shape, method, measured, dtype):
    """On an H100, Llama-3-8B sizes with Unsloth's checkpointing, on 2026-11-27; by fits to dense and channel steps."""
    fitted = choose(load(), "unsloth", dtype, "h100")
    dense, few = (fitted.step_time(work_of_row(row(shape, name, 1.0), LLAMA_3_8B)) for name in (METHODS[0], method))
    assert dense / few == pytest.approx(measured, rel=0.09)


@pytest.mark.parametrize(
    ("method", "layers"), [("dense-graphs", 31), ("sparse-50", 31), ("rows-25", 31), ("unsloth-dense-exact", 0)]
)
def test_a_whole_layers_recompute_leaves_out_down(method, layers):
    """But its LoRA A, which backward reads; the last layer skips unused rows instead."""
    plan, batch, removal = plan_of_row(row("wizardlm", method, 1.0), LLAMA_3_8B)
    parts = (
        batch_work(one, batch, removal).products for one in (replace(plan, whole_layers=False, captured=False), plan)
    )
    rows = batch.dense + batch.context * {"sparse-50": 16 / 31, "rows-25": 0.25}.get(method, 1)  # layer 0 is dense
    saved = saved_by_down = 2 * layers * rows * 14336 * 4096
    apart, whole = parts
    if method == "rows-25":  # O as well, of all rows
        saved += 2 * layers * batch.rows * 4096 * 4096
    assert apart - whole == pytest.approx(saved, rel=0.01)
    assert (apart > whole) == bool(layers)
    assert batch_work(replace(plan, output_norm=True), batch, removal).products >= whole + saved_by_down * 0.99


# -- Memory -----------------------------------------------------------------------------------------------------------


def old_row(shape, method):
    return row(shape, method, 1.0) | {"versions": "torch=2.11.0 unsloth=2026.10.6"}


@pytest.mark.parametrize(
    ("shape", "method", "measured"),
    [
        ("wizardlm", "unsloth-dense", 9.815),
        ("long16k", "unsloth-dense", 9.05),
        ("wizardlm", "sparse-o2", 7.781),
        ("codefeedback", "sparse-o2", 8.481),
        ("long8k", "sparse-o2", 8.594),
        ("long16k", "sparse-o2", 8.931),
    ],
)
def test_peak_against_measured_ones(shape, method, measured):
    """On an H200, Llama-3-8B sizes in 4 bits, on 2026-11-24."""
    assert memory_of_row(old_row(shape, method), LLAMA_3_8B) == pytest.approx(measured, rel=0.085)


def test_peak_without_checkpointing():
    """20.1 GiB for 4096 tokens on an H100, with an Unsloth that computed logits in smaller chunks."""
    predicted = memory_of_row(row("custom-4096-0.75", "unsloth-dense", 1.0, checkpointing="False"), LLAMA_3_8B)
    assert predicted == pytest.approx(20.1, rel=0.1)


def test_peak_of_few_rows():
    """Of the dense one's, on an H100 on 2026-11-27."""
    few, dense = (memory_of_row(old_row("wizardlm", method), LLAMA_3_8B) for method in ("rows-25", "unsloth-dense"))
    assert few / dense == pytest.approx(0.75, rel=0.07)


ROWS = {"linear": 0, "other": 0, "adapter": 0, "rows": 8192, "in_4bit": True, "backward_rows": 3000}


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, 2 * 14336 + 7 * 4096),
        ({"skips_output": False}, 2 * 14336 + 7 * 4096),
        ({"whole_layers": False}, 4 * 4096 + 2 * 4096 + 2 * 1024),
    ],
)
def test_what_row_sparse_layers_keep_without_checkpointing(changes, numbers):
    """By hand, of Llama-3-8B, 32 layers, 8192 rows, two bytes a number; `ops.stored_rows` and what precedes it agree.

    Whole layers store, a row, ``heads * head_dim + 2 H + 2 I + 4 r`` numbers after attention, and before it the layer's
    input, the normed one, Q, K, V and ``3 r``.
    """
    memory = peak_memory(LLAMA_3_8B, **ROWS, checkpointing="off", **changes)
    assert memory.kept_activations == 32 * 8192 * 2 * numbers
    if "whole_layers" not in changes:
        after, before = 4096 + 2 * 4096 + 2 * 14336 + 4 * 16, 2 * 4096 + 4096 + 2 * 1024 + 3 * 16
        assert numbers == pytest.approx(after + before, rel=0.04)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, 4 * 4096 + 2 * 4096 + 2 * 1024),
        ({"whole_layers": False}, 4 * 4096 + 2 * 4096 + 2 * 1024),
        ({"skips_output": False}, 2 * 14336 + 7 * 4096),
    ],
)
def test_what_a_recompute_of_a_row_sparse_layer_keeps(changes, numbers):
    """One layer's, besides the backward of 3000 of 8192 rows and two dequantised weights, by hand as above."""
    memory = peak_memory(LLAMA_3_8B, **ROWS, checkpointing="unsloth", **changes)
    backward = 3000 * (3 * 14336 + 6 * 4096) + 8192 * 6 * 4096 + 2 * 4096 * 14336
    assert memory.kept_activations == 0
    assert memory.working_set == 2 * (8192 * numbers + backward)


def test_chunks_of_the_fused_loss():
    """One chunk up to 4 GiB; else a multiple of four. What a chunk really takes depends on Unsloth's version."""
    for release, each in (("2026.10.6", 16), ("2026.10.9", 3), ("2027.1.1.post2", 3)):
        assert logit_bytes(release) == each
        logit = LLAMA_3_8B.vocab_size * each
        assert fused_logits(LLAMA_3_8B, 1152, each) == 1152 * logit
        assert fused_logits(LLAMA_3_8B, 4224, each) == 4224 * logit / 4
        assert fused_logits(LLAMA_3_8B, 8192, each) == 8192 * logit / 4
        assert fused_logits(LLAMA_3_8B, 16384, each) == 16384 * logit / 12
    assert logit_bytes() in (3, 16)


def test_memory_adds_up_and_grows_with_what_it_depends_on():
    common = {"linear": 10**9, "other": 10**8, "adapter": 10**7, "rows": 4096, "in_4bit": True}
    off, on, unsloth = (peak_memory(LLAMA_3_8B, checkpointing=mode, **common) for mode in ("off", "on", "unsloth"))
    assert off.peak > on.peak > unsloth.peak
    assert unsloth.gib()["peak"] == pytest.approx(sum(value for name, value in unsloth.gib().items() if name != "peak"))
    logits = plain_logits(LLAMA_3_8B, 4096)
    assert peak_memory(LLAMA_3_8B, checkpointing="on", logits=logits, **common).working_set == logits
    assert peak_memory(LLAMA_3_8B, checkpointing="on", **{**common, "in_4bit": False}).weights == 2.2e9


def test_captured_passes_have_a_pool():
    """By hand, of one dense layer of 1000 rows: the pool of kept and of checkpointed layers, and who may use it."""
    shape = replace(LLAMA_3_8B, num_layers=1)
    common = {"linear": 0, "other": 0, "adapter": 0, "rows": 1000, "in_4bit": False, "logits": 5e8}
    hidden, layer = 1000 * 4096 * 2, layer_activations(shape, 1000, 1000)
    backward = 1000 * (14336 + 6 * 4096) * 2
    for mode, pool, inputs in (
        ("off", layer + hidden + backward, 0),
        ("on", layer + backward, hidden),
        ("unsloth", layer + backward, 0),
    ):
        alone = peak_memory(shape, checkpointing=mode, **common)
        assert alone.graphs == 0
        one = peak_memory(shape, checkpointing=mode, **common, captured=[(1000, 5e8)])
        assert one.peak == pytest.approx(pool + inputs + 4 * hidden + 5e8), "all is replayed"
        several = peak_memory(shape, checkpointing=mode, **common, captured=[(900, 1e8), (1000, 1e8)])
        assert several.peak == pytest.approx(alone.peak + pool), "others run beside it"
    memory = StepMemory(shape, in_4bit=True)
    few, dense = (Forward(1000, 0, 0, 0, 1, 7.0, through) for through in (100, None))
    assert memory.pool(few) == memory.pool(dense), "captured rows need what captured dense layers need"
    assert memory.working(few) != memory.working(dense)
