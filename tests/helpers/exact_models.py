"""Checks that sparse training with every row kept gives the gradients of dense training."""

import peft
import torch

from sparse_unsloth import attach, get_state

from tiny_models import always, loss_and_gradients, make_base

ALL_ROWS = {"backward_rows": 0.999999}
CONFIGS = {"rows": ALL_ROWS, "channels": always()}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(model):
    return model.get_base_model().model


def with_adapter(config, **changes):
    return peft.get_peft_model(make_base(**changes), config).train()


def assert_exact(model, batch, config=ALL_ROWS):
    """Asserts that with every row kept, loss and gradients equal those of the model before attaching."""
    loss, gradients = loss_and_gradients(model, batch)
    attach(model, config)
    for _ in range(2):  # the second forward judges the first one's backward pass
        other_loss, others = loss_and_gradients(model, batch)
    assert get_state(model).gradients_seen
    torch.testing.assert_close(other_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def lora_config(**options):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": TARGETS} | options)
