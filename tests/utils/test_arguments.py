"""Arguments of a script that cannot be meant are refused before a library takes or ignores them."""

import inspect
import traceback
from pathlib import Path

import pytest
import torch

from sparse_unsloth import FastSparseLanguageModel
from sparse_unsloth.backends.peft import loading
from sparse_unsloth.errors import ConfigError, DataError
from sparse_unsloth.utils.arguments import check_length, check_lora, check_names

from tiny_models import save_checkpoint


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


def test_a_folder_without_weights_keeps_the_librarys_error(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(Path(checkpoint, "config.json").read_text())
    with pytest.raises(OSError, match="no file named"):
        load(tmp_path)
