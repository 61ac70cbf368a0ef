"""Which module may import which: downwards, without circles, public names alone; and no file is long.

Imports count wherever they stand: in functions and under ``TYPE_CHECKING`` too. `kernels/` is `sparse_unsloth.kernels`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = """
errors
utils
config tokens model reporting rank
data
kernels costs rows exact study
ops
channels graphs
explain layer
planning
runtime
backends callback
attachment
autosparsity
language_model
training __init__
bench evaluation integrations quickstart
forecast
cli
"""
"""A module imports from its own package and from those on lines above; ``__init__`` is the package's own."""

LEVEL = {package: level for level, line in enumerate(LINES.split("\n")) for package in line.split()}
TOP_LEVEL, LENGTH = 8, 500
"""Most modules directly in the package, and most lines of a file."""

Modules = dict[str, Path]


def modules_of(package: Path) -> Modules:
    """Files by module; the folder's name is the package's."""
    files = {
        *package.rglob("*.py"),
        *(package / "kernels").glob("*.py"),
    }  # `**` may not follow the link
    names = {file: file.relative_to(package.parent).with_suffix("").parts for file in sorted(files)}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for file, parts in names.items()}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def statements(module: str, file: Path) -> Iterator[tuple[str, str | None]]:
    """What the file imports: modules, and ``(module, name)`` of ``from module import name``; by absolute names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from ((alias.name, None) for alias in node.names)
            case ast.ImportFrom():
                parents = module.split(".") + ["__init__"] * (file.name == "__init__.py")
                base = parents[: -node.level] if node.level else []
                source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
                yield from ((source, alias.name) for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name, None


def imports(module: str, modules: Modules) -> Iterator[tuple[str, str | None]]:
    """Modules of the package that it imports, each with the name that is taken from it (None: the module itself)."""
    for source, name in statements(module, modules[module]):
        if f"{source}.{name}" in modules:
            yield f"{source}.{name}", None
        elif source.split(".")[0] == module.split(".")[0]:
            yield source, name


def upward(modules: Modules) -> list[str]:
    found = []
    for module in modules:
        for other in {other for other, _ in imports(module, modules)}:
            here, there = package_of(module), package_of(other)
            if here != there and not LEVEL.get(there, len(LEVEL)) < LEVEL.get(here, -1):
                found.append(f"{module} imports {other}")
    return sorted(found)


def circles(modules: Modules) -> list[list[str]]:
    """Modules that reach each other by imports, one list a circle (a strongly connected component)."""
    graph = {module: {other for other, _ in imports(module, modules)} & modules.keys() for module in modules}
    reached = {}
    for module, others in graph.items():
        seen, left = set(), list(others)
        while left:
            if (other := left.pop()) not in seen:
                seen.add(other)
                left += graph[other]
        reached[module] = seen
    found = {frozenset(other for other in seen if module in reached[other]) for module, seen in reached.items()}
    return sorted(sorted(circle) for circle in found if circle)


def private(modules: Modules) -> list[str]:
    """Names and modules with an underscore before them that another package imports."""
    found = []
    for module in modules:
        for other, name in imports(module, modules):
            parts = [*other.split("."), *([name] if name else [])]
            hidden = [part for part in parts if part.startswith("_") and not part.endswith("__")]
            if hidden and package_of(other) != package_of(module):
                found.append(f"{module} imports {'.'.join(parts)}")
    return sorted(found)


def outside(modules: Modules) -> list[str]:
    """Imports of what is not installed with the package."""
    return sorted(
        f"{module} imports {source}"
        for module, file in modules.items()
        for source, _ in statements(module, file)
        if source.split(".")[0] in ("benchmarks", "tests")
    )


def long(*folders: Path) -> list[str]:
    counts = {file: len(file.read_text(encoding="utf-8").splitlines()) for f in folders for file in f.rglob("*.py")}
    return sorted(f"{file}: {count} lines" for file, count in counts.items() if count > LENGTH)


# -- The package ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules():
    return modules_of(ROOT / "sparse_unsloth")


def test_every_package_has_a_line(modules):
    assert {package_of(module) for module in modules} == set(LEVEL)


def test_imports_run_downwards(modules):
    assert upward(modules) == []


def test_no_imports_in_circles(modules):
    assert circles(modules) == []


def test_private_names_stay_in_their_package(modules):
    assert private(modules) == []


def test_nothing_imports_benchmarks_or_tests(modules):
    assert outside(modules) == []


def test_few_modules_at_the_top():
    top = sorted(file.name for file in (ROOT / "sparse_unsloth").glob("*.py"))
    assert len(top) <= TOP_LEVEL, top


def test_no_file_is_long():
    assert long(*(ROOT / name for name in ("sparse_unsloth", "kernels", "tests", "benchmarks"))) == []


# -- That faults are found, in a made-up package ----------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path):
    """``made_up({file: text})``: the modules of a package without fault, with these files in it."""
    package = tmp_path / "sparse_unsloth"

    def make(files):
        sound = {
            "__init__.py": "if TYPE_CHECKING:\n    from sparse_unsloth.attachment import attach\n",
            "errors.py": "class ConfigError(Exception): ...",
            "attachment.py": "from sparse_unsloth.ops import mlp\nfrom sparse_unsloth.errors import ConfigError\n",
            "ops/__init__.py": "",
            "ops/mlp.py": "import torch\nfrom sparse_unsloth.kernels.glu import KINDS\nfrom .linear import _sum\n",
            "ops/linear.py": "def _sum(): ...",
            "../kernels/glu.py": "import sparse_unsloth.errors\nKINDS = ()",
            "cli/__init__.py": "from sparse_unsloth.cli.main import main",
            "cli/main.py": "def main():\n    from sparse_unsloth import attach, __version__",
        }
        for name, text in (sound | files).items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(text)
        (package / "kernels").symlink_to(tmp_path / "kernels")
        return modules_of(package)

    return make


def test_a_package_without_fault_passes(made_up, tmp_path):
    modules = made_up({})
    assert modules["sparse_unsloth.kernels.glu"].is_file()
    found = upward(modules), circles(modules), private(modules), outside(modules), long(tmp_path)
    assert found == ([], [], [], [], [])


@pytest.mark.parametrize(
    "statement",
    [
        "from sparse_unsloth.cli import main",
        "from sparse_unsloth.cli.main import main",
        "from sparse_unsloth import cli",
        "import sparse_unsloth.cli.main as command",
        "from ..cli import main",
        "from .. import cli",
        "from ..cli.main import *",
        "import importlib\nimportlib.import_module('sparse_unsloth.cli.main')",
        "def late():\n    from sparse_unsloth.cli import main",
        "if TYPE_CHECKING:\n    from sparse_unsloth.cli import main",
        "try:\n    import sparse_unsloth.cli\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_upwards_is_found(made_up, statement):
    (found,) = upward(made_up({"ops/late.py": statement}))
    assert found.startswith("sparse_unsloth.ops.late imports sparse_unsloth.cli")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"ops/a.py": "import sparse_unsloth"}, "sparse_unsloth.ops.a imports sparse_unsloth"),
        ({"ops/a.py": "from sparse_unsloth import attach"}, "sparse_unsloth.ops.a imports sparse_unsloth"),
        ({"rows/a.py": "import sparse_unsloth.costs.b", "costs/b.py": ""},
         "sparse_unsloth.rows.a imports sparse_unsloth.costs.b"),
        ({"../kernels/glu.py": "from sparse_unsloth.ops import linear"},
         "sparse_unsloth.kernels.glu imports sparse_unsloth.ops.linear"),
        ({"new/a.py": "import sparse_unsloth.errors"}, "sparse_unsloth.new.a imports sparse_unsloth.errors"),
        ({"new/a.py": "", "cli/b.py": "import sparse_unsloth.new.a"},
         "sparse_unsloth.cli.b imports sparse_unsloth.new.a"),
    ],
    ids=["the package", "a public name", "the same line", "a kernel", "of a package without line", "to it"],
)  # fmt: skip
def test_other_imports_that_are_not_downwards_are_found(made_up, files, found):
    assert upward(made_up(files)) == [found]


@pytest.mark.parametrize("last", ["from sparse_unsloth.ops import a", "def late():\n    from .a import x"])
def test_a_circle_is_found(made_up, last):
    circle = {"ops/a.py": "from sparse_unsloth.ops.b import y", "ops/b.py": "import sparse_unsloth.ops.c"}
    modules = made_up({**circle, "ops/c.py": last, "ops/d.py": "import sparse_unsloth.ops.a"})
    assert circles(modules) == [[f"sparse_unsloth.ops.{name}" for name in "abc"]]


def test_each_circle_is_found_by_itself(made_up):
    pair = "if TYPE_CHECKING:\n    from sparse_unsloth.{} import {}"
    modules = made_up({
        "ops/a.py": pair.format("ops", "b"), "ops/b.py": pair.format("ops", "a"),
        "rows/c.py": pair.format("rows.d", "x"), "rows/d.py": "from . import c\nimport sparse_unsloth.ops.a",
    })  # fmt: skip
    assert circles(modules) == [
        ["sparse_unsloth.ops.a", "sparse_unsloth.ops.b"],
        ["sparse_unsloth.rows.c", "sparse_unsloth.rows.d"],
    ]


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from sparse_unsloth.ops.linear import _sum", "ops.linear._sum"),
        ("def late():\n    from ..ops.linear import ConfigError, _sum as total", "ops.linear._sum"),
        ("from sparse_unsloth.ops import _hidden", "ops._hidden"),
        ("import sparse_unsloth.ops._hidden", "ops._hidden"),
        ("from sparse_unsloth.ops._hidden import x", "ops._hidden.x"),
    ],
)
def test_a_private_name_of_another_package_is_found(made_up, statement, name):
    modules = made_up({"channels/a.py": statement, "ops/_hidden.py": ""})
    assert private(modules) == [f"sparse_unsloth.channels.a imports sparse_unsloth.{name}"]


@pytest.mark.parametrize("statement", ["import benchmarks.rank", "def late():\n    from tests.helpers import x"])
def test_an_import_of_what_is_not_installed_is_found(made_up, statement):
    (found,) = outside(made_up({"cli/a.py": statement}))
    assert found.startswith("sparse_unsloth.cli.a imports ")


def test_a_long_file_is_found(made_up, tmp_path):
    made_up({"ops/a.py": "x = 1\n" * LENGTH, "ops/b.py": "x = 1\n" * (LENGTH + 1)})
    (found,) = long(tmp_path)
    assert found.endswith("b.py: 501 lines")
