"""Runs the command ``sparse-unsloth completion``: prints a script that a shell loads to complete command lines.

The script is complete in itself, so a press of TAB starts no Python: this command reads the parsers, the shipped
recipes and the keys once.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_unsloth.cli.arguments import command_parser
from sparse_unsloth.cli.main import SUBCOMMANDS

DESCRIPTION = """\
Prints a script that completes commands, their options and values, shipped recipes and keys of a recipe.
It lists what this version has: print it again after an upgrade."""

EPILOG = """\
examples:
  sparse-unsloth completion bash > ~/.local/share/bash-completion/completions/sparse-unsloth
  sparse-unsloth completion zsh > ~/.sparse-unsloth.zsh   # and `source ~/.sparse-unsloth.zsh` in ~/.zshrc
  sparse-unsloth completion fish > ~/.config/fish/completions/sparse-unsloth.fish"""

TAKES_RECIPE = ("train", "estimate", "calibrate", "recipes")
TAKES_KEYS = ("train", "estimate", "calibrate")


@dataclass
class Command:
    """What may follow a command.

    Attributes:
        words: names that stand for themselves: recipes, studies.
        options: choices of each option's value; an empty list for any value, None for an option without one.
    """

    words: list[str] = field(default_factory=list)
    options: dict[str, list[str] | None] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """The options without a value."""
        return [option for option, choices in self.options.items() if choices is None]


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's words."""
    parser = command_parser("completion", DESCRIPTION, EPILOG)
    parser.add_argument("shell", choices=list(SHELLS), help="whose language the script has")
    return parser


def main(words: Sequence[str]) -> int:
    """Prints the script of the shell that is named."""
    shell = build_parser().parse_args(words).shell
    print(SHELLS[shell](read_commands()), end="")
    return 0


def read_commands() -> dict[str, Command]:
    """What may follow each command, from its parser, the shipped recipes and the keys of a recipe."""
    from sparse_unsloth.training.document import shipped_recipes

    commands = {name: Command() for name in SUBCOMMANDS}
    keys = _keys()
    for name, command in commands.items():
        _read(importlib.import_module(f"sparse_unsloth.cli.{name}").build_parser(), command)
        if name in TAKES_RECIPE:
            command.words += shipped_recipes()
        if name in TAKES_KEYS:
            command.options |= {key: choices for key, choices in keys.items() if key not in command.options}
    return commands


def _read(parser: argparse.ArgumentParser, command: Command) -> None:
    """Adds a parser's options and choices to ``command``, those of its own commands too."""
    for action in parser._actions:
        choices = [str(choice) for choice in action.choices or ()]
        if not action.option_strings:
            command.words += choices
            for inner in action.choices.values() if isinstance(action.choices, dict) else ():
                _read(inner, command)
        elif action.help != argparse.SUPPRESS:
            option = next((word for word in action.option_strings if word.startswith("--")), action.option_strings[0])
            command.options[option] = None if action.nargs == 0 else choices


def _keys() -> dict[str, list[str] | None]:
    """The options that set a key of a recipe; all take a value, and a name after --sparsity is a preset's."""
    from sparse_unsloth.config.sparsity import PRESETS, EstimatorConfig, SparsityConfig
    from sparse_unsloth.training.keys import recipe_keys

    inner = [f"sparsity.{name}" for name in SparsityConfig.model_fields]
    inner += [f"sparsity.estimator.{name}" for name in EstimatorConfig.model_fields]
    return {f"--{name}": list(PRESETS) if name == "sparsity" else [] for name in (*recipe_keys(), *inner)}


def _bash(commands: dict[str, Command]) -> str:
    """A function that offers words by the command and the word before; where it offers none, files are."""
    lines = [
        "_sparse_unsloth() {",
        "    local command=${COMP_WORDS[1]} before=${COMP_WORDS[COMP_CWORD-1]} offered flags=",
        '    case "$command" in',
    ]
    for name, command in commands.items():
        words = shlex.quote(" ".join([*command.words, *command.options]))
        lines.append(f"        {name}) offered={words} flags={shlex.quote(' '.join(command.flags))};;")
    first = shlex.quote(" ".join([*commands, "--help", "--version", "--debug"]))
    lines += [
        "    esac",
        f'    if [ "$COMP_CWORD" -eq 1 ]; then offered={first}',
        '    else case "$command $before" in',
    ]
    for name, command in commands.items():
        for option, choices in command.options.items():
            if choices:
                lines.append(f"        '{name} {option}') offered={shlex.quote(' '.join(choices))};;")
    lines += [
        '        *" --"*) case " $flags " in *" $before "*) ;; *) offered=;; esac;;',
        "    esac; fi",
        '    COMPREPLY=($(compgen -W "$offered" -- "${COMP_WORDS[COMP_CWORD]}"))',
        "}",
        "complete -o default -F _sparse_unsloth sparse-unsloth",
    ]
    return "\n".join(lines) + "\n"


def _zsh(commands: dict[str, Command]) -> str:
    """Bash's function, which zsh runs by a part of its own."""
    start = "autoload -Uz compinit bashcompinit\n(($+functions[compdef])) || compinit\nbashcompinit\n"
    return start + _bash(commands)


def _fish(commands: dict[str, Command]) -> str:
    start = "complete -c sparse-unsloth"
    lines = [f"{start} -n __fish_use_subcommand -l {option}" for option in ("help", "version", "debug")]
    for name, command in commands.items():
        lines.append(f"{start} -n __fish_use_subcommand -f -a {name} -d {shlex.quote(SUBCOMMANDS[name])}")
        here = f"{start} -n '__fish_seen_subcommand_from {name}'"
        if command.words:
            lines.append(f"{here} -a {shlex.quote(' '.join(command.words))}")
        for option, choices in command.options.items():
            value = "" if choices is None else f" -x -a {shlex.quote(' '.join(choices))}" if choices else " -r"
            lines.append(f"{here} -l {option.removeprefix('--')}{value}")
    return "\n".join(lines) + "\n"


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
