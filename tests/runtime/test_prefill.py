"""Sparse prefill: prompts computed as in training, compared with a masked model built from hooks."""

import copy
import shutil

import pytest
import torch
from transformers import DynamicCache

from sparse_unsloth import FastSparseLanguageModel, attach, detach, get_state
from sparse_unsloth.config.layer_rules import keep_count
from sparse_unsloth.config.sparsity import SparsityConfig
from sparse_unsloth.errors import EstimatorError, SparsityError
from sparse_unsloth.runtime import prefill
from sparse_unsloth.tokens.partition import TokenPartition

from classifier_models import make_batch as make_labelled
from classifier_models import make_classifier
from masked_models import masked_by_hooks, record_selections
from tiny_models import FAMILIES, always, load, loss_and_gradients, make_batch, make_lora, save_checkpoint
from unsloth_stand_in import StandIn

LENGTHS = (9, 5, 7)


def prompts(side="left"):
    """Three prompts without their answers."""
    batch = make_batch(2, side, lengths=tuple((length, 0) for length in LENGTHS))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def for_inference(model, **options):
    return FastSparseLanguageModel.for_inference(model, **options)


@torch.no_grad()
def greedy(prefilling, decoding, batch, tokens):
    """The next tokens, where one model fills the cache and the other one decodes with it."""
    mask, logits = batch["attention_mask"], None
    out = prefilling(**batch, use_cache=True)
    found = []
    for step in range(tokens):
        logits = out.logits[:, -1]
        found.append(logits.argmax(-1))
        if step + 1 < tokens:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            out = decoding(
                input_ids=found[-1][:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    return torch.stack(found, dim=1), logits


def with_positions(batch):
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def test_roles_of_prompts_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    found = TokenPartition.from_prompts(mask, mask)
    assert found.dense.tolist() == [3, 7, 9, 11]  # the last column too, whose logits are read
    assert found.context.tolist() == [0, 1, 2, 6, 8]
    assert found.padding.tolist() == [4, 5, 10]
    found = TokenPartition.from_prompts(torch.zeros(2, 3, 8), dense_tokens="none")
    assert found.context.tolist() == list(range(6))
    assert not len(found.dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_a_masked_prefill_and_dense_decoding(family, monkeypatch):
    plain, model, batch = make_lora(family).eval(), make_lora(family), prompts()
    attach(model, always())
    contexts = record_selections(model, monkeypatch)
    generate = {**batch, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    generate |= {"output_logits": True, "return_dict_in_generate": True}
    for_inference(model)
    dense = model.generate(**generate)
    for_inference(model, sparse_prefill=True)
    sparse = model.generate(**generate)
    assert [context is not None for context in contexts] == [True, *[False] * 4], "one prefill, then dense decoding"
    partition, chosen = contexts[0].partition, contexts[0].selections
    assert partition.num_context == sum(LENGTHS) - 3
    assert partition.num_padding == 27 - sum(LENGTHS)
    assert all(len(chosen[index, "mlp"].channels) == keep_count(128, 0.6) for index in range(3))
    masked = masked_by_hooks(make_lora(family), chosen, partition).eval()
    expected, logits = greedy(masked, plain, with_positions(batch), 5)
    torch.testing.assert_close(sparse.logits[-1], logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.sequences[:, 9:], expected)
    _, logits = greedy(plain, plain, with_positions(batch), 5)
    torch.testing.assert_close(dense.logits[-1], logits, rtol=1e-4, atol=1e-5)
    assert (sparse.logits[0] - dense.logits[0]).abs().max() > 1e-4, "the sparse prefill left nothing out"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_cache_holds_the_keys_of_the_sparse_forward(side, monkeypatch):
    model, batch = make_lora(), prompts(side)
    attach(model, always())
    contexts = record_selections(model, monkeypatch)
    for_inference(model, sparse_prefill=True)
    with torch.no_grad():
        ours = model(**batch, use_cache=True)
        masked = masked_by_hooks(make_lora(), contexts[0].selections, contexts[0].partition).eval()
        theirs = masked(**batch, use_cache=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-4, atol=1e-5)
    for one, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            pair = [getattr(layer, name).transpose(1, 2)[real] for layer in (one, other)]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_what_is_no_prefill_is_dense(monkeypatch):
    plain, model, batch = make_lora().eval(), make_lora(), prompts()
    attach(model, always())
    for_inference(model, sparse_prefill=True)
    contexts = record_selections(model, monkeypatch)
    with torch.no_grad():
        cache = plain(**batch, use_cache=True).past_key_values
        more = {"input_ids": batch["input_ids"][:, :3], "use_cache": True}
        for arguments in (batch, {**batch, "use_cache": False}, {"input_ids": batch["input_ids"][:, :1]}):
            torch.testing.assert_close(model(**arguments).logits, plain(**arguments).logits)
        torch.testing.assert_close(
            model(**more, past_key_values=copy.deepcopy(cache)).logits, plain(**more, past_key_values=cache).logits
        )
        tokens = [each.generate(**batch, max_new_tokens=3, use_cache=False, do_sample=False) for each in (model, plain)]
    assert torch.equal(*tokens)
    assert contexts
    assert not any(contexts)


def test_a_mask_that_does_not_tell_padding_is_said(caplog):
    model, batch = make_lora(), prompts()
    attach(model, always())
    for_inference(model, sparse_prefill=True)
    mask = torch.zeros(3, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=True)
    assert caplog.text.count("does not tell padding, so it ran dense") == 1


@pytest.mark.parametrize("estimator", [{"kind": "svd"}, {"kind": "prior"}], ids=str)
def test_with_labels_the_loss_is_that_of_training(estimator):
    model, batch = make_lora(), make_batch()
    attach(model, always(estimator=estimator), [make_batch(seed) for seed in range(3)])
    expected, _ = loss_and_gradients(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(for_inference(model, sparse_prefill=True)(**batch).loss, expected)
        assert abs(for_inference(model)(**batch).loss - expected) > 1e-5


def test_classifiers_are_sparse_in_use():
    model, batch = make_classifier(), make_labelled()
    attach(model, always())
    expected = model(**batch).loss.detach()
    with torch.no_grad():
        del batch["labels"]
        sparse = for_inference(model, sparse_prefill=True)(**batch).logits
        dense = for_inference(model)(**batch).logits
    torch.testing.assert_close(torch.nn.functional.cross_entropy(sparse, make_labelled()["labels"]), expected)
    assert not torch.allclose(sparse, dense)


def test_training_goes_on_after_an_inference_mode_prefill():
    """Factors and gains stay on the device, so none of them may be an inference tensor."""
    for estimator in ({"kind": "svd"}, {"kind": "prior"}):
        fresh, model = make_lora(), make_lora()
        samples = [make_batch(seed) for seed in range(3)]
        for each in (fresh, model):
            attach(each, always(estimator=estimator), samples)
        for_inference(model, sparse_prefill=True)
        with torch.inference_mode():
            model.generate(**prompts(), max_new_tokens=2)
        state = get_state(model)
        again = state.selector.mlp(state.layers[0], torch.ones(1, 64), 0.6, torch.zeros(1, dtype=torch.long))
        assert not again.channels.is_inference()
        FastSparseLanguageModel.for_training(model)
        ours, theirs = loss_and_gradients(model, make_batch()), loss_and_gradients(fresh, make_batch())
        torch.testing.assert_close(ours, theirs)


def test_it_is_off_by_default_and_switched_off_again():
    model = make_lora()
    attach(model, always())
    state, inner = get_state(model), model.get_base_model()
    for_inference(model)
    assert not state.sparse_prefill
    before = len(inner._forward_pre_hooks), set(inner.__dict__)
    for turn_off in (
        lambda: for_inference(model, sparse_prefill=False),
        lambda: FastSparseLanguageModel.for_training(model),
        lambda: state.begin_training("test", max_steps=10),
        lambda: detach(model),
    ):
        for_inference(model, sparse_prefill=True)
        assert state.sparse_prefill
        turn_off()
        assert not state.sparse_prefill
        assert (len(inner._forward_pre_hooks), set(inner.__dict__)) == before


def test_copies_choose_for_themselves(monkeypatch):
    model = make_lora()
    attach(model, always(sparse_prefill=True))
    for_inference(model)
    other = copy.deepcopy(model)
    contexts, others = record_selections(model, monkeypatch), record_selections(other, monkeypatch)
    other.generate(**prompts(), max_new_tokens=1)
    assert not contexts
    assert any(others)


def test_what_cannot_be_sparse_is_refused(caplog):
    model = make_lora()
    with pytest.raises(SparsityError, match=r"sparse_prefill: the model is not attached; attach\(model, sparsity\)"):
        for_inference(model, sparse_prefill=True)
    attach(model, {"preset": "dense", "sparse_prefill": True})
    for_inference(model)
    with pytest.raises(SparsityError, match="no layer of this model is sparse"):
        for_inference(model, sparse_prefill=True)
    detach(model)
    attach(model, "rows")
    for_inference(model)
    with pytest.raises(SparsityError, match="with backward_rows every forward is exact"):
        for_inference(model, sparse_prefill=True)
    detach(model)
    attach(model, always(estimator={"kind": "prior"}))
    with pytest.raises(EstimatorError, match="'prior' is not calibrated yet"):
        for_inference(model, sparse_prefill=True)
    detach(model)
    attach(model, always())
    for_inference(model, sparse_prefill=True)
    model.merge_adapter()
    model.generate(**prompts(), max_new_tokens=1)
    assert "6 parts ran dense" in caplog.text
    assert "adapter is merged or disabled" in caplog.text


def test_an_adapter_brings_its_estimator(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "base")
    model, tokenizer = load(checkpoint)
    samples = [make_batch(seed) for seed in range(3)]
    config = SparsityConfig.from_any(always(estimator={"kind": "prior", "rank": 4}, sparse_prefill=True))
    model = FastSparseLanguageModel.get_peft_model(model, r=4, sparsity=config, calibration_samples=samples)
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    again, _ = load(str(tmp_path / "a"))
    assert get_state(again).config == config
    assert get_state(again).selector is None, "a new training calibrates anew"
    logits = []
    with torch.no_grad():
        for each in (model, again):
            for_inference(each)  # as the configuration says
            logits.append(each(**prompts(), use_cache=True).logits)
        torch.testing.assert_close(*logits)
        assert not torch.allclose(logits[0], for_inference(again, sparse_prefill=False)(**prompts()).logits)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / prefill.ESTIMATOR_NAME).is_file()
    half, _ = load(str(tmp_path / "a"), dtype=torch.bfloat16)
    with pytest.raises(EstimatorError, match="another model, revision, dtype or quantisation"):
        for_inference(half)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / prefill.ESTIMATOR_NAME).unlink()
    bare, _ = load(str(tmp_path / "c"))
    with pytest.raises(EstimatorError, match=r"is not calibrated yet, and there is no .*c/sparsity_estimator"):
        for_inference(bare)


def test_unsloths_slots_serve_the_prefill(monkeypatch):
    stand_in = StandIn(monkeypatch)
    model, peft, batch = stand_in.model(), make_lora(), prompts()
    for each in (model, peft):
        attach(each, always())
        prefill.switch(get_state(each), on=True)
        each.eval()
    stand_in.called()
    with torch.no_grad():
        ours, theirs = (each(**batch, past_key_values=DynamicCache()) for each in (model, peft))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-4, atol=1e-5)
    assert stand_in.called() == []
