"""Generates answers in batches, shortest prompts first, and reports each batch when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparse_unsloth.utils.progress import bar


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    done: Callable[[int, str], None],
    *,
    max_new_tokens: int,
    batch_size: int,
    add_special_tokens: bool,
    temperature: float = 0.0,
    seed: int = 0,
    title: str = "generating",
) -> None:
    """Generates an answer to every prompt.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer, padding on the left.
        prompts: whole texts, with the template applied.
        done: called with a prompt's number and its answer, batch by batch.
        max_new_tokens: the longest answer; it ends earlier at the model's end of sequence.
        batch_size: prompts per batch.
        add_special_tokens: whether the tokenizer adds its beginning of sequence.
        temperature: 0 is greedy.
        seed: of sampling; set again for each batch, so that an interrupted run can resume.
        title: of the progress bar.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if temperature == 0:
        # The sampling defaults of the checkpoint would cause warnings.
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    for start in bar(range(0, len(order), batch_size), title, "batch"):
        chosen = order[start : start + batch_size]
        encoded = tokenizer(
            [prompts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            add_special_tokens=add_special_tokens,
            return_token_type_ids=False,
        ).to(model.device)
        torch.manual_seed(seed)
        output = model.generate(
            **encoded, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
        answers = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, answer in zip(chosen, answers, strict=True):
            done(index, answer)
