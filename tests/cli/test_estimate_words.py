"""The words of the command line `sparse-unsloth estimate`."""

import difflib

import pytest

from sparse_unsloth.cli import calibrate, estimate, main
from sparse_unsloth.cli.arguments import OF_A_COMMAND, options_of, parse
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
        (["--samples", "3", "quickstart"], "given nothing before the options"),
        (["quickstart", "--sample", "3"], "--sample: unknown option; did you mean --samples?"),
        (["quickstart", "--preset=o2", "--jsn"], "--jsn: unknown option; did you mean --json?"),
        (["quickstart", "--no_such_key", "1"], "unknown key"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [estimate, calibrate])
def test_no_key_of_a_recipe_is_taken_for_a_misspelt_option(command):
    """But for output_dir, which `calibrate` sets itself."""
    from sparse_unsloth.training.keys import block_keys, recipe_keys

    options = options_of(command.build_parser())
    for key in (*recipe_keys(), *(key.name for key in block_keys())):
        for name in {key, key.replace("_", "-")} - {"output_dir", "output-dir"}:
            assert not difflib.get_close_matches(f"--{name}", options, cutoff=OF_A_COMMAND), name
