"""What the package imports is declared in pyproject.toml: at once by the light install, later by an extra."""

import ast
import re
import sys
from pathlib import Path

import pytest

from sparse_unsloth.cli import main

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
"""Distributions whose name is not that of their module."""
LEFT_TO_USERS = {"axolotl", "llamafactory", "liger-kernel"}
"""Front ends, whose bounds no extra could fit, and an arm of benchmarks."""
BROUGHT = {"triton": "torch", "unsloth-zoo": "unsloth"}
"""What other distributions bring where it can be used."""


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements}


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(items) for extra, items in PROJECT["optional-dependencies"].items() if extra != "dev"}


def distribution(module: str) -> str:
    top = module.split(".")[0]
    return NAMED.get(top, top.lower().replace("_", "-"))


def imports(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Distributions that a source imports at once, and those that it imports later, or only where they are there."""
    found = {True: set(), False: set()}

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.Import):
            found[at_once].update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found[at_once].add(node.module)
        optional = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        optional |= isinstance(node, ast.Try) and any("ImportError" in ast.unparse(one) for one in node.handlers)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = at_once and not optional and not later
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, True)
    ours = {*sys.stdlib_module_names, "sparse_unsloth"}
    at_once, later = ({distribution(name) for name in found[key] if name.split(".")[0] not in ours} for key in found)
    return at_once, later


def undeclared(tree: ast.Module) -> set[str]:
    """What a source imports, and the installation that it belongs to does not bring."""
    at_once, later = imports(tree)
    known = BASE | LEFT_TO_USERS | set(BROUGHT) | set().union(*EXTRAS.values())
    return (at_once - BASE) | (later - known)


def wrongly_required(tree: ast.Module) -> set[str]:
    """Modules of a ``require(extra, purpose, *modules)`` that its extra does not bring."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        module.value
        for call in calls
        if getattr(call.func, "id", "") == "require"
        for module in call.args[2:]
        if distribution(module.value) not in EXTRAS[call.args[0].value]
    }


@pytest.fixture(scope="module")
def sources() -> dict[Path, ast.Module]:
    files = [*(ROOT / "sparse_unsloth").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def test_every_import_is_declared(sources):
    plugin = ROOT / "sparse_unsloth" / "integrations" / "axolotl.py"
    found = {path: undeclared(tree) for path, tree in sources.items() if path != plugin}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_dependency_is_imported(sources):
    assert set().union(*(set().union(*imports(tree)) for tree in sources.values())) >= BASE


def test_extras_bring_what_is_required_of_them(sources):
    assert {path: found for path, tree in sources.items() if (found := wrongly_required(tree))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import scipy.optimize", {"scipy"}),
        ("if True:\n    import lm_eval", {"lm-eval"}),
        ("class A:\n    from sklearn import metrics", {"scikit-learn"}),
        ("def later():\n    import wandb", {"wandb"}),
        ("def later():\n    import scipy, unsloth_zoo.x, llamafactory", set()),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", set()),
        ("try:\n    import triton\nexcept OSError:\n    triton = None", {"triton"}),
        ("if TYPE_CHECKING:\n    from matplotlib.axes import Axes", set()),
        ("import os, yaml, torch.nn\nfrom . import x\nfrom sparse_unsloth import attach", set()),
    ],
)
def test_an_undeclared_import_is_found(text, found):
    assert undeclared(ast.parse(text)) == found


def test_a_module_of_another_extra_is_found():
    tree = ast.parse("require('study', 'x', 'scipy', 'gguf')\nrequire('gguf', 'x', 'gguf')")
    assert wrongly_required(tree) == {"gguf"}


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (["calibrate", "quickstart"], "scipy", "study"),
        (["calibrate", "quickstart"], "matplotlib", "study"),
        (["compare", "runs/a", "runs/b"], "matplotlib", "study"),
        (["study", "toy"], "scipy", "study"),
        (["quickstart"], "reasoning_gym", "quickstart"),
    ],
)
def test_a_command_names_the_extra_before_it_begins(words, module, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(words) == 2
    assert f"needs {module}, which the extra {extra} brings: `pip install 'sparse-unsloth[{extra}]'`" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
