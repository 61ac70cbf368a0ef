"""Tests that values, columns and samples of a data set are used, or counted with a reason."""

import json
import logging

import datasets
import pytest

from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.datasets import load_dataset_for
from sparse_unsloth.data.ledger import Ledger, left_out
from sparse_unsloth.errors import DataError

import word_models
from word_models import TOOLS, chat, share_gpt

OTHER_TOOLS = [{"name": "halve", "parameters": {"type": "object", "properties": {"two": {"type": "number"}}}}]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """``(training samples, ledger)`` of rows, or of a file's text."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(rows, suffix="jsonl", call=None, **changes):
        file = tmp_path / f"rows{len(list(tmp_path.glob('rows*')))}.{suffix}"
        content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(content, encoding="utf-8")
        ledger = Ledger()
        train, _ = load_dataset_for(DataArguments(dataset_name=str(file), **changes), ledger=ledger, **(call or {}))
        return train.to_list(), ledger

    return load


def texts(samples, part="completion"):
    return [sample[part][-1]["content"] for sample in samples]


# -- Values -----------------------------------------------------------------------------------------------------------


def test_a_csv_keeps_every_answer_as_it_is_written(read):
    """Only an empty field is missing, and white space is no answer."""
    answers = ["NA", "None", "null", "N/A", "nan", "NaN", "False", "0", "007", "1.50", "2024-05-01", "1e3"]
    rows = "".join(f"{index},{answer}\n" for index, answer in enumerate([*answers, "", '""', '"  "']))
    samples, ledger = read(f"question,answer\n{rows}", "csv")
    assert texts(samples) == answers
    assert ledger.split("training").as_dict()["left_out"] == {"without an answer": 3}
    assert "3 of 15 samples left out: 3 without an answer" in ledger.as_dict()["facts"]


def test_a_csv_of_numbers_alone_stays_text(read):
    samples, _ = read("question,answer\n01,1\n02,\n03,2.50\n", "csv")
    assert (texts(samples, "prompt"), texts(samples)) == (["01", "03"], ["1", "2.50"])


def test_a_csv_header_may_have_a_byte_order_mark_capitals_and_spaces(read):
    samples, ledger = read("\ufeffInstruction, Context ,Response,Notes\none,two,three,four\n", "csv")
    assert (texts(samples, "prompt"), texts(samples)) == (["one\n\ntwo"], ["three"])
    assert ledger.unused == ["Notes"]


def test_a_csv_whose_columns_are_unclear_is_refused(read):
    with pytest.raises(DataError, match=r"several columns called answer: rename all but one"):
        read("question,answer,answer\na,b,c\n", "csv")
    with pytest.raises(
        DataError, match=r"rows\d\.csv has more fields in its rows than in its header \(question, answer\)"
    ):
        read("question,answer\na,b,c\nd,e,f\n", "csv")
    _, ledger = read("question,answer,note,note\na,b,c,d\n", "csv")
    assert ledger.unused == ["note", "note.1"]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_values_are_answers_unless_they_are_null(read, suffix):
    answers = [False, True, 0, 0.0, 7, 2.5, "NA", "None", "null", "False", [], ["é"], {"x": None}, "2024-05-01"]
    missing = [None, "", " \n", float("nan")]
    rows = [{"question": f"q{index}", "answer": answer} for index, answer in enumerate([*answers, *missing])]
    rows = json.dumps(rows) if suffix == "json" else rows
    samples, ledger = read(rows, suffix)
    written = [
        json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value) for value in answers
    ]
    assert texts(samples) == written
    assert ledger.split("training").left_out == {"without an answer": 4}


@pytest.mark.parametrize(
    "answers", [["2024-05-01", "2024-05-02 10:00:00"], [5, 2.5], [False, True], [0, 1], [1.0, 2.0]]
)
def test_json_columns_of_one_kind_are_trained_as_written(read, answers):
    """pyarrow reads dates as times and 5 beside 2.5 as 5.0."""
    samples, _ = read([{"question": "when", "answer": answer} for answer in answers])
    assert texts(samples) == [str(answer) for answer in answers]
    samples, _ = read([{"messages": chat(("user", "when"), ("assistant", str(answer)))} for answer in answers])
    assert [sample["messages"][1]["content"] for sample in samples] == [str(answer) for answer in answers]


# -- Columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "unused"),
    [
        ({"instruction": "i", "context": "c", "response": "r", "kind": "x"}, [("user", "i\n\nc")], "r", ["kind"]),
        ({"instruction": "i", "context": "", "response": "r"}, [("user", "i")], "r", []),
        ({"instruction": "i", "input": "in", "context": "c", "output": "o"}, [("user", "i\n\nin\n\nc")], "o", []),
        ({"instruction": "", "input": "in", "output": "o"}, [("user", "in")], "o", []),
        ({"context": "c", "question": "q", "answer": "a"}, [("user", "q\n\nc")], "a", []),
        ({"input": "in", "output": "o"}, [("user", "in")], "o", []),
        (
            {"id": "1", "system_prompt": "s", "question": "q", "response": "r"},
            [("system", "s"), ("user", "q")], "r", ["id"],
        ),
        ({"system": "s", "instruction": "i", "output": "o"}, [("system", "s"), ("user", "i")], "o", []),
        ({"prompt": "p", "response": "r"}, [("user", "p")], "r", []),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, [("user", "p")], "c", ["rejected"]),
        (
            {"prompt": "p", "chosen": chat(("user", "p"), ("assistant", "c")), "rejected": "r"},
            [("user", "p")], "c", ["rejected"],
        ),
        ({"question": "q", "query": "x", "answer": "a", "response": "y", "Answer": "z"}, [("user", "q")], "a",
         ["query", "response", "Answer"]),
        ({"instruction": "i", "output": "o", "text": "i o"}, [("user", "i")], "o", ["text"]),
        (
            {"instruction": "i", "output": "o", "history": [["a", "b"], ["c", "d"]]},
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "i")], "o", [],
        ),
        (
            {"instruction": "i", "output": "o", "history": json.dumps([["a", "b"]]), "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "i")], "o", [],
        ),
        (
            {"question": "q", "answer": "a", "history": chat(("user", "a"), ("assistant", "b"))},
            [("user", "a"), ("assistant", "b"), ("user", "q")], "a", [],
        ),
    ],
)  # fmt: skip
def test_common_columns_are_used_and_others_named(read, row, prompt, answer, unused, caplog):
    with caplog.at_level(logging.INFO, "sparse_unsloth"):
        (sample,), ledger = read([row])
    assert sample == {"prompt": chat(*prompt), "completion": chat(("assistant", answer))}
    assert ledger.unused == unused
    told = [record.getMessage() for record in caplog.records if "columns" in record.getMessage()]
    assert len(told) == 1 + bool(unused)
    assert not unused or told[1].endswith(f"columns not used: {', '.join(unused)}")


def test_a_system_column_goes_before_the_system_prompt_of_the_recipe(read):
    rows = [{"system": system, "question": "q", "answer": "a"} for system in ("own", None, " ")]
    samples, _ = read(rows, dataset_system_prompt="default")
    assert [sample["prompt"][0]["content"] for sample in samples] == ["own", "default", "default"]


def test_the_alpaca_form_takes_the_history_and_names_what_it_has_no_place_for(read):
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s", "tools": TOOLS}
    (sample,), ledger = read([row], dataset_template="alpaca")
    assert sample["prompt"].endswith(
        "### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n"
    )
    assert ledger.unused == ["system", "tools"]
    with pytest.raises(DataError, match=r"dataset_system_prompt: the Alpaca form has no system message"):
        read([row], dataset_template="alpaca", dataset_system_prompt="Be brief.")


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_tools_reach_trl_in_their_own_shapes(read, as_text, streaming):
    """Not one row's parameters as null in every other row."""
    rows = [
        {"question": "q", "answer": "a", "tools": json.dumps(tools) if as_text else tools}
        for tools in (TOOLS, OTHER_TOOLS, [])
    ]
    options = {"dataset_streaming": True, "dataset_size": 3} if streaming else {}
    samples, ledger = read(rows, **options)
    assert [sample["tools"] for sample in samples] == [TOOLS, OTHER_TOOLS, None]
    assert ledger.used["tools"] == ["tools"]


def test_rows_whose_json_cannot_be_read_are_counted(read):
    rows = [{"question": "q", "answer": "a", "tools": tools, "history": ""} for tools in ("{bad", "[1]", "", " ")]
    rows += [{"question": "q", "answer": "a", "tools": "", "history": history} for history in ("no", '["a"]')]
    samples, ledger = read(rows)
    assert len(samples) == 2
    assert ledger.split("training").left_out == {
        "with unreadable tools (no JSON)": 1,
        "with unreadable tools (no list of mappings)": 1,
        "with unreadable history (no JSON)": 1,
        "with unreadable history (no list of question and answer)": 1,
    }


# -- Conversations ----------------------------------------------------------------------------------------------------


def test_share_gpt_conversations_become_messages(read):
    calls = [json.dumps({"name": "add", "arguments": {"one": 1}}), json.dumps({"name": "halve", "arguments": "{}"})]
    rows = [
        share_gpt(("system", "s"), ("human", "h"), ("gpt", "g"), ("human", "i"), ("gpt", "j"), tools=""),
        share_gpt(
            ("human", "h"), ("function_call", calls[0]), ("observation", "2"), ("gpt", "g"), tools=json.dumps(TOOLS)
        ),
        share_gpt(("user", "h"), ("function_call", calls[1]), ("tool", ""), ("assistant", "g"), tools=""),
    ]
    samples, ledger = read([{**row, "system": "column", "source": "web"} for row in rows])
    assert [set(sample) for sample in samples] == [{"messages", "tools", "source"}] * 3
    assert samples[0]["messages"] == chat(
        ("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "i"), ("assistant", "j")
    )
    function = {"name": "add", "arguments": {"one": 1}}
    assert samples[1]["messages"] == [
        *chat(("system", "column"), ("user", "h")),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        *chat(("tool", "2"), ("assistant", "g")),
    ]
    assert samples[1]["tools"] == TOOLS
    assert samples[2]["messages"][2]["tool_calls"][0]["function"] == {"name": "halve", "arguments": {}}
    assert ledger.unused == ["source"]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("gpt", "g"), ("human", "h"), ("gpt", "g")], "with an assistant's turn first"),
        ([("human", "h"), ("critic", "c"), ("gpt", "g")], "with a turn of an unknown role (critic)"),
        ([("human", "h"), ("observation", "o"), ("gpt", "g")], "with turns in the wrong order"),
        (
            [("human", "h"), ("gpt", "g"), ("system", "s"), ("human", "h"), ("gpt", "g")],
            "with turns in the wrong order",
        ),
        ([("human", " "), ("gpt", "g")], "with an empty turn"),
        ([("human", "h"), ("gpt", ""), ("human", "h"), ("gpt", "g")], "with an empty turn"),
        ([("human", "h"), ("gpt", None)], "without an answer"),
        ([("human", "h")], "without an answer"),
        ([], "without an answer"),
    ],
)
def test_conversations_that_cannot_be_trained_are_counted(read, turns, reason):
    samples, ledger = read([share_gpt(*turns), share_gpt(("human", "h"), ("gpt", "g"))])
    assert len(samples) == 1
    assert ledger.split("training").left_out == {reason: 1}
    assert f"1 of 2 samples left out: 1 {reason}" in ledger.as_dict()["facts"]


def test_what_is_changed_of_conversations_is_said(read):
    rows = [share_gpt(("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"), ("human", "e"))]
    (sample,), ledger = read(rows)
    assert sample["messages"] == chat(("user", "a\n\nb"), ("assistant", "c\n\nd"))
    facts = ledger.as_dict()["facts"]
    assert "1 of 1 samples: turns of one role in a row are joined" in facts
    assert "1 of 1 samples: a last turn without an answer is cut off" in facts


def test_a_system_column_beside_a_system_turn_is_said(read):
    rows = [share_gpt(("system", "own"), ("human", "h"), ("gpt", "g"), system=system) for system in ("own", "x", None)]
    samples, ledger = read(rows)
    assert [sample["messages"][0] for sample in samples] == chat(("system", "own")) * 3
    assert list(ledger.split("training").notes.values()) == [1]


def test_an_older_function_call_is_an_answer(read):
    call = {"name": "add", "arguments": '{"one": 1}'}
    turns = [*chat(("user", "u")), {"role": "assistant", "content": None, "function_call": call}]
    (sample,), _ = read([{"messages": turns}])
    function = sample["messages"][1]["tool_calls"][0]["function"]
    assert function == {"name": "add", "arguments": {"one": 1}}


def test_filters_read_the_answer_of_a_conversation(read):
    rows = [{"prompt": "p", "chosen": chat(("user", "p"), ("assistant", text))} for text in ("Sorry.", "Yes.")]
    samples, ledger = read(rows, dataset_filters=["no-refusal"])
    assert texts(samples) == ["Yes."]
    assert ledger.split("training").left_out == {"by the filter no-refusal": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(chat(("user", "u"), ("assistant", "a")))},
        {"Messages": chat(("user", "u"), ("assistant", "a"))},
        {"messages": chat(("human", "u"), ("gpt", "a"))},
        {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"conversations": chat(("user", "u"), ("assistant", "a"))},
        {"conversation": chat(("user", "u"), ("assistant", "a"))},
        {"conversations": json.dumps([{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}])},
    ],
)
def test_messages_by_other_names(read, row):
    (sample,), _ = read([row])
    assert sample == {"messages": chat(("user", "u"), ("assistant", "a"))}


def test_messages_without_an_answer_are_left_out_and_others_pass(read):
    good = [chat(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")), chat(("assistant", "a"))]
    bad = [chat(("user", "u")), chat(("user", "u"), ("assistant", " ")), [], None]
    samples, ledger = read([{"messages": messages} for messages in (*good, *bad)])
    assert [sample["messages"] for sample in samples] == good
    assert ledger.split("training").left_out == {"without an answer": 4}


def test_prompts_and_completions_without_a_value_are_left_out(read):
    rows = [{"prompt": "p", "completion": value} for value in ("NA", None, " ", "null")]
    samples, ledger = read([*rows, {"prompt": None, "completion": "c"}, {"prompt": "", "completion": "c"}])
    assert [sample["completion"] for sample in samples] == ["NA", "null", "c"]
    assert ledger.split("training").left_out == {"without an answer": 2, "without a question": 1}
    rows = [{"Prompt": json.dumps(chat(("user", "p"))), "completion": json.dumps(chat(("assistant", "c")))}]
    samples, _ = read(rows)
    assert samples == [{"prompt": chat(("user", "p")), "completion": chat(("assistant", "c"))}]


@pytest.mark.parametrize(
    ("rows", "call", "unused"),
    [
        ([{"text": "a", "meta": "m"}, {"text": None, "meta": "m"}], {}, ["meta"]),
        ([{"body": "a", "title": "t"}, {"body": " ", "title": "t"}], {"text_field": "body"}, ["title"]),
        ([{"input_ids": [1, 2], "labels": [-100, 2], "x": "y"}, {"input_ids": [], "labels": [], "x": "y"}], {}, ["x"]),
        ([{"text": "a", "question": "q", "answer": "b"}, {"text": "", "question": "q", "answer": "b"}],
         {"completion_only_loss": False, "text_field": "text"}, ["question", "answer"]),
    ],
)  # fmt: skip
def test_texts_and_tokens_pass_unchanged(read, rows, call, unused):
    samples, ledger = read(rows, call=call)
    assert samples == rows[:1]
    assert ledger.unused == unused
    assert ledger.split("training").left_out.total() == 1


def test_other_pairs_are_still_made_where_every_token_is_a_loss_token(read):
    call = {"completion_only_loss": False, "text_field": "text"}
    (sample,), _ = read([{"question": "q", "answer": "b"}], call=call)
    assert set(sample) == {"prompt", "completion"}


# -- The count --------------------------------------------------------------------------------------------------------


def test_the_count_is_kept_with_cached_data(read, tmp_path, monkeypatch):
    """Both of a file and of a stream, whose rows are not read again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"q{index}", "answer": "" if index % 3 else "a", "note": "n"} for index in range(12)]
    file = word_models.save_rows(tmp_path / "same.jsonl", rows)
    for options in ({}, {"dataset_streaming": True, "dataset_size": 4}, {"dataset_streaming": True, "dataset_size": 9}):
        found = []
        for _ in range(2):
            ledger = Ledger()
            load_dataset_for(DataArguments(dataset_name=file, **options), ledger=ledger)
            found.append(ledger.as_dict())
        assert found[0] == found[1]
        read_rows = 10 if options.get("dataset_size") == 4 else 12
        assert (found[0]["training"]["read"], found[0]["training"]["kept"]) == (read_rows, 4)
        assert found[0]["training"]["left_out"] == {"without an answer": read_rows - 4}
        assert found[0]["columns"]["not_used"] == ["note"]


def test_every_sample_of_a_file_is_accounted_for(read, tmp_path):
    rows = [{"question": f"q{index}", "answer": "" if index < 3 else "a"} for index in range(20)]
    file = word_models.save_rows(tmp_path / "all.jsonl", rows)
    ledger = Ledger()
    arguments = DataArguments(dataset_name=file, dataset_size=5, dataset_test_size=4)
    load_dataset_for(arguments, evaluation=True, ledger=ledger)
    training, held_out = ledger.split("training"), ledger.split("held-out")
    assert (training.read, training.kept, held_out.kept) == (20, 5, 4)
    assert training.set_aside == {"held-out": 4, "beyond dataset_size": 8}
    assert training.read == training.kept + training.left_out.total() + sum(training.set_aside.values())
    with pytest.raises(DataError, match=r"no training samples are left.* \(20 without an answer\)"):
        load_dataset_for(
            DataArguments(
                dataset_name=word_models.save_rows(tmp_path / "none.jsonl", [{"question": "q", "answer": ""}] * 20)
            )
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_samples_than_asked_for_are_said(read, streaming):
    _, ledger = read([{"question": "q", "answer": "a"}] * 3, dataset_size=7, dataset_streaming=streaming)
    assert "dataset_size asks for 7 samples, and 3 are there" in ledger.as_dict()["facts"]
    _, ledger = read([{"question": "q", "answer": "a"}] * 3, dataset_size=3, dataset_streaming=streaming)
    assert not ledger.others


def test_a_column_that_begins_late_is_used_or_an_error(read):
    rows = [{"question": "q", "answer": "a"}] * 120 + [{"question": "q", "answer": "a", "context": "late"}]
    samples, _ = read(rows)
    assert texts(samples, "prompt")[-1] == "q\n\nlate"
    with pytest.raises(DataError, match=r"has the column 'context' in a later row .* set dataset_streaming: false"):
        read(rows, dataset_streaming=True, dataset_size=130)


@pytest.mark.parametrize("options", [{}, {"dataset_streaming": True, "dataset_size": 2}])
def test_columns_that_trl_would_take_for_another_form_do_not_stay(read, options):
    """TRL ends `text` instead of the completion, trains `conversations` instead of `messages`, and unpacks null."""
    rows = [{"prompt": "p", "completion": "c", "text": "pc", "tools": "x"}] * 2
    samples, ledger = read(rows, **options)
    assert samples == [{"prompt": "p", "completion": "c"}] * 2
    assert ledger.unused == ["text", "tools"]
    messages = chat(("user", "u"), ("assistant", "a"))
    samples, _ = read([{"messages": messages, "conversations": [], "prompt": "p"}] * 2, **options)
    assert samples == [{"messages": messages}] * 2
    rows = [{"messages": messages, "chat_template_kwargs": value} for value in ({"deep": True}, None)]
    samples, _ = read(rows, **options)
    assert [sample["chat_template_kwargs"] for sample in samples] == [{"deep": True}, {}]


def test_turns_among_texts_are_not_trained_as_json(read):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": chat(("user", "p")), "completion": chat(("assistant", "c"))}]
    samples, ledger = read(rows)
    assert len(samples) == 1
    assert ledger.split("training").left_out == {"with turns, where the first row has texts": 1}


def test_many_reasons_stay_one_line():
    ledger = Ledger()
    ledger.split("training").read = 4800
    reasons = ledger.split("training").left_out
    reasons.update({"longer than max_length": 290, "without an answer": 22})
    assert left_out(reasons, 4800) == "312 of 4,800 samples left out: 290 longer than max_length, 22 without an answer"
    reasons.update({f"with a turn of an unknown role ({index})": 1 for index in range(50)})
    assert left_out(reasons, 4800).endswith("47 for 47 other reasons (see metrics.json)")


def test_rows_of_a_classifier_are_counted(tmp_path, monkeypatch):
    from sparse_unsloth.data.classification import label_names, load_labelled

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "labels.csv"
    file.write_text("sentence,label,idx\nNA,0,1\nNone,1,2\n7,1,3\n,1,4\nx,,5\n")
    ledger = Ledger()
    train, _, columns = load_labelled(DataArguments(dataset_name=str(file)), False, ledger)
    assert train["sentence"][:] == ["NA", "None", "7"]
    assert label_names(train, None) == ["0", "1"]
    assert ledger.split("training").left_out == {"without a text": 1, "without a label": 1}
    assert (columns, ledger.unused) == (["sentence"], ["idx"])
    file.write_text("sentence,label\na,0\nb,2\n")
    assert label_names(load_labelled(DataArguments(dataset_name=str(file)), False)[0], None) == ["0", "1", "2"]
    file.write_text("sentence,label\na,0.5\nb,2\n")
    assert label_names(load_labelled(DataArguments(dataset_name=str(file)), False)[0], None) is None


@pytest.mark.parametrize("frame", [{"answer": [1.5, None]}, {"answer": ["NA", None]}, {"answer": [True, None]}])
def test_a_parquet_file_loses_only_what_is_missing(tmp_path, monkeypatch, frame):
    import pandas

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pandas.DataFrame({"question": ["a", "b"], **frame}).to_parquet(tmp_path / "rows.parquet")
    ledger = Ledger()
    train, _ = load_dataset_for(DataArguments(dataset_name=str(tmp_path / "rows.parquet")), ledger=ledger)
    assert texts(train) == [str(frame["answer"][0])]
    assert ledger.split("training").left_out == {"without an answer": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "b", "answer": "c"}\n', r"names 'answer' twice in one row \(line 1\)"),
        ('{"question": "a", "answer": "b"}\n{"question": "a",\n', r"line 2 is no JSON"),
        ('[{"question": "a",\n "answer": }]', r"line 2 is no JSON"),
        ("[1, 2]", r"its rows must be objects, but one is 1"),
        ("\n\n", r"is empty, or cannot be read"),
    ],
)
def test_a_json_file_that_cannot_be_read_says_where(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content)
