"""The examples run, in this process and on tiny models; their notebooks are those of the scripts."""

import ast
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

from sparse_unsloth import get_state
from sparse_unsloth.utils.environment import requirements

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


writer = load("write_notebooks")
SCRIPTS = {path.stem: path for path in writer.scripts()}


def test_there_is_one_for_each_way_to_train():
    assert set(SCRIPTS) == {"sft_unsloth", "sft_peft", "passages", "grpo", "vision_language", "own_loop"}
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SCRIPTS.items()}
    assert {name: length for name, length in lengths.items() if length >= 60} == {}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder to run in, where the examples take tiny models."""
    monkeypatch.setenv("TINY", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def run(name):
    return runpy.run_path(str(SCRIPTS[name]), run_name="__main__")


@pytest.mark.parametrize("name", ["sft_unsloth", "sft_peft", "passages", "vision_language"])
def test_fine_tuning_runs(name, tiny):
    left = run(name)
    trainer = left["trainer"]
    assert trainer.state.global_step == 2
    config = get_state(trainer.model).config
    assert config.backward_rows == {"passages": 0.1, "vision_language": 0.25}.get(name, config.backward_rows)
    shares = [entry["sparsity/context_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(shares) == 2
    assert min(shares) > 0.5, "the prompts are context"
    assert any(weight.abs().sum() > 0 for key, weight in trainer.model.named_parameters() if "lora_B" in key)
    assert not [key for key, _ in trainer.model.named_parameters() if "lora" in key and "visual" in key]
    if name != "passages":
        assert (tiny / "runs" / name.replace("_", "-") / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("sparsity", ["dense", "rows"])
def test_grpo_runs_and_rewards_right_answers(sparsity, tiny, monkeypatch):
    monkeypatch.setenv("SPARSITY", sparsity)
    left = run("grpo")
    assert left["trainer"].state.global_step == 2
    logs = [entry for entry in left["trainer"].state.log_history if "sparsity/sparse_forwards" in entry]
    assert [entry["sparsity/sparse_forwards"] > 0 for entry in logs] == ([True] * 2 if sparsity == "rows" else [])
    turns = [[{"content": text}] for text in ("so 1,000", "2, no: 3", "none", "1000 or 3.5")]
    answers = ["1 + 999\n#### 1,000", "#### 3", "#### 1", "#### 1000"]
    assert left["is_right"](turns, answers) == [1, 1, 0, 0]
    assert left["has_a_number"](turns) == [0.1, 0.1, 0, 0.1]


def test_the_loop_trains(tiny, capsys):
    left = run("own_loop")
    assert left["step"] == 1
    assert "step 1: loss" in capsys.readouterr().out
    assert left["state"].config.backward_rows == 0.25
    assert (left["batch"]["labels"] == -100).float().mean() > 0.5, "the prompts are context"


def test_they_need_no_more_than_the_package():
    """The light install has what their first lines import, but for Unsloth in an example about it."""
    there = {item.name for item in requirements()} | {"sparse_unsloth", *sys.stdlib_module_names}
    for path in EXAMPLES.glob("*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert {name.partition(".")[0] for name in names} - there == set(), path.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_notebooks_are_those_of_the_scripts(name):
    """`python examples/write_notebooks.py` writes them."""
    script, path = SCRIPTS[name].read_text(encoding="utf-8"), SCRIPTS[name].with_suffix(".ipynb")
    assert path.read_text(encoding="utf-8") == writer.notebook(script)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(script))
    assert "".join(cells[0]["source"]).startswith("# "), "a title"


def test_a_script_without_cells_is_refused():
    with pytest.raises(ValueError, match="begins with"):
        writer.notebook("import os\n# %%\n")
