"""Arguments of a script that cannot be meant are refused before a library takes or ignores them."""

import ast
import inspect
import shutil
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig

from sparse_unsloth import FastSparseLanguageModel
from sparse_unsloth.backends.peft import loading
from sparse_unsloth.backends.unsloth.contract import find_unsloth
from sparse_unsloth.errors import ConfigError, DataError
from sparse_unsloth.utils.arguments import check_folder, check_length, check_lora, check_names

from tiny_models import save_checkpoint

OF_THE_LOADER = (*loading.NEEDS_UNSLOTH, *loading.IGNORED)
LORA_TAKERS = (FastSparseLanguageModel.get_peft_model, loading.add_lora, LoraConfig)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


def load(name, max_seq_length=64, **given):
    return FastSparseLanguageModel.from_pretrained(
        str(name), max_seq_length, backend="peft", load_in_4bit=False, **given
    )[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_alfa": 32}, "lora_alfa: unknown argument; did you mean 'lora_alpha'"),
        ({"random_sate": 1, "use_rs_lora": True}, "random_sate: .* did you mean 'random_state'"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -16, "lora_dropout": -0.1}, "lora_alpha is -16, .*; lora_dropout is -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
    ],
)
def test_an_adapter_that_cannot_be_meant_is_refused_and_the_model_stays(checkpoint, given, message):
    model = load(checkpoint)
    with pytest.raises(ConfigError, match=message):
        FastSparseLanguageModel.get_peft_model(model, **given)
    assert not hasattr(model, "peft_config")
    FastSparseLanguageModel.get_peft_model(model, r=4, sparsity="dense")  # and can be given an adapter still


def test_what_other_libraries_take_is_theirs():
    takers = FastSparseLanguageModel.from_pretrained, loading.load
    check_names(("attn_implementation", "max_memory", "cache_dir", "torch_dtype", "use_safetensors"), takers)
    check_names(loading.NEEDS_UNSLOTH, takers, (*loading.NEEDS_UNSLOTH, *loading.IGNORED))
    check_names(loading.OF_UNSLOTHS_LORA, (loading.add_lora,), loading.OF_UNSLOTHS_LORA)
    with pytest.raises(ConfigError, match="load_in_8bit"):  # what the names beside the functions are for
        check_names(loading.NEEDS_UNSLOTH, takers)


@pytest.mark.parametrize(
    ("file", "function", "takers", "others"),
    [
        ("loader.py", "from_pretrained", (FastSparseLanguageModel.from_pretrained, loading.load), OF_THE_LOADER),
        ("llama.py", "from_pretrained", (FastSparseLanguageModel.from_pretrained, loading.load), OF_THE_LOADER),
        ("llama.py", "get_peft_model", LORA_TAKERS, loading.OF_UNSLOTHS_LORA),
        ("vision.py", "get_peft_model", LORA_TAKERS, loading.OF_UNSLOTHS_LORA),
    ],
)
def test_every_argument_of_the_installed_unsloth_is_taken(file, function, takers, others):
    """Read off its sources: `get_peft_model` of text and of vision models, the loaders of all models and of Llama's."""
    folder = find_unsloth()
    if folder is None:
        pytest.skip("Unsloth is not installed")
    nodes = ast.walk(ast.parse(next(folder.rglob(f"models/{file}")).read_text(encoding="utf-8")))
    found = [node.args for node in nodes if isinstance(node, ast.FunctionDef) and node.name == function]
    names = {one.arg for given in found for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
    assert len(names) > 15
    check_names(names, takers, others)


@pytest.mark.parametrize("name", ["kwarg", "args"])
def test_the_names_of_further_arguments_are_no_arguments(name):
    check_names([name], (FastSparseLanguageModel.from_pretrained,))  # which are `kwargs`, and so are no suggestion


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Unsloth: Failed to load model. Both AutoConfig and PeftConfig loading failed.\n\nAutoConfig ..."),
        OSError("We couldn't connect to 'https://huggingface.co'"),
    ],
)
def test_a_model_that_is_not_found_is_told_alike_by_both_backends(error, monkeypatch):
    """Unsloth raises a RuntimeError with both libraries' messages, transformers an OSError."""

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(loading, "load", refuse)
    with pytest.raises(DataError, match="nobody/nothing-here: its configuration cannot be read") as caught:
        load("nobody/nothing-here")
    assert caught.value.__cause__ is None  # its traceback would be 50 lines
    assert caught.value.__suppress_context__


def test_usual_sizes_pass():
    for rank, alpha, dropout in ((1, 1, 0), (16, 32.0, 0.05), (torch.tensor(8).item(), 0.5, 0.99)):
        check_lora(rank, alpha, dropout)
    defaults = inspect.signature(FastSparseLanguageModel.get_peft_model).parameters
    check_lora(*(defaults[name].default for name in ("r", "lora_alpha", "lora_dropout")))
    check_length(inspect.signature(FastSparseLanguageModel.from_pretrained).parameters["max_seq_length"].default)


@pytest.mark.parametrize("length", [0, -5, 2048.0, "2048", True])
def test_a_length_that_is_none_is_refused(checkpoint, length):
    with pytest.raises(ConfigError, match=r"max_seq_length is .*, and it is a number of tokens"):
        load(checkpoint, max_seq_length=length)


def test_no_length_means_all_positions_of_the_model(checkpoint):
    model = load(checkpoint, max_seq_length=None)
    assert model.max_seq_length == model.config.max_position_embeddings


def test_misspelt_arguments_of_the_loader_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="max_seq_len: unknown argument; did you mean 'max_seq_length'"):
        load(checkpoint, max_seq_len=64)


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file.bin").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = "there is no such folder"
    for name, message in (
        (tmp_path / "nothing", folder),
        ("./nothing", folder),
        ("runs/of/mine", folder),
        (empty, "this folder holds no config.json or adapter_config.json"),
        (tmp_path / "file.bin", "this is a file; give the folder"),
        ("nobody/nothing-here", "its configuration cannot be read: .* Check the name"),
        ("two words/of it", "its configuration cannot be read: .* Check the name"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load(name)
        assert str(name) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert isinstance(caught.value.__context__, OSError)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback (most recent call last)") == 1, "those of the libraries are left out"


def test_folders_are_found_as_users_name_them(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(checkpoint).parent))
    load(f"~/{Path(checkpoint).name}")
    FastSparseLanguageModel.from_pretrained(Path(checkpoint), 64, backend="peft", load_in_4bit=False)
    with pytest.raises(DataError, match="there is no such folder"):
        load("~/nothing")
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    (bare / "config.json").unlink()
    load(bare, config=config)  # the script brings what the folder lacks
    with pytest.raises(DataError, match="this folder holds no"):
        load(bare)
    (tmp_path / "inner").mkdir()
    check_folder(str(Path(checkpoint).parent), Path(checkpoint).name)
    with pytest.raises(DataError, match="this folder holds no"):
        check_folder(str(tmp_path), "inner")


def test_a_folder_without_weights_keeps_the_librarys_error(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(Path(checkpoint, "config.json").read_text())
    with pytest.raises(OSError, match="no file named"):
        load(tmp_path)
