"""Our attention under Unsloth against that of the installed release's own modules."""

import importlib.util

import pytest

PADDED, PACKED = ("padded", "left padded"), ("packed", "padding after the documents")
MASK, DOCUMENTS = ["attention_mask"], ["documents begin at"]
WINDOWS = {"mistral": [5, 5], "gemma2": [5, None]}
"""Of two layers; Unsloth gives Qwen2 none, whatever its configuration says."""


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
@pytest.mark.installed_unsloth("attention")
def test_every_family_of_the_fast_path(unsloth_case):
    """The case compares outputs and gradients; here is by what they were computed."""
    ((found,), _) = unsloth_case
    assert len(found) == 6 * (6 + 5)
    for name, calls in found.items():
        family, kernels, layout = name.split(", ")
        said_by_mask = layout == "kept mask" or (family == "gemma2" and kernels == "PyTorch")
        if layout != "positions alone":  # since 2026.10.8 Unsloth reads documents from them
            expected = MASK if said_by_mask else [] if layout in PADDED else DOCUMENTS
            assert [call["by"] for call in calls] == [expected] * 2, name
        assert [call["window"] for call in calls] == WINDOWS.get(family, [None, None]), name
        assert all(call["capturable"] == (call["by"] != DOCUMENTS) for call in calls), name
