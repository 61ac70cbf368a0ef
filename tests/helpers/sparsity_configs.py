"""What the tests of `SparsityConfig` share: the published settings, and the words of its refusals."""

import json
from pathlib import Path

import pytest

from sparse_unsloth.config.layer_rules import LayerSparsity
from sparse_unsloth.errors import ConfigError

SHARE = "must be a number in [0, 1), the share of channels left out (0.9 leaves out 90 %)"
STEP = "must be a float in [0, 1] (fraction of the training) or an int from 0 up (optimiser steps)"

RECIPES = Path(__file__).parents[2] / "recipes" / "sparsity"

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
