"""Two processes on the CPU (gloo), launched by accelerate with the shipped configurations, against one process."""

import importlib.util
import json
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser

from sparse_unsloth.backends.unsloth.contract import find_unsloth

import worker
from processes import fork, needs_fork, wait_for

WORKER = Path(__file__).parent / "worker.py"
ROOT = WORKER.parents[2]
RECIPES = ROOT / "recipes" / "accelerate"
CONFIGS = sorted(RECIPES.glob("*.yaml"))


def fork_ranks(args):
    """In place of torchrun: its variables, and every rank of the worker forked from this process."""
    from accelerate.state import AcceleratorState

    folder, count = Path(args.training_script_args[0]), int(args.nproc_per_node)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def work(rank):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update(address | {name: str(value) for name, value in ranks.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        worker.main(folder)

    said = [folder / f"said-{rank}.txt" for rank in range(count)]
    statuses = wait_for([fork(partial(work, rank), said[rank]) for rank in range(count)])
    assert not any(statuses), "\n".join(file.read_text()[-3000:] for file in said)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """accelerate's launcher is for GPUs, the workers compute on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.distributed.run, "run", fork_ranks)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process computes of the whole global batch."""
    folder = tmp_path_factory.mktemp("one")
    assert wait_for([fork(lambda: worker.main(folder), folder / "said.txt")]) == [0], (folder / "said.txt").read_text()
    return torch.load(folder / "alone.pt", weights_only=False)


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_same_global_batch(how, one, tmp_path):
    words = ["--config_file", str(RECIPES / f"{how}.yaml"), "--mixed_precision", "no", "--num_processes", "2"]
    launch_command(launch_command_parser().parse_args([*words, str(WORKER), str(tmp_path)]))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    assert not torch.allclose(one["few rows"]["losses"], one["every row"]["losses"], rtol=1e-4)
    for rank in ranks:
        assert (rank["how"], rank["world"]) == (how, 2)
        for case, expected in one.items():
            if case not in worker.LEFT_OUT[how] and not case.startswith("trainer"):
                assert_same(rank[case], expected)
        for case in worker.TRAINERS[how]:
            trainer, expected = rank[case], one[case]
            assert trainer["sharded"] == (how == "fsdp2")
            torch.testing.assert_close(trainer["losses"], expected["losses"], rtol=2e-4, atol=2e-3)  # of 4 digits
            assert_same(trainer["parameters"], expected["parameters"])
            assert trainer["enabled"] == expected["enabled"] == [0.0, 1.0, 1.0, 0.0]
            assert trainer["merged"] == [2 if (how, case) == ("ddp", "trainer, merged") else 1] * 4
            assert torch.equal(trainer["gain"], ranks[0][case]["gain"])
            torch.testing.assert_close(trainer["gain"], expected["gain"], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "estimator.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    said = "".join((tmp_path / f"said-{rank}.txt").read_text() for rank in range(2))
    assert said.count("sparsity/enabled") == 4 * len(worker.TRAINERS[how]), "every log line once"
    assert said.count("sparsity/backward_rows") == 4 * (len(worker.TRAINERS[how]) - 1)
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


@pytest.mark.skipif(
    not (find_unsloth() or Path()).joinpath("context_parallel.py").is_file(),
    reason="no Unsloth with context parallelism is installed",
)
@pytest.mark.installed_unsloth("context_parallel")
def test_unsloths_context_parallelism(unsloth_case):
    """Halves of sequences on two processes: roles, loss and gradients of the whole ones, packed too."""
    found, texts = unsloth_case
    assert len(found) == 2
    for rank in range(2):
        for name, (loss, gradients, whole, parts) in found[rank].items():
            assert max(loss, gradients) < 1e-5, name
            assert parts == ([0, 0] if name.startswith("dense") else whole), name
    assert "memory_budget: sequences are split over several GPUs" in texts[0]
