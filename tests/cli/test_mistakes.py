"""Tests wrong command lines: one message with cause and fix, no traceback, and no files written or overwritten."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from sparse_unsloth.cli import main
from sparse_unsloth.cli.main import take_debug
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.training import run as train_module
from sparse_unsloth.training.recipe import load_recipe
from sparse_unsloth.utils.faults import explain

from word_models import questions, save_checkpoint, save_recipe, save_rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    save_checkpoint(folder / "model", num_hidden_layers=2)
    save_rows(folder / "rows.jsonl", questions([(5, 2)] * 12))
    keys = {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "rows.jsonl"), "backend": "peft",
        "bf16": False, "use_cpu": True, "max_length": 32, "max_steps": 1, "per_device_train_batch_size": 4,
        "lora_r": 4, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "output_dir": "run",
    }  # fmt: skip
    save_recipe(folder / "r.yaml", keys)
    (folder / "bytes").write_bytes(b"{}\n\xff\xfe")
    return folder


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    """A folder of one's own, to be in: {S} in the words is the shared one, {T} this."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda text: text.replace("{S}", str(shared)).replace("{T}", str(tmp_path))


def refused(words, capsys, place, code=2, program=True):
    """Returns the message about the command line on standard error."""
    words = [place(word) for word in words]
    before = {str(path) for path in Path.cwd().rglob("*")}
    try:
        found = main(words)
    except SystemExit as error:  # of argparse
        found = error.code
    said = capsys.readouterr().err
    assert found == code, said
    assert "Traceback" not in said
    assert {str(path) for path in Path.cwd().rglob("*")} == before, "nothing is left behind"
    start = said.rfind("\nsparse-unsloth")
    return said[start + 1 :].strip()


# -- Of a training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_r 0", "--lora_r: must be 1 or more, given 0"),
        ("--lora_r -4", "--lora_r: must be 1 or more, given -4"),
        ("--lora_alpha 0", "--lora_alpha: must be above 0, given 0"),
        ("--lora_dropout 1.5", "--lora_dropout: must be 0 or more and below 1"),
        ("--learning_rate -1e-4", "--learning_rate: must be above 0 and at most 1"),
        ("--learning_rate 0", "--learning_rate: must be above 0 and at most 1"),
        ("--learning_rate 20", "--learning_rate: must be above 0 and at most 1"),
        ("--learning_rate .nan", "--learning_rate: must be above 0 and at most 1"),
        ("--max_length 0", "--max_length: must be 1 or more"),
        ("--max_steps 0", "--max_steps: must be 1 or more, or -1"),
        ("--max_steps -7", "--max_steps: must be 1 or more, or -1"),
        ("--num_train_epochs 0", "--num_train_epochs: must be above 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size: must be 1 or more"),
        ("--per_device_eval_batch_size -1", "--per_device_eval_batch_size: must be 1 or more"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps: must be 1 or more"),
        ("--dataset_size 0", "--dataset_size: must be 1 or more, or null for all"),
        ("--dataset_size -3", "--dataset_size: must be 1 or more, or null for all"),
        ("--dataset_test_size -1", "--dataset_test_size: must be 1 or more, or null for none"),
        ("--weight_decay -1", "--weight_decay: must be 0 or more"),
        ("--seed -1", "--seed: must be 0 or more"),
        ("--pad_to_multiple_of 0", "--pad_to_multiple_of: must be 1 or more, or null for none, given 0"),
        ("--pad_to_multiple_of -8", "--pad_to_multiple_of: must be 1 or more, or null for none, given -8"),
        ("--report_to wanbd", "--report_to: there is no integration 'wanbd'; did you mean 'wandb'?"),
        ("--report_to none wanbd", "--report_to: there is no integration 'wanbd'"),
        ("--device cuda:7", "--device: unknown key; use_cpu: true chooses the CPU, CUDA_VISIBLE_DEVICES"),
        ("--load_best_model_at_end", "--load_best_model_at_end: needs eval_strategy and save_strategy"),
        ("--accelerator_config none.json", "No such file or directory: 'none.json'"),
        ("--gradient_checkpointing_kwargs {use_reentrent:1}", "use_reentrent:1: unknown option; did you mean 'use_re"),
        ("--sparsity none", "--sparsity: 'none' is no preset; 'dense' is training without sparsity"),
        ("--sparsity off", "--sparsity: 'off' is no preset; 'dense' is training without sparsity"),
        ("--sparsity false", "--sparsity: 'false' is no preset; 'dense' is training without sparsity"),
        ("--lora_target_modules q_prj v_proj", "lora_target_modules: 'q_prj' (did you mean 'q_proj'?) not found"),
        ("--lora_modules_to_save lm_hed", "lora_modules_to_save: 'lm_hed' (did you mean 'lm_head'?) not found"),
        ("--lora_target_modules input_layernorm", "peft says: Target module LlamaRMSNorm"),
        ("--model_name_or_path /none/x", "'/none/x' cannot be loaded: there is no such folder"),
        ("--model_name_or_path {T}", "cannot be loaded: there is no config.json in it"),
        ("--dataset_name ./none", "there is no file or folder none"),
        ("--dataset_name some.tsv", "there is no file or folder some.tsv"),
        ("--dataset_name {T}", "is a folder that `datasets` cannot read as a data set"),
        ("--output_dir {S}/r.yaml", "output_dir: {S}/r.yaml is a file, and"),
        ("--output_dir {S}/r.yaml/run", "output_dir: {S}/r.yaml is a file, and"),
        ("--output_dir=", "--output_dir: must name a folder; leave it out for runs/r"),
        ("--output_dir /proc/run", "output_dir: /proc/run cannot be written to"),
        ("--optim lomo", "transformers says: You need to install `lomo_optim`"),
        ("--lr_scheduler_type cosine_with_min_lr", "transformers says: One of min_lr or min_lr_rate should be set"),
        ("--attn_implementation flsh", 'transformers says: Specified `attn_implementation="flsh"` is not supported'),
        ("--torch_compile_backend foo", "accelerate says: 'FOO' is not a valid DynamoBackend"),
        ("--pad_token <foo>", "trl says: The specified `pad_token` ('<foo>') is not found"),
    ],
)
def test_a_training_that_cannot_be_is_refused_and_leaves_nothing(place, words, message, capsys):
    assert place(message) in refused(["train", "{S}/r.yaml", *words.split(" ")], capsys, place)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model_init_kwargs", "transformers says: LlamaForCausalLM.__init__() got an unexpected keyword argument"),
        ("lr_scheduler_kwargs", "transformers says: get_linear_schedule_with_warmup() got an unexpected keyword"),
    ],
)
def test_arguments_that_a_library_does_not_know(place, key, message, capsys):
    assert message in refused(["train", "{S}/r.yaml", f"--{key}", "{foo: 1}"], capsys, place)


def test_what_was_there_before_stays(place, capsys):
    """The run's folder exists, with files of the user's, and the set-up fails after the trainer was built."""
    Path("run").mkdir()
    Path("run", "notes.txt").write_text("mine")
    refused(["train", "{S}/r.yaml", "--optim", "lomo"], capsys, place)
    assert Path("run", "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(place, monkeypatch, capsys):
    def full(**kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    said = refused(["train", "{S}/r.yaml"], capsys, place)
    assert "output_dir: run cannot be written to: No space left on device" in said


@pytest.mark.parametrize("value", [False, "none", "off", "False", "no"])
def test_other_words_for_dense_say_so(value):
    with pytest.raises(ConfigError, match="'dense' is training without sparsity"):
        SparsityConfig.from_any(value)


def test_a_length_beyond_the_models_positions(place, capsys):
    said = refused(["train", "{S}/r.yaml", "--max_length", "999"], capsys, place, code=1)
    assert "max_seq_length=999 is beyond the 128 positions" in said
    assert "a recipe's max_length" in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            b'{"question":"a","answer":"b"}\n{"question":"a","answer":\n',
            "line 2 is no JSON: Expecting value",
        ),
        ("b.jsonl", b'{"question":"a","answer":"b"}\n\n["a"]\n', r"\['a'\].* must be|must be .*\['a'\]"),
        ("c.json", b'[{"question":"a","answer":"b"},\n{"question":"a" "answer":"b"}]', "line 2 is no JSON"),
        ("d.json", b'[{"question":"a","answer":"b"}, 3]', "must be .*3|3.* must be"),
        ("e.jsonl", b'{"question":"a","answer":"b"}\n{"question":"\xff","answer":"b"}\n', "(?i)utf-8"),
        ("g.csv", b"question,answer\na,b\na,b,c\n", "Error tokenizing data"),
        ("h.csv", b"question,answer\na,\xff\n", "'utf-8'"),
        ("j.jsonl", b"question,answer\na,b\n", "line 1 is no JSON"),
    ],
)
def test_a_file_of_rows_that_cannot_be_read_is_named_with_its_line(place, name, text, message, capsys):
    Path(name).write_bytes(text)
    said = refused(["train", "{S}/r.yaml", "--dataset_name", name], capsys, place)
    assert said.startswith(f"sparse-unsloth: dataset_name: {name} is empty, or cannot be read: ")
    assert re.search(message, said)


# -- Of recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [\nb: 1", "m.yaml:2:5: cannot be read as YAML"),
        (b"a: 1\n\tb: 2", "m.yaml:2:1: cannot be read as YAML"),
        (b'a: "x\n', "m.yaml:2:1: cannot be read as YAML"),
        (b"\xff\xfe\x00", "m.yaml: cannot be read as YAML: it is not UTF-8 text"),
        (b"sparsity:\n  mlp: {}\n  start_step: 1\n  mlp: {}\n", "m.yaml:4: mlp: given twice, first as m.yaml:2: mlp"),
        (b"sparsity: off\n", "m.yaml:1: sparsity: False is no preset; 'dense' is training without sparsity"),
        (b"dataset_size: 0\n", "m.yaml:1: dataset_size: must be 1 or more"),
        (b"model_name_or_path: ''\n", "m.yaml: model_name_or_path is missing"),
    ],
)
def test_a_recipe_that_is_wrong_is_named_with_its_line(place, text, message, capsys):
    Path("m.yaml").write_bytes(text)
    assert message in refused(["train", "m.yaml", "--use_cpu"], capsys, place)


# -- Of the other commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("estimate {S}/r.yaml --device cuda:7", "--device, --speed-table: are of GPUs"),
        ("estimate {S}/r.yaml --speed-table none.csv", "--device, --speed-table: are of GPUs"),
        ("estimate {S}/model {S}/rows.jsonl --lora_target_modules q_prj v_proj", "(did you mean 'q_proj'?)"),
        ("estimate {S}/model {S}/rows.jsonl --lora_r 0", "--lora_r: must be 1 or more"),
        ("estimate {S}/r.yaml --preset none", "'dense' is training without sparsity"),
        ("calibrate {S}/r.yaml --budget 2", "--budget: must be a number above 0 and below 1, given '2'"),
        ("calibrate {S}/r.yaml --max-loss -1", "--max-loss: must be a number above 0, given '-1'"),
        ("calibrate {S}/r.yaml --mlp-levels 2", "--mlp-levels: must be a number of at least 0 and below 1, given '2'"),
        ("calibrate {S}/r.yaml --held-out-samples -1", "--held-out-samples: must be an integer from 0 on"),
        ("calibrate {S}/r.yaml --buget 0.5", "--buget: unknown option; did you mean --budget?"),
        ("calibrate {S}/r.yaml --output_dir x", "--output_dir: unknown option; did you mean --output-dir?"),
        ("estimate {S}/r.yaml --samples -1", "--samples: must be an integer from 0 on, given '-1'"),
        ("calibrate {S}/r.yaml --lora_target_modules q_prj", "(did you mean 'q_proj'?)"),
        ("calibrate {S}/r.yaml --output-dir {S}/r.yaml", "output-dir: {S}/r.yaml is a file"),
        ("calibrate {S}/r.yaml --budget 0.5 --max-loss 1", "not allowed with argument --budget"),
        ("evaluate {S}/model --suite humaneval --output-dir {S}/r.yaml", "output-dir: {S}/r.yaml is a file"),
        ("evaluate /none/x --suite humaneval --limit 1", "the model cannot be loaded: '/none/x'"),
        ("evaluate {S}/model --suite humaneval --limit 0", "--limit: must be an integer from 1 on, given '0'"),
        ("evaluate {S}/model --suite humanevl", "did you mean humaneval?"),
        ("evaluate {S}/model --suite glue --batchsize 3", "--batchsize 3; did you mean --batch-size?"),
        ("evaluate {S}/model --suite glue --shots -1", "--shots: must be an integer from 0 on"),
        ("compare {S} --output-dir {S}/r.yaml", "output-dir: {S}/r.yaml is a file"),
        ("study toy --outdir {S}/r.yaml", "outdir: {S}/r.yaml is a file"),
        ("study spectra --model {S}/model --device cuda:77", "--device: 'cuda:77' is no device of this machine"),
        ("study spectra --model {S}/model --device gpu", "--device: 'gpu' is no device of this machine"),
        ("study tiy", "did you mean toy?"),
        ("study toy --trails 3", "did you mean --trials?"),
        ("study spectra --model {S}/model --max-layers 0", "--max-layers: must be an integer from 1 on"),
        ("study spectra --model {S}/model --calibration-samples 0", "must be an integer from 1 on, given '0'"),
        ("trian {S}/r.yaml", "; did you mean train?"),
        ("train", "the following arguments are required: RECIPE"),
        ("train {S}", "{S} is a folder"),
        ("quickstart --steps abc", "--steps: must be an integer from 1 on, given 'abc'"),
        ("quickstart --output-dir {S}/r.yaml", "output-dir: {S}/r.yaml is a file"),
    ],
)
def test_every_command_refuses_alike(place, words, message, capsys):
    assert place(message) in refused(words.split(" "), capsys, place)


def test_a_sparsity_file_that_is_no_yaml_is_one_line(place, capsys):
    Path("bad.yaml").write_text("mlp: [")
    said = refused(["train", "{S}/r.yaml", "--sparsity", "bad.yaml"], capsys, place)
    assert said.splitlines()[0].endswith("r.yaml: 1 problem")
    assert "command line: --sparsity: bad.yaml:1:7: cannot be read as YAML: while parsing a flow node" in said


def test_a_run_folder_in_place_of_a_recipe_names_the_recipe_in_it(place, capsys):
    Path("old").mkdir()
    Path("old", "recipe.yaml").touch()
    assert "./old is a folder; name a file: old/recipe.yaml." in refused(["train", "./old"], capsys, place)


@pytest.mark.parametrize(
    "words",
    [
        "evaluate {S}/model --suite humaneval --problems bytes",
        "evaluate {S}/model --suite mt-bench --questions bytes",
        "evaluate {S}/model --suite commonsense --data boolq=bytes",
        "study spectra --model {S}/model --calibration-text bytes",
        "bench --model {S}/model --out bytes",
    ],
)
def test_a_file_that_is_no_text_is_named_with_its_line(place, words, capsys):
    Path("bytes").write_bytes(b"{}\n\xff\xfe\n")
    assert "bytes: line 2 is not UTF-8 text (invalid start byte). Give a" in refused(words.split(" "), capsys, place)


@pytest.mark.parametrize(
    ("recipe", "metrics", "message"),
    [
        ("a: [", "{}", "recipe.yaml: is damaged"),
        ("a: 1", "{", "metrics.json: is damaged"),
        ("a: 1", "{}", "metrics.json: is damaged: it holds no log"),
    ],
)
def test_compare_names_a_damaged_file(place, recipe, metrics, message, capsys):
    Path("one").mkdir()
    Path("one", "recipe.yaml").write_text(recipe)
    Path("one", "metrics.json").write_text(metrics)
    assert message in refused(["compare", "one"], capsys, place)


def test_the_quickstart_empties_no_folder_of_others(place, capsys):
    Path("q", "dense", "photos").mkdir(parents=True)
    said = refused(["quickstart", "--output-dir", "q"], capsys, place)
    assert "q/dense would be emptied, and holds photos" in said


# -- Whose fault it is ------------------------------------------------------------------------------------------------


def test_a_fault_of_our_own_says_so_and_debug_shows_it(place, monkeypatch, capsys):
    def broken(data):
        raise AttributeError("no attribute 'x'")

    monkeypatch.setattr(train_module, "data_digest", broken)
    said = refused(["train", "{S}/r.yaml"], capsys, place, code=1)
    assert "unexpected error AttributeError: no attribute 'x'" in said
    assert "please report it" in said
    assert "--debug" in said
    for words in (["train", place("{S}/r.yaml"), "--debug"], ["--debug", "train", place("{S}/r.yaml")]):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "Traceback (most recent call last)" in said
        assert "in broken" in said
    assert not Path("run").exists()


def test_debug_shows_the_traceback_of_a_mistake_too(place, capsys):
    assert main(["train", place("{S}/r.yaml"), "--optim", "lomo", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert "sparse-unsloth: transformers says: You need to install `lomo_optim`" in said
    assert take_debug(["train", "r", "--debug", "underflow_overflow"])[1] is False, "TRL's key of that name"
    assert take_debug(["train", "r", "--debug", "--lora_r", "8"]) == (["train", "r", "--lora_r", "8"], True)


class Fails(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("somewhere in a step"), None),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device. The disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "The disk is full"),
    ],
)
def test_errors_while_training_keep_their_traceback_unless_the_disk_is_full(place, monkeypatch, error, message, capsys):
    run = train_module.run
    monkeypatch.setattr(train_module, "run", lambda recipe: run(recipe, (Fails(error),)))
    if message is None:
        with pytest.raises(ValueError, match="somewhere in a step") as caught:
            main(["train", place("{S}/r.yaml")])
        assert any("This happened while training" in note for note in caught.value.__notes__)
    else:
        assert main(["train", place("{S}/r.yaml")]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert Path("run", "recipe.yaml").is_file(), "what the run wrote before stays"


def test_an_interrupted_command_says_so(place, monkeypatch, capsys):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "run", interrupted)
    assert main(["train", place("{S}/r.yaml")]) == 130
    assert capsys.readouterr().err.endswith("sparse-unsloth: interrupted.\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"), 2, "No such file or directory: x.txt"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Change its permissions"),
        (KeyError("x"), 1, "unexpected error KeyError: 'x'"),
        (ValueError("made here"), 1, "unexpected error ValueError: made here"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "Lower per_device_train_batch_size"),
    ],
)
def test_explanations(error, code, message):
    try:
        raise error
    except Exception as caught:
        line, found = explain(caught)
    assert message in line
    assert found == code
    assert "\n" not in line


def test_a_library_that_refuses_is_named_and_python_itself_is_none():
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: [")
    assert explain(caught.value)[0].startswith("yaml says: ")
    with pytest.raises(ValueError, match="property name") as caught:
        json.loads("{")
    assert explain(caught.value)[0].startswith("unexpected error"), "called by this file, which is no library"


def test_a_right_recipe_still_trains(place, capsys):
    assert main(["train", place("{S}/r.yaml"), "--lora_target_modules", "q_proj"]) == 0
    assert load_recipe("run/recipe.yaml").model.lora_target_modules == "q_proj"
    assert "trained 1 steps" in capsys.readouterr().out
