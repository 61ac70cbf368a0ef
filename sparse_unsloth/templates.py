"""Prompt templates and row filters of recipes: plain functions of texts, the same for training and for evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
"""The Alpaca form without input, as the published experiments used it."""
CHAT_TEMPLATE, ALPACA_TEMPLATE = "chat", "alpaca"
TEMPLATES = (CHAT_TEMPLATE, ALPACA_TEMPLATE)

# A fence opens and closes at the beginning of a line; what stands behind the opening one is the language.
_CODE_BLOCK = re.compile(r"^```[^\n`]*\n.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
_REFUSALS = ("sorry", "as an ai")

Turns = Sequence[tuple[str, str | None]]
"""``(question, answer)`` pairs; the answer of the last one is None where the model shall give it."""


def training_pair(
    template: str, question: str, answer: str, system_prompt: str | None = None, history: Turns = ()
) -> dict[str, Any]:
    """One sample in TRL's prompt-completion form: messages for "chat", plain texts for "alpaca".

    ``history`` comes before the question; its answers are part of the prompt.

    With plain texts TRL adds the end of the sequence to the completion; with messages the chat template does.
    """
    if template == ALPACA_TEMPLATE:
        return {"prompt": alpaca([*history, (question, None)]), "completion": answer}
    return {
        "prompt": messages([*history, (question, None)], system_prompt),
        "completion": [_message("assistant", answer)],
    }


def alpaca(turns: Turns) -> str:
    """The Alpaca text of a conversation, up to where the answer shall begin."""
    parts = [f"### Instruction:\n{question}\n\n### Response:\n{answer or ''}" for question, answer in turns]
    return ALPACA + "\n\n".join(parts)


def messages(turns: Turns, system_prompt: str | None = None) -> list[dict[str, str]]:
    """The conversation as chat messages."""
    found = [] if system_prompt is None else [_message("system", system_prompt)]
    for question, answer in turns:
        found.append(_message("user", question))
        if answer is not None:
            found.append(_message("assistant", answer))
    return found


def generation_prompt(template: str, tokenizer: Any, turns: Turns, system_prompt: str | None = None) -> str:
    """The text after which the model's answer begins: what training put before a completion, token for token.

    Args:
        template: "chat" (the tokenizer's own) or "alpaca".
        tokenizer: of the model; used by "chat" only.
        turns: the conversation so far, the last answer None.
        system_prompt: of "chat".
    """
    if template == ALPACA_TEMPLATE:
        return alpaca(turns)
    return tokenizer.apply_chat_template(messages(turns, system_prompt), tokenize=False, add_generation_prompt=True)


def adds_special_tokens(template: str) -> bool:
    """Whether the tokenizer shall still add its beginning of sequence: a chat template writes it itself."""
    return template == ALPACA_TEMPLATE


def first_code_block(answer: str) -> str | None:
    """``answer`` up to the end of its first fenced code block; None where it has none."""
    found = _CODE_BLOCK.search(answer)
    return None if found is None else answer[: found.end()]


def no_refusal(answer: str) -> str | None:
    """``answer``; None where it says "sorry" or "as an AI"."""
    lowered = answer.lower()
    return None if any(text in lowered for text in _REFUSALS) else answer


FILTERS: dict[str, Callable[[str], str | None]] = {"first-code-block": first_code_block, "no-refusal": no_refusal}
"""By name; each gives the answer to train on, or None for a sample to leave out."""


def filtered(answer: str, filters: Sequence[str]) -> str | None:
    """``answer`` through ``filters`` in order; None as soon as one leaves it out."""
    for name in filters:
        changed = FILTERS[name](answer)
        if changed is None:
            return None
        answer = changed
    return answer


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
