"""Tests the quality benchmark's tasks of natural text, from made files and with a tokenizer of words."""

import dataclasses
from zlib import crc32

import pytest

from benchmarks.quality import tasks
from benchmarks.quality.gemma3 import build, merges_of
from benchmarks.quality.natural import functions, passages
from sparse_unsloth.errors import SparsityError


def test_gemmas_merges_follow_from_its_scores():
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<turn>",
        "\n\n",
        "▁",
        "a",
        "b",
        "ab",
        "▁a",
        "▁ab",
        "<0xC3>",
        "<0xA9>",
    ]
    kinds = [3, 3, 3, 2, 3, 4, *[1] * 6, 6, 6]
    scores = [0.0] * 9 + [-2.0, -1.0, -3.0, 0.0, 0.0]
    assert merges_of(tokens, scores, kinds) == [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b")]
    tokenizer = build(tokens, scores, kinds, "<bos>{{ messages[0]['content'] }}")
    text = tokenizer.apply_chat_template([{"content": "ab ab<turn>\n\né"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "ab", "▁ab", "<turn>", "\n\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == text


SOURCE = '''
class Counter:
    """Counts. A second sentence about counters. The third one names widgets. The last one ends here."""

    @staticmethod
    def add(a, b):
        """Adds two numbers."""
        if a:
            return a + b
        return b

    def none(self):
        """Raises."""
        raise NotImplementedError
'''


def test_functions_are_asked_for_by_head_and_docstring():
    (item,) = functions([("a.py", SOURCE), ("copy.py", SOURCE), ("broken.py", "def f(:")])
    assert item.question == 'def add(a, b):\n    """Adds two numbers."""'
    assert item.answer == "    if a:\n        return a + b\n    return b"


def test_questions_are_answered_by_one_sentence_of_their_passage():
    prose = SOURCE.replace("Counts.", "Counts everything that it is given, one by one.")
    items = passages([(f"{number}.py", prose.replace("widgets", f"widgets {number}")) for number in range(40)])
    assert len(items) > 30
    assert {item.kind for item in items} == {"following", "mentioning"}
    assert {item.held_out for item in items} == {True, False}
    for item in items:
        passage, question = item.question.split("\n\n")
        sentences = [sentence if sentence.endswith(".") else f"{sentence}." for sentence in passage.split(". ")]
        assert passage.count(item.answer) == 1
        named = question.split('"')[1]
        if item.kind == "mentioning":
            assert [sentence for sentence in sentences if named in sentence] == [item.answer]
        else:
            assert sentences[[sentence.startswith(named) for sentence in sentences].index(True) + 1] == item.answer


class Words:
    """A tokenizer of words."""

    chat_template = "<|im_end|>"

    def __len__(self):
        return 2**16 + 1

    def __call__(self, text, add_special_tokens):
        return {
            "input_ids": [
                2**16 if word.endswith("<|im_end|>") else crc32(word.encode()) % 2**16 for word in text.split()
            ]
        }

    def apply_chat_template(self, messages, **ignored):
        return " ".join(message["content"] for message in messages)


def test_natural_items_are_drawn_from_files_that_hold_nothing_out(tmp_path, monkeypatch):
    files = [(f"{number}.py", SOURCE.replace("return a + b", f"return a + {number} + b")) for number in range(60)]
    monkeypatch.setattr(tasks, "python_files", lambda: files)
    small = dataclasses.replace(tasks.TASKS["D"], train_items=20, test_items=3, context=(0.5, 0.9))
    monkeypatch.setattr(tasks, "TASKS", {"D": small})
    (line,) = tasks.prepare(tmp_path / "data.npz", Words(), seeds=2).values()
    assert "context share" in line
    splits = [tasks.read_items(tmp_path / "data.npz", "D", split) for split in ("train0", "train1", "test")]
    first, second, test = ({tuple(tokens) for tokens in items.tokens.tolist()} for items in splits)
    assert (len(first), len(second), len(test)) == (20, 20, 3)
    assert first & second
    assert not test & (first | second)
    assert splits[0].tokens.max() == 2**16, "a vocabulary beyond 16 bits"
    items = tasks.items_of(Words(), "D", small, 20, seed=1)
    assert items.tokens.tolist() == splits[1].tokens.tolist()
    monkeypatch.setattr(tasks, "TASKS", {"D": dataclasses.replace(small, context=(0.95, 1.0))})
    with pytest.raises(SparsityError, match="20 items of train0 are wanted, and there are 0"):
        tasks.prepare(tmp_path / "data.npz", Words(), seeds=1)
