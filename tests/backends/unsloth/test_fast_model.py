"""Unsloth's compiled path: models that the installed release loads by ``FastModel``."""

import importlib.util

import pytest


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
@pytest.mark.installed_unsloth("fast_model")
def test_layers_run_whole_or_by_parts_and_exact(unsloth_case):
    ((found,), _) = unsloth_case
    assert len(found) == 3 * 2 + 1
    for name, outcome in found.items():
        if name.startswith("gpt_oss"):
            assert outcome["parts"] == [["self_attn.o_proj", "mlp.experts"]], (name, outcome)
        else:
            assert outcome["whole"], (name, outcome)
        assert outcome["restored"], (name, outcome)
        assert outcome["replayed"] == name.endswith("graphs"), (name, outcome)
        assert outcome["error"] < (0.03 if name.startswith("olmo2") else 1e-4), (name, outcome)
