"""Tests the queue of trainings that share one GPU, with processes that do nothing."""

import argparse
import tarfile
import time

from benchmarks.quality import gpu
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.table import COLUMNS, append_rows


class Process:
    def __init__(self, command, **options):
        self.command, self.returncode = command, None

    def poll(self):
        return self.returncode


def make_queue(tmp_path, monkeypatch, jobs, **changes):
    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    own = {
        "processes": 9,
        "memory": 60,
        "compile": True,
        "out": tmp_path,
        "commit": "abc",
        "flags": "--test 6",
        "tar": tmp_path / "all.tgz",
    }
    own |= {name: tmp_path / name for name in ("data", "smollm2", "gemma3_data", "gemma3_folder")}
    return gpu.Queue(argparse.Namespace(**own | changes), time.perf_counter() + 400, list(jobs))


def test_jobs_are_of_known_settings_and_fit():
    for job in gpu.JOBS:
        assert set(job.settings.split(",")) <= set(SETTINGS)
        assert job.memory <= 60
    names = [job.name for job in gpu.JOBS]
    assert len(set(names)) == len(names), "each has a log of its own"


def test_jobs_begin_in_order_where_memory_and_processes_allow(tmp_path, monkeypatch):
    jobs = gpu.JOBS[:5]
    queue = make_queue(tmp_path, monkeypatch, jobs, memory=jobs[0].memory + jobs[1].memory)
    queue.fill()
    assert list(queue.running) == [jobs[0], jobs[1]]
    command = queue.running[jobs[0]][0].command
    assert command[command.index("--settings") + 1] == "dense,dense-50,dense-65"
    assert {"--compile", "--test"} < set(command)
    assert command[command.index("--out") + 1] == str(tmp_path)
    queue.pack()
    with tarfile.open(tmp_path / "all.tgz") as tar:
        assert f"{jobs[0].name}.log" in tar.getnames()
    queue.running[jobs[1]][0].returncode = 0
    queue.collect()
    queue.fill()
    assert list(queue.running) == [jobs[0], jobs[3]], "the third one is too large, the fourth one fits"
    queue = make_queue(tmp_path, monkeypatch, jobs, processes=1)
    queue.fill()
    assert len(queue.running) == 1
    queue = make_queue(tmp_path, monkeypatch, jobs)
    queue.ends = time.perf_counter() + gpu.START_SECONDS - 1
    queue.fill()
    assert not queue.running, "nothing would be trained in time"


def test_failed_jobs_are_tried_once_more_without_compiling(tmp_path, monkeypatch, capsys):
    queue = make_queue(tmp_path, monkeypatch, gpu.JOBS[:1])
    queue.fill()
    for compiled in (True, False):
        ((process, _),) = queue.running.values()
        assert ("--compile" in process.command) == compiled
        process.returncode = 1
        queue.collect()
    assert not queue.running
    assert "ended with 1, see its log" in capsys.readouterr().out


def test_gemma_waits_for_its_folder(tmp_path, monkeypatch):
    job = next(job for job in gpu.JOBS if job.model == gpu.GEMMA3)
    queue = make_queue(tmp_path, monkeypatch, [job])
    queue.fill()
    assert not queue.running
    (tmp_path / "gemma3_folder").mkdir()
    queue.fill()
    assert queue.running[job][0].command[-1] == "--compile"
    assert str(tmp_path / "gemma3_data") in queue.running[job][0].command


def test_differences_to_dense_are_paired_by_seed(tmp_path):
    rows = [
        dict.fromkeys(COLUMNS, 1.0) | {"model": "m", "task": "A", "config": name, "seed": seed, "answer_nll": loss}
        for name, losses in (("dense", (1.0, 2.0)), ("default", (1.1, 2.2))) for seed, loss in enumerate(losses)
    ]  # fmt: skip
    append_rows(tmp_path / "quality.csv", rows)
    dense, default = gpu.table(tmp_path / "quality.csv")
    assert dense.split()[-1] == "1.5000"
    assert default.endswith("2 1.6500  against dense +0.1500 ± 0.6353")
