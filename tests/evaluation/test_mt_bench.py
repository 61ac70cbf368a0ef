"""Tests MT-Bench from end to end on a tiny model, its table by hand, and its errors."""

import pytest
import torch

from sparse_unsloth.cli import main
from sparse_unsloth.evaluation import mt_bench
from sparse_unsloth.evaluation.model import find_source, load
from sparse_unsloth.evaluation.results import read_lines

import word_models
from outputs import results

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["one two", "three"]},
    {"question_id": 101, "category": "reasoning", "turns": ["four", "five six"]},
]


@pytest.fixture
def questions(tmp_path):
    return word_models.save_rows(tmp_path / "question.jsonl", QUESTIONS)


def test_mt_bench_answers_in_fastchats_format(trained, questions, tmp_path, monkeypatch):
    seen = []
    plain = mt_bench.generate

    def watch(model, tokenizer, prompts, done, **options):
        seen.extend(prompts)
        plain(model, tokenizer, prompts, done, **options)

    monkeypatch.setattr(mt_bench, "generate", watch)
    command = ["evaluate", str(trained / "text"), "--suite", "mt-bench", "--questions", questions]
    assert main([*command, "--max-new-tokens", "3", "--output-dir", str(tmp_path / "text" / "out")]) == 0
    rows = {row["question_id"]: row for row in read_lines(tmp_path / "text/out/mt-bench/model_answer/text.jsonl")}
    assert set(rows) == {81, 101}
    for row in rows.values():
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (row["model_id"], row["choices"][0]["index"], len(row["choices"][0]["turns"])) == ("text", 0, 2)
    second = [prompt for prompt in seen if "### Instruction:\nfive six" in prompt]
    first_answer = rows[101]["choices"][0]["turns"][0]
    assert len(second) == 1
    assert f"### Instruction:\nfour\n\n### Response:\n{first_answer}\n\n### Instruction:\nfive six" in second[0]


def test_mt_bench_table_by_category(trained, questions, tmp_path, capsys):
    judged = [(81, 1, 8), (81, 2, 4), (101, 1, 5), (101, 2, -1), (101, 1, 6)]
    rows = [{"question_id": q, "turn": turn, "score": score, "model": "text"} for q, turn, score in judged]
    file = word_models.save_rows(tmp_path / "gpt-4_single.jsonl", [*rows, {**rows[0], "model": "other", "score": 1}])
    command = ["evaluate", str(trained / "text"), "--suite", "mt-bench", "--questions", questions, "--judgements"]
    out = tmp_path / "text" / "out"
    assert main([*command, file, "--output-dir", str(out)]) == 0
    found = results(out, "mt-bench")
    wanted = {"score": 6, "turn 1": 7, "turn 2": 4, "reasoning": 6, "writing": 6}
    assert found["scores"] == wanted
    assert next(iter(found["scores"])) == "score"
    assert found["items"] == {"81/1": 8, "81/2": 4, "101/1": 6}
    other = word_models.save_rows(tmp_path / "none.jsonl", [{**rows[0], "model": "other"}])
    assert main([*command, other, "--output-dir", str(out)]) == 2
    assert "judges no model 'text'; it judges other" in capsys.readouterr().err


def test_mt_bench_agrees_with_fastchats_own_average():
    """As its show_result.py does: the mean over all rated turns, by pandas."""
    pandas = pytest.importorskip("pandas")
    rows = [{"question_id": i % 7, "turn": 1 + i % 2, "score": (3 * i) % 11 - (i == 5)} for i in range(14)]
    frame = pandas.DataFrame(rows)
    frame = frame[frame["score"] != -1]
    found, _ = mt_bench.score(rows, dict.fromkeys(range(7), "all"))
    assert found["score"] == pytest.approx(frame["score"].mean())
    for turn, mean in frame.groupby("turn")["score"].mean().items():
        assert found[f"turn {turn}"] == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_exported_folder_loads_without_this_package(trained, questions, tmp_path, kind):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    out = tmp_path / "text" / "out"
    command = ["evaluate", str(trained / "text"), "--suite", "mt-bench", "--questions", questions, "--export", kind]
    assert main([*command, "--max-new-tokens", "1", "--output-dir", str(out)]) == 0
    auto = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    exported = auto.from_pretrained(out / "mt-bench" / "model")
    ids = {"input_ids": torch.tensor([[2, 5, 6]])}
    with torch.no_grad():
        torch.testing.assert_close(exported(**ids).logits, load(find_source(str(trained / "text")))[0](**ids).logits)


def test_mt_bench_errors(trained, tmp_path, capsys):
    command = ["evaluate", str(trained / "text"), "--suite", "mt-bench", "--output-dir", str(tmp_path / "out")]
    wrong = word_models.save_rows(tmp_path / "wrong.jsonl", [{"question": "x"}])
    for more, message in (
        ([], "give --questions FILE (it is in FastChat's repository"),
        (["--questions", "none.jsonl"], "there is no file none.jsonl"),
        (["--questions", wrong], "is not FastChat's question file"),
        (["--base", "--questions", wrong, "--export", "adapter"], "is no adapter"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
