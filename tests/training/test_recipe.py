"""Tests how recipe files and overrides are read, and the messages about wrong ones."""

import re

import pytest
import yaml

from sparse_unsloth.cli import main
from sparse_unsloth.errors import RecipeError
from sparse_unsloth.training.document import shipped_recipes
from sparse_unsloth.training.overrides import parse_overrides
from sparse_unsloth.training.recipe import load_recipe, raw_backend

from word_models import save_recipe

BASE = {
    "model_name_or_path": "some/model",
    "dataset_name": "some/data",
    "bf16": False,
    "use_cpu": True,
}


@pytest.fixture
def recipe(tmp_path):
    def make(**changes):
        return save_recipe(tmp_path / "mine.yaml", BASE, **changes)

    return make


def problems(source, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def test_shipped_recipes_are_valid():
    # On a machine without a GPU a recipe is valid once it is told to do without.
    for name in shipped_recipes():
        assert load_recipe(name, ["--use_cpu", "--bf16", "false"]).name == name


def test_quickstart_leaves_rows_out_of_the_whole_training():
    sparsity = load_recipe("quickstart").sparsity
    assert (sparsity.backward_rows, sparsity.start_step, sparsity.end_step) == (0.25, 0.0, 1.0)
    assert not any(map(any, sparsity.layer_sparsity(30)))


def test_keys_fill_their_blocks(recipe):
    made = load_recipe(recipe(learning_rate="1e-4", lora_r=8, dataset_size=7, sparsity="o1", backend="peft"))
    assert made.training.learning_rate == 1e-4, "YAML reads 1e-4 as a text"
    assert (made.model.lora_r, made.data.dataset_size, made.sparsity.preset, made.backend) == (8, 7, "o1", "peft")
    assert made.training.output_dir == "runs/mine"


def test_defaults_that_differ_from_trl(recipe):
    model = load_recipe(recipe()).model
    assert (model.use_peft, model.lora_dropout, model.dtype) == (True, 0.0, "auto")


def test_without_a_sparsity_block_auto_decides_and_null_is_dense(recipe, tmp_path):
    made = load_recipe(recipe())
    assert made.sparsity.is_auto
    assert not load_recipe(recipe(sparsity=None)).sparsity.is_auto
    by_hand = load_recipe(recipe(sparsity={"preset": "auto", "cuda_graphs": False}))
    by_hand.save(tmp_path / "again.yaml")
    again = load_recipe(tmp_path / "again.yaml").sparsity
    assert again.model_fields_set == {"preset", "cuda_graphs"}, "what is given is decided, and nothing else"
    assert load_recipe(recipe(peft="dora")).sparsity.preset == "dense"


def test_overrides_come_last(recipe):
    words = ["--learning_rate", "1e-4", "--lora-r", "4", "--lora_target_modules", "q_proj", "v_proj", "--packing"]
    words += ["--max_steps", "-1", "--eval_strategy", "no"]
    made = load_recipe(recipe(learning_rate=1.0, max_steps=5), words)
    assert (made.training.learning_rate, made.training.packing, made.training.max_steps) == (1e-4, True, -1)
    assert (made.model.lora_r, made.model.lora_target_modules) == (4, ["q_proj", "v_proj"])
    assert made.training.eval_strategy == "no"


def test_bare_yaml_no_is_no(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE) + "save_strategy: no\n")
    assert load_recipe(path).training.save_strategy == "no"


def test_nested_overrides(recipe):
    source = recipe(sparsity={"mlp": {"1-3": 0.9}, "estimator": {"kind": "svd"}})
    made = load_recipe(source, ["--sparsity.mlp", '{"2": 0.5}', "--sparsity.estimator.rank", "16"]).sparsity
    assert made.mlp == {"2": 0.5}
    assert (made.estimator.kind, made.estimator.rank) == ("svd", 16)
    assert load_recipe(source, ["--sparsity.mlp.2", "0.5"]).sparsity.mlp == {"1-3": 0.9, "2": 0.5}
    assert load_recipe(source, ["--sparsity", "o2", "--sparsity.start_step=0.2"]).sparsity.start_step == 0.2
    made = load_recipe(source, ["--gradient_checkpointing_kwargs.use_reentrant", "false"])
    assert made.training.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_sparsity_file_beside_the_recipe(recipe, tmp_path, monkeypatch):
    (tmp_path / "half.yaml").write_text('mlp: {"all": 0.5}\n')
    source = recipe(sparsity="half.yaml")
    assert load_recipe(source).sparsity.mlp == {"all": 0.5}
    made = load_recipe(source, ["--sparsity.end_step", "0.6"]).sparsity
    assert (made.mlp, made.end_step) == ({"all": 0.5}, 0.6)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe(), ["--sparsity", "half.yaml"]).sparsity.mlp == {"all": 0.5}


@pytest.mark.parametrize(
    ("changes", "words", "backend"),
    [
        ({"use_cpu": False}, [], "auto"),
        ({}, [], "peft"),
        ({"backend": "unsloth"}, [], "unsloth"),
        ({"backend": "unsloth"}, ["--backend", "auto", "--use_cpu", "false"], "auto"),
        ({"use_cpu": False}, ["--use_cpu"], "peft"),
    ],
)
def test_backend_is_known_before_trl_is_imported(recipe, changes, words, backend):
    assert raw_backend(recipe(**changes), words) == backend


@pytest.mark.parametrize("words", [["all-linear"], ["[all-linear]"]])
def test_one_text_is_a_list_of_one(recipe, words):
    assert load_recipe(recipe(), ["--lora_target_modules", *words]).model.lora_target_modules == "all-linear"
    assert load_recipe(recipe(label_names="labels")).training.label_names == ["labels"]


def test_parse_overrides():
    assert parse_overrides(["--a", "1", "2", "--b-c", "--d.e-f=x=y"]) == [
        (("a",), ["1", "2"]),
        (("b_c",), True),
        (("d", "e-f"), "x=y"),
    ]
    with pytest.raises(RecipeError, match="'8' stands before any --key"):
        parse_overrides(["8"])


def test_saved_recipe_reads_back(recipe, tmp_path):
    words = ["--sparsity", "o1", "--sparsity.estimator.rank", "16", "--lr_scheduler_type", "cosine"]
    words += ["--report_to", "none", "--hub_token", "secret", "--warmup_steps", "0.1", "--dtype", "float32"]
    made = load_recipe(recipe(logging_steps=5), words)
    path = tmp_path / "resolved.yaml"
    made.save(path)
    assert "secret" not in path.read_text()
    again = load_recipe(path)
    assert (again.sparsity, again.model, again.data, again.backend) == (
        made.sparsity,
        made.model,
        made.data,
        made.backend,
    )
    ours, theirs = made.training.to_dict(), again.training.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"hub_token"}


# -- Errors of recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rte": 1}, r"mine\.yaml:5: learning_rte: unknown key; did you mean learning_rate\?"),
        ({"max_seq_length": 1}, r"max_seq_length: unknown key; did you mean max_length\?"),
        ({"start_step": 1}, r"start_step: unknown key; did you mean sparsity\.start_step\?"),
        ({"rank": 1}, r"rank: must be a block of target_density, .* sparsity\.estimator\.rank, LoRA's lora_r"),
        ({"xyzzy": 1}, r"xyzzy: unknown key; `sparse-unsloth keys` lists the valid ones"),
        ({"max_length": "long"}, r"mine\.yaml:5: max_length: must be an integer or null, given 'long'"),
        ({"learning_rate": [1]}, r"learning_rate: must be a number, given \[1\]"),
        ({"packing": 3}, "packing: must be true or false, given 3"),
        ({"lora_r": True}, "lora_r: must be an integer, given True"),
        ({"run_name": 3}, "run_name: must be a text or null, given 3"),
        ({"lora_target_modules": {"a": 1}}, "lora_target_modules: must be a list or null"),
        (
            {"lr_scheduler_type": "cosin"},
            r"lr_scheduler_type: must be one of linear, .* given 'cosin'; did you mean 'cosine'\?",
        ),
        ({"dtype": "bf16"}, "dtype: must be one of auto, bfloat16, float16, float32, given 'bf16'"),
        ({"backend": "hf"}, "backend: must be one of auto, unsloth, peft, given 'hf'"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"sparsity": {"mpl": {}}}, r"mine\.yaml:5: sparsity: mpl: unknown key; did you mean mlp\?"),
        (
            {"sparsity": {"estimator": {"rnk": 3}}},
            r"sparsity: estimator\.rnk: unknown key; did you mean estimator\.rank\?",
        ),
        ({"sparsity": {"mlp": {"1-3": 1.0}}}, r"sparsity: mlp\.1-3: must be a number in \[0, 1\)"),
        ({"sparsity": "o3"}, r"sparsity: 'o3' is neither a preset \(auto, dense, rows, o1, o2\) nor a file"),
        ({"sparsity": "none.yaml"}, "sparsity: .*none.yaml"),
        (
            {"rank": {"target_densty": 0.1}},
            r"mine\.yaml:\d+: rank: target_densty: unknown key; did you mean target_density",
        ),
        ({"rank": {"target_density": 0}}, r"rank: target_density must be a number in \(0, 1\]"),
        ({"use_peft": False}, "use_peft: false: .* for full training use `trl sft`"),
        ({"load_in_8bit": True}, "load_in_8bit: has no sparse path"),
        ({"lora_task_type": "SEQ_2_SEQ_LM"}, "lora_task_type: must be CAUSAL_LM or SEQ_CLS"),
        ({"lora_target_parameters": ["a"]}, "lora_target_parameters: has no sparse path"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "can't use 8 bit and 4 bit"),
        ({"eval_strategy": "steps", "eval_steps": 0, "logging_steps": 0}, "logging"),
    ],
)
def test_wrong_keys_and_values(recipe, changes, message):
    assert re.search(message, problems(recipe(**changes)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_rr 8", r"command line: --lora_rr: unknown key; did you mean lora_r\?"),
        ("--max_steps", "command line: --max_steps: must be an integer, given True"),
        ("--max_steps 1 2", r"--max_steps: must be an integer, given \['1', '2'\]"),
        ("--sparsity o3", "command line: --sparsity: 'o3' is neither a preset"),
        ("--sparsity.estimator.rnk 3", r"command line: --sparsity\.estimator\.rnk: estimator\.rnk: unknown key"),
        ("--sparsty.mlp 3", r"command line: --sparsty\.mlp: unknown key; did you mean sparsity\?"),
    ],
)
def test_wrong_overrides(recipe, words, message):
    assert re.search(message, problems(recipe(), *words.split()))


def test_all_problems_are_reported_together(recipe, capsys):
    source = recipe(learning_rte=1, max_length="long", sparsity={"mlp": {"all": 2}, "estimator": {"rnk": 1}})
    assert main(["train", source, "--lora_rr", "8", "--backend", "peft"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "sparse-unsloth: mine.yaml: 5 problems"
    assert len(lines) == 6
    for line, word in zip(
        lines[1:], ("learning_rte", "max_length", "lora_rr", "mlp.all", "estimator.rnk"), strict=True
    ):
        assert word in line


def test_key_given_twice(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(BASE) + "lora_r: 4\nlora_r: 8\n")
    assert "twice.yaml:6: lora_r: given twice, first as twice.yaml:5: lora_r" in problems(path)


@pytest.mark.parametrize(("text", "message"), [("a: [", "cannot be read as YAML"), ("- a", "must hold a mapping")])
def test_no_recipe_at_all(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message in problems(path)


def test_missing_recipe(tmp_path):
    assert "there is no recipe file none.yaml" in problems("none.yaml")
    assert "there is no shipped recipe 'none'" in problems("none")
    assert f"{tmp_path} is a folder; name a file in it" in problems(str(tmp_path))
