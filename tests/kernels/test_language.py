"""Kernels can be imported without Triton: PyTorch's build for CPUs does not bring it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sparse_unsloth.errors import BackendError
from sparse_unsloth.ops import dispatch

FILES = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py"))


def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_triton(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.setitem(sys.modules, name, None)
    language = load(next(file for file in FILES if file.stem == "language"), "sparse_unsloth.kernels.language")
    assert language.tl is None
    monkeypatch.setitem(sys.modules, "sparse_unsloth.kernels.language", language)


def test_every_kernel_can_be_imported(without_triton):
    for file in FILES:
        module = load(file, f"without_triton_{file.stem}")
        assert "triton" not in vars(module) or not hasattr(module.triton, "__version__"), file.stem
    assert len(FILES) > 10


def test_triton_that_is_asked_for_and_missing_is_an_error(without_triton, monkeypatch):
    assert not dispatch.use_kernels(torch.zeros(1))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(BackendError, match="Triton is not installed: `pip install triton`"):
        dispatch.use_kernels(torch.zeros(1))
