"""Reads texts, conversations, earlier turns and tools from rows, in the form that chat templates take."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

HISTORY, TOOLS, TEMPLATE_OPTIONS = "history", "tools", "chat_template_kwargs"
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""The role of each name that data sets use."""
OWN_ROLES = ("user", "assistant", "system", "developer", "tool")
NO_ANSWER, NO_QUESTION = "without an answer", "without a question"
EMPTY_TURN, WRONG_ORDER = "with an empty turn", "with turns in the wrong order"
BEGINS_WITH_ANSWER = "with an assistant's turn first"
JOINED = "turns of one role in a row are joined"
LAST_QUESTION = "a last turn without an answer is cut off"


class LeftOut(Exception):
    """The reason why a row gives no sample."""


def text_of(value: Any) -> str | None:
    """Returns ``value`` as text; None where it is missing: null, NaN, or only white space.

    False, 0 and "NA" are values. Lists and mappings become JSON.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    text = value if isinstance(value, str) else str(value)
    return text if text.strip() else None


def is_conversation(value: Any) -> bool:
    """Whether it is a list of turns."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and ({"role", "from"} & set(turn)) for turn in value)


def _parsed(value: Any, column: str) -> Any:
    """Parses a value that may be JSON text; None where it is missing.

    Raises:
        LeftOut: the text is not JSON.
    """
    if not isinstance(value, str):
        return None if text_of(value) is None else value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        raise LeftOut(f"with unreadable {column} (no JSON)") from None


def tools_of(value: Any) -> list[Any] | None:
    """Reads a tool list, which may be JSON text; None without tools."""
    tools = _parsed(value, TOOLS)
    if tools is None or tools == [] or tools == {}:
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise LeftOut(f"with unreadable {TOOLS} (no list of mappings)")
    return tools


def history_of(value: Any) -> list[tuple[str, str]]:
    """Reads earlier ``(question, answer)`` turns from a list of pairs or of messages, which may be JSON text."""
    turns = _parsed(value, HISTORY) or []
    if is_conversation(turns):
        turns, _ = ordered(turns_of(turns, HISTORY))
        if len(turns) % 2 or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise LeftOut(f"with unreadable {HISTORY} (no list of question and answer)")
        texts = [turn["content"] for turn in turns]
        turns = list(zip(texts[::2], texts[1::2], strict=True))
    found = []
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise LeftOut(f"with unreadable {HISTORY} (no list of question and answer)")
        question, answer = map(text_of, turn)
        if question is None and answer is None:
            continue
        if question is None or answer is None:
            raise LeftOut(EMPTY_TURN)
        found.append((question, answer))
    return found


def turns_of(value: Any, column: str, keep_unknown: bool = False) -> list[dict[str, Any]]:
    """Reads the messages of a conversation, in the roles of chat templates; keys without a value are dropped."""
    turns = _parsed(value, column)
    if turns is None or turns == []:
        raise LeftOut(NO_ANSWER)
    if not is_conversation(turns):
        raise LeftOut(f"with unreadable {column} (no list of turns)")
    found = []
    for turn in turns:
        name = str(turn.get("role") or turn.get("from") or "")
        role = ROLES.get(name.strip().lower())
        if role is None and not keep_unknown:
            raise LeftOut(f"with a turn of an unknown role ({name[:20] or 'none'})")
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        others = {key: item for key, item in turn.items() if item is not None}
        for key in ("role", "from", "content", "value"):
            others.pop(key, None)
        if role == "function_call":
            role, content, others = _call(content, others)
        elif role == "assistant" and "function_call" in others:  # OpenAI's older form
            _, _, others = _call(others.pop("function_call"), others)
        if name in OWN_ROLES:
            role = name
        message = {"role": role or name}
        if content is not None:
            if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
                content = _joined(content)
            message["content"] = content if isinstance(content, str) else text_of(content)
        found.append({**message, **others})
    last = max((index for index, turn in enumerate(found) if turn["role"] == "assistant"), default=None)
    for index, turn in enumerate(found):
        if _is_empty(turn) and turn["role"] in ("user", "assistant"):
            raise LeftOut(NO_ANSWER if index == last else EMPTY_TURN)
    return found


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Joins a content that comes in parts, which templates of text models would write as a Python list."""
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if not texts:
        return parts
    others = [part["type"] for part in parts if part.get("type") not in ("text", None)]
    if others:
        raise LeftOut(f"with a part of a turn that is no text ({str(others[0])[:20]})")
    return "".join(map(str, texts))


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether a turn is empty; a tool may answer nothing, and an assistant may call a tool without a text."""
    return text_of(turn.get("content")) is None and "tool_calls" not in turn


def _call(content: Any, others: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """Reads an assistant's turn that calls functions; the text stays text unless it is JSON of name and arguments."""
    calls = content
    if isinstance(content, str):
        try:
            calls = json.loads(content)
        except ValueError:
            return "assistant", content, others
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return "assistant", content, others
    made = []
    for call in calls:
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        made.append({"type": "function", "function": {"name": call["name"], "arguments": arguments or {}}})
    return "assistant", "", {**others, "tool_calls": made}


def ordered(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Orders turns as [system,] user, assistant, ..., up to the last answer, and says what was changed.

    Two consecutive turns of one role are joined, so no text is lost.
    """
    found: list[dict[str, Any]] = []
    notes = []
    for turn in turns:
        role, before = turn["role"], found[-1]["role"] if found else None
        if _is_empty(turn) and role in ("system", "developer"):
            continue
        if role == "assistant" and before in (None, "system", "developer"):
            raise LeftOut(BEGINS_WITH_ANSWER)
        if role == "tool" and before not in ("assistant", "tool"):
            raise LeftOut(WRONG_ORDER)
        if role in ("system", "developer") and before is not None:
            raise LeftOut(WRONG_ORDER)
        if role == before and role in ("user", "assistant") and all(map(_is_text, (found[-1], turn))):
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{turn['content']}"}
            notes = [JOINED]
        else:
            found.append(turn)
    last = max((index for index, turn in enumerate(found) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise LeftOut(NO_ANSWER)
    if last + 1 < len(found):
        notes = [*notes, LAST_QUESTION]
    return found[: last + 1], "\n".join(notes) or None


def _is_text(turn: dict[str, Any]) -> bool:
    return set(turn) == {"role", "content"} and isinstance(turn["content"], str)


def with_system(turns: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    if system is None or (turns and turns[0]["role"] in ("system", "developer")):
        return turns
    return [{"role": "system", "content": system}, *turns]


def parsed_turns(value: Any) -> Any:
    """Parses messages given as JSON text; other texts and values are returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return parsed if is_conversation(parsed) else value
    return value
