"""Stand-ins for CUDA graphs, and of Unsloth's modules with what row-sparse layers call."""

import pytest


@pytest.fixture
def recorder(monkeypatch):
    """A stand-in for CUDA graphs that records layers in plain PyTorch: what is recorded and when is tested."""
    from plain_layers import use_plain_layers  # not before Triton's interpreter is chosen

    return use_plain_layers(monkeypatch)


@pytest.fixture
def interpreted(monkeypatch):
    """A stand-in that records our own layers, with their kernels in Triton's interpreter: ten times slower."""
    from recorded_layers import Rerun, share_memory

    recorder = Rerun()
    share_memory(monkeypatch, recorder)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    return recorder


@pytest.fixture
def stand_in(monkeypatch):
    from unsloth_stand_in import StandIn

    return StandIn(monkeypatch)
