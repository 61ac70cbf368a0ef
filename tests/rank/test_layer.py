"""Rank-sparse LoRA compared with plain LoRA with masked components; the choice of components."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from sparse_unsloth import rank

from rank_models import (
    apply,
    assert_same,
    importance_of,
    make,
    mask_components,
    one_layer,
    record_choices,
    train,
    values,
)
from tiny_models import loras, loss_and_gradients, make_base, make_batch


@pytest.fixture
def chosen(monkeypatch):
    return record_choices(monkeypatch)


# -- The forward and its gradients ------------------------------------------------------------------------------------


def test_density_one_is_plain_lora():
    plain, sparse = make(dtype=torch.float32), make(dtype=torch.float32)
    rank.apply(sparse, target_density=1.0, warmup_steps=1)
    assert train(plain, 4) == train(sparse, 4)
    assert torch.equal(plain.eval()(**make_batch()).logits, sparse.eval()(**make_batch()).logits)
    assert_same(values(plain), values(sparse), rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_gradients_are_those_of_the_masked_branch(chosen, dropout):
    model = make(lora_dropout=dropout)
    apply(model)
    chosen.clear()
    torch.manual_seed(5)
    loss, gradients = loss_and_gradients(model, make_batch())
    assert len(chosen) == 21
    assert all(len(index) == 4 for index in chosen.values())
    assert len({tuple(index.tolist()) for index in chosen.values()}) > 5, "layers choose for themselves"
    reference = mask_components(make(lora_dropout=dropout), chosen)
    torch.manual_seed(5)
    expected, wanted = loss_and_gradients(reference, make_batch())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients, wanted)
    full, _ = loss_and_gradients(make(), make_batch())
    assert abs(full - loss) > 1e-6, "the mask matters"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_recomputes_the_same_components(reentrant, dropout):
    def gradients(checkpointing):
        model = make(lora_dropout=dropout)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        state = apply(model)
        torch.manual_seed(3)
        result = loss_and_gradients(model, make_batch())
        forwards = {layer.forwards for layer in state.layers}
        assert forwards == ({2} if checkpointing else {1})
        before = {layer.name: layer.importance.clone() for layer in state.layers}
        state.advance()
        return result, {layer.name: layer.importance - before[layer.name] for layer in state.layers}

    (loss, plain), moved = gradients(False)
    (other_loss, checkpointed), moved_again = gradients(True)
    assert loss == other_loss
    assert_same(plain, checkpointed, rtol=1e-12)
    assert_same(moved, moved_again, rtol=1e-5, atol=1e-8)


def test_two_forwards_in_flight_each_keep_their_components(chosen):
    model = make()
    apply(model)
    first = model(**make_batch(seed=1)).loss
    kept_first = dict(chosen)
    second = model(**make_batch(seed=2)).loss
    kept_second = dict(chosen)
    (first + second).backward()
    found = {name: parameter.grad for name, parameter in loras(model).items()}
    _, one = loss_and_gradients(mask_components(make(), kept_first), make_batch(seed=1))
    _, two = loss_and_gradients(mask_components(make(), kept_second), make_batch(seed=2))
    assert any(not torch.equal(kept_first[name], kept_second[name]) for name in kept_first)
    assert_same(found, {name: one[name] + two[name] for name in one})


def test_four_bit_base(chosen):
    from bitsandbytes.nn import Linear4bit

    def four_bit():
        base = make_base(dtype=torch.float32)
        for module in list(base.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "lm_head":
                    packed = Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                    packed.load_state_dict({"weight": child.weight.data})
                    packed.support_avx512bf16_for_cpu = False
                    setattr(module, name, packed.to("cpu"))
        base.is_loaded_in_4bit = True  # PEFT's own sign
        return make(base, dtype=torch.float32)

    model = four_bit()
    apply(model)
    chosen.clear()
    loss, gradients = loss_and_gradients(model, make_batch())
    assert "4bit" in type(model.get_submodule(next(iter(chosen)))).__name__
    expected, wanted = loss_and_gradients(mask_components(four_bit(), chosen), make_batch())
    torch.testing.assert_close(loss, expected)
    assert_same(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_autocast(chosen):
    model = make(dtype=torch.float32)
    apply(model)
    chosen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, make_batch())
        reference = mask_components(make(dtype=torch.float32), chosen)
        expected, wanted = loss_and_gradients(reference, make_batch())
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert_same(gradients, wanted, rtol=0.1, atol=2e-3)


# -- The choice -------------------------------------------------------------------------------------------------------


def test_components_are_chosen_by_both_importances(chosen):
    model, state, layer = one_layer(importance_lambda=0.4, importance_decay=0.9)
    x, y = torch.randn(7, 8), torch.randn(2, 7, 8)
    model(x)
    state.advance()
    torch.testing.assert_close(layer.importance, importance_of(layer, x))
    accumulated = importance_of(layer, x)
    model(y[0])
    model(y[1])
    score = 0.6 * importance_of(layer, y[1]) + 0.4 * accumulated
    assert sorted(score.topk(3).indices.tolist()) == chosen[layer.name].tolist()
    state.advance()
    mean = (importance_of(layer, y[0]) + importance_of(layer, y[1])) / 2
    torch.testing.assert_close(layer.importance, (accumulated + mean) / 2)
    for _ in range(20):
        model(x)
        state.advance()
    before = layer.importance.clone()
    model(y[0])
    state.advance()
    torch.testing.assert_close(layer.importance, 0.9 * before + 0.1 * importance_of(layer, y[0]))


def test_contextual_importance_follows_the_batch(chosen):
    """An input along A_i makes component i the first choice, whatever the accumulated importance."""
    model, state, layer = one_layer(target_density=0.17)
    model(torch.randn(7, 8))
    state.advance()
    for component in range(6):
        model(layer.whole_A[component].detach()[None].repeat(3, 1))
        shares = importance_of(layer, layer.whole_A[component].detach()[None])
        assert chosen[layer.name].tolist() == [torch.lerp(shares, layer.importance, 0.15).argmax().item()]


def test_by_default_training_computes_what_evaluation_does(chosen):
    model = make()
    state = apply(model, importance_lambda=rank.RankConfig().importance_lambda)
    for seed in range(3):
        model(**make_batch(seed=seed))
        assert all(torch.equal(chosen[layer.name], layer.retained()) for layer in state.layers)
        state.advance()


def test_few_rows_are_scored():
    _, _, layer = one_layer(score_rows=4)
    x = torch.randn(10, 8)
    torch.testing.assert_close(layer.contextual_importance(x), importance_of(layer, x[::3]))


def test_first_steps_compute_everything_and_take_note(chosen):
    model = make()
    state = apply(model, past_warmup=False, warmup_steps=2)
    plain = loss_and_gradients(make(), make_batch())
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, make_batch())
        assert loss == plain[0]
        assert_same(gradients, plain[1], rtol=0, atol=0)
        assert set(chosen.values()) == {None}
        state.advance()
    loss_and_gradients(model, make_batch())
    assert all(len(index) == 4 for index in chosen.values())


def test_b_of_zero_has_no_importance_and_no_nan():
    model, state, layer = one_layer()
    with torch.no_grad():
        layer.whole_B.zero_()
    layer.changed()
    model(torch.randn(3, 8))
    state.advance()
    assert layer.importance.tolist() == [0] * 6
    model(torch.randn(3, 8)).sum().backward()


def test_all_components_are_computed_before_choices_begin_and_within_retained_1(chosen):
    model, plain = make(), make()
    state = apply(model, past_warmup=False)
    batch = make_batch()
    everything = plain.eval()(**batch).logits
    assert torch.equal(model.eval()(**batch).logits, everything)
    model.train()(**batch)
    state.advance()
    assert not torch.allclose(model.eval()(**batch).logits, everything)
    with rank.retained(model, 1):
        for layer in state.layers:
            layer.module.scaling["default"] /= layer.gain
        torch.testing.assert_close(model(**batch).logits, everything, rtol=1e-12, atol=1e-12)


def test_evaluation_follows_what_was_important(chosen):
    """Evaluation adds up no importances, and computes the same components for every batch."""
    model, state, layer = one_layer(importance_decay=0.0)
    x, y = torch.randn(7, 8), torch.randn(7, 8)
    for batch in (x, y):
        model(batch)
        state.advance()
        index = layer.best(0.5)
        branch = x @ layer.whole_A[index].t() @ layer.whole_B[:, index].t()
        expected = layer.module.base_layer(x) + math.sqrt(6 / 3) * layer.module.scaling["default"] * branch
        chosen.clear()
        torch.testing.assert_close(model.eval()(x), expected)
        model.train()
        assert not chosen
        assert layer.forwards == 0


def test_a_removed_model_computes_everything():
    model, plain = make(), make()
    apply(model)
    batch = make_batch()
    assert not torch.equal(model(**batch).logits, plain(**batch).logits)
    rank.remove(model)
    assert torch.equal(model.train()(**batch).logits, plain.train()(**batch).logits)
    assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_A["default"]) is nn.Linear
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(rank.RankError, match="not rank-sparse"):
        rank.remove(model)


@pytest.mark.parametrize("training", [False, True])
def test_disabled_and_merged_adapters(training):
    model, plain = make(), make()
    state = apply(model)
    batch = make_batch()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert {layer.forwards for layer in state.layers} == {0}
    expected = model.eval()(**batch).logits
    model.train(training)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.eval()(**batch).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected)


@pytest.mark.parametrize(
    ("density", "r", "kept"), [(0.08, 1024, 88), (0.08, 64, 5), (0.5, 8, 4), (0.001, 8, 1), (0.9, 20, 20)]
)
def test_counts(density, r, kept):
    assert rank.RankConfig(density).kept(r) == kept
    _, _, layer = one_layer(r, target_density=density)
    assert len(layer.best(density)) == kept


def test_model_is_freed():
    model = make()
    apply(model)
    train(model, 1)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# -- What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_density": 0}, r"target_density must be a number in \(0, 1\], given 0"),
        ({"importance_lambda": 1.5, "score_rows": 0}, "importance_lambda must be .* score_rows must be a whole number"),
        ({"importance_decay": 1}, "importance_decay"),
        ({"warmup_steps": 0}, "warmup_steps must be a whole number from 1 up"),
        ({"prune_after": True}, "prune_after"),
        ({"target_densty": 0.5}, "target_densty: unknown key; did you mean target_density"),
        ({"adapter": "other"}, "There is no adapter 'other'; the model has default"),
    ],
)
def test_wrong_options(options, message):
    model = make()
    with pytest.raises(rank.RankError, match=message):
        rank.apply(model, **options)
    assert rank.get_rank_state(model) is None


def test_models_that_cannot_be():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    with pytest.raises(rank.RankError, match="has no adapters"):
        rank.apply(make_base())
    with pytest.raises(rank.RankError, match="DoraLinearVariant"):
        rank.apply(make(use_dora=True, dtype=torch.float32))
    with pytest.raises(rank.RankError, match="on an embedding"):
        rank.apply(make(target_modules=["embed_tokens", "q_proj"]))
    prompt = get_peft_model(make_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(rank.RankError, match="only LoRA has ranks"):
        rank.apply(prompt)
    convolution = get_peft_model(nn.Sequential(nn.Conv1d(3, 4, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(rank.RankError, match="Conv1d have no rank-sparse path"):
        rank.apply(convolution)
    model = make()
    rank.apply(model)
    with pytest.raises(rank.RankError, match="rank-sparse already"):
        rank.apply(model)
