"""Trainings draw much the same picture of what sparsity did; tests/explain looks at pictures."""

import pytest

_drawn = []


@pytest.fixture(autouse=True)
def one_picture(monkeypatch):
    """The first one is drawn, and lies beside the reports of all."""
    from sparse_unsloth.explain import report

    draw = report.draw

    def draw_once(records, path):
        if not _drawn:
            draw(records, path)
            _drawn.append(path.read_bytes())
        path.write_bytes(_drawn[0])

    monkeypatch.setattr(report, "draw", draw_once)
