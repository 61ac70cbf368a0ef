"""`rank.patch()`, and rank sparsity together with channel sparsity."""

import pytest
import torch

from sparse_unsloth import attach, detach, rank
from sparse_unsloth.rank.state import STATE_NAME

from rank_models import GAIN, TARGETS, R, apply, assert_same, make, mask_components, record_choices, train
from tiny_models import always, loss_and_gradients, make_base, make_batch


@pytest.fixture
def chosen(monkeypatch):
    return record_choices(monkeypatch)


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
    """An attention module as its own forward sees it, with other projections."""

    def __init__(self, module, projections):
        self.__dict__.update(projections)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


# -- Together with channel sparsity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["rank first", "rank last"])
def test_with_channel_sparsity(chosen, order):
    """Compared with channel sparsity alone on an adapter whose other components are zero."""
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
                    scaled = mask.view(shape) * (GAIN if factor == "lora_B" else 1)
                    getattr(module, factor)["default"].weight.mul_(scaled)
                    kept[f"{name}.{factor}.default.weight"] = scaled
    attach(reference, always())
    expected, wanted = loss_and_gradients(reference, make_batch())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same(gradients, {name: gradient * kept[name] for name, gradient in wanted.items()})
    dense, _ = loss_and_gradients(make(), make_batch())
    assert abs(dense - loss) > 1e-6


def test_fused_forwards_read_factors_chosen_by_the_input_of_their_block(chosen):
    """Unsloth's fused blocks read their projections' factors and call no projection."""

    def fused(module, x):
        adapter, base = module.active_adapters[0], module.base_layer
        branch = (x @ module.lora_A[adapter].weight.t()) @ module.lora_B[adapter].weight.t()
        return x @ base.weight.t() + module.scaling[adapter] * branch

    class Calls:
        """Replaces a projection without calling it."""

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
