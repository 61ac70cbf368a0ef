"""Saved adapters: loading them with their vocabulary and tokenizer, over a base that may have been moved."""

import contextlib
import json
import shutil

import pytest
import torch
from torch import nn

from sparse_unsloth import FastSparseLanguageModel
from sparse_unsloth.cli import main
from sparse_unsloth.errors import BackendError, ConfigError, DataError
from sparse_unsloth.evaluation.model import find_source
from sparse_unsloth.evaluation.model import load as load_for_evaluation
from sparse_unsloth.utils.saved_adapters import check_targets, named_targets, vocabulary_of

from tiny_models import make_base
from word_models import save_checkpoint

VOCABULARY = 14


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=1)


def load(name, **options):
    return FastSparseLanguageModel.from_pretrained(
        str(name), load_in_4bit=False, max_seq_length=64, backend="peft", use_gradient_checkpointing=False, **options
    )


def make(base, folder, resized=None, **options):
    """A trained adapter without a tokenizer, saved in ``folder``; its model."""
    model, _ = load(base, **({} if resized is None else {"resize_model_vocab": resized}))
    options = {"r": 4, "sparsity": "dense", "use_gradient_checkpointing": False, **options}
    model = FastSparseLanguageModel.get_peft_model(model, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("resized", [None, 20])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [2, 13]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_an_adapter_comes_with_the_vocabulary_it_was_trained_with(base, tmp_path, resized, options):
    trained = make(base, tmp_path / "adapter", resized, **options)
    again, tokenizer = load(tmp_path / "adapter")
    ids = torch.arange(VOCABULARY if resized is None else resized)[None]
    with torch.no_grad():
        expected = trained.eval()(input_ids=ids).logits
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, expected)
        judged, _ = load_for_evaluation(find_source(str(tmp_path / "adapter"), output_dir=str(tmp_path / "results")))
        torch.testing.assert_close(judged(input_ids=ids).logits.to(expected.device), expected, atol=1e-4, rtol=1e-4)
    assert len(tokenizer) == VOCABULARY, "the base's: none was saved with the adapter"
    trainable = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (trained, again)]
    assert trainable[0] == trainable[1]


def test_a_vocabulary_that_does_not_fit_is_refused(base, tmp_path):
    make(base, tmp_path / "adapter", 20)
    assert vocabulary_of(tmp_path / "adapter") == 20
    with pytest.raises(BackendError, match=r"resize_model_vocab=30: the adapter in .* was trained with 20"):
        load(tmp_path / "adapter", resize_model_vocab=30)
    load(tmp_path / "adapter", resize_model_vocab=20)

    _, tokenizer = load(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    make(base, tmp_path / "lost")
    tokenizer.save_pretrained(tmp_path / "lost")
    with pytest.raises(BackendError, match=r"its tokenizer has 16 tokens and the base model .* 14 embeddings"):
        load(tmp_path / "lost")
    model, tokenizer = load(tmp_path / "lost", resize_model_vocab=16)
    assert (model.get_input_embeddings().weight.shape[0], len(tokenizer)) == (16, 16)


def test_a_base_that_was_moved_is_named_and_another_can_be_given(base, tmp_path, capsys):
    here = shutil.copytree(base, tmp_path / "model")
    make(here, tmp_path / "adapter")
    shutil.move(here, tmp_path / "moved")
    file = tmp_path / "adapter" / "adapter_config.json"
    with pytest.raises(
        DataError, match=r"was trained over the base model '.*/model', which cannot be loaded"
    ) as caught:
        load(tmp_path / "adapter")
    assert f"write its new folder or hub name as base_model_name_or_path into {file}" in str(caught.value)
    assert main(["evaluate", str(tmp_path / "adapter"), "--suite", "humaneval", "--limit", "1"]) == 2
    assert "was trained over the base model" in capsys.readouterr().err

    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}))
    load(tmp_path / "adapter")
    (tmp_path / "moved" / "config.json").unlink()
    with pytest.raises(DataError, match="which cannot be loaded: "):
        load(tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(DataError, match="over the base model 'nobody/nothing', which cannot be loaded"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged, or no adapter's configuration"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "KeyError: 'base_model_name_or_path'"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing, and so is adapter_model.safeten"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    ],
)
def test_a_damaged_adapter_is_named(base, tmp_path, damage, message):
    make(base, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "adapter")


# -- Names of modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_prj", "v_proj"],
            r"'q_prj' \(did you mean 'q_proj'\?\) not found in the base model, whose modules are called",
        ),
        (["q_prj", "v_prj", "xyz"], r"'q_prj' .*, 'v_prj' .*, 'xyz' not found in .*'all-linear' takes every"),
        (r".*\.(q|v)_prj", "not found in the base model"),
        ("(", "is no regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, message):
    base = make_base()
    with pytest.raises(ConfigError, match=message):
        check_targets(base, targets)
    with pytest.raises(ConfigError, match=message):
        FastSparseLanguageModel.get_peft_model(base, target_modules=targets, sparsity="dense")
    assert not hasattr(base, "peft_config"), "and the model is as it was"
    with pytest.raises(ConfigError, match=r"modules_to_save: 'lm_hed' .* not found"):
        FastSparseLanguageModel.get_peft_model(base, modules_to_save=["lm_hed"], sparsity="dense")


@pytest.mark.parametrize("targets", [["q_proj", "layers.1.mlp.up_proj"], r".*\.(q|v)_proj", "all-linear", None])
def test_targets_that_match_are_taken(targets):
    check_targets(make_base(), targets)


def test_unsloth_takes_names_of_a_gated_mlp_for_experts():
    model = nn.ModuleDict({"q_proj": nn.Identity(), "experts": nn.Identity()})
    for backend, wrong in (("unsloth", []), ("peft", ["up_proj"])):
        model.__dict__["_sparse_backend"] = backend
        for names in (["q_proj", "up_proj"], ["q_proj", "u_proj"]):
            with pytest.raises(ConfigError) if wrong or "u_proj" in names else contextlib.nullcontext():
                check_targets(model, names)


def test_one_name_is_a_list_of_one():
    assert named_targets("q_proj") == named_targets(["q_proj"]) == ["q_proj"]
    assert named_targets("all-linear") == "all-linear"
    assert named_targets([r".*_proj"]) == r".*_proj"
