"""Row sparsity: exact forwards, gradients equal to the masked reference, for every family and layout."""

import copy

import pytest
import torch

from sparse_unsloth import SparsityConfig, attach, detach
from sparse_unsloth.attachment import get_state
from sparse_unsloth.errors import AttachError, ConfigError
from sparse_unsloth.model.decoder_layer import find_layers
from sparse_unsloth.tokens.partition import TokenPartition

from classifier_models import make_batch as make_labelled
from classifier_models import make_classifier
from masked_models import every_step, masked_gradients
from tiny_models import FAMILIES, loras, loss_and_gradients, make_base, make_batch, make_lora, pack_nf4


def assert_same(first, second, **tolerance):
    (loss, gradients), (other_loss, others) = first, second
    torch.testing.assert_close(loss, other_loss, **tolerance)
    assert gradients.keys() == others.keys()
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], others[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_as_its_masks_say(family):
    model, batch = make_lora(family, dtype=torch.float64), make_batch()
    dense_loss, dense = loss_and_gradients(model, batch)
    expected = masked_gradients(model, batch)
    report = attach(model, every_step())
    ours = loss_and_gradients(model, batch)
    assert_same(ours, expected, rtol=1e-5, atol=1e-8)
    assert ours[0] == dense_loss
    assert any(not torch.allclose(ours[1][name], dense[name]) for name in dense)
    assert "backward through 0.25 of" in str(report)
    detach(model)
    assert_same(loss_and_gradients(model, batch), (dense_loss, dense))


def test_the_whole_share_is_dense_training():
    model, batch = make_lora("llama", dtype=torch.float64), make_batch()
    expected = loss_and_gradients(model, batch)
    attach(model, every_step(backward_rows=0.9999))  # rounded up to every row
    assert_same(loss_and_gradients(model, batch), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant):
    model, batch = make_lora("llama", dtype=torch.float64), make_batch()
    expected = masked_gradients(model, batch)
    attach(model, every_step())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_same(loss_and_gradients(model, batch), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_leaves_the_mlp_out(use_reentrant):
    model, batch = make_lora("llama"), make_batch()
    attach(model, every_step())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    rows = []
    for layer in find_layers(model):
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: rows.append(args[0].numel() // 128))
    loss_and_gradients(model, batch)
    partition = TokenPartition.from_labels(batch["labels"], batch["attention_mask"])
    few = len(partition.dense) + -(-len(partition.context) // 4)
    assert sorted(rows) == sorted([batch["labels"].numel()] * 3 + [few] * 3)


def test_four_bit_weights_do_as_they_are():
    model, batch = make_lora("llama", base=pack_nf4(make_base())), make_batch()
    expected = masked_gradients(model, batch)
    attach(model, every_step())
    assert_same(loss_and_gradients(model, batch), expected, rtol=1e-4, atol=1e-6)


def test_autocast_of_the_forward_holds_in_backward():
    model, batch = make_lora("llama"), make_batch()
    attach(model, every_step())
    seen = []
    for layer in find_layers(model):
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 6


def test_packed_rows():
    model = make_lora("llama", dtype=torch.float64)
    tokens, labels = (
        torch.cat([t[:2, :5].flatten(), t[2, :9]])[None] for t in (make_batch()["input_ids"], make_batch()["labels"])
    )
    positions = torch.cat([torch.arange(5), torch.arange(5), torch.arange(9)])[None]
    labels[:, [4, 9]] = tokens[:, [4, 9]]
    batch = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    expected = masked_gradients(model, batch)
    attach(model, every_step())
    assert_same(loss_and_gradients(model, batch), expected, rtol=1e-5, atol=1e-8)


def test_other_uses_are_dense():
    model, batch = make_lora("llama"), make_batch()
    attach(model, every_step())
    model.eval()
    with torch.no_grad():
        whole = model(**batch).logits
    detach(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, whole)


def test_answers_alone_need_no_choice():
    model, batch = make_lora("llama"), make_batch()
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    expected = loss_and_gradients(model, batch)
    attach(model, every_step())
    assert_same(loss_and_gradients(model, batch), expected)


def test_a_copy_trains_alike():
    model, batch = make_lora("llama"), make_batch()
    attach(model, every_step())
    copied = copy.deepcopy(model)
    assert_same(loss_and_gradients(copied, batch), loss_and_gradients(model, batch))


def test_saved_settings_come_back(tmp_path):
    model = make_lora("llama")
    attach(model, "rows")
    model.save_pretrained(tmp_path)
    again = SparsityConfig.from_file(tmp_path / "sparsity_config.yaml")
    assert again == get_state(model).config
    assert (again.backward_rows, again.start_step, again.end_step) == (0.25, 0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backward_rows": 0}, "share in"),
        ({"backward_rows": True}, "share in"),
        ({"backward_rows": 0.5, "mlp": {"all": 0.5}}, "not both"),
        ({"backward_rows": 0.5, "preset": "o2"}, "not both"),
        ({"preset": "rows", "self_attn": {"1": 0.5}}, "not both"),
        ({"preset": "rows", "sparse_prefill": True}, "sparse_prefill: must be False with backward_rows"),
    ],
)
def test_wrong_settings_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        SparsityConfig(**given)


def test_a_schedule_may_be_given():
    config = SparsityConfig(preset="rows", backward_rows=0.1, end_step=0.8)
    assert (config.backward_rows, config.start_step, config.end_step) == (0.1, 0.0, 0.8)
    assert SparsityConfig(mlp={"all": 0.5}).end_step == 0.75


@pytest.mark.parametrize("lora_b", [0.0, 0.05])
def test_dropout_is_refused(lora_b):
    """Also in a fresh adapter, where dropout does not change the output."""
    model = make_lora("llama", lora_b=lora_b)
    for module in model.modules():
        if isinstance(getattr(module, "lora_dropout", None), torch.nn.ModuleDict):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    with pytest.raises(AttachError, match="lora_dropout"):
        attach(model, every_step())
    assert get_state(model) is None
    loss_and_gradients(model, make_batch())
    assert loras(model)


def test_a_classifiers_head_may_have_another_dtype():
    """Heads in float32 on a base in bf16 run under the trainer's autocast; attaching has none."""
    model = make_classifier()
    model.get_base_model().model.bfloat16()
    assert model.get_base_model().score.weight.dtype == torch.float32

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_gradients(model, make_labelled())

    plain = step()
    attach(model, {"backward_rows": 1 - 1e-9})
    ours = step()
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-2)
    for name, gradient in plain[1].items():
        assert (ours[1][name].float() - gradient.float()).norm() <= 0.05 * gradient.float().norm() + 1e-4, name
