"""What the package must keep to be importable everywhere: see "the kernels trap" in the docstrings below."""

import importlib.metadata
import importlib.resources
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import sparse_unsloth

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "trl", "peft", "unsloth", "datasets", "bitsandbytes", "matplotlib")


def python(code: str, cwd: Path = ROOT) -> str:
    """Runs ``code`` with the repository's root on the path, as a notebook or ``python -c`` there has it."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kernels_folder_is_no_regular_package():
    """transformers looks for Hugging Face's ``kernels``; an ``__init__.py`` in our folder would answer in its place."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists(), "it would put the root on the path of every test"
    assert not list((ROOT / "tests").rglob("__init__.py")), "they would put other folders on the path of every test"


@pytest.mark.parametrize("name", ["kernels", "recipes"])
def test_links_lead_to_the_folders_at_the_root(name):
    link = ROOT / "sparse_unsloth" / name
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == ROOT / name


def test_recipes_are_package_data():
    folder = importlib.resources.files("sparse_unsloth") / "recipes"
    assert (folder / "quickstart.yaml").is_file()
    assert (folder / "sparsity" / "llama3-8b-math10k.yaml").is_file()
    assert (folder / "accelerate" / "fsdp2.yaml").is_file()


def test_import_is_light_and_nothing_hides_hf_kernels():
    """The rest fails with an ImportError when ``kernels/`` at the root shadows Hugging Face's; so do our own names."""
    assert importlib.metadata.version("kernels").startswith("0.16"), "other versions do not arm the trap"
    code = f"""
import sys, time
start = time.perf_counter()
import sparse_unsloth, sparse_unsloth.cli
seconds = time.perf_counter() - start
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
assert seconds < 10, seconds
import sparse_unsloth.cli.bench  # Unsloth must be the first that imports these
heavy = [name for name in ("transformers", "peft", "trl") if name in sys.modules]
assert not heavy, heavy
import sparse_unsloth.kernels.dequantize as module
assert module.__name__ == "sparse_unsloth.kernels.dequantize", module
import transformers.models.llama.modeling_llama
from trl import SFTTrainer
for name in sparse_unsloth.__all__: getattr(sparse_unsloth, name)
"""
    python(code)


def test_every_public_name_exists():
    for name in sparse_unsloth.__all__:
        assert getattr(sparse_unsloth, name)


def copy(folder: Path) -> Path:
    """A copy of the sources in ``folder``, where a build may write."""
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "unsloth_compiled_cache")
    return shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)


def package_files() -> set[str]:
    """What a wheel must hold."""
    package = ROOT / "sparse_unsloth"
    files = {f"sparse_unsloth/{path.relative_to(package)}" for path in package.rglob("*.py")}
    files |= {f"sparse_unsloth/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    files |= {f"sparse_unsloth/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    return files | {"sparse_unsloth/py.typed"}


@pytest.mark.slow
def test_sdist_and_its_wheel_hold_kernels_and_recipes_and_pass_the_check_of_the_index(tmp_path):
    """As `make dist` does: the wheel is built from the sdist, so the sdist holds everything."""
    pytest.importorskip("build", reason="pip install -e '.[dev]'")
    pytest.importorskip("twine", reason="pip install -e '.[dev]'")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    sdist, wheel = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix)
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files() <= names
    assert not [name for name in names if name.startswith(("kernels/", "recipes/", "tests/"))]


def test_the_version_is_one():
    """`sparse-unsloth --version` prints it (tests/cli/test_main.py)."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{sparse_unsloth.__version__}"' in project
    assert citation["version"] == sparse_unsloth.__version__
    assert f"## {sparse_unsloth.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_public_names_are_typed():
    """By the settings of `[tool.mypy]`, which name the modules."""
    pytest.importorskip("mypy", reason="pip install -e '.[dev]'")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout


def test_readme_shows_the_committed_quickstart_results():
    """`make publish-quickstart` writes both; nothing is typed in by hand."""
    results = ROOT / "benchmarks" / "results" / "quickstart" / "results.md"
    if not results.exists():
        pytest.skip("no quickstart results are committed yet")
    table = [line for line in results.read_text().splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "README.md").read_text()
    assert (results.parent / "quickstart.png").exists()
