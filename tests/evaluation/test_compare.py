"""Tests `sparse-unsloth compare`: groups by recipe, means and spreads by hand, tests over seeds and over items."""

import json
import statistics

import pytest
import yaml

from sparse_unsloth.cli import main
from sparse_unsloth.evaluation.compare import CompareError, compare, group_runs, read_run

RECIPE = {"model_name_or_path": "m", "dataset_name": "d", "lora_r": 4}


def make_run(folder, name, seed, loss, kind="dense", items=None, **changes):
    """A run folder as `train` and `evaluate` leave it."""
    run = folder / name
    (run / "evaluation" / "humaneval").mkdir(parents=True)
    recipe = {**RECIPE, "seed": seed, "output_dir": str(run), "sparsity": {"preset": kind, "estimator": {"path": None}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    log = [{"step": step, "loss": loss + (10 - step) / 10} for step in range(1, 11)]
    metrics = {
        "log": [*log, {"step": 10, "eval_loss": loss}, {"train_runtime": 1.0}],
        "train_seconds": 20.0,
        "median_step_seconds": {"dense": 2.0, "sparse": None if kind == "dense" else 1.0},
        "evaluation": {"eval_loss": loss + 0.5, "eval_runtime": 3.0, "eval_mean_token_accuracy": 0.7, "epoch": 1.0},
        "tokens_per_second": 1000.0 * loss,
        "memory": {"gpu_allocated": 2**31, "host": 2**30},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    if items is not None:
        scores = {"pass@1": statistics.fmean(items)}
        named = {f"HumanEval/{number}": value for number, value in enumerate(items)}
        found = {"suite": "humaneval", "name": name, "scores": scores, "items": named}
        (run / "evaluation" / "humaneval" / "results.json").write_text(json.dumps(found))
    return str(run)


def test_a_run_is_read(tmp_path):
    run = read_run(make_run(tmp_path, "a-1", 1, 2.0, "o1", items=[1.0, 0.0]))
    assert run.values == {
        "training loss, last tenth": pytest.approx(2.0),
        "held-out loss": 2.5,
        "held-out mean token accuracy": 0.7,
        "tokens/s": 2000.0,
        "dense step, median seconds": 2.0,
        "sparse step, median seconds": 1.0,
        "training seconds": 20.0,
        "peak GPU memory, GiB": 2.0,
        "peak host memory, GiB": 1.0,
        "humaneval pass@1": 0.5,
    }
    assert run.items == {"humaneval pass@1": {"HumanEval/0": 1.0, "HumanEval/1": 0.0}}
    assert len(run.losses) == 10


def test_seeds_make_a_group_and_settings_do_not_mix(tmp_path):
    folders = [make_run(tmp_path, f"dense-{seed}", seed, 2 + seed / 10) for seed in range(3)]
    folders += [make_run(tmp_path, f"sparse-{seed}", seed, 2.2 + seed / 10, "o1") for seed in range(3)]
    folders += [make_run(tmp_path, "wide", 0, 2.0, lora_r=8)]
    # The estimator's file lies in each run's own folder.
    own = {"preset": "o1", "estimator": {"path": str(tmp_path / "sparse-9" / "estimator.safetensors")}}
    folders += [make_run(tmp_path, "sparse-9", 9, 2.0, "o1", sparsity=own)]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [(group.name, len(group.runs)) for group in groups] == [("dense (n=3)", 3), ("sparse (n=4)", 4), ("wide", 1)]


def test_means_spreads_and_a_paired_test_by_hand(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    dense, sparse = [2.0, 2.2, 2.1], [2.3, 2.4, 2.45]
    runs = [read_run(make_run(tmp_path, f"dense-{seed}", seed, loss)) for seed, loss in enumerate(dense)]
    runs += [read_run(make_run(tmp_path, f"sparse-{seed}", seed, loss, "o1")) for seed, loss in enumerate(sparse)]
    found = compare(group_runs(runs))
    cell = found["metrics"]["held-out loss"][0]
    assert cell == {"mean": pytest.approx(2.6), "spread": pytest.approx(0.1), "n": 3}
    test = next(test for test in found["tests"] if test["metric"] == "held-out loss")
    assert (test["over"], test["pairs"], test["test"]) == ("seeds", 3, "t")
    assert test["mean_difference"] == pytest.approx(statistics.fmean(sparse) - statistics.fmean(dense))
    assert test["p_value"] == pytest.approx(stats.ttest_rel(sparse, dense).pvalue)
    assert all(test["p_value"] <= test["p_holm"] <= 1 for test in found["tests"])
    assert found["metrics"]["sparse step, median seconds"][0] is None


def test_one_seed_is_tested_over_items(tmp_path):
    """Eight problems are solved by the second run only, one by the first only: McNemar's exact test, by hand."""
    first = [1.0] * 3 + [0.0] * 8 + [1.0] + [0.0] * 5
    second = [1.0] * 3 + [1.0] * 8 + [0.0] + [0.0] * 5
    runs = [make_run(tmp_path, "a", 0, 2.0, items=first), make_run(tmp_path, "b", 0, 2.1, "o1", items=second)]
    found = compare(group_runs([read_run(run) for run in runs]))
    (test,) = found["tests"]
    assert (test["metric"], test["over"], test["test"], test["pairs"]) == ("humaneval pass@1", "items", "McNemar", 17)
    assert test["mean_difference"] == pytest.approx(7 / 17)
    assert test["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)


def test_graded_items_by_signed_ranks(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    first, second = [5.0, 6.0, 7.0, 4.0, 9.0], [6.0, 7.5, 9.0, 3.5, 9.0]
    runs = [make_run(tmp_path, "a", 0, 2.0, items=first), make_run(tmp_path, "b", 0, 2.1, "o1", items=second)]
    (test,) = compare(group_runs([read_run(run) for run in runs]))["tests"]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    assert test["p_value"] == pytest.approx(stats.wilcoxon(differences, zero_method="zsplit").pvalue)


def test_runs_without_a_common_seed_are_not_tested(tmp_path):
    runs = [make_run(tmp_path, "a", 0, 2.0, items=[1.0, 0.0]), make_run(tmp_path, "b", 1, 2.1, "o1", items=[1.0, 0.0])]
    assert compare(group_runs([read_run(run) for run in runs]))["tests"] == []


def test_command_writes_tables_and_picture(tmp_path, capsys):
    runs = [make_run(tmp_path, f"dense-{seed}", seed, 2 + seed / 9, items=[1.0, 0.0]) for seed in range(2)]
    runs += [make_run(tmp_path, f"sparse-{seed}", seed, 2.3 - seed / 9, "o1", items=[1.0, 1.0]) for seed in range(2)]
    out = tmp_path / "out"
    assert main(["compare", *runs, "--output-dir", str(out)]) == 0
    printed, table = capsys.readouterr().out, (out / "comparison.md").read_text()
    for word in ("held-out loss", "humaneval pass@1", "tokens/s", "peak GPU memory, GiB", "p, Holm"):
        assert word in table
        assert word in printed
    assert "2.556 ± 0.079" in table
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "comparison.json").read_text())
    assert saved["groups"] == ["dense (n=2)", "sparse (n=2)"]
    assert saved["runs"]["dense (n=2)"][0]["values"]["held-out loss"] == 2.5


def test_what_cannot_be_compared(tmp_path, capsys):
    run = make_run(tmp_path, "a", 0, 2.0)
    assert main(["compare", run, str(tmp_path)]) == 2
    assert "has no recipe.yaml and no metrics.json, so it holds no finished run" in capsys.readouterr().err
    with pytest.raises(CompareError, match=r"a and a are the same recipe with the same seed \(0\)"):
        group_runs([read_run(run), read_run(run)])
