"""Snippets of README.md and docs/ are right: Python runs on a tiny model, YAML loads, commands have their options."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset

from sparse_unsloth.cli.main import SUBCOMMANDS
from sparse_unsloth.config.sparsity import EstimatorConfig, SparsityConfig
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.planning import fits
from sparse_unsloth.training.keys import recipe_keys
from sparse_unsloth.training.recipe import load_recipe

from tiny_models import make_base, make_batch, make_lora, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
HUB_NAME = "Qwen/Qwen2.5-1.5B-Instruct"


def snippets(language: str) -> list:
    """Every fenced block of a language, once, with its place as the test's name."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.setdefault(match[1], f"{page.relative_to(ROOT)}:{line}")
    return [pytest.param(snippet, id=place) for snippet, place in found.items()]


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_runs_on_a_tiny_model(snippet, tmp_path, monkeypatch):
    """With a model, a data set, batches and a trainer in the reader's place."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "w5 w6 w7 w8 w9", "completion": " w10 w11"}] * 8
    given = {
        "model": make_base() if "get_peft_model(model, LoraConfig" in snippet else make_lora(),
        "dataset": Dataset.from_list(rows),
        "batches": [make_batch(0), make_batch(1)],
        "trainer": SimpleNamespace(train=lambda: None),
    }
    if HUB_NAME in snippet:
        folder = Path(save_checkpoint(tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
        snippet = snippet.replace(f'"{HUB_NAME}"', repr(str(folder)))
        snippet = snippet.replace(
            'output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False'
        )  # README: without a GPU
    exec(compile(snippet, "snippet", "exec"), given)


@pytest.mark.parametrize("snippet", snippets("ya?ml"))
def test_yaml_is_a_recipe_or_a_sparsity_block(snippet, tmp_path):
    values = yaml.safe_load(snippet)
    if set(values) == {"sparsity"}:
        SparsityConfig.from_any(values["sparsity"])
        with pytest.raises(ConfigError):
            SparsityConfig.from_any({**values["sparsity"], "backward_row": 0.5})
    elif "plugins" in values:  # axolotl's
        module, _, name = values["plugins"][0].rpartition(".")
        assert f"class {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        SparsityConfig.from_any(values["sparse_unsloth"])
    else:
        path = tmp_path / "recipe.yaml"
        path.write_text(snippet)
        assert load_recipe(path, ["--use_cpu", "true", "--bf16", "false"]).given["dataset_name"]


def options_of(path: Path) -> set[str]:
    """The options that a source gives to a parser."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {
        word.value
        for call in calls
        if getattr(call.func, "attr", "") == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant) and str(word.value).startswith("--")
    }


SHARED = options_of(ROOT / "sparse_unsloth" / "cli" / "bench.py")
"""The options that benchmarks may take over from the command."""


def is_key(option: str) -> bool:
    """Whether an option overrides a key of a recipe."""
    key, *rest = option.removeprefix("--").split(".")
    inner = (SparsityConfig, EstimatorConfig)
    return key in recipe_keys() and all(name in kind.model_fields for name, kind in zip(rest, inner, strict=False))


def wrong_words(command: str) -> list[str]:
    """The words of a command line that nothing takes; or what the command's parser says of a value."""
    words = shlex.split(command, comments=True)
    while words and "=" in words[0]:
        words = words[1:]
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not words or words[0] not in ("sparse-unsloth", "make", "python", "pip"):
        return []
    name, *rest = words
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [word for word in rest if "=" not in word and word not in targets]
    if name == "pip":
        named = re.findall(r"\[([\w,]+)\]", command)
        extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        return [extra for text in named for extra in text.split(",") if extra not in extras]
    if name == "python":
        module = rest[1].replace(".", "/") if rest[0] == "-m" else rest[0]
        places = [ROOT / module, ROOT / f"{module}.py", ROOT / module / "__main__.py"]
        source = next((place for place in places if place.is_file()), None)
        if source is None:
            return [module]
        known = options_of(source) | SHARED
        return [option for option in given if option not in known]
    if rest[0] not in SUBCOMMANDS and not rest[0].startswith("--"):
        return [rest[0]]
    if rest[0] not in SUBCOMMANDS:
        return [word for word in rest if word not in ("--version", "--debug", "--help")]
    module = importlib.import_module(f"sparse_unsloth.cli.{rest[0]}")
    known = options_of(Path(module.__file__)) | {"--then", "--debug", "--help"}
    takes_keys = rest[0] in ("train", "estimate", "calibrate")
    if "--device" in rest and rest[0] == "estimate":
        device = rest[rest.index("--device") + 1]
        if not any(device.lower() in fit.device.lower() for fit in fits.load()):
            return [device]
    ends = [index for index, word in enumerate(rest) if word in (">", "&&", "|", "--then")]
    words = rest[1 : min(ends, default=None)]
    if not takes_keys and "--help" not in words and words:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                (module.parse if rest[0] == "bench" else module.build_parser().parse_args)(words)
        except (SystemExit, ConfigError) as error:  # a value that nothing takes
            said = said.getvalue().strip() or str(error)
            return [option for option in given if option not in known] or [said.splitlines()[-1]]
    return [option for option in given if option not in known and not (takes_keys and is_key(option))]


def commands() -> list[str]:
    """The command lines of bash blocks and of code in text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found += block.replace("\\\n", " ").splitlines()
        found += re.findall(r"`((?:sparse-unsloth|python|make|pip install) [^`\n]*)`", text)
    return found


def test_commands_and_their_options_exist():
    lines = commands()
    assert len(lines) > 60
    assert {line: wrong for line in lines if (wrong := wrong_words(line))} == {}


def test_a_wrong_option_is_found():
    lines = {
        "sparse-unsloth train my.yaml --learning_rat 1 --sparsity.backward_row 0.1": [
            "--learning_rat", "--sparsity.backward_row"],
        "sparse-unsloth explained runs/mine": ["explained"],
        "sparse-unsloth bench --model DIR --method rows": ["--method"],
        "sparse-unsloth estimate my.yaml --device h200": ["h200"],
        "sparse-unsloth evaluate runs/mine --suite humanevals": [
            "sparse-unsloth evaluate: error: argument --suite: invalid choice: 'humanevals' (choose from 'humaneval', "
            "'humaneval-plus', 'mt-bench', 'commonsense', 'arithmetic', 'glue', 'arc-agi'); did you mean humaneval?"],
        "sparse-unsloth bench --out mine.csv": ["bench needs --model, a checkpoint folder or hub name"],
        "make tests": ["tests"],
        "pip install 'sparse-unsloth[evals]'": ["evals"],
        "python benchmarks/long_sequences.py": ["benchmarks/long_sequences.py"],
        "python -m benchmarks.kernel_suite --outs FOLDER  # --other": ["--outs"],
    }  # fmt: skip
    assert {line: wrong_words(line) for line in lines} == lines
