"""A model with the call of Unsloth's loss, and its loss and gradients."""

import sys

import torch
from torch import nn

from sparse_unsloth.exact.loss import FUNCTION, MODULES
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT

HIDDEN, VOCABULARY, BATCH, SEQUENCE = 8, 17, 3, 150


class Model(nn.Module):
    """A last layer that takes keyword arguments, a head, and the call of the loss as Unsloth's forwards write it."""

    def __init__(self, seed=0, module=MODULES[0]):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.head, self.module = Layer(), nn.Linear(HIDDEN, VOCABULARY, bias=False), module

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden_states, labels, context=None, **kwargs):
        hidden_states = self.layer(hidden_states, **{CONTEXT_ARGUMENT: context})
        return getattr(sys.modules[self.module], FUNCTION)(
            trainer=None,
            hidden_states=hidden_states,
            lm_head_weight=self.head.weight,
            lm_head_bias=None,
            labels=labels,
            **{"mask": None, **kwargs},
        )


class Layer(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def make_labels(share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return labels.masked_fill(torch.rand(BATCH, SEQUENCE, generator=generator) >= share, -100)


def run(model, labels, **kwargs):
    """Loss, and the gradients of the hidden states and of the head."""
    hidden_states = torch.randn(*labels.shape, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = model(hidden_states, labels, **kwargs)
    return loss, *torch.autograd.grad(3 * loss, [hidden_states, model.head.weight])


def assert_same(left, right):
    for ours, reference in zip(left, right, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)
