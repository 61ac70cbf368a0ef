"""Sparse prefill: generations that read their prompts as training did."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from sparse_unsloth import FastSparseLanguageModel, attach, detach, get_state
from sparse_unsloth.attachment import CONFIG_NAME, ESTIMATOR_NAME
from sparse_unsloth.errors import AttachError, EstimatorError
from sparse_unsloth.partition import TokenPartition

sys.path.insert(0, str(Path(__file__).parent))
from tiny import always, make_base, make_lora

PROMPT = [9, 5, 7]
"""Lengths of the prompts."""


def prompts(side="left", seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.full((len(PROMPT), max(PROMPT)), 2), torch.zeros(len(PROMPT), max(PROMPT), dtype=torch.int64)
    for row, length in enumerate(PROMPT):
        start = max(PROMPT) - length if side == "left" else 0
        ids[row, start : start + length] = torch.randint(3, 96, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def make_model(**changes):
    model = make_lora("llama")
    attach(model, {**always(), **changes})
    return model


@torch.no_grad()
def logits_of_training(model, batch):
    """What a sparse training forward, whose answer is one more token, predicts at the last prompt token."""
    token = torch.full((len(batch["input_ids"]), 1), 3)
    ids = torch.cat((batch["input_ids"], token), 1)
    mask = torch.cat((batch["attention_mask"], torch.ones_like(token)), 1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 3
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model.train()
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    model.eval()
    return output.logits[:, -2]


def generate(model, batch, **options):
    """``(tokens, logits)``, greedily; ``logits [steps, batch, vocabulary]``."""
    out = model.generate(
        **batch, max_new_tokens=3, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def test_a_prompt_is_read_as_in_training_and_decoding_is_dense():
    model, batch = make_model(), prompts()
    dense = copy.deepcopy(model)
    detach(dense)
    dense.eval()
    expected = logits_of_training(model, batch)
    FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    tokens, logits = generate(model, batch)
    torch.testing.assert_close(logits[0], expected)
    assert not torch.allclose(logits[0], generate(dense, batch)[1][0], atol=1e-3)
    # From the sparse prompt's cache on, the dense model.
    with torch.no_grad():
        cache = model(**batch, use_cache=True, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp_min(0))
        cache, mask = cache.past_key_values, batch["attention_mask"]
        for step in (0, 1):
            mask = torch.cat((mask, torch.ones(len(mask), 1, dtype=mask.dtype)), 1)
            out = dense(
                input_ids=tokens[:, max(PROMPT) + step, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            torch.testing.assert_close(logits[step + 1], out.logits[:, -1])


def test_it_is_off_unless_asked_for_and_ends_with_for_training():
    model, batch = make_model(), prompts()
    dense = copy.deepcopy(model)
    detach(dense)
    expected = generate(dense.eval(), batch)[1]
    for switch in (
        lambda: FastSparseLanguageModel.for_inference(model),
        lambda: FastSparseLanguageModel.for_inference(FastSparseLanguageModel.for_training(sparse())),
        lambda: FastSparseLanguageModel.for_inference(sparse(), sparse_prefill=False),
    ):

        def sparse():
            assert not torch.equal(
                generate(FastSparseLanguageModel.for_inference(model, sparse_prefill=True), batch)[1], expected
            )
            return model

        switch()
        assert torch.equal(generate(model, batch)[1], expected)
    sparse()
    detach(model)
    assert torch.equal(generate(model.eval(), batch)[1], expected)


def test_only_a_prompt_is_sparse(monkeypatch):
    """Not a decoded token, not a forward that keeps no cache, has labels, or goes on from a cache."""
    model, batch = make_model(mlp={"1": 0.6}, self_attn={}), prompts()
    chosen = []
    state = get_state(model)
    select = state.selector.mlp
    monkeypatch.setattr(state.selector, "mlp", lambda *args: chosen.append(args[3]) or select(*args))
    FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    generate(model, batch)
    (rows,) = chosen
    mask = batch["attention_mask"].bool()
    mask[:, -1] = False
    assert torch.equal(rows, mask.flatten().nonzero()[:, 0])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        assert len(chosen) == 2
        model(**batch, use_cache=False)
        model(**batch, labels=batch["input_ids"], use_cache=True)
        longer = torch.cat((batch["attention_mask"], torch.ones(3, 2, dtype=torch.int64)), 1)
        model(input_ids=batch["input_ids"][:, :2], attention_mask=longer, past_key_values=cache, use_cache=True)
    assert len(chosen) == 2


def test_roles_of_prompts_padded_on_either_side():
    for side in ("left", "right"):
        mask = prompts(side)["attention_mask"]
        partition = TokenPartition.from_prompts(mask)
        roles = partition._roles(dense=0, context=1, padding=2).view(mask.shape)
        for row, length in enumerate(PROMPT):
            kept = roles[row][mask[row].bool()].tolist()
            assert kept == [1] * (length - 1) + [0]
        assert torch.equal(roles == 2, mask == 0)
    assert not len(TokenPartition.from_prompts(mask, "none").dense)


def test_it_is_saved_with_the_adapter_and_loaded_again(tmp_path):
    base, batch = make_base("llama"), prompts()
    base.save_pretrained(tmp_path / "base")
    model = make_lora(base=type(base).from_pretrained(tmp_path / "base", attn_implementation="eager"))
    attach(model, {**always(), "sparse_prefill": True, "seed": 7})
    FastSparseLanguageModel.for_inference(model)
    expected = generate(model, batch)[1]
    model.save_pretrained(tmp_path / "adapter")
    assert {CONFIG_NAME, ESTIMATOR_NAME} <= {path.name for path in (tmp_path / "adapter").iterdir()}
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    (tmp_path / "moved").mkdir()
    for name in (CONFIG_NAME, ESTIMATOR_NAME):  # the estimator is found beside the configuration, wherever they are
        (tmp_path / "adapter" / name).rename(tmp_path / "moved" / name)
    attach(again, tmp_path / "moved" / CONFIG_NAME)
    assert get_state(again).config.estimator.path == str(tmp_path / "moved" / ESTIMATOR_NAME)
    FastSparseLanguageModel.for_inference(again)
    torch.testing.assert_close(generate(again, batch)[1], expected)


def test_a_dense_generation_saves_no_estimator(tmp_path):
    model = make_model()
    FastSparseLanguageModel.for_inference(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / ESTIMATOR_NAME).exists()


def test_a_mask_of_another_form_is_read_densely(caplog):
    model, batch = make_model(), prompts()
    FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    causal = torch.full((9, 9), float("-inf")).triu(1).expand(3, 1, 9, 9)
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=causal, use_cache=True)
    assert "read densely" in caplog.text


def test_refusals():
    model = make_lora("llama")
    with pytest.raises(AttachError, match="attached to"):
        FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    attach(model, {**always(), "estimator": {"kind": "prior"}})
    with pytest.raises(EstimatorError, match="waits for calibration samples"):
        FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    detach(model)
    attach(model, always(mlp={}, self_attn={}))
    with pytest.raises(AttachError, match="layers with sparsity"):
        FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
    detach(model)
    attach(model, always())
    model.merge_adapter()
    with pytest.raises(AttachError, match="merged"):
        FastSparseLanguageModel.for_inference(model, sparse_prefill=True)
