"""kill -9 in the middle of calibration, of writing the estimator, of a checkpoint, of a step: nothing half-written is
used, and the resumed run ends with the same bits as one that was never killed."""

import os
import random
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from sparse_unsloth.utils.checkpoints import last_whole_checkpoint
from sparse_unsloth.utils.tensor_file import read_tensors

import kill_worker
from processes import fork, needs_fork, wait_for

BEGINS_FROM = {
    "calibration": None,
    "estimator": None,
    "adapter": "checkpoint-2",
    "optimiser": "checkpoint-2",
    "trainer state": "checkpoint-2",
    "step": "checkpoint-4",
}


@needs_fork
@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_bits(tmp_path):
    results = kill_worker.run(tmp_path)
    whole = results.pop(None)
    assert whole["enabled"] == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert set(results) == set(BEGINS_FROM)
    for place, resumed in results.items():
        assert resumed["killed"] == signal.SIGKILL, place
        assert resumed["from"] == BEGINS_FROM[place], place
        assert resumed["estimator"] == (place not in ("calibration", "estimator")), place
        for name in ("losses", "weights", "enabled", "kind"):
            assert resumed[name] == whole[name], f"{place}: {name}"


@needs_fork
def test_a_tensor_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    path, seen = tmp_path / "estimator.safetensors", set()
    chance = random.Random(0)
    for _ in range(3):
        ready, written = os.pipe()
        writer = fork(partial(kill_worker.write_for_ever, path, written), tmp_path / "said.txt")
        os.close(written)
        assert os.read(ready, 1) == b".", (tmp_path / "said.txt").read_text()
        os.close(ready)
        time.sleep(chance.uniform(0.01, 0.1))
        os.kill(writer, signal.SIGKILL)
        wait_for([writer])
        tensors, metadata = read_tensors(path)
        assert torch.equal(tensors["value"], torch.full((300_000,), float(metadata["number"])))
        seen.add(metadata["number"])
    assert seen != {"1"}, "the writer was always killed before its second file"


def test_half_a_checkpoint_is_passed_over(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path / "none") is None
    for step, text in ((2, '{"global_step": 2}'), (10, '{"global_step": 10'), (4, '{"global_step": 4}'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"value": torch.ones(2)}, folder / "adapter_model.safetensors")
        for part in ("optimizer", "scheduler", "rng_state"):
            torch.save({}, folder / f"{part}.pt")
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-99-old").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert [record.args[0].name for record in caplog.records] == ["checkpoint-12", "checkpoint-10"]
