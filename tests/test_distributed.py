"""Two processes on the CPU (gloo), launched by accelerate with the shipped configurations, against one process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

WORKER = Path(__file__).parent / "distributed_worker.py"
ROOT = WORKER.parents[1]
RECIPES = ROOT / "recipes" / "accelerate"
CONFIGS = sorted(RECIPES.glob("*.yaml"))


def run(folder, *launcher):
    """The worker in processes of its own, without the kernels' interpreter; what they said."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, *launcher, str(WORKER), str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process computes of the whole global batch."""
    folder = tmp_path_factory.mktemp("one")
    run(folder)
    return torch.load(folder / "alone.pt", weights_only=False)


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_same_global_batch(how, one, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{how}.yaml")]
    said = run(tmp_path, *launcher, "--mixed_precision", "no", "--num_processes", "2")
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    for rank in ranks:
        assert (rank["how"], rank["world"]) == (how, 2)
        for case, expected in one.items():
            if case != "trainer":
                assert_same(rank[case], expected)
        trainer, expected = rank["trainer"], one["trainer"]
        assert trainer["sharded"] == (how == "fsdp2")
        torch.testing.assert_close(trainer["losses"], expected["losses"], rtol=2e-4, atol=2e-3)  # logged in 4 digits
        assert_same(trainer["parameters"], expected["parameters"])
        assert trainer["enabled"] == expected["enabled"] == [0.0, 1.0, 1.0, 0.0]
        assert torch.equal(trainer["gain"], ranks[0]["trainer"]["gain"])
        torch.testing.assert_close(trainer["gain"], expected["gain"], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "estimator.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert said.count("sparsity/enabled") == 4, "every log line once"
    if how == "ddp":
        check_faults(tmp_path)


def check_faults(folder):
    """What is wrong on one rank is an error on both, and nobody waits for ever."""
    first, second = (json.loads((folder / f"faults-{rank}.json").read_text()) for rank in range(2))
    assert "Rank 1 holds other base weights than rank 0" in first["other weights"]
    assert second["other weights"] == first["other weights"]
    assert "is calibrated, and there are no calibration samples" in first["rank 0 fails"]
    assert second["rank 0 fails"].startswith("SparsityError: Rank 0 failed, and rank 1 stops with it. EstimatorError")
    assert first["not begun"] == "nothing"
    assert "Rank 1 has no estimator yet" in second["not begun"]
    for case in ("small units", "lora units"):
        assert "FSDP2 gathers its weight by itself" in first[case]
        assert second[case] == first[case]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type.value == yaml.safe_load(path.read_text())["distributed_type"]
    assert config.num_processes > 1


def test_the_configurations_are_all_there():
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "multi-node"]
