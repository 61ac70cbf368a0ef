"""Prompt templates and row filters of recipes: plain functions of texts, the same for training and for evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
"""The Alpaca form without input, as the published experiments used it."""
CHAT_TEMPLATE, ALPACA_TEMPLATE = "chat", "alpaca"
TEMPLATES = (CHAT_TEMPLATE, ALPACA_TEMPLATE)

# A fence opens and closes at the beginning of a line; what stands behind the opening one is the language.
_CODE_BLOCK = re.compile(r"^```[^\n`]*\n.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
_REFUSALS = ("sorry", "as an ai")

LOOKED_AT, SHOWN = 1000, 8
"""Rows in which parts of conversations are looked for, and rows in which each part is looked for in the text."""
REFERENCES = ("role", "content", "id", "tool_call_id")
"""Keys of a turn that need not be written, or are every template's concern."""

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


def not_written(rows: Iterable[Mapping[str, Any]], tokenizer: Any, chat_template: str | None = None) -> list[str]:
    """What of the conversations in ``rows`` the chat template leaves out, one line for each fact.

    A part is left out if the text is the same without it, in each of the first rows that have it.

    Args:
        rows: samples in TRL's form; those that are no conversations pass.
        tokenizer: whose template writes them.
        chat_template: takes the place of the tokenizer's.
    """
    tried: dict[str, list[bool]] = {}
    apart = None
    for row, _ in zip(rows, range(LOOKED_AT), strict=False):
        whole = row["prompt"] + row["completion"] if "prompt" in row else row.get("messages")
        if not isinstance(whole, list) or not whole:
            return []
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools

        options = {**(row.get("chat_template_kwargs") or {}), "chat_template": chat_template, "tokenize": False}
        without: dict[str, tuple[Any, Any]] = {"the tools": (whole, None)} if tools else {}
        if len(whole) > 1 and whole[0]["role"] in ("system", "developer"):
            without["the system turn"] = whole[1:], tools
        keys = dict.fromkeys(key for turn in whole for key, value in turn.items() if value not in (None, "", [], {}))
        for key in (key for key in keys if key not in REFERENCES):
            fewer = [{name: value for name, value in turn.items() if name != key} for turn in whole]
            without[f"{key!r} of the turns"] = fewer, tools
        wanted = {name: parts for name, parts in without.items() if len(tried.setdefault(name, [])) < SHOWN}
        if not wanted and (apart is not None or "prompt" not in row):
            continue
        try:
            written = tokenizer.apply_chat_template(whole, tools=tools, **options)
            if apart is None and "prompt" in row:
                alone = tokenizer.apply_chat_template(row["prompt"], tools=tools, **options, add_generation_prompt=True)
                apart = "" if written.startswith(alone) else alone
        except (TemplateError, TypeError, ValueError):  # TRL says so where it matters
            return []
        for name, (turns, kept) in wanted.items():
            try:
                bare = tokenizer.apply_chat_template(turns, tools=kept, **options)
                tried[name].append(bare.split() != written.split())
            except (TemplateError, TypeError, ValueError):
                tried[name].append(True)
    left_out = [name for name, differs in tried.items() if differs and not any(differs)]
    facts = []
    if left_out:
        facts.append(f"the chat template does not write {', '.join(left_out)}, which plays no part in training")
    if apart:
        facts.append(
            "the chat template writes a prompt that waits for its answer otherwise than one that has it (it ends in "
            f"{apart[-40:]!r}): training puts other tokens before the answers than the use of the model does"
        )
    return facts


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
