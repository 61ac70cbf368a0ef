"""Steps, components pruned for good, resuming, pruned checkpoints."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparse_unsloth import rank
from sparse_unsloth.rank.state import STATE_NAME

from rank_models import GAIN, R, apply, assert_same, importance_of, make, one_layer, record_choices, train, values
from tiny_models import loras, make_base, make_batch


@pytest.fixture
def chosen(monkeypatch):
    return record_choices(monkeypatch)


# -- Steps ------------------------------------------------------------------------------------------------------------


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


# -- Components that a step did not choose ----------------------------------------------------------------------------


def _optimiser(name, parameters):
    if name == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-3, weight_decay=0.0)
    options = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.0}}.get(name, {})
    return getattr(torch.optim, name)(parameters, lr=1e-3, **options)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD", "bitsandbytes"])
def test_components_that_were_not_chosen_do_not_move(chosen, name):
    """The momentum of the warm-up or of earlier choices does not move them."""
    model = make(r=64, dtype=torch.float32)
    state = rank.apply(model, 0.5, warmup_steps=2)
    optimizer = _optimiser(name, list(loras(model).values()))
    train(model, 4, optimizer)
    if name == "bitsandbytes":
        assert optimizer.state[state.layers[0].whole_A]["state1"].dtype == torch.uint8
    before = values(model)
    train(model, 1, optimizer, start=4)
    moved = {key: value - before[key] for key, value in values(model).items()}
    for layer in state.layers:
        still = torch.ones(64, dtype=torch.bool)
        still[chosen[layer.name]] = False
        assert not moved[f"{layer.name}.lora_A.default.weight"][still].any()
        assert not moved[f"{layer.name}.lora_B.default.weight"][:, still].any()
        assert moved[f"{layer.name}.lora_B.default.weight"][:, ~still].any(0).all()


def test_components_of_every_micro_batch_move(chosen):
    model, _, layer = one_layer(importance_lambda=0.0, target_density=0.17)
    optimizer = torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3, weight_decay=0.0)
    fit(model, optimizer, 3)
    before = layer.whole_B.detach().clone()
    for component in (1, 4):
        model(layer.whole_A[component].detach()[None].repeat(3, 1)).square().sum().backward()
    optimizer.step()
    assert (layer.whole_B != before).any(0).tolist() == [False, True, False, False, True, False]


# -- Pruning ----------------------------------------------------------------------------------------------------------


def prunable(**options):
    """A layer whose component 1 is never chosen, since the others are more important, with nonzero moments."""
    model, state, layer = one_layer(prune_after=4, importance_lambda=0.5, **options)
    with torch.no_grad():
        layer.whole_B[:, 1] *= 1e-4
    layer.changed()
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
    assert optimizer.state[layer.whole_A]["exp_avg_sq"][1].any(), "the warm-up moved it"
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
    layer.prune(torch.tensor([1]))
    assert torch.equal(model(x), before)
    assert torch.equal(chosen[layer.name], index)


class Packed(torch.optim.Optimizer):
    """Momentum stored in another form than the parameters', as in 8-bit optimisers."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                flat = self.state[parameter].setdefault("packed", torch.zeros(parameter.numel()))
                flat.mul_(0.9).add_(parameter.grad.flatten())
                parameter.sub_(1e-3 * flat.view_as(parameter))


class Coded(Packed):
    """Momentum in whole numbers of the parameters' shape, of which 0 means -1: bitsandbytes' 8-bit form."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state.setdefault("qmap1", (torch.arange(256) - 127) / 127)
                code = state.setdefault("state1", torch.full_like(parameter, 127, dtype=torch.uint8))
                moment = 0.9 * (code.float() - 127) / 127 + 0.1 * parameter.grad
                code.copy_((moment.clamp(-1, 1) * 127 + 127).round())
                parameter.sub_(1e-3 * (code.float() - 127) / 127)


@pytest.mark.parametrize("optimiser", [Packed, Coded])
def test_optimisers_with_other_moments_cannot_bring_pruned_components_back(optimiser):
    model, _, layer = prunable(target_density=0.84)
    fit(model, optimiser([layer.whole_A, layer.whole_B]), 20)
    assert layer.dead.tolist() == [False, True, False, False, False, False]
    assert not layer.whole_A[1].any()
    assert not layer.whole_B[:, 1].any()


def test_pruned_components_are_never_chosen(chosen):
    """They are not chosen even where all importances are zero."""
    model, state, layer = one_layer(importance_lambda=0.0)
    model(torch.randn(3, 8))
    state.advance()
    layer.prune(torch.tensor([0, 2, 5]))
    model(torch.zeros(3, 8))
    assert chosen[layer.name].tolist() == [1, 3, 4]
    assert layer.best(1.0).tolist() == [1, 3, 4]


def test_at_least_the_computed_components_stay():
    model, _, layer = one_layer(prune_after=1, target_density=0.5)
    optimizer = torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3)
    fit(model, optimizer, 30)
    assert 3 <= (~layer.dead).sum() < 6
    assert torch.isfinite(model(torch.randn(3, 8))).all()


def test_nothing_is_pruned_where_everything_is_computed():
    model, _, layer = one_layer(target_density=1.0, prune_after=2)
    fit(model, torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3), 5)
    assert layer.dead is None
    assert layer.gain == 1


@pytest.fixture
def elsewhere(monkeypatch):
    """Stands for another process: the values that it contributes to each reduction."""
    values = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_reduce(tensor, op):
        combine = {torch.distributed.ReduceOp.MIN: torch.minimum, torch.distributed.ReduceOp.SUM: torch.add}[op]
        combine(tensor, values.get(op, tensor), out=tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return values


def test_processes_agree_on_what_is_pruned(elsewhere):
    """Only components that no process chooses are pruned: here the other process still uses component 1."""
    unused = elsewhere[torch.distributed.ReduceOp.MIN] = torch.tensor([0.0, 0.0, 1, 1, 1, 1])
    model, _, layer = prunable(target_density=0.84)
    fit(model, torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3), 8)
    assert layer.dead is None
    unused[1] = 1
    fit(model, torch.optim.AdamW([layer.whole_A, layer.whole_B], lr=1e-3), 4, start=8)
    assert layer.dead.tolist() == [False, True, False, False, False, False]


def test_processes_agree_on_what_has_been_important(elsewhere):
    model, state, layer = one_layer()
    x = torch.randn(5, 8)
    other = elsewhere[torch.distributed.ReduceOp.SUM] = torch.rand(6).softmax(0)
    model(x)
    state.advance()
    torch.testing.assert_close(layer.importance, (importance_of(layer, x) + other) / 2)


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


@pytest.mark.parametrize("r", [12, 210])
def test_evaluation_is_that_of_the_pruned_checkpoint_of_the_target_density(tmp_path, r):
    """Also with rounded numbers of components, and with pruned ones."""
    from peft import PeftModel

    model = make(r=r)
    state = apply(model, density=0.1)
    state.layers[0].prune(torch.arange(r - 1))
    ranks = rank.save_pruned_checkpoint(model, tmp_path, 0.1)
    assert ranks["model.layers.0.mlp.up_proj"] == state.layers[1].kept == {12: 1, 210: 24}[r]
    loaded = PeftModel.from_pretrained(make_base(dtype=torch.float64), tmp_path, autocast_adapter_dtype=False).eval()
    expected = loaded(**make_batch()).logits
    model.eval()
    torch.testing.assert_close(model(**make_batch()).logits, expected, rtol=1e-10, atol=1e-12)
    ids = make_batch()["input_ids"][:1]
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(input_ids=ids, **told), loaded.generate(input_ids=ids, **told))


def test_saving_all_components_is_told_once_where_they_are_more_than_evaluation_computes(tmp_path, caplog):
    model = make()
    state = apply(model, past_warmup=False)
    model.save_pretrained(tmp_path)
    assert not caplog.text, "in the warm-up all are computed"
    train(model, 1)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert caplog.text.count("rank.save_pruned_checkpoint(model, path, 0.34)") == 1
    caplog.clear()
    state._told = False
    for layer in state.layers:
        layer.prune(torch.arange(layer.rank - layer.kept))
    model.save_pretrained(tmp_path)
    assert not caplog.text, "all that are left are computed"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ratio", [0.15, 0.5, 1.0])
def test_pruned_checkpoint_loads_in_plain_peft(tmp_path, rslora, ratio):
    from peft import PeftModel

    config = {"use_rslora": rslora, "rank_pattern": {"down_proj": 20}, "alpha_pattern": {"up_proj": 5}}
    model = make(**config)
    state = apply(model)
    state.layers[0].prune(torch.arange(R - 1))
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
    with rank.retained(model, 1.0):
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
    assert config["lora_alpha"] == pytest.approx(8 / 40 * 6 * math.sqrt(40 / 4))
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
    """alpha / r, and alpha / sqrt(r) under rslora, stay what they were, times what 4 of 12 components count."""
    for rslora, wanted in ((False, 8 / 12 * 6 * GAIN), (True, 8 / math.sqrt(12) * math.sqrt(6) * GAIN)):
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
