"""Makes samples in TRL's form out of rows: finds columns, and reads values, conversations, histories and tools."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sparse_unsloth.errors import DataError
from sparse_unsloth.ledger import Outcome, Reading
from sparse_unsloth.templates import ALPACA_TEMPLATE, CHAT_TEMPLATE, filtered, training_pair

if TYPE_CHECKING:
    from sparse_unsloth.data import DataArguments

COLUMN_PAIRS = (
    ("question", "answer"), ("query", "answer"), ("query", "response"), ("instruction", "output"),
    ("instruction", "response"), ("instruction", "answer"), ("question", "response"), ("question", "output"),
    ("question", "completion"), ("query", "output"), ("query", "completion"), ("instruction", "completion"),
    ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("problem", "solution"), ("problem", "answer"),
    ("input", "output"), ("input", "response"), ("input", "answer"), ("input", "completion"), ("prompt", "chosen"),
    ("question", "chosen"), ("instruction", "chosen"),
)  # fmt: skip
"""Question and answer columns of public data sets, in the order in which they are looked for."""
CONTEXT_COLUMNS = ("input", "context")
"""Belong to the question, and come after it in this order."""
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
HISTORY, TOOLS, TEMPLATE_OPTIONS = "history", "tools", "chat_template_kwargs"
TOKENS = "input_ids"
CONVERSATIONS = (("conversations",), ("conversation",))
"""Of turns by whatever names and in whatever order; ``messages`` are taken as they are."""
PAIR = ("prompt", "completion")
# What TRL takes as it is, in the order in which it looks; its key dataset_text_field names one more.
TRL_FORMS = ((TOKENS,), PAIR, ("messages",), *CONVERSATIONS)
CHATS = (("messages",), *CONVERSATIONS)
TRL_READS = (*PAIR, "messages", "conversations", "chosen", "rejected", "text", TOOLS, TEMPLATE_OPTIONS)
"""TRL takes a sample by these for one of another form, so those that are not used do not stay."""
OF_TOKENS = (
    "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths", "token_type_ids",
)  # fmt: skip
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""Of the names that data sets give to roles."""
OWN_ROLES = ("user", "assistant", "system", "developer", "tool")

NO_ANSWER, NO_QUESTION = "without an answer", "without a question"
EMPTY_TURN, WRONG_ORDER = "with an empty turn", "with turns in the wrong order"
BEGINS_WITH_ANSWER = "with an assistant's turn first"
JOINED = "turns of one role in a row are joined"
OWN_SYSTEM = "the conversation's own system turn is taken, and the system column is not"
LAST_QUESTION = "a last turn that nobody answers is cut off"


class _LeftOut(Exception):
    """Why a row gives no sample."""


# -- Values -----------------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str | None:
    """``value`` as the text that is trained; None where it is missing: null, NaN, or nothing but white space.

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
    """A value that may be JSON text; None where it is missing.

    Raises:
        _LeftOut: a text that is no JSON.
    """
    if not isinstance(value, str):
        return None if text_of(value) is None else value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        raise _LeftOut(f"with unreadable {column} (no JSON)") from None


def tools_of(value: Any) -> list[Any] | None:
    """A tool list, which may come as JSON text; None without tools."""
    tools = _parsed(value, TOOLS)
    if tools is None or tools == [] or tools == {}:
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _LeftOut(f"with unreadable {TOOLS} (no list of mappings)")
    return tools


def history_of(value: Any) -> list[tuple[str, str]]:
    """Earlier ``(question, answer)`` turns: a list of pairs, or of messages, which may come as JSON text."""
    turns = _parsed(value, HISTORY) or []
    if is_conversation(turns):
        turns, _ = _ordered(_turns(turns, HISTORY))
        if len(turns) % 2 or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise _LeftOut(f"with unreadable {HISTORY} (no list of question and answer)")
        texts = [turn["content"] for turn in turns]
        turns = list(zip(texts[::2], texts[1::2], strict=True))
    found = []
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise _LeftOut(f"with unreadable {HISTORY} (no list of question and answer)")
        question, answer = map(text_of, turn)
        if question is None and answer is None:
            continue
        if question is None or answer is None:
            raise _LeftOut(EMPTY_TURN)
        found.append((question, answer))
    return found


# -- Conversations ----------------------------------------------------------------------------------------------------


def _turns(value: Any, column: str, keep_unknown: bool = False) -> list[dict[str, Any]]:
    """The messages of a conversation, in roles that chat templates know; keys without a value are dropped."""
    turns = _parsed(value, column)
    if turns is None or turns == []:
        raise _LeftOut(NO_ANSWER)
    if not is_conversation(turns):
        raise _LeftOut(f"with unreadable {column} (no list of turns)")
    found = []
    for turn in turns:
        name = str(turn.get("role") or turn.get("from") or "")
        role = ROLES.get(name.strip().lower())
        if role is None and not keep_unknown:
            raise _LeftOut(f"with a turn of an unknown role ({name[:20] or 'none'})")
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
            raise _LeftOut(NO_ANSWER if index == last else EMPTY_TURN)
    return found


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The text of a content that comes in parts, which templates of text models would write as Python lists."""
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if not texts:
        return parts
    others = [part["type"] for part in parts if part.get("type") not in ("text", None)]
    if others:
        raise _LeftOut(f"with a part of a turn that is no text ({str(others[0])[:20]})")
    return "".join(map(str, texts))


def _is_empty(turn: dict[str, Any]) -> bool:
    """A tool may well answer nothing, and an assistant may call it without a word."""
    return text_of(turn.get("content")) is None and "tool_calls" not in turn


def _call(content: Any, others: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """An assistant's turn that calls functions; its text stays a text where it is no JSON of name and arguments."""
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


def _ordered(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Turns as chat templates take them, [system,] user, assistant, ..., up to the last answer; and what was changed.

    Two turns of one role in a row are joined: nothing of them is lost.
    """
    found: list[dict[str, Any]] = []
    notes = []
    for turn in turns:
        role, before = turn["role"], found[-1]["role"] if found else None
        if _is_empty(turn) and role in ("system", "developer"):
            continue
        if role == "assistant" and before in (None, "system", "developer"):
            raise _LeftOut(BEGINS_WITH_ANSWER)
        if role == "tool" and before not in ("assistant", "tool"):
            raise _LeftOut(WRONG_ORDER)
        if role in ("system", "developer") and before is not None:
            raise _LeftOut(WRONG_ORDER)
        if role == before and role in ("user", "assistant") and all(map(_is_text, (found[-1], turn))):
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{turn['content']}"}
            notes = [JOINED]
        else:
            found.append(turn)
    last = max((index for index, turn in enumerate(found) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise _LeftOut(NO_ANSWER)
    if last + 1 < len(found):
        notes = [*notes, LAST_QUESTION]
    return found[: last + 1], "\n".join(notes) or None


def _is_text(turn: dict[str, Any]) -> bool:
    return set(turn) == {"role", "content"} and isinstance(turn["content"], str)


def _with_system(turns: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    if system is None or (turns and turns[0]["role"] in ("system", "developer")):
        return turns
    return [{"role": "system", "content": system}, *turns]


# -- Columns ----------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """A column's name in small letters, with ``_`` for spaces and hyphens, without a byte order mark."""
    return re.sub(r"[\s\-]+", "_", name.strip("\ufeff \t").lower())


def find_columns(columns: Sequence[str]) -> dict[str, str]:
    """The columns by their usual names; one that is spelled so goes before one that only reads so ("Answer")."""
    found: dict[str, str] = {}
    for name in columns:
        found.setdefault(canonical(name), name)
    return {**found, **{name: name for name in columns if name == canonical(name)}}


def reading_for(
    arguments: DataArguments,
    columns: Sequence[str],
    first: dict[str, Any],
    text_field: str = "text",
    fits: Callable[[dict[str, Any]], bool] | None = None,
    whole_text: bool = False,
) -> Reading:
    """How the rows of a data set become samples.

    The first of these that is there: what ``dataset_columns`` names; TRL's own forms (``input_ids``, ``prompt`` and
    ``completion``, ``messages``, ``conversations``, a ``text_field`` of another name than "text"); a pair of
    `COLUMN_PAIRS`, in that order; ``text``, which goes before pairs with ``whole_text``.

    Args:
        arguments: the recipe's data block.
        columns: of the data set.
        first: its first row.
        text_field: TRL's ``dataset_text_field``.
        fits: for ``dataset_drop_long``.
        whole_text: whether all tokens shall bear loss.

    Raises:
        DataError: no such form, or keys that do not go with it.
    """
    names = {name: name for name in columns} if arguments.dataset_columns else find_columns(columns)
    if arguments.dataset_columns is None:
        forms = [form for form in (*TRL_FORMS, (text_field,)) if set(form) <= {*names, *columns}]
        if TOKENS not in columns:
            forms = [form for form in forms if form != (TOKENS,)]
        pairs = any(set(pair) <= set(names) for pair in COLUMN_PAIRS)
        if forms == [("text",)] and pairs and not whole_text:
            forms = []
        if forms:
            return _trl_form(arguments, forms[0], names, columns, first, fits)
    names = {**names, **find_columns(columns)}
    question, answer = _pair(arguments, columns, names)
    return _pair_form(arguments, question, answer, names, columns, fits)


def _trl_form(
    arguments: DataArguments,
    form: tuple[str, ...],
    names: dict[str, str],
    columns: Sequence[str],
    first: dict[str, Any],
    fits: Callable[[dict[str, Any]], bool] | None,
) -> Reading:
    """Passes rows as they are where TRL can train them so: most often all."""
    from datasets import List, Value

    own = [names.get(name, name) for name in form]
    if form == (TOKENS,):
        _no_changes(arguments, TOKENS)
        used = {"tokens": [name for name in columns if name in (TOKENS, *OF_TOKENS)]}
        return _reading(
            lambda row: (row, None, None) if row[TOKENS] else (None, "without tokens", None),
            used, columns, fits, dict.fromkeys(used["tokens"], List(Value("int64"))),
        )  # fmt: skip
    # TRL looks at the first row to tell conversations from texts.
    chat = form in CHATS or (form == PAIR and any(is_conversation(_quiet_json(first.get(name))) for name in own))
    strict = form in CONVERSATIONS
    _no_changes(arguments, " and ".join(form), system=strict)
    used = {role: [name] for role, name in zip(form if form == PAIR else ["text"], own, strict=True)}
    system, tools = (_first_of(wanted, names, own) if chat else None for wanted in (SYSTEM_COLUMNS, (TOOLS,)))
    options = TEMPLATE_OPTIONS if chat and TEMPLATE_OPTIONS in columns else None
    used |= {role: [name] for role, name in (("system", system), (TOOLS, tools), ("options", options)) if name}
    target = ("messages",) if strict else form
    gone = {old for old, new in zip([*own, tools], [*target, TOOLS], strict=True) if old != new} | {system}
    gone |= set(TRL_READS).intersection(columns).difference(*used.values())
    gone -= {None}

    def read(row: dict[str, Any]) -> Outcome:
        try:
            values = [row[name] for name in own]
            note = None
            if form == PAIR and chat:
                prompt, completion = map(_quiet_json, values)
                made = [
                    _turns(prompt, "prompt", True) if isinstance(prompt, list) and prompt else _texts(row, own[:1]),
                    _turns(completion, "completion", True) if isinstance(completion, list) else _answer(completion, ()),
                ]
            elif form == PAIR:
                if any(is_conversation(_quiet_json(value)) for value in values):
                    raise _LeftOut("with turns, where the first row has texts")
                # An empty prompt is one: its completion is what a text begins with.
                made = [values[0] if isinstance(values[0], str) else text_of(values[0]), text_of(values[1])]
                if None in made:
                    raise _LeftOut(NO_ANSWER if made[1] is None else NO_QUESTION)
            elif chat:
                made = [_turns(values[0], form[0], keep_unknown=not strict)]
                if strict:
                    made[0], note = _ordered(made[0])
                elif not any(turn["role"] == "assistant" for turn in made[0]):
                    raise _LeftOut(NO_ANSWER)
                elif strangers := [turn["role"] for turn in made[0] if turn["role"] not in OWN_ROLES]:
                    note = f"a turn of a role that chat templates may pass over ({strangers[0][:20] or 'none'})"
            else:
                made = [text_of(values[0])]
                if made[0] is None:
                    raise _LeftOut("without text")
            if chat:
                text = None if system is None else text_of(row[system])
                made[0] = _with_system(made[0], arguments.dataset_system_prompt if text is None else text)
                if text is not None and made[0][0]["content"] != text:
                    note = "\n".join(filter(None, (note, OWN_SYSTEM)))
            changes = {} if _same(values, made) and not gone else dict(zip(target, made, strict=True))
            if options is not None and row[options] is None:
                changes[options] = {}  # TRL unpacks it
            if tools is not None and (isinstance(row[tools], str) or tools != TOOLS):
                changes[TOOLS] = tools_of(row[tools])
        except _LeftOut as reason:
            return None, str(reason), None
        kept = {name: value for name, value in row.items() if name not in gone}
        return {**kept, **changes} if changes else row, None, note

    made_kinds = made_features(target, chat, [tools and TOOLS, options])
    return _reading(read, used, columns, fits, made_kinds, frozenset(gone))


def _pair_form(
    arguments: DataArguments,
    question: str,
    answer: str,
    names: dict[str, str],
    columns: Sequence[str],
    fits: Callable[[dict[str, Any]], bool] | None,
) -> Reading:
    """Questions and answers, with what belongs to them, into prompts and completions by the template."""
    template, filters = arguments.dataset_template, arguments.dataset_filters or []
    chat, taken = template == CHAT_TEMPLATE, [question, answer]
    if template == ALPACA_TEMPLATE and arguments.dataset_system_prompt is not None:
        raise DataError("dataset_system_prompt: the Alpaca form has no system message; use dataset_template: chat.")
    contexts = [names[name] for name in CONTEXT_COLUMNS if name in names and names[name] not in taken]
    system = _first_of(SYSTEM_COLUMNS, names, taken) if chat else None
    tools = _first_of((TOOLS,), names, taken) if chat else None
    history = _first_of((HISTORY,), names, taken)
    used = {"question": [question, *contexts], "answer": [answer]}
    for role, column in (("system", system), (HISTORY, history), (TOOLS, tools)):
        if column is not None:
            used[role] = [column]

    def read(row: dict[str, Any]) -> Outcome:
        note = None
        try:
            asked, given = row[question], row[answer]
            system_text = None if system is None else text_of(row[system])
            system_text = arguments.dataset_system_prompt if system_text is None else system_text
            earlier = [] if history is None else history_of(row[history])
            if is_conversation(asked) or is_conversation(given):
                if not chat:
                    raise DataError(
                        f"dataset_template: {template} takes texts, and {question} or {answer} holds turns."
                    )
                turns = _turns(given, answer) if is_conversation(given) else _answer(given, filters)
                if turns[0]["role"] == "assistant":
                    before = _turns(asked, question) if is_conversation(asked) else _texts(row, [question, *contexts])
                    turns = [*before, *turns]
                turns, note = _ordered(turns)
                if filters:
                    turns[-1] = {**turns[-1], **_answer(turns[-1]["content"], filters)[0]}
                pairs = [
                    {"role": role, "content": text}
                    for pair in earlier for role, text in zip(("user", "assistant"), pair, strict=True)
                ]  # fmt: skip
                sample = {"prompt": _with_system([*pairs, *turns[:-1]], system_text), "completion": turns[-1:]}
            else:
                text = _texts(row, [question, *contexts])[0]["content"]
                found = _answer(given, filters)[0]["content"]
                sample = training_pair(template, text, found, system_text, earlier)
            if tools is not None:
                sample[TOOLS] = tools_of(row[tools])
        except _LeftOut as reason:
            return None, str(reason), None
        return sample, None, note

    # A column called prompt or completion alone would clash with the new ones, so no other column stays.
    made = made_features(PAIR, chat, [tools and TOOLS])
    return _reading(read, used, columns, fits, made, frozenset(columns))


def made_features(names: Sequence[str], chat: bool, nested: Iterable[str | None]) -> dict[str, Any]:
    """Of the columns that are made, the ``nested`` ones of any shape.

    Turns and tools differ in their keys, which a column of one shape would fill with null in every row. Empty where
    `datasets` is too old for that, and infers one shape.
    """
    import datasets

    if not hasattr(datasets, "Json"):
        return {}
    kind = datasets.List(datasets.Json()) if chat else datasets.Value("string")
    return {**dict.fromkeys(names, kind), **{name: datasets.Json() for name in nested if name is not None}}


def _texts(row: dict[str, Any], columns: Iterable[str]) -> list[dict[str, Any]]:
    found = [text for column in columns if row[column] != [] and (text := text_of(row[column])) is not None]
    if not found:
        raise _LeftOut(NO_QUESTION)
    return [{"role": "user", "content": "\n\n".join(found)}]


def _answer(value: Any, filters: Sequence[str]) -> list[dict[str, Any]]:
    text = text_of(value)
    if text is None:
        raise _LeftOut(NO_ANSWER)
    for name in filters:
        text = filtered(text, [name])
        if text is None or not text.strip():
            raise _LeftOut(f"by the filter {name}")
    return [{"role": "assistant", "content": text}]


def _quiet_json(value: Any) -> Any:
    """Messages that stand in a text; other texts, and other values, as they are."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return parsed if is_conversation(parsed) else value
    return value


def _same(values: Sequence[Any], made: Sequence[Any]) -> bool:
    """Whether TRL reads ``made`` out of ``values`` as they are; a key without a value counts for none."""

    def plain(value: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            return value
        return [{key: item for key, item in turn.items() if item is not None} for turn in value]

    return all(type(value) is type(other) and plain(value) == other for value, other in zip(values, made, strict=True))


def _first_of(wanted: Sequence[str], names: dict[str, str], taken: Sequence[str]) -> str | None:
    return next((names[name] for name in wanted if name in names and names[name] not in taken), None)


def _reading(
    read: Callable[[dict[str, Any]], Outcome],
    used: dict[str, list[str]],
    columns: Sequence[str],
    fits: Callable[[dict[str, Any]], bool] | None,
    made: dict[str, Any] | None = None,
    gone: frozenset[str] = frozenset(),
) -> Reading:
    taken = {name for group in used.values() for name in group}
    return Reading(read, fits, made or {}, gone, used, tuple(name for name in columns if name not in taken))


def _pair(arguments: DataArguments, columns: Sequence[str], names: dict[str, str]) -> tuple[str, str]:
    """The columns of question and answer.

    Raises:
        DataError: they are not there.
    """
    asked, name = arguments.dataset_columns, arguments.dataset_name
    if asked is not None:
        missing = [column for column in asked if column not in columns]
        if len(asked) != 2:
            raise DataError(f"dataset_columns: name two, of question and answer; given {', '.join(asked) or 'none'}.")
        if missing:
            raise DataError(
                f"{name}: has no column {' and no column '.join(missing)} (dataset_columns); its columns are "
                f"{', '.join(columns) or 'none'}."
            )
        return asked[0], asked[1]
    pair = next((pair for pair in COLUMN_PAIRS if set(pair) <= set(names)), None)
    if pair is None:
        forms = "; ".join(" and ".join(pair) for pair in COLUMN_PAIRS)
        raise DataError(
            f"{name}: its columns are {', '.join(columns)}. Training needs prompt and completion, messages or "
            "conversations (with assistant_only_loss: true), text, input_ids, or one of: "
            f"{forms}; others are named by dataset_columns."
        )
    return names[pair[0]], names[pair[1]]


def _no_changes(arguments: DataArguments, form: str, system: bool = False) -> None:
    """Refuses keys that change texts, for data that comes as TRL takes it; ``system``: a system prompt can be added."""
    changed = {
        "dataset_system_prompt": arguments.dataset_system_prompt is not None and not system,
        "dataset_template": arguments.dataset_template != CHAT_TEMPLATE,
        "dataset_filters": bool(arguments.dataset_filters),
    }
    asked = [name for name, given in changed.items() if given]
    if asked:
        raise DataError(
            f"{', '.join(asked)}: the data set is in TRL's own form ({form}) and stays as it is; put the system "
            "message and the template into the data, or name question and answer columns by dataset_columns."
        )
