"""A stand-in for CUDA graphs, and stand-ins of Unsloth's modules with what row-sparse layers call."""

import pytest


@pytest.fixture
def recorder(monkeypatch):
    from recorded_layers import Rerun, share_memory  # not before Triton's interpreter is chosen

    recorder = Rerun()
    share_memory(monkeypatch, recorder)
    monkeypatch.setenv("SPARSE_UNSLOTH_KERNELS", "triton")
    return recorder


@pytest.fixture
def stand_in(monkeypatch):
    from unsloth_stand_in import StandIn

    return StandIn(monkeypatch)
