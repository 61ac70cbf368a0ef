"""The sparsity files of the 2025 and 2026 releases, read as `SparsityConfig`."""

import pytest
import yaml

from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.errors import ConfigError

from sparsity_configs import RECIPES, SHARE, STEP, error_of, published_layers, write


def flat(**changes):
    """The 2025 release's file of llama3.1-8b-codefeedback, with the layer names of that release."""
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


def test_flat_yaml_dense_mode():
    dense = SparsityConfig.from_any({"mode": "dense", "sparsity": {"layers.0.mlp": 0, "layers.0.self_attn": 0}})
    assert dense.layer_sparsity(4) == [LayerSparsity(0.0, 0.0)] * 4


def test_flat_yaml_whose_lora_branch_was_sparse():
    assert SparsityConfig.from_any(flat(sparse_lora_branch=False)) == SparsityConfig.from_any(flat())
    with pytest.raises(ConfigError, match="sparse_lora_branch: this option was removed: it let context rows leave out"):
        SparsityConfig.from_any(flat(sparse_lora_branch=True))


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
