"""Progress bars: of long waits, on terminals alone, without colours."""

import io
import re
import sys

import pytest

from sparse_unsloth.utils import progress
from sparse_unsloth.utils.progress import bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Every item takes a second; tqdm reads this clock."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def drawn(monkeypatch, clock, seconds, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in bar(range(seconds), "Proving layers", "layer", **options):
        clock[0] += 1
    return stream.getvalue()


def test_a_long_wait_is_drawn_in_plain_characters(monkeypatch, clock):
    text = drawn(monkeypatch, clock, 6, Terminal())
    assert "Proving layers: 100%" in text
    assert "6/6" in text
    assert "layer" in text
    assert "\x1b[3" not in text, "a colour"


def test_a_short_wait_is_not(monkeypatch, clock):
    assert drawn(monkeypatch, clock, 1, Terminal()).strip() == ""


@pytest.mark.parametrize("quiet", ["no terminal", "another process", "not shown"])
def test_nothing_is_drawn_elsewhere(quiet, monkeypatch, clock):
    monkeypatch.setattr(progress, "is_main", lambda: quiet != "another process")
    stream = io.StringIO() if quiet == "no terminal" else Terminal()
    assert drawn(monkeypatch, clock, 6, stream, shown=quiet != "not shown") == ""


def test_a_wait_without_items_is_counted(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar(None, "prune", "run", total=4) as shown:
        for _ in range(4):
            clock[0] += 1
            shown.update()
    assert "prune: 100%" in sys.stderr.getvalue()


@pytest.mark.parametrize("quiet", ["", "no terminal", "another process"])
def test_captures_are_said_in_lines(quiet, monkeypatch):
    """Of batch signatures 1, 2, 4, ...; each is captured after its first runs."""
    from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE, GraphCache

    monkeypatch.setattr(progress, "is_main", lambda: quiet != "another process")
    monkeypatch.setattr(sys, "stderr", io.StringIO() if quiet == "no terminal" else Terminal())
    graphs = GraphCache(recorder=object())
    for key in range(5):
        assert [graphs.should_replay(key) for _ in range(RUNS_BEFORE_CAPTURE + 2)][-2:] == [True, True]
    said = re.findall(r"batch signature (\d+)", sys.stderr.getvalue())
    assert said == ([] if quiet else ["1", "2", "4"])


@pytest.mark.parametrize("asked", [False, True])
def test_tables_have_no_colours_where_nobody_wants_them(asked, monkeypatch):
    """rich draws tables and the quickstart's bars; it knows NO_COLOR."""
    from rich.console import Console
    from rich.table import Table

    for name, value in {"TERM": "xterm-256color", "NO_COLOR": "1" if asked else ""}.items():
        monkeypatch.setenv(name, value)
    table = Table(title="[red]a title")
    table.add_column("[green]speed")
    stream = Terminal()
    Console(file=stream).print(table)
    assert bool(re.search(r"\x1b\[[\d;]*3[0-7]m", stream.getvalue())) != asked
