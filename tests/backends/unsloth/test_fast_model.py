"""Unsloth's compiled path: models that the installed release loads by ``FastModel``."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from unsloth_on_cpu import SCRIPTS, UNSLOTH_ON_CPU


def test_layers_run_whole_and_exact(tmp_path):
    """One test, since Unsloth takes long to import."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    environment = {**os.environ, **UNSLOTH_ON_CPU, "TRITON_INTERPRET": "1", "SPARSE_UNSLOTH_KERNELS": "triton"}
    command = [sys.executable, str(SCRIPTS / "fast_model.py"), str(tmp_path / "found.json")]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 3 * 2
    for name, outcome in found.items():
        assert outcome["whole"], (name, outcome)
        assert outcome["restored"], (name, outcome)
        assert outcome["replayed"] == name.endswith("graphs"), (name, outcome)
        assert outcome["error"] < (0.03 if name.startswith("olmo2") else 1e-4), (name, outcome)
