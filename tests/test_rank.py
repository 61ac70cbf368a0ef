"""Rank-sparse LoRA against plain LoRA with masked components; pruning, resuming, pruned checkpoints, composition."""

import gc
import json
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparse_unsloth import attach, detach, rank
from sparse_unsloth.rank.layer import RankLayer
from sparse_unsloth.rank.state import STATE_NAME

sys.path.insert(0, str(Path(__file__).parent))
from tiny import always, loras, loss_and_gradients, make_base, make_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R = 12


def make(base=None, seed=0, lora_b=0.05, dtype=torch.float64, r=R, **config):
    """A PEFT model of rank ``r`` whose LoRA branches are not zero."""
    from peft import LoraConfig, get_peft_model

    base = make_base(seed=seed, dtype=dtype) if base is None else base
    torch.manual_seed(seed + 1)
    options = {"r": r, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in loras(model).items():
            if "lora_B" in name:
                parameter.normal_(0, lora_b)
    return model.train()


def apply(model, density=0.34, past_warmup=True, **options):
    """Rank-sparse, and as if the warm-up were over."""
    state = rank.apply(model, density, **({"warmup_steps": 1} | options))
    if past_warmup:
        model(**make_batch(seed=9))
        state.advance()
    return state


@pytest.fixture
def chosen(monkeypatch):
    """The components of each layer's last forward, by name."""
    found, choose = {}, RankLayer._choose

    def record(layer, source):
        found[layer.name] = choose(layer, source)
        return found[layer.name]

    monkeypatch.setattr(RankLayer, "_choose", record)
    return found


def mask_components(model, chosen):
    """The definition: a plain model whose thin activations are multiplied by constant masks."""
    for name, module in model.named_modules():
        if name in chosen:
            mask = torch.zeros(len(module.lora_A["default"].weight), dtype=module.lora_A["default"].weight.dtype)
            mask[chosen[name]] = 1
            module.lora_A["default"].register_forward_hook(lambda m, a, output, mask=mask: output * mask)
    return model


def assert_same(left, right, rtol=1e-9, atol=1e-12):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def train(model, steps, optimizer=None, start=0, lr=0.01):
    optimizer = optimizer or torch.optim.AdamW(loras(model).values(), lr=lr)
    losses = []
    for step in range(start, start + steps):
        loss = model(**make_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model):
    return {name: parameter.detach().clone() for name, parameter in loras(model).items()}


# -- The forward and its gradients ------------------------------------------------------------------------------------


def test_density_one_is_plain_lora():
    plain, sparse = make(dtype=torch.float32), make(dtype=torch.float32)
    rank.apply(sparse, target_density=1.0, warmup_steps=1)
    assert train(plain, 4) == train(sparse, 4)
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


def one_layer(r=6, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5)), LoraConfig(r=r, target_modules=["0"]))
    model.train()
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    state = rank.apply(model, **({"target_density": 0.5, "warmup_steps": 1, "prune_after": 0} | options))
    return model, state, state.layers[0]


def importance_of(layer, x):
    c = torch.stack([(x @ layer.whole_A[i]).norm() * layer.whole_B[:, i].norm() for i in range(layer.rank)])
    return (c / c.sum()).detach()


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
    """An input along A_i makes component i the first choice, whatever was important before."""
    model, state, layer = one_layer(target_density=0.17)
    model(torch.randn(7, 8))
    state.advance()
    for component in range(6):
        model(layer.whole_A[component].detach()[None].repeat(3, 1))
        shares = importance_of(layer, layer.whole_A[component].detach()[None])
        assert chosen[layer.name].tolist() == [torch.lerp(shares, layer.importance, 0.15).argmax().item()]


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
    layer.weights_changed()
    model(torch.randn(3, 8))
    state.advance()
    assert layer.importance.tolist() == [0] * 6
    model(torch.randn(3, 8)).sum().backward()


def test_evaluation_and_a_removed_model_compute_everything():
    model, plain = make(), make()
    apply(model)
    batch = make_batch()
    assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, plain(**batch).logits)
    rank.remove(model)
    assert torch.equal(model.train()(**batch).logits, plain.train()(**batch).logits)
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_A["default"]) is nn.Linear
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(rank.RankError, match="not rank-sparse"):
        rank.remove(model)


def test_disabled_and_merged_adapters():
    model, plain = make(), make()
    state = apply(model)
    batch = make_batch()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert {layer.forwards for layer in state.layers} == {0}
    model.merge_adapter()
    plain.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize(
    ("density", "r", "kept"), [(0.08, 1024, 88), (0.08, 64, 5), (0.5, 8, 4), (0.001, 8, 1), (0.9, 20, 20)]
)
def test_counts(density, r, kept):
    assert rank.RankConfig(density).kept(r) == kept


def test_model_is_freed():
    model = make()
    apply(model)
    train(model, 1)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# -- Steps and pruning ------------------------------------------------------------------------------------------------


def test_only_optimisers_that_train_the_adapter_count():
    model = make()
    state = apply(model, past_warmup=False)
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert state.step == 0
    train(model, 2)
    assert state.step == 2


def test_steps_that_never_reach_the_layers_are_an_error():
    model = make()
    rank.apply(model)
    optimizer = torch.optim.SGD(loras(model).values(), 0.1)
    optimizer.step()
    optimizer.step()
    with pytest.raises(rank.RankError, match="no training forward passed any of the 21 rank-sparse layers"):
        optimizer.step()


def test_steps_that_go_unnoticed_are_told(monkeypatch, caplog):
    monkeypatch.setattr("sparse_unsloth.rank.layer.STUCK_FORWARDS", 3)
    model, state, layer = one_layer()
    for _ in range(4):
        model(torch.randn(3, 8))
    assert caplog.text.count("3 forwards since the last optimiser step") == 1
    state.advance()
    assert layer.forwards == 0


def test_loaded_weights_are_looked_at_again():
    _, _, layer = one_layer()
    x = torch.randn(5, 8)
    layer.contextual_importance(x)
    with torch.no_grad():
        layer.whole_B.mul_(torch.arange(6.0))
    torch.testing.assert_close(layer.contextual_importance(x), importance_of(layer, x))


def prunable(**options):
    """A layer whose component 1 is never chosen once the others count for more, with momentum in every moment."""
    model, state, layer = one_layer(prune_after=4, importance_lambda=0.5, **options)
    with torch.no_grad():
        layer.whole_B[:, 1] *= 1e-4
    layer.weights_changed()
    return model, state, layer


def fit(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_idle_components_are_pruned_for_good_and_moments_follow():
    model, state, layer = prunable(target_density=0.84)
    optimizer = torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3, weight_decay=0.1)
    fit(model, optimizer, 7)
    assert layer.dead is None
    assert optimizer.state[layer.whole_A]["exp_avg"][1].any(), "the warm-up gave it momentum"
    x = torch.randn(4, 8)
    before = model(x)
    layer.forwards = 0
    layer.pending.zero_()
    fit(model, optimizer, 1, start=7)
    assert layer.dead.tolist() == [False, True, False, False, False, False]
    for whole, dim in ((layer.whole_A, 0), (layer.whole_B, 1)):
        assert not whole.select(dim, 1).any()
        assert not any(optimizer.state[whole][key].select(dim, 1).any() for key in ("exp_avg", "exp_avg_sq"))
        assert whole.select(dim, 0).any()
    torch.testing.assert_close(model(x), before, rtol=0.2, atol=0.02)
    fit(model, optimizer, 6, start=8)
    assert not layer.whole_A[1].any()
    assert not layer.whole_B[:, 1].any()
    assert state.step == 14


def test_pruning_does_not_change_the_training_forward(chosen):
    model, _, layer = prunable(target_density=0.84)
    optimizer = torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3)
    fit(model, optimizer, 7)
    x = torch.randn(4, 8)
    before, index = model(x), chosen[layer.name]
    layer.bury(torch.tensor([1]))
    assert torch.equal(model(x), before)
    assert torch.equal(chosen[layer.name], index)


class Packed(torch.optim.Optimizer):
    """Momentum kept in another form than the parameters', as 8-bit optimisers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                flat = self.state[parameter].setdefault("packed", torch.zeros(parameter.numel()))
                flat.mul_(0.9).add_(parameter.grad.flatten())
                parameter.sub_(1e-3 * flat.view_as(parameter))


def test_optimisers_with_other_moments_cannot_bring_pruned_components_back():
    model, _, layer = prunable(target_density=0.84)
    fit(model, Packed([layer.whole_A, layer.whole_B]), 20)
    assert layer.dead.tolist() == [False, True, False, False, False, False]
    assert not layer.whole_A[1].any()
    assert not layer.whole_B[:, 1].any()


def test_pruned_components_are_never_chosen(chosen):
    """Not even where nothing has any importance."""
    model, state, layer = one_layer(importance_lambda=0.0)
    model(torch.randn(3, 8))
    state.advance()
    layer.bury(torch.tensor([0, 2, 5]))
    model(torch.zeros(3, 8))
    assert chosen[layer.name].tolist() == [1, 3, 4]
    assert layer.best(1.0).tolist() == [1, 3, 4]


def test_at_least_the_computed_components_stay():
    model, _, layer = one_layer(prune_after=1, target_density=0.5)
    optimizer = torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3)
    fit(model, optimizer, 30)
    assert 3 <= (~layer.dead).sum() < 6
    assert torch.isfinite(model(torch.randn(3, 8))).all()


def test_processes_agree_on_what_is_pruned(monkeypatch):
    """Only what is idle in every process goes: here the other one still uses component 1."""
    elsewhere = torch.tensor([0.0, 0.0, 9, 9, 9, 9])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MIN
        torch.minimum(tensor, elsewhere, out=tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    model, _, layer = prunable(target_density=0.84)
    fit(model, torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3), 8)
    assert layer.dead is None
    elsewhere[1] = 9
    fit(model, torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3), 4, start=8)
    assert layer.dead.tolist() == [False, True, False, False, False, False]


# -- Saving and resuming ----------------------------------------------------------------------------------------------

RESUME = {"target_density": 0.34, "warmup_steps": 2, "prune_after": 3}


def test_resumed_training_ends_where_the_whole_one_does(tmp_path):
    model = make(dtype=torch.float32)
    optimizer = torch.optim.AdamW(loras(model).values(), lr=0.01)
    state = rank.apply(model, **RESUME)
    train(model, 7, optimizer)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    pruned = sum(layer.dead.sum() for layer in state.layers if layer.dead is not None)
    assert pruned > 0, "something was pruned before the checkpoint"
    # The next pruning, at step 9, counts idle steps from before the checkpoint.
    whole = train(model, 2, optimizer, start=7)
    assert sum(layer.dead.sum() for layer in state.layers if layer.dead is not None) > pruned
    whole += train(model, 3, optimizer, start=9)

    resumed = make(dtype=torch.float32, seed=0)
    optimizer = torch.optim.AdamW(loras(resumed).values(), lr=0.01)
    again = rank.apply(resumed, **RESUME)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert again.step == 7
    assert train(resumed, 5, optimizer, start=7) == whole
    assert_same(values(model), values(resumed), rtol=0, atol=0)


def test_saved_adapter_is_plain_and_resume_from_takes_the_state(tmp_path):
    from peft import PeftModel

    model = make()
    state = apply(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / STATE_NAME).is_file()
    assert all(
        name.endswith(("lora_A.weight", "lora_B.weight")) for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    loaded = PeftModel.from_pretrained(make_base(dtype=torch.float64), tmp_path, is_trainable=True)
    again = rank.apply(loaded, 0.34, warmup_steps=1, resume_from=tmp_path)
    assert again.step == state.step == 1
    for layer, other in zip(state.layers, again.layers, strict=True):
        assert torch.equal(layer.importance, other.importance)


def test_states_that_do_not_fit(tmp_path):
    model = make()
    apply(model)
    model.save_pretrained(tmp_path)
    other = make(r=8)
    with pytest.raises(rank.RankError, match="is of other layers or ranks than this model's"):
        rank.apply(other, resume_from=tmp_path)
    assert rank.get_rank_state(other) is None, "the model is as before"
    (tmp_path / STATE_NAME).write_bytes(b"no tensors")
    with pytest.raises(rank.RankError, match="cannot be read"):
        rank.apply(make(), resume_from=tmp_path)
    with pytest.raises(rank.RankError, match="cannot be read"):
        rank.apply(make(), resume_from=tmp_path / "none")


# -- Pruned checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ratio", [0.15, 0.5, 1.0])
def test_pruned_checkpoint_loads_in_plain_peft(tmp_path, rslora, ratio):
    from peft import PeftModel

    config = {"use_rslora": rslora, "rank_pattern": {"down_proj": 20}, "alpha_pattern": {"up_proj": 5}}
    model = make(**config)
    state = apply(model)
    state.layers[0].bury(torch.arange(R - 1))
    before = values(model)
    ranks = rank.save_pruned_checkpoint(model, tmp_path / "pruned", ratio)
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.1.mlp.down_proj"] == round(ratio * 20)
    assert ranks["model.layers.1.mlp.up_proj"] == round(ratio * 12)
    assert_same(values(model), before, rtol=0, atol=0)

    batch = make_batch()
    with rank.retained(model, ratio):
        expected = model.eval()(**batch).logits
    loaded = PeftModel.from_pretrained(
        make_base(dtype=torch.float64), tmp_path / "pruned", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-10, atol=1e-12)
    whole = model(**batch).logits
    assert torch.allclose(whole, expected, rtol=1e-9) == (ratio == 1.0)


def test_pruned_checkpoint_is_small_and_keeps_what_matters(tmp_path):
    model = make(r=40, dtype=torch.float32)
    state = apply(model, density=0.1)
    model.save_pretrained(tmp_path / "full")
    ranks = rank.save_pruned_checkpoint(model, tmp_path / "pruned", 0.15)
    assert set(ranks.values()) == {6}
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("pruned", "full")]
    assert sizes[0] < 0.2 * sizes[1]
    config = json.loads((tmp_path / "pruned" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (6, {}, {})
    assert config["lora_alpha"] == pytest.approx(8 / 40 * 6)
    for layer in state.layers:
        assert layer.importance[layer.best(0.15)].min() >= layer.importance.sort().values[-6]


def test_other_trained_modules_travel_along(tmp_path):
    from peft import PeftModel

    model = make(modules_to_save=["lm_head"])
    apply(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    rank.save_pruned_checkpoint(model, tmp_path, 0.5)
    loaded = PeftModel.from_pretrained(make_base(dtype=torch.float64), tmp_path, autocast_adapter_dtype=False)
    with rank.retained(model, 0.5):
        expected = model.eval()(**make_batch()).logits
    torch.testing.assert_close(loaded.eval()(**make_batch()).logits, expected, rtol=1e-10, atol=1e-12)


def test_unpruned_scaling_by_hand(tmp_path):
    """alpha / r stays what it was, and alpha / sqrt(r) under rslora."""
    for rslora, wanted in ((False, 8 / 12 * 6), (True, 8 / math.sqrt(12) * math.sqrt(6))):
        model = make(use_rslora=rslora)
        apply(model)
        rank.save_pruned_checkpoint(model, tmp_path, 0.5)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(wanted)


@pytest.mark.parametrize("ratio", [0, 1.5, True, "half"])
def test_wrong_ratio(tmp_path, ratio):
    model = make()
    rank.apply(model)
    with pytest.raises(rank.RankError, match=r"retain_ratio must be a number in \(0, 1\]"):
        rank.save_pruned_checkpoint(model, tmp_path, ratio)
    with pytest.raises(rank.RankError, match="not rank-sparse"):
        rank.save_pruned_checkpoint(make(), tmp_path, 0.5)


def test_initialisation_that_moved_the_base_is_refused(tmp_path):
    model = make(init_lora_weights="pissa", dtype=torch.float32)
    apply(model)
    with pytest.raises(rank.RankError, match="changed the base weights"):
        rank.save_pruned_checkpoint(model, tmp_path, 0.5)


# -- patch() ----------------------------------------------------------------------------------------------------------


def test_patch_makes_models_rank_sparse_and_is_undone(tmp_path):
    from peft import PeftModel

    undo = rank.patch(target_density=0.34, warmup_steps=1)
    try:
        with pytest.raises(rank.RankError, match="called already"):
            rank.patch()
        model = make()
        state = rank.get_rank_state(model)
        assert (state.config.target_density, state.config.warmup_steps) == (0.34, 1)
        train(model, 1)
        model.save_pretrained(tmp_path)
        trainable = PeftModel.from_pretrained(make_base(dtype=torch.float64), tmp_path, is_trainable=True)
        assert rank.get_rank_state(trainable).step == 1, "the state came with the adapter"
        inference = PeftModel.from_pretrained(make_base(dtype=torch.float64), tmp_path)
        assert rank.get_rank_state(inference) is None
    finally:
        undo()
    assert rank.get_rank_state(make()) is None
    with pytest.raises(rank.RankError, match="target_density must be"):
        rank.patch(target_density=2)


class _Namespace:
    """An attention module as its own forward sees it, but for the projections."""

    def __init__(self, module, projections):
        self.__dict__.update(projections)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


# -- Together with channel sparsity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["rank first", "rank last"])
def test_with_channel_sparsity(chosen, order):
    """Against channel sparsity alone on an adapter whose other components are zero."""
    model = make()
    if order == "rank first":
        state = rank.apply(model, 0.34, warmup_steps=1)
    attach(model, always())
    if order == "rank last":
        state = rank.apply(model, 0.34, warmup_steps=1)
    model(**make_batch(seed=9))
    state.advance()
    chosen.clear()
    loss, gradients = loss_and_gradients(model, make_batch())
    assert len(chosen) == 21
    assert all(len(index) == 4 for index in chosen.values())

    reference = make()
    kept = {}
    with torch.no_grad():
        for name, module in reference.named_modules():
            if name in chosen:
                mask = torch.zeros(R, dtype=torch.float64)
                mask[chosen[name]] = 1
                for factor, shape in (("lora_A", (-1, 1)), ("lora_B", (1, -1))):
                    getattr(module, factor)["default"].weight.mul_(mask.view(shape))
                    kept[f"{name}.{factor}.default.weight"] = mask.view(shape)
    attach(reference, always())
    expected, wanted = loss_and_gradients(reference, make_batch())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same(gradients, {name: gradient * kept[name] for name, gradient in wanted.items()})
    dense, _ = loss_and_gradients(make(), make_batch())
    assert abs(dense - loss) > 1e-6


def test_fused_forwards_read_factors_chosen_by_the_input_of_their_block(chosen):
    """As under Unsloth, where blocks read their projections' factors and call no projection."""

    def fused(module, x):
        adapter, base = module.active_adapters[0], module.base_layer
        branch = (x @ module.lora_A[adapter].weight.t()) @ module.lora_B[adapter].weight.t()
        return x @ base.weight.t() + module.scaling[adapter] * branch

    class Calls:
        """Stands where a projection stood, and never calls it."""

        def __init__(self, module):
            self.module = module

        def __call__(self, x):
            return fused(self.module, x)

    model = make()
    state = apply(model)
    for layer in model.base_model.model.model.layers:
        attention = layer.self_attn
        projections = {name: Calls(getattr(attention, name)) for name in TARGETS[:4]}
        forward, namespace = type(attention).forward, _Namespace(attention, projections)
        attention.forward = lambda *a, forward=forward, namespace=namespace, **k: forward(namespace, *a, **k)
    inputs = {}
    for layer in model.base_model.model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda m, a, output, key=layer: inputs.update({key: output}))
    chosen.clear()
    loss, gradients = loss_and_gradients(model, make_batch())
    expected, wanted = loss_and_gradients(mask_components(make(), chosen), make_batch())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients, wanted)
    by_name = {layer.name: layer for layer in state.layers}
    for index, layer in enumerate(model.base_model.model.model.layers):
        for name, source in (("v_proj", inputs[layer]), ("o_proj", None)):
            full_name = f"base_model.model.model.layers.{index}.self_attn.{name}"
            found = by_name[full_name]
            score = torch.lerp(found.contextual_importance(source), found.importance, 0.15)
            assert sorted(score.topk(4).indices.tolist()) == chosen[full_name].tolist()


@pytest.mark.parametrize("order", ["rank first", "rank last"])
@pytest.mark.parametrize("off", ["rank", "channels"])
def test_each_is_taken_off_without_the_other(tmp_path, order, off):
    model = make()
    for step in ("rank", "channels") if order == "rank first" else ("channels", "rank"):
        rank.apply(model) if step == "rank" else attach(model, always())
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / STATE_NAME).exists()
    assert (tmp_path / "both" / "sparsity_config.yaml").exists()
    rank.remove(model) if off == "rank" else detach(model)
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / STATE_NAME).exists() == (off == "channels")
    assert (tmp_path / "one" / "sparsity_config.yaml").exists() == (off == "rank")
    detach(model) if off == "rank" else rank.remove(model)
    model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / STATE_NAME).exists()
    assert not (tmp_path / "none" / "sparsity_config.yaml").exists()
    assert "save_pretrained" not in model.__dict__
    assert "load_adapter" not in model.__dict__


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
