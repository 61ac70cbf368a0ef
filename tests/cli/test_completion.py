"""Tests the completion scripts in the shells that are installed: what is offered for a line that ends in a TAB."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sparse_unsloth.cli import main
from sparse_unsloth.cli.completion import read_commands
from sparse_unsloth.cli.main import SUBCOMMANDS

LINES = {
    "": {"train", "doctor", "completion"},
    "--ver": {"--version"},
    "tr": {"train"},
    "train quick": {"quickstart"},
    "train quickstart --learning_ra": {"--learning_rate"},
    "train quickstart --sparsity.backward": {"--sparsity.backward_rows"},
    "train quickstart --sparsity ro": {"rows"},
    "train quickstart --output_dir ": set(),
    "recipes quick": {"quickstart"},
    "evaluate runs/a --suite arc": {"arc-agi"},
    "evaluate runs/a --base --lim": {"--limit"},
    "estimate quickstart --js": {"--json"},
    "calibrate quickstart --max-lo": {"--max-loss"},
    "study to": {"toy"},
    "study prune --keep-": {"--keep-ratio", "--keep-ratios"},
    "completion f": {"fish"},
    "doctor --no-such": set(),
}
"""Command lines after the program's name, and what must be offered for their last word (a part of it for the first)."""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder, commands = tmp_path_factory.mktemp("completion"), read_commands()
    from sparse_unsloth.cli.completion import SHELLS

    for shell, write in SHELLS.items():
        (folder / shell).write_text(write(commands))
    return folder


def offered(shell: list[str], text: str, folder: Path) -> dict[str, set[str]]:
    done = subprocess.run([*shell, text], capture_output=True, text=True, timeout=60, cwd=folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    blocks = done.stdout.split("== ")[1:]
    return {block.split("\n")[0]: {word.split("\t")[0] for word in block.split("\n")[1:] if word} for block in blocks}


def check(found: dict[str, set[str]]) -> None:
    assert LINES[""] <= found.pop("")
    assert found == {line: words for line, words in LINES.items() if line}


def test_bash(scripts, tmp_path):
    text = f"source {scripts / 'bash'}\n"
    for line in LINES:
        words = " ".join(f"'{word}'" for word in ("sparse-unsloth " + line).split(" "))
        text += f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); echo '== {line}'\n"
        text += "_sparse_unsloth; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    check(offered(["bash", "-c"], text, tmp_path))


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(scripts, tmp_path):
    text = f"source {scripts / 'fish'}\n"
    text += "".join(f"echo '== {line}'; complete -C 'sparse-unsloth {line}'\n" for line in LINES)
    check(offered(["fish", "--no-config", "-c"], text + "true", tmp_path))


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh(scripts, tmp_path):
    text = f"compdef() {{ :; }}; source {scripts / 'zsh'}\nemulate sh\n"  # as bashcompinit calls it
    for line in LINES:
        words = " ".join(f"'{word}'" for word in ("sparse-unsloth " + line).split(" "))
        text += f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); echo '== {line}'\n"
        text += "_sparse_unsloth; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    found = offered(["zsh", "-f", "-c"], text, tmp_path)
    # zsh itself chooses what begins with the last word.
    check({line: {word for word in words if word.startswith(line.split(" ")[-1])} for line, words in found.items()})


def test_every_command_is_there_with_its_options(capsys):
    commands = read_commands()
    assert list(commands) == list(SUBCOMMANDS)
    assert all("--help" in command.options for command in commands.values())
    assert commands["estimate"].flags == ["--help", "--json"]
    assert commands["bench"].options["--dtype"] == ["4bit", "bf16"]
    assert not {"--child", "--deadline"} & commands["bench"].options.keys(), "these are hidden"
    assert main(["completion", "bash"]) == 0
    assert "complete -o default -F _sparse_unsloth sparse-unsloth" in capsys.readouterr().out
