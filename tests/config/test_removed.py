"""Removed options: an old file loads if they had no effect there; otherwise the error says what they were."""

import json
import re

import pytest
import yaml

from sparse_unsloth.config.removed import REMOVED
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.errors import ConfigError, RecipeError
from sparse_unsloth.training.recipe import load_recipe

ASKED = {
    "ramp": 0.25,
    "refresh_steps": 4,
    "lora_branch": "selected",
    "estimator.compensation_rank": 64,
    "output_sparsity": {"mlp": {"1-2": 0.25}, "self_attn": {}},
    "rope_pairs": False,
    "estimator.kind": "static",
}
"""A value of each option that asked for what is gone."""


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


NEUTRAL = [(path, value) for path, removed in REMOVED.items() for value in removed.neutral] + [
    ("output_sparsity", {"mlp": {}, "self_attn": {}}),
    ("output_sparsity", {"mlp": {"all": 0.0}}),
]


def test_every_removed_option_is_tested():
    assert set(ASKED) == set(REMOVED)


@pytest.mark.parametrize("path", REMOVED)
def test_a_value_that_asks_for_it_is_an_error_that_says_why(path, tmp_path):
    data = nested(path, ASKED[path])
    files = [tmp_path / "it.yaml", tmp_path / "it.json"]
    for file in files:  # JSON is YAML
        file.write_text(yaml.safe_dump(data) if file.suffix == ".yaml" else json.dumps(data))
    how = "set 'prior'" if REMOVED[path].values else "delete the key"
    said = rf"{re.escape(path)}: .*removed: .*{how} \(given {re.escape(repr(ASKED[path]))}\)"
    for read in (*(lambda file=file: SparsityConfig.from_any(file) for file in files), lambda: SparsityConfig(**data)):
        with pytest.raises(ConfigError, match=said):
            read()
    with pytest.raises(ConfigError, match="2 problems"):
        SparsityConfig.from_any({**data, "seed": -1})
    words = [f"--sparsity.{path}", json.dumps(ASKED[path])]
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", ["--use_cpu", "--bf16", "false", *words])


@pytest.mark.parametrize(("path", "value"), NEUTRAL)
def test_a_saved_neutral_value_is_dropped(path, value, tmp_path):
    file = tmp_path / "sparsity_config.yaml"
    file.write_text(yaml.safe_dump(nested(path, value)))
    assert SparsityConfig.from_file(file) == SparsityConfig(**nested(path, value)) == SparsityConfig()
    if path.startswith("estimator."):
        assert EstimatorConfig(**{path.removeprefix("estimator."): value}) == EstimatorConfig()


@pytest.mark.parametrize("word", ["--output_levels", "--refresh-steps", "--ramp", "--sparsity.compensation_rank"])
def test_words_at_another_place_say_so_too(word):
    with pytest.raises(RecipeError, match="this option was removed: it"):
        load_recipe("quickstart", ["--use_cpu", "--bf16", "false", word, "4"])
