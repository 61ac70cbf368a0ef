"""Converts rows to samples in TRL's form: finds the columns, and reads each row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.conversations import (
    HISTORY,
    NO_ANSWER,
    NO_QUESTION,
    OWN_ROLES,
    TEMPLATE_OPTIONS,
    TOOLS,
    LeftOut,
    history_of,
    is_conversation,
    ordered,
    parsed_turns,
    text_of,
    tools_of,
    turns_of,
    with_system,
)
from sparse_unsloth.data.ledger import Outcome, Reading
from sparse_unsloth.data.templates import ALPACA_TEMPLATE, CHAT_TEMPLATE, filtered, training_pair
from sparse_unsloth.errors import DataError

COLUMN_PAIRS = (
    ("question", "answer"), ("query", "answer"), ("query", "response"), ("instruction", "output"),
    ("instruction", "response"), ("instruction", "answer"), ("question", "response"), ("question", "output"),
    ("question", "completion"), ("query", "output"), ("query", "completion"), ("instruction", "completion"),
    ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("problem", "solution"), ("problem", "answer"),
    ("input", "output"), ("input", "response"), ("input", "answer"), ("input", "completion"), ("prompt", "chosen"),
    ("question", "chosen"), ("instruction", "chosen"),
)  # fmt: skip
"""Question and answer columns of public data sets, in the order of the search."""
CONTEXT_COLUMNS = ("input", "context")
"""Columns that belong to the question; they follow it in this order."""
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
TOKENS = "input_ids"
CONVERSATIONS = (("conversations",), ("conversation",))
"""Columns of turns with any names of roles and in any order; ``messages`` stay unchanged."""
PAIR = ("prompt", "completion")
# The forms that TRL reads, in the order in which it looks; its key dataset_text_field names one more.
TRL_FORMS = ((TOKENS,), PAIR, ("messages",), *CONVERSATIONS)
CHATS = (("messages",), *CONVERSATIONS)
TRL_READS = (*PAIR, "messages", "conversations", "chosen", "rejected", "text", TOOLS, TEMPLATE_OPTIONS)
"""Columns by which TRL recognises a form; unused ones are removed so that a sample keeps its form."""
OF_TOKENS = (
    "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths", "token_type_ids",
)  # fmt: skip

OWN_SYSTEM = "the conversation's own system turn is taken, and the system column is not"


def canonical(name: str) -> str:
    """Returns a column's name in lower case, with ``_`` for spaces and hyphens, without a byte order mark."""
    return re.sub(r"[\s\-]+", "_", name.strip("\ufeff \t").lower())


def find_columns(columns: Sequence[str]) -> dict[str, str]:
    """Returns the columns by their canonical names; an exact spelling ("answer") goes before others ("Answer")."""
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
    """Chooses how the rows of a data set become samples.

    The first of these forms that exists is taken: the columns that ``dataset_columns`` names; TRL's own forms
    (``input_ids``, ``prompt`` and ``completion``, ``messages``, ``conversations``, a ``text_field`` of another name
    than "text"); a pair of `COLUMN_PAIRS`, in that order; ``text``, which goes before pairs with ``whole_text``.

    Args:
        arguments: the recipe's data block.
        columns: of the data set.
        first: its first row.
        text_field: TRL's ``dataset_text_field``.
        fits: whether a sample is short enough, for ``dataset_drop_long``.
        whole_text: whether all tokens are loss tokens.

    Raises:
        DataError: the columns have none of these forms, or keys contradict the form.
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
    """Reads rows in TRL's own form; most rows need no change."""
    from datasets import List, Value

    found = [names.get(name, name) for name in form]
    if form == (TOKENS,):
        _no_changes(arguments, TOKENS)
        used = {"tokens": [name for name in columns if name in (TOKENS, *OF_TOKENS)]}
        return _reading(
            lambda row: (row, None, None) if row[TOKENS] else (None, "without tokens", None),
            used, columns, fits, dict.fromkeys(used["tokens"], List(Value("int64"))),
        )  # fmt: skip
    # TRL looks at the first row to tell conversations from texts.
    chat = form in CHATS or (form == PAIR and any(is_conversation(parsed_turns(first.get(name))) for name in found))
    strict = form in CONVERSATIONS
    _no_changes(arguments, " and ".join(form), system=strict)
    used = {role: [name] for role, name in zip(form if form == PAIR else ["text"], found, strict=True)}
    system, tools = (_first_of(wanted, names, found) if chat else None for wanted in (SYSTEM_COLUMNS, (TOOLS,)))
    options = TEMPLATE_OPTIONS if chat and TEMPLATE_OPTIONS in columns else None
    used |= {role: [name] for role, name in (("system", system), (TOOLS, tools), ("options", options)) if name}
    target = ("messages",) if strict else form
    gone = {old for old, new in zip([*found, tools], [*target, TOOLS], strict=True) if old != new} | {system}
    gone |= set(TRL_READS).intersection(columns).difference(*used.values())
    gone -= {None}

    def read(row: dict[str, Any]) -> Outcome:
        try:
            values = [row[name] for name in found]
            note = None
            if form == PAIR and chat:
                prompt, completion = map(parsed_turns, values)
                made = [
                    turns_of(prompt, "prompt", True) if isinstance(prompt, list) and prompt else _texts(row, found[:1]),
                    turns_of(completion, "completion", True)
                    if isinstance(completion, list)
                    else _answer(completion, ()),
                ]
            elif form == PAIR:
                if any(is_conversation(parsed_turns(value)) for value in values):
                    raise LeftOut("with turns, where the first row has texts")
                # An empty prompt is one: its completion is what a text begins with.
                made = [values[0] if isinstance(values[0], str) else text_of(values[0]), text_of(values[1])]
                if None in made:
                    raise LeftOut(NO_ANSWER if made[1] is None else NO_QUESTION)
            elif chat:
                made = [turns_of(values[0], form[0], keep_unknown=not strict)]
                if strict:
                    made[0], note = ordered(made[0])
                elif not any(turn["role"] == "assistant" for turn in made[0]):
                    raise LeftOut(NO_ANSWER)
                elif unknown := [turn["role"] for turn in made[0] if turn["role"] not in OWN_ROLES]:
                    note = f"a turn of a role that chat templates may pass over ({unknown[0][:20] or 'none'})"
            else:
                made = [text_of(values[0])]
                if made[0] is None:
                    raise LeftOut("without text")
            if chat:
                text = None if system is None else text_of(row[system])
                made[0] = with_system(made[0], arguments.dataset_system_prompt if text is None else text)
                if text is not None and made[0][0]["content"] != text:
                    note = "\n".join(filter(None, (note, OWN_SYSTEM)))
            changes = {} if _same(values, made) and not gone else dict(zip(target, made, strict=True))
            if options is not None and row[options] is None:
                changes[options] = {}  # TRL unpacks it
            if tools is not None and (isinstance(row[tools], str) or tools != TOOLS):
                changes[TOOLS] = tools_of(row[tools])
        except LeftOut as reason:
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
    """Converts questions and answers, with their inputs, histories and tools, to prompts and completions."""
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
                turns = turns_of(given, answer) if is_conversation(given) else _answer(given, filters)
                if turns[0]["role"] == "assistant":
                    before = turns_of(asked, question) if is_conversation(asked) else _texts(row, [question, *contexts])
                    turns = [*before, *turns]
                turns, note = ordered(turns)
                if filters:
                    turns[-1] = {**turns[-1], **_answer(turns[-1]["content"], filters)[0]}
                pairs = [
                    {"role": role, "content": text}
                    for pair in earlier for role, text in zip(("user", "assistant"), pair, strict=True)
                ]  # fmt: skip
                sample = {"prompt": with_system([*pairs, *turns[:-1]], system_text), "completion": turns[-1:]}
            else:
                text = _texts(row, [question, *contexts])[0]["content"]
                found = _answer(given, filters)[0]["content"]
                sample = training_pair(template, text, found, system_text, earlier)
            if tools is not None:
                sample[TOOLS] = tools_of(row[tools])
        except LeftOut as reason:
            return None, str(reason), None
        return sample, None, note

    # A column called prompt or completion alone would clash with the new ones, so no other column stays.
    made = made_features(PAIR, chat, [tools and TOOLS])
    return _reading(read, used, columns, fits, made, frozenset(columns))


def made_features(names: Sequence[str], chat: bool, nested: Iterable[str | None]) -> dict[str, Any]:
    """Returns the features of the new columns, the ``nested`` ones without a fixed schema.

    Turns and tools differ in their keys; a column with one schema would fill the missing ones with null in every row.
    The result is empty where `datasets` is too old for columns without a schema.
    """
    import datasets

    if not hasattr(datasets, "Json"):
        return {}
    kind = datasets.List(datasets.Json()) if chat else datasets.Value("string")
    return {**dict.fromkeys(names, kind), **{name: datasets.Json() for name in nested if name is not None}}


def _texts(row: dict[str, Any], columns: Iterable[str]) -> list[dict[str, Any]]:
    found = [text for column in columns if row[column] != [] and (text := text_of(row[column])) is not None]
    if not found:
        raise LeftOut(NO_QUESTION)
    return [{"role": "user", "content": "\n\n".join(found)}]


def _answer(value: Any, filters: Sequence[str]) -> list[dict[str, Any]]:
    text = text_of(value)
    if text is None:
        raise LeftOut(NO_ANSWER)
    for name in filters:
        text = filtered(text, [name])
        if text is None or not text.strip():
            raise LeftOut(f"by the filter {name}")
    return [{"role": "assistant", "content": text}]


def _same(values: Sequence[Any], made: Sequence[Any]) -> bool:
    """Whether TRL reads ``made`` from the unchanged ``values``; keys without a value are ignored."""

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
    """Returns the columns of question and answer.

    Raises:
        DataError: there are no such columns.
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
    """Refuses keys that change texts, for data in TRL's own form; ``system``: a system prompt can be added."""
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
