"""Our attention under Unsloth against that of the installed release's own modules, in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from unsloth_on_cpu import SCRIPTS, UNSLOTH_ON_CPU

PADDED, PACKED = ("padded", "left padded"), ("packed", "padding after the documents")
MASK, DOCUMENTS = ["attention_mask"], ["documents begin at"]
WINDOWS = {"mistral": [5, 5], "gemma2": [5, None]}
"""Of two layers; Unsloth gives Qwen2 none, whatever its configuration says."""


def test_every_family_of_the_fast_path(tmp_path):
    """The script compares outputs and gradients; here is by what they were computed."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {**UNSLOTH_ON_CPU, "TORCHDYNAMO_DISABLE": "1"}  # Gemma 2's attention compiles for a minute
    command = [sys.executable, str(SCRIPTS / "attention.py"), str(tmp_path / "found.json")]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 6 * (6 + 5)
    for name, calls in found.items():
        family, kernels, layout = name.split(", ")
        said_by_mask = layout == "kept mask" or (family == "gemma2" and kernels == "PyTorch")
        if layout != "positions alone":  # since 2026.10.8 Unsloth reads documents from them
            expected = MASK if said_by_mask else [] if layout in PADDED else DOCUMENTS
            assert [call["by"] for call in calls] == [expected] * 2, name
        assert [call["window"] for call in calls] == WINDOWS.get(family, [None, None]), name
        assert all(call["capturable"] == (call["by"] != DOCUMENTS) for call in calls), name
