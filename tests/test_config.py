import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_unsloth.config import PRESETS, EstimatorConfig, LayerSparsity, SparsityConfig
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.layer_rules import canonical_rule, collect, expand

RECIPES = Path(__file__).parents[1] / "recipes" / "sparsity"

# name: start_step, dense_tokens, number of layers, MLP and attention sparsity with their layers (both ends included)
PUBLISHED = {
    "llama2-7b-csr": (0.05, "output", 32, {0.9: [(13, 29)]}, {0.5: [(17, 19), (21, 23), (25, 29)]}),
    "llama2-7b-math10k": (0.05, "output", 32, {0.9: [(13, 29)]}, {0.6: [(17, 19), (21, 23), (25, 29)]}),
    "llama2-7b-codefeedback": (0.05, "output", 32, {0.99: [(3, 30)]}, {0.25: [(14, 19), (21, 23), (25, 29)]}),
    "llama2-13b-csr": (0.1, "output", 40, {0.97: [(13, 36)]}, {0.2: [(17, 36)]}),
    "llama2-13b-math10k": (0.05, "output", 40, {0.97: [(13, 36)]}, {0.25: [(17, 36)]}),
    "llama3-8b-csr": (0.05, "output", 32, {0.97: [(17, 30)]}, {0.2: [(17, 19), (21, 23), (25, 29)]}),
    "llama3-8b-math10k": (0.05, "output", 32, {0.99: [(3, 30)]}, {0.75: [(14, 19), (21, 23), (25, 29)]}),
    "llama3-8b-glue": (0.05, "none", 32, {0.95: [(17, 30)], 0.5: [(31, 31)]}, {0.75: [(17, 29)]}),
    "llama3.1-8b-codefeedback": (0.05, "output", 32, {0.99: [(3, 30)]}, {0.4: [(14, 19), (21, 23), (25, 29)]}),
    "llama3.1-8b-wizardlm": (0.05, "output", 32, {0.99: [(3, 30)]}, {0.4: [(14, 19), (21, 23), (25, 29)]}),
    "llama3.1-8b-arc-agi": (0.1, "output", 32, {0.9: [(16, 29)]}, {}),
}


def table(num_layers, part):
    layers = [0.0] * num_layers
    for sparsity, spans in part.items():
        for first, last in spans:
            layers[first : last + 1] = [sparsity] * (last + 1 - first)
    return layers


def published_layers(name):
    _, _, num_layers, mlp, self_attn = PUBLISHED[name]
    return [LayerSparsity(*pair) for pair in zip(table(num_layers, mlp), table(num_layers, self_attn), strict=True)]


def error_of(build, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        build(*args, **kwargs)
    return str(caught.value)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- rules and layers


def test_defaults_are_dense_with_a_dense_tail():
    config = SparsityConfig()
    assert config.layer_sparsity(3) == [LayerSparsity(0.0, 0.0)] * 3
    assert (config.start_step, config.end_step, config.ramp) == (0.05, 0.75, 0.0)
    assert (config.estimator.kind, config.estimator.rank) == ("auto", 8)
    assert (config.criterion, config.dense_tokens, config.lora_branch) == ("estimator", "output", "dense")


def test_later_rules_override_earlier_ones_and_the_preset():
    config = SparsityConfig(preset="o2", mlp={"all": 0.5, "1-2": 0.25, 2: 0, " 3 - 3 ": 0.125}, self_attn={"31": 0.1})
    mlp = [layer.mlp for layer in config.layer_sparsity(32)]
    assert mlp == [0.5, 0.25, 0.0, 0.125, *[0.5] * 28]
    assert config.mlp == {"all": 0.5, "1-2": 0.25, "2": 0.0, "3": 0.125}
    attention = [layer.self_attn for layer in config.layer_sparsity(32)]
    assert attention[31] == 0.1
    assert attention[14] == 0.75


def test_bare_yaml_layer_numbers_are_rules(tmp_path):
    path = write(tmp_path / "c.yaml", "mlp:\n  5: 0.9\n  7-8: 0.5\n")
    assert SparsityConfig.from_file(path).mlp == {"5": 0.9, "7-8": 0.5}


@pytest.mark.parametrize(("preset", "name"), [("o1", "llama3-8b-csr"), ("o2", "llama3-8b-math10k")])
def test_presets_are_the_published_tables_at_32_layers(preset, name):
    assert SparsityConfig(preset=preset).layer_sparsity(32) == published_layers(name)


@pytest.mark.parametrize("preset", ["o1", "o2"])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 16, 22, 24, 28, 30, 40, 80])
def test_presets_scale_to_any_depth(preset, num_layers):
    layers = SparsityConfig(preset=preset).layer_sparsity(num_layers)
    published = SparsityConfig(preset=preset).layer_sparsity(32)
    assert len(layers) == num_layers
    assert layers[0] == (0.0, 0.0)
    for i, layer in enumerate(layers[1:], start=1):
        assert layer == published[int((i + 0.5) * 32 / num_layers)]
    if num_layers > 1:
        assert any(layer.mlp for layer in layers)
    if num_layers >= 16:
        assert layers[-1] == (0.0, 0.0)
        share = sum(layer.mlp for layer in layers) / num_layers
        assert share == pytest.approx(sum(layer.mlp for layer in published) / 32, abs=0.05)


def test_dense_preset_is_dense():
    assert SparsityConfig(preset="dense").layer_sparsity(40) == [LayerSparsity(0.0, 0.0)] * 40


def test_layers_that_the_model_lacks_are_named_with_the_nearest_valid_ones():
    config = SparsityConfig(mlp={"3-30": 0.9, "all": 0.5}, self_attn={"28": 0.5, "40-50": 0.1, "27": 0.1})
    assert error_of(config.layer_sparsity, 28).splitlines() == [
        "sparsity configuration for a model with layers 0 to 27: 3 problems",
        "  mlp.3-30: no such layer; did you mean mlp.3-27?",
        "  self_attn.28: no such layer; did you mean self_attn.27?",
        "  self_attn.40-50: no such layer; did you mean self_attn.27?",
    ]
    assert error_of(config.layer_sparsity, 0) == "num_layers: must be at least 1, given 0"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.integers(0, 40), st.sampled_from([0.0, 0.25, 0.5, 0.99])))
def test_collected_rules_give_back_the_layers(layers):
    rules = collect(layers)
    assert SparsityConfig(mlp=rules).mlp == rules
    assert expand(rules, [0.0] * 41) == [layers.get(i, 0.0) for i in range(41)]


# --- refusals

SHARE = "must be a number in [0, 1), the share of channels left out (0.9 leaves out 90 %)"
RULE = "must name layers as 'all', one layer '5' or a range '3-30'"
STEP = "must be a float in [0, 1] (fraction of the training) or an int from 0 up (optimiser steps)"
FRACTION = "must be a number in [0, 1], a share of the training"
REFUSED = [
    ({"mpl": {}}, "mpl: unknown key; did you mean mlp? (given {})"),
    ({"self_atn": {}}, "self_atn: unknown key; did you mean self_attn? (given {})"),
    ({"rank": 16}, "rank: unknown key; did you mean estimator.rank? (given 16)"),
    ({"estimator": {"knd": "svd"}}, "estimator.knd: unknown key; did you mean estimator.kind? (given 'svd')"),
    (
        {"zzz": 1},
        "zzz: unknown key; valid keys: preset, mlp, self_attn, estimator, criterion, dense_tokens, "
        "output_sparsity, rope_pairs, lora_branch, exact_removal, memory_budget, start_step, end_step, ramp, "
        "refresh_steps, explain_steps, seed (given 1)",
    ),
    ({"mlp": {"3-30": 1.0}}, f"mlp.3-30: {SHARE}, given 1.0"),
    ({"mlp": {"3-30": 99}}, f"mlp.3-30: {SHARE}, given 99"),
    ({"mlp": {"5": -0.1}}, f"mlp.5: {SHARE}, given -0.1"),
    ({"mlp": {"5": float("nan")}}, f"mlp.5: {SHARE}, given nan"),
    ({"mlp": {"5": True}}, f"mlp.5: {SHARE}, given True"),
    ({"self_attn": {"all": "0.5"}}, f"self_attn.all: {SHARE}, given '0.5'"),
    ({"self_attn": {"all": None}}, f"self_attn.all: {SHARE}, given None"),
    ({"mlp": {"first": 0.5}}, f"mlp.first: {RULE}, given 'first'"),
    ({"mlp": {"-1": 0.5}}, f"mlp.-1: {RULE}, given '-1'"),
    ({"mlp": {-1: 0.5}}, f"mlp.-1: {RULE}, given -1"),
    ({"mlp": {"3-": 0.5}}, f"mlp.3-: {RULE}, given '3-'"),
    ({"mlp": {"3-5-7": 0.5}}, f"mlp.3-5-7: {RULE}, given '3-5-7'"),
    ({"mlp": {"3,5": 0.5}}, f"mlp.3,5: {RULE}, given '3,5'"),
    ({"mlp": {1.5: 0.5}}, f"mlp.1.5: {RULE}, given 1.5"),
    ({"mlp": {"30-3": 0.5}}, "mlp.30-3: must run from low to high: '3-30', given '30-3'"),
    ({"mlp": {5: 0.5, "05": 0.4}}, "mlp: must name each rule once; twice: 5, given {5: 0.5, '05': 0.4}"),
    ({"mlp": 0.9}, "mlp: must be a mapping of layers to shares, such as {'3-30': 0.99}, given 0.9"),
    ({"mlp": None}, "mlp: must be a mapping of layers to shares, such as {'3-30': 0.99}, given None"),
    ({"preset": "o3"}, "preset: must be 'dense', 'o1' or 'o2', given 'o3'"),
    ({"preset": "denes"}, "preset: must be 'dense', 'o1' or 'o2', given 'denes'; did you mean 'dense'?"),
    (
        {"criterion": "wnada"},
        "criterion: must be 'estimator', 'oracle', 'wanda', 'magnitude' or 'random', given 'wnada'; "
        "did you mean 'wanda'?",
    ),
    ({"dense_tokens": False}, "dense_tokens: must be 'output' or 'none', given False"),
    ({"lora_branch": "sparse"}, "lora_branch: must be 'dense' or 'selected', given 'sparse'"),
    ({"rope_pairs": 1}, "rope_pairs: must be a valid boolean, given 1"),
    ({"seed": -1}, "seed: must be greater than or equal to 0, given -1"),
    ({"seed": True}, "seed: must be a valid integer, given True"),
    ({"start_step": True}, f"start_step: {STEP}, given True"),
    ({"start_step": -1}, f"start_step: {STEP}, given -1"),
    ({"start_step": 100.0}, f"start_step: {STEP}, given 100.0"),
    ({"end_step": float("nan")}, f"end_step: {STEP}, given nan"),
    ({"end_step": "1.0"}, f"end_step: {STEP}, given '1.0'"),
    (
        {"end_step": 1},
        "end_step: must be written 1.0 for the whole training: the int 1 means one optimiser step, given 1",
    ),
    ({"start_step": 0.5, "end_step": 0.25}, "end_step: must not be less than start_step (0.5), given 0.25"),
    ({"start_step": 50, "end_step": 20}, "end_step: must not be less than start_step (50), given 20"),
    ({"start_step": 0.8}, "end_step: must not be less than start_step (0.8), given 0.75"),
    ({"ramp": 1.5}, f"ramp: {FRACTION}, given 1.5"),
    ({"ramp": False}, f"ramp: {FRACTION}, given False"),
    ({"ramp": 0.8}, "ramp: must fit between start_step and end_step: at most 0.7, given 0.8"),
    (
        {"estimator": "svd"},
        "estimator: must be a mapping with some of the keys kind, rank, path, calibration_samples, compensation_rank, "
        "given 'svd'",
    ),
    (
        {"estimator": {"kind": "svdd"}},
        "estimator.kind: must be 'auto', 'svd', 'whitened', 'prior' or 'static', given 'svdd'; did you mean 'svd'?",
    ),
    ({"estimator": {"rank": 0}}, "estimator.rank: must be greater than or equal to 1, given 0"),
    ({"estimator": {"rank": 8.0}}, "estimator.rank: must be a valid integer, given 8.0"),
    ({"estimator": {"rank": "8"}}, "estimator.rank: must be a valid integer, given '8'"),
    ({"estimator": {"path": 5}}, "estimator.path: must be a valid string, given 5"),
    (
        {"estimator": {"kind": "prior", "calibration_samples": 0}},
        "estimator.calibration_samples: must be at least 1 for kind 'prior', unless path names factors made before, "
        "given 0",
    ),
    (
        {"estimator": {"compensation_rank": 64}},
        "estimator.compensation_rank: must be 0 for kind 'auto': compensation is fitted for fixed channels, "
        "kind 'static', given 64",
    ),
    (
        {"estimator": {"kind": "static", "compensation_rank": -1}},
        "estimator.compensation_rank: must be greater than or equal to 0, given -1",
    ),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message.split(",")[0] for _, message in REFUSED])
@pytest.mark.parametrize("build", [lambda data: SparsityConfig(**data), SparsityConfig.from_any])
def test_bad_input_is_refused_by_name(build, data, message):
    assert error_of(build, data) == f"sparsity configuration: {message}"


def test_all_problems_are_reported_at_once():
    data = {"mlp": {"3-30": 1.5, "9-1": 0.5}, "ramp": 2, "estimator": {"rank": 0, "kin": 1}, "sed": 1}
    assert error_of(SparsityConfig.from_any, data).splitlines() == [
        "sparsity configuration: 6 problems",
        f"  mlp.3-30: {SHARE}, given 1.5",
        "  mlp.9-1: must run from low to high: '1-9', given '9-1'",
        "  estimator.rank: must be greater than or equal to 1, given 0",
        "  estimator.kin: unknown key; did you mean estimator.kind? (given 1)",
        f"  ramp: {FRACTION}, given 2",
        "  sed: unknown key; did you mean seed? (given 1)",
    ]


def test_an_estimator_alone_reports_the_same_way():
    assert error_of(EstimatorConfig, rank=0) == (
        "sparsity configuration: rank: must be greater than or equal to 1, given 0"
    )
    config = SparsityConfig(estimator=EstimatorConfig(kind="static", compensation_rank=64, path=Path("a") / "b"))
    assert config.estimator.compensation_rank == 64
    assert config.estimator.path == os.path.join("a", "b")


def test_config_is_frozen_and_copies():
    config = SparsityConfig(preset="o1", mlp={"1": 0.5})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_steps_and_fractions_may_be_mixed():
    config = SparsityConfig(start_step=100, end_step=0.75)
    assert config.schedule.sparse_steps(1000) == range(100, 750)


# --- files


def shares():
    return st.floats(0, 1, exclude_max=True, allow_nan=False)


def rules():
    ranges = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda ends: f"{min(ends)}-{max(ends)}")
    names = st.one_of(st.just("all"), ranges, st.integers(0, 99)).map(canonical_rule)
    return st.dictionaries(names, shares(), max_size=6)


def estimators():
    text = st.text("ab1:#-/\\ '\"\n\u00e9\u4e2d", max_size=20)
    return st.fixed_dictionaries(
        {"kind": st.sampled_from(["auto", "svd", "whitened", "prior"]), "rank": st.integers(1, 512)},
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
        "rope_pairs": st.booleans(),
        "lora_branch": st.sampled_from(["dense", "selected"]),
        "seed": st.integers(0, 2**63),
    }
    return st.tuples(st.fixed_dictionaries({}, optional=fields), schedules()).map(
        lambda parts: SparsityConfig(**parts[0], **parts[1])
    )


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_saved_configs_come_back_exactly(tmp_path_factory, suffix):
    path = tmp_path_factory.mktemp("saved") / f"config{suffix}"

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    assert error_of(SparsityConfig.from_file, broken).startswith(f"{broken}: cannot be read as YAML: ")
    wrong = write(tmp_path / "wrong.yaml", "mlp: {3-30: 1}\n")
    assert error_of(SparsityConfig.from_file, wrong) == f"{wrong}: mlp.3-30: {SHARE}, given 1"


def test_keys_given_twice_are_refused(tmp_path):
    doubled = write(tmp_path / "c.yaml", "mlp:\n  5: 0.5\n  5: 0.9\n")
    message = error_of(SparsityConfig.from_file, doubled)
    assert "key '5' given twice" in message
    assert "line 3" in message
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
        "sparsity configuration: 'dens' is neither a preset (dense, o1, o2) nor a file; did you mean 'dense'?"
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
    assert (config.start_step, config.end_step, config.ramp) == (start, 1.0, 0.0)
    assert config.dense_tokens == dense_tokens
    assert config.estimator == EstimatorConfig(kind="svd", rank=8)
    header = path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") for line in header)
    assert "arXiv 2506.16500" in header[0]
    assert str(Path("recipes", "sparsity", path.name)) in header[1]


# --- older formats


def flat(**changes):
    """The 2025 release's file of llama3.1-8b-codefeedback, with every layer named as there."""
    layers = {}
    for index, layer in enumerate(published_layers("llama3.1-8b-codefeedback")):
        layers[f"layers.{index}.mlp"] = layer.mlp or 0
        layers[f"layers.{index}.self_attn"] = layer.self_attn or 0
    data = {
        "start_step": 0.05,
        "mode": "svd_8",
        "skip_output_tokens": True,
        "ffn_sparsity": "ffn=0.99x28",
        "qkvo_sparsity": "qkv=0.4x14",
        "sparsity": layers,
    }
    return {key: value for key, value in (data | changes).items() if value is not ...}


def hub(*modes, **changes):
    """The 2026 release's config.json."""
    tables = {}
    for mode in modes:
        layers = {}
        for index, layer in enumerate(SparsityConfig(preset=mode).layer_sparsity(32)):
            layers[f"model.layers.{index}.mlp"] = layer.mlp or 0
            layers[f"model.layers.{index}.self_attn"] = layer.self_attn or 0
        tables[mode] = {"layer_sparsity": layers}
    return {"base_model": "some/model", "predictor_rank": 8, "modes": tables} | changes


def test_flat_yaml_reads_as_the_recipe_it_became(tmp_path):
    path = write(tmp_path / "old.yaml", yaml.safe_dump(flat()))
    assert SparsityConfig.from_file(path) == SparsityConfig.from_file(RECIPES / "llama3.1-8b-codefeedback.yaml")


def test_flat_yaml_takes_that_releases_values_for_what_it_leaves_out():
    config = SparsityConfig.from_any({"mode": "svd_16", "sparsity": {"layers.3.mlp": 0.99, "layers.14.self_attn": 0.4}})
    assert config == SparsityConfig(
        mlp={"3": 0.99},
        self_attn={"14": 0.4},
        estimator={"kind": "svd", "rank": 16},
        dense_tokens="none",
        start_step=0.0,
        end_step=1.0,
    )


@pytest.mark.parametrize(("old", "new"), [(0, 0.0), (1, 1.0), (0.9, 0.9), (200, 200), (200.0, 200)])
def test_flat_yaml_steps_are_fractions_up_to_1(old, new):
    config = SparsityConfig.from_any(flat(start_step=0, end_step=old))
    assert config.end_step == new
    assert type(config.end_step) is type(new)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("svd_32", {"estimator": {"kind": "svd", "rank": 32}}),
        ("oracle_svd_8", {"estimator": {"kind": "svd", "rank": 8}}),
        ("oracle_ffn_norm", {"criterion": "oracle"}),
        ("oracle_attention_norm", {"criterion": "oracle"}),
        ("oracle_l2norm", {"criterion": "oracle"}),
        ("oracle_ffn_wanda", {"criterion": "wanda"}),
        ("oracle_random", {"criterion": "random"}),
    ],
)
def test_flat_yaml_modes(mode, expected):
    config = SparsityConfig.from_any({"mode": mode, "sparsity": {"layers.1.mlp": 0.5}})
    rest = {"mlp": {"1": 0.5}, "dense_tokens": "none", "start_step": 0.0, "end_step": 1.0}
    assert config == SparsityConfig(**rest, **expected)


def test_flat_yaml_dense_mode_and_lora_branch():
    dense = SparsityConfig.from_any({"mode": "dense", "sparsity": {"layers.0.mlp": 0, "layers.0.self_attn": 0}})
    assert dense.layer_sparsity(4) == [LayerSparsity(0.0, 0.0)] * 4
    assert SparsityConfig.from_any(flat(sparse_lora_branch=True)).lora_branch == "selected"


MODE = (
    "mode: must be 'svd_RANK' (such as 'svd_8'), 'dense', or an 'oracle_...' study of whole layers by norm, wanda or "
    "random, given "
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "svd"}, f"{MODE}'svd'"),
        ({"mode": "svd_0"}, f"{MODE}'svd_0'"),
        ({"mode": ...}, f"{MODE}None"),
        ({"mode": 8}, f"{MODE}8"),
        ({"mode": "oracle_attention_norm_qk"}, f"{MODE}'oracle_attention_norm_qk'"),
        (
            {"mode": "dense"},
            "mode: 'dense' contradicts the layers above 0 in sparsity; write 'svd_8', or set them to 0",
        ),
        ({"skip_output_token": True}, "skip_output_token: unknown key; did you mean skip_output_tokens? (given True)"),
        (
            {"zzz": 1},
            "zzz: unknown key; valid keys of this older format: start_step, end_step, mode, skip_output_tokens, "
            "sparse_lora_branch, sparsity, ffn_sparsity, qkvo_sparsity (given 1)",
        ),
        ({"skip_output_tokens": "yes"}, "skip_output_tokens: must be true or false, given 'yes'"),
        ({"start_step": "soon"}, f"start_step: {STEP}, given 'soon'"),
        ({"start_step": float("nan")}, f"start_step: {STEP}, given nan"),
        ({"sparsity": {"layers.3.mlp": 1}}, f"sparsity.layers.3.mlp: {SHARE}, given 1"),
        (
            {"sparsity": {"layers.3.ffn": 0.5}},
            "sparsity.layers.3.ffn: must name a module as layers.3.mlp or layers.3.self_attn (given 0.5)",
        ),
        (
            {"sparsity": {"layers.3.mlp": 0.5, "model.layers.3.mlp": 0.5}},
            "sparsity.model.layers.3.mlp: names the mlp of layer 3 a second time",
        ),
    ],
)
def test_flat_yaml_refusals(changes, message):
    assert error_of(SparsityConfig.from_any, flat(**changes)) == f"sparsity configuration: {message}"


def test_flat_yaml_problems_are_reported_at_once():
    data = {"mode": "svd", "sparsity": {"layers.3.mlp": 2}, "end_step": "never"}
    assert error_of(SparsityConfig.from_any, data).splitlines() == [
        "sparsity configuration: 3 problems",
        f"  sparsity.layers.3.mlp: {SHARE}, given 2",
        f"  {MODE}'svd'",
        f"  end_step: {STEP}, given 'never'",
    ]


@pytest.mark.parametrize("mode", ["o1", "o2"])
def test_hub_json_modes(tmp_path, mode):
    path = write(tmp_path / "config.json", hub("o1", "o2"))
    config = SparsityConfig.from_file(path, mode=mode)
    assert config.layer_sparsity(32) == SparsityConfig(preset=mode).layer_sparsity(32)
    assert config.estimator == EstimatorConfig(kind="svd", rank=8)
    assert (config.start_step, config.end_step, config.dense_tokens) == (0.0, 1.0, "output")
    assert SparsityConfig.from_any(f"{path}#{mode}") == config


def test_hub_json_needs_a_mode_only_when_it_holds_several(tmp_path):
    only = write(tmp_path / "one.json", hub("o2"))
    assert SparsityConfig.from_file(only).mlp == {"3-30": 0.99}
    both = write(tmp_path / "two.json", hub("o1", "o2"))
    assert error_of(SparsityConfig.from_file, both) == (
        f"{both}: mode: choose one of o1, o2, as in from_file(path, mode='o1')"
    )
    assert error_of(SparsityConfig.from_file, both, mode="o3") == f"{both}: mode: must be one of o1, o2, given 'o3'"


def test_a_mode_is_refused_where_there_are_none(tmp_path):
    new = write(tmp_path / "new.yaml", "preset: o1\n")
    assert error_of(SparsityConfig.from_file, new, mode="o1") == (
        f"{new}: mode: 'o1' given, but only the older JSON format has modes"
    )
    old = write(tmp_path / "old.yaml", yaml.safe_dump(flat()))
    assert error_of(SparsityConfig.from_file, old, mode="o1") == (
        f"{old}: mode: 'o1' asked for, but this file has no modes to choose from"
    )


def test_saved_2026_config_reads_too(tmp_path):
    data = {"layer_sparsity": {"model.layers.3.mlp": 0.99}, "predictor_rank": 4, "path": "a/b", "start_step": 0.05}
    config = SparsityConfig.from_file(write(tmp_path / "sparselora_config.json", data))
    assert config == SparsityConfig(
        mlp={"3": 0.99}, estimator={"kind": "svd", "rank": 4}, start_step=0.05, end_step=1.0
    )
    message = error_of(SparsityConfig.from_file, tmp_path / "sparselora_config.json", mode="o1")
    assert message.endswith("mode: 'o1' asked for, but this file has no modes to choose from")


def test_hub_json_finds_the_factors_beside_it(tmp_path):
    path = write(tmp_path / "config.json", hub("o1"))
    assert SparsityConfig.from_file(path).estimator.path is None
    (tmp_path / "model.safetensors").touch()
    assert SparsityConfig.from_file(path).estimator.path == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor_rank": 0}, "predictor_rank: must be a whole number from 1 up, given 0"),
        ({"predictor_rank": True}, "predictor_rank: must be a whole number from 1 up, given True"),
        ({"predictor_rnk": 8}, "predictor_rnk: unknown key; did you mean predictor_rank? (given 8)"),
        ({"modes": {}}, "modes: must be a mapping of names to layer_sparsity, given {}"),
        ({"modes": {"o1": {}}}, "modes.o1: must be a mapping with the key layer_sparsity only, given {}"),
        (
            {"modes": {"o1": {"layer_sparsity": [1]}}},
            "modes.o1.layer_sparsity: must be a mapping such as {'layers.3.mlp': 0.99}, given [1]",
        ),
        (
            {"modes": {"o1": {"layer_sparsity": {"model.layers.3.mlp": 1.0}}}},
            f"modes.o1.layer_sparsity.model.layers.3.mlp: {SHARE}, given 1.0",
        ),
    ],
)
def test_hub_json_refusals(changes, message):
    assert error_of(SparsityConfig.from_any, hub("o1", **changes)) == f"sparsity configuration: {message}"
