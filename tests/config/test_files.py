"""Files of `SparsityConfig`: saving, reading, errors, and the published ones."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_unsloth.config.layer_rules import canonical_rule
from sparse_unsloth.config.sparsity import PRESETS, EstimatorConfig, SparsityConfig

from sparsity_configs import PUBLISHED, RECIPES, SHARE, error_of, published_layers, write


def shares():
    return st.floats(0, 1, exclude_max=True, allow_nan=False)


def rules():
    ranges = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda ends: f"{min(ends)}-{max(ends)}")
    names = st.one_of(st.just("all"), ranges, st.integers(0, 99)).map(canonical_rule)
    return st.dictionaries(names, shares(), max_size=6)


def estimators():
    text = st.text("ab1:#-/\\ '\"\n\u00e9\u4e2d", max_size=20)
    return st.fixed_dictionaries(
        {"kind": st.sampled_from(["auto", "svd", "prior"]), "rank": st.integers(1, 512)},
        optional={"path": text | st.none(), "calibration_samples": st.integers(1, 99)},
    )


def schedules():
    fractions = st.tuples(st.floats(0, 1), st.floats(0, 1))
    steps = st.tuples(st.integers(0, 10**9), st.integers(2, 10**9))
    return st.one_of(fractions, steps).map(lambda pair: {"start_step": min(pair), "end_step": max(pair)})


def configs():
    fields = {
        "preset": st.sampled_from([None, "dense", "o1", "o2"]),
        "mlp": rules(),
        "self_attn": rules(),
        "estimator": estimators(),
        "criterion": st.sampled_from(["estimator", "oracle", "wanda", "magnitude", "random"]),
        "dense_tokens": st.sampled_from(["output", "none"]),
        "exact_removal": st.booleans(),
        "seed": st.integers(0, 2**63),
    }
    return st.tuples(st.fixed_dictionaries({}, optional=fields), schedules()).map(
        lambda parts: SparsityConfig(**parts[0], **parts[1])
    )


@pytest.mark.parametrize(("suffix", "examples"), [(".yaml", 60), (".yml", 5), (".json", 40)])
def test_saved_configs_come_back_exactly(tmp_path_factory, suffix, examples):
    path = tmp_path_factory.mktemp("saved") / f"config{suffix}"

    @settings(deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(configs())
    def round_trip(config):
        config.save(path)
        back = SparsityConfig.from_file(path)
        assert back == config
        assert list(back.mlp) == list(config.mlp)
        assert [type(back.start_step), type(back.end_step)] == [type(config.start_step), type(config.end_step)]
        assert SparsityConfig.from_any(config.model_dump()) == config

    round_trip()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "config.yaml"
    SparsityConfig(preset="o1").save(path)

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        SparsityConfig(preset="o2").save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert SparsityConfig.from_file(path).preset == "o1"


def test_unusable_files_are_named(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert error_of(SparsityConfig.from_file, missing) == f"{missing}: no such file"
    assert error_of(SparsityConfig.from_file, tmp_path) == f"{tmp_path}: is a folder, name a file in it"
    text = write(tmp_path / "c.txt", "")
    assert error_of(SparsityConfig.from_file, text) == f"{text}: must end in .yaml, .yml, .json"
    assert error_of(SparsityConfig().save, text) == f"{text}: must end in .yaml, .yml, .json"
    empty = write(tmp_path / "c.yaml", "# nothing\n")
    assert error_of(SparsityConfig.from_file, empty) == (
        f"{empty}: must hold a mapping of SparsityConfig keys, but is empty"
    )
    array = write(tmp_path / "c.json", "[1]")
    assert error_of(SparsityConfig.from_file, array).endswith(
        "must hold a mapping of SparsityConfig keys, but holds a list"
    )
    broken = write(tmp_path / "broken.json", '{"mlp": ')
    assert error_of(SparsityConfig.from_file, broken).startswith(f"{broken}: cannot be read as JSON: Expecting value")
    broken = write(tmp_path / "broken.yaml", "mlp: {")
    assert error_of(SparsityConfig.from_file, broken).startswith(
        f"{broken}:1:7: cannot be read as YAML: while parsing a flow node"
    )
    wrong = write(tmp_path / "wrong.yaml", "mlp: {3-30: 1}\n")
    assert error_of(SparsityConfig.from_file, wrong) == f"{wrong}: mlp.3-30: {SHARE}, given 1"


def test_keys_given_twice_are_refused(tmp_path):
    doubled = write(tmp_path / "c.yaml", "mlp:\n  5: 0.5\n  5: 0.9\n")
    message = error_of(SparsityConfig.from_file, doubled)
    assert "key '5' given twice" in message
    assert "c.yaml:3:3: " in message
    doubled = write(tmp_path / "c.json", '{"seed": 1, "seed": 2}')
    assert error_of(SparsityConfig.from_file, doubled) == f"{doubled}: cannot be read as JSON: key 'seed' given twice"


def test_from_any(tmp_path):
    config = SparsityConfig(preset="o2", mlp={"0": 0.5})
    assert SparsityConfig.from_any(config) is config
    assert SparsityConfig.from_any(None) == SparsityConfig()
    for preset in PRESETS:
        assert SparsityConfig.from_any(preset) == SparsityConfig(preset=preset)
    config.save(tmp_path / "c.yaml")
    assert SparsityConfig.from_any(str(tmp_path / "c.yaml")) == config
    assert SparsityConfig.from_any(tmp_path / "c.yaml") == config
    assert SparsityConfig.from_any({"preset": "o2", "mlp": {0: 0.5}}) == config
    assert error_of(SparsityConfig.from_any, "dens") == (
        "sparsity configuration: 'dens' is neither a preset (auto, dense, rows, o1, o2) nor a file; "
        "did you mean 'dense'?"
    )
    assert error_of(SparsityConfig.from_any, "no/such.yaml") == "no/such.yaml: no such file"
    assert error_of(SparsityConfig.from_any, 0.9) == (
        "sparsity configuration: must be a preset, a path, a mapping or a SparsityConfig, given 0.9"
    )


# --- published recipes


def test_every_published_recipe_is_there():
    assert sorted(path.name for path in RECIPES.rglob("*")) == sorted(f"{name}.yaml" for name in PUBLISHED)
    assert len(PUBLISHED) == 11


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_the_published_settings(name):
    path = RECIPES / f"{name}.yaml"
    config = SparsityConfig.from_file(path)
    start, dense_tokens, num_layers, _, _ = PUBLISHED[name]
    assert config.layer_sparsity(num_layers) == published_layers(name)
    assert (config.start_step, config.end_step) == (start, 1.0)
    assert config.dense_tokens == dense_tokens
    assert config.estimator == EstimatorConfig(kind="svd", rank=8)
    header = path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") for line in header)
    assert "arXiv 2506.16500" in header[0]
    assert str(Path("recipes", "sparsity", path.name)) in header[1]
