"""Rules, layers and presets of `SparsityConfig`, and its errors."""

import copy
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_unsloth.config.layer_rules import LayerSparsity, collect, expand
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig

from sparsity_configs import SHARE, STEP, error_of, published_layers, write


def test_defaults_are_dense_with_a_dense_tail():
    config = SparsityConfig()
    assert config.layer_sparsity(3) == [LayerSparsity(0.0, 0.0)] * 3
    assert (config.start_step, config.end_step) == (0.05, 0.75)
    assert (config.estimator.kind, config.estimator.rank) == ("auto", 8)
    assert (config.criterion, config.dense_tokens) == ("estimator", "output")


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

RULE = "must name layers as 'all', one layer '5' or a range '3-30'"
MERGE = "must be true (as many as fit), false, null, or an int from 2 up (at most so many)"
REFUSED = [
    ({"mpl": {}}, "mpl: unknown key; did you mean mlp? (given {})"),
    ({"self_atn": {}}, "self_atn: unknown key; did you mean self_attn? (given {})"),
    ({"rank": 16}, "rank: unknown key; did you mean estimator.rank? (given 16)"),
    ({"estimator": {"knd": "svd"}}, "estimator.knd: unknown key; did you mean estimator.kind? (given 'svd')"),
    (
        {"zzz": 1},
        "zzz: unknown key; valid keys: preset, mlp, self_attn, estimator, criterion, dense_tokens, "
        "backward_rows, exact_removal, memory_budget, merge_micro_batches, cuda_graphs, "
        "precision, start_step, end_step, explain_steps, cosine_steps, sparse_prefill, seed (given 1)",
    ),
    ({"precision": "fp16"}, "precision: must be 'bf16', 'fp8' or 'fp8-context', given 'fp16'; did you mean 'bf16'?"),
    (
        {"precision": "fp8", "preset": "o2"},
        "precision: must be bf16 where channels are left out (mlp, self_attn, preset o1 or o2), given 'fp8'",
    ),
    (
        {"precision": "fp8-context", "preset": "rows"},
        "precision: must be fp8 or bf16 with backward_rows: fp8-context is for dense training so far, given "
        "'fp8-context'",
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
    ({"preset": "o3"}, "preset: must be 'auto', 'dense', 'o1', 'o2' or 'rows', given 'o3'"),
    (
        {"preset": "denes"},
        "preset: must be 'auto', 'dense', 'o1', 'o2' or 'rows', given 'denes'; did you mean 'dense'?",
    ),
    (
        {"preset": "auto", "mlp": {"all": 0.5}},
        "mlp: cannot be combined with preset auto, which leaves out no channels; leave the preset out, given "
        "{'all': 0.5}",
    ),
    (
        {"criterion": "wnada"},
        "criterion: must be 'estimator', 'oracle', 'wanda', 'magnitude' or 'random', given 'wnada'; "
        "did you mean 'wanda'?",
    ),
    (
        {"backward_rows": 0.5, "dense_tokens": "none"},
        "backward_rows: cannot be combined with dense_tokens: none: answers would be context tokens, and be left out "
        "of the backward pass where their gradients are small, which makes models unlearn; set dense_tokens: output, "
        "given 0.5",
    ),
    ({"dense_tokens": False}, "dense_tokens: must be 'output' or 'none', given False"),
    ({"merge_micro_batches": 1}, f"merge_micro_batches: {MERGE}, given 1"),
    ({"merge_micro_batches": "all"}, f"merge_micro_batches: {MERGE}, given 'all'"),
    ({"merge_micro_batches": 2.0}, f"merge_micro_batches: {MERGE}, given 2.0"),
    ({"exact_removal": 1}, "exact_removal: must be a valid boolean, given 1"),
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
    (
        {"estimator": "svd"},
        "estimator: must be a mapping with some of the keys kind, rank, path, calibration_samples, given 'svd'",
    ),
    (
        {"estimator": {"kind": "svdd"}},
        "estimator.kind: must be 'auto', 'svd' or 'prior', given 'svdd'; did you mean 'svd'?",
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
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message.split(",")[0] for _, message in REFUSED])
@pytest.mark.parametrize("build", [lambda data: SparsityConfig(**data), SparsityConfig.from_any])
def test_bad_input_is_refused_by_name(build, data, message):
    assert error_of(build, data) == f"sparsity configuration: {message}"


def test_all_problems_are_reported_at_once():
    data = {"mlp": {"3-30": 1.5, "9-1": 0.5}, "end_step": -1, "estimator": {"rank": 0, "kin": 1}, "sed": 1}
    assert error_of(SparsityConfig.from_any, data).splitlines() == [
        "sparsity configuration: 6 problems",
        f"  mlp.3-30: {SHARE}, given 1.5",
        "  mlp.9-1: must run from low to high: '1-9', given '9-1'",
        "  estimator.rank: must be greater than or equal to 1, given 0",
        "  estimator.kin: unknown key; did you mean estimator.kind? (given 1)",
        f"  end_step: {STEP}, given -1",
        "  sed: unknown key; did you mean seed? (given 1)",
    ]


def test_an_estimator_alone_reports_the_same_way():
    assert error_of(EstimatorConfig, rank=0) == (
        "sparsity configuration: rank: must be greater than or equal to 1, given 0"
    )
    config = SparsityConfig(estimator=EstimatorConfig(kind="prior", rank=64, path=Path("a") / "b"))
    assert config.estimator.rank == 64
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


@pytest.mark.parametrize("value", [None, True, False, 2, 16])
def test_merged_micro_batches_keep_their_kind(value, tmp_path):
    SparsityConfig(preset="dense", merge_micro_batches=value).save(tmp_path / "sparsity.yaml")
    assert SparsityConfig.from_file(tmp_path / "sparsity.yaml").merge_micro_batches is value
