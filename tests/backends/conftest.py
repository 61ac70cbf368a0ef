import pytest


@pytest.fixture
def stand_in(monkeypatch):
    from unsloth_stand_in import StandIn  # not before Triton's interpreter is chosen

    return StandIn(monkeypatch)
