"""The words of the command line `sparse-unsloth estimate`."""

import pytest

from sparse_unsloth.cli import main
from sparse_unsloth.cli.arguments import parse
from sparse_unsloth.cli.estimate import _recipe, build_parser
from sparse_unsloth.errors import ConfigError, SparsityError


def test_names_come_before_options():
    names, arguments, overrides = parse(build_parser(), ["a", "b", "--max_length", "5", "--json"], ConfigError)
    assert (names, arguments.json, overrides) == (["a", "b"], True, ["--max_length", "5"])
    with pytest.raises(ConfigError, match="given nothing"):
        parse(build_parser(), ["--json"], ConfigError)
    with pytest.raises(SparsityError, match="there is no shipped recipe"):
        _recipe(["nothing"], [], None)


def test_help(capsys):
    assert main(["estimate", "--help"]) == 0
    assert "--speed-table" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "estimate takes RECIPE, or MODEL and DATASET"),
        (["a", "b", "c"], "given a b c"),
        (["quickstart", "--samples", "-1"], "--samples must be 0"),
        (["quickstart", "--no_such_key", "1"], "unknown key"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err
