"""Real training runs through Unsloth and TRL on the GPU: `sft_runs.py` in a process of its own; its report is asserted.

Needs SmolLM2-135M-Instruct as a checkpoint folder, named by the environment variable SMOLLM2:

    SMOLLM2=DIR pytest -m gpu tests/gpu/test_sft.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MODEL = os.environ.get("SMOLLM2", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(not Path(MODEL, "config.json").is_file(), reason="SMOLLM2 names no checkpoint folder"),
    pytest.mark.timeout(1200),
]
SCRIPT = Path(__file__).parent / "sft_runs.py"
SETTINGS = [f"{dtype}-{layout}" for dtype in ("bf16", "4bit") for layout in ("padded", "free", "packed")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    command = [sys.executable, str(SCRIPT), "--model", MODEL, "--out", str(folder), "--runs", "all"]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout)
    assert (folder / "sft.json").is_file(), process.stdout[-6000:]
    return json.loads((folder / "sft.json").read_text())


@pytest.mark.parametrize("setting", SETTINGS)
def test_training(report, setting):
    run = report["runs"][setting]
    assert len(run["losses"]) == report["steps"] == 20
    assert sum(run["losses"][-5:]) < sum(run["losses"][:5])
    assert [step for step, entry in enumerate(run["metrics"]) if entry["sparsity/enabled"]] == list(range(2, 18))
    assert all(entry["sparsity/context_share"] > 0.5 for entry in run["metrics"])


@pytest.mark.parametrize("setting", ["bf16-free", "4bit-padded"])
def test_saved_adapter_gives_the_same_logits(report, setting):
    names = ["FastLanguageModel", "FastSparseLanguageModel", "plain PEFT"]
    found = {name: check["passed"] for name, check in report["checks"].items() if name.startswith(f"{setting}: logits")}
    for name in names:
        assert any(name in check and passed for check, passed in found.items()), (name, found)


def test_dpo_is_sparse_in_policy_and_reference(report):
    ran = report["dpo"]["parts_run_by_forward"]
    assert len(set(ran)) == 1
    assert ran[0] > 0


def test_no_check_failed(report):
    assert {name: report["checks"][name]["detail"] for name in report["failed"]} == {}
