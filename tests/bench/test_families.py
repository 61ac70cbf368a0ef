"""Tests that what is special in a family changes what its trial model computes, so that a trial can find it missing."""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_unsloth.bench.families import COMPILED, FAMILIES, families_of, write_models
from sparse_unsloth.bench.trial import make_batch

FULL = {"layer_types": ["full_attention"] * 4}
SAME_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
SPECIAL = [
    ("mistral", {"sliding_window": None}),
    ("ministral3", {"sliding_window": None}),
    ("ministral3", {"rope_parameters": FAMILIES["ministral3"].peft["rope_parameters"] | {"llama_4_scaling_beta": 0.0}}),
    ("ministral3", {"rope_parameters": FAMILIES["ministral3"].peft["rope_parameters"] | {"factor": 1.0}}),
    ("qwen2", FULL),
    ("gemma2", FULL),
    ("gemma2", {"query_pre_attn_scalar": 64}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2-eager", {"attn_logit_softcapping": None}),
    ("gemma3", FULL),
    ("gemma3", {"query_pre_attn_scalar": 64}),
    ("gemma3", {"rope_parameters": SAME_ROPE}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 64**-0.5}),
    ("granite", {"logits_scaling": 1.0}),
    ("smollm3", {"no_rope_layers": [1] * 4}),
]
LEAST = 0.02
"""The least relative change of the logits: more than bf16 arithmetic changes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, families_of("peft"), "peft")
    return folder


@functools.cache
def plain_logits(folder):
    return logits(folder)


def logits(folder, layout="padded", **changes):
    family, config = FAMILIES[folder.name], AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    attention = {"attn_implementation": family.attention} if family.attention else {}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **attention)
    batch = make_batch(layout, config.vocab_size, torch.device("cpu"), "peft")
    with torch.no_grad():
        return model(**batch).logits[batch["labels"] != -100]


@pytest.mark.parametrize(("family", "without"), SPECIAL)
def test_what_is_special_in_a_family_acts(models, family, without):
    true, other = plain_logits(models / family), logits(models / family, **without)
    assert (other - true).norm() > LEAST * true.norm()


@pytest.mark.parametrize("family", families_of("peft"))
def test_documents_without_padding_are_told_apart(models, family):
    """By their positions alone, as TRL sends them to transformers."""
    ours = logits(models / family, "padding-free")
    torch.testing.assert_close(ours, plain_logits(models / family), atol=1e-4, rtol=1e-4)


def test_families_of_unsloth(tmp_path, models):
    """Those of the compiled path have the PEFT backend's models."""
    assert families_of("unsloth") == ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
    assert {FAMILIES[name].unsloth for name in COMPILED} == {None}
    write_models(tmp_path, ["granite"])
    texts = [(folder / "granite" / "model.safetensors").read_bytes() for folder in (tmp_path, models)]
    assert texts[0] == texts[1]
