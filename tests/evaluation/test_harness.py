"""Tests suites of lm-eval from end to end on a tiny model, and their errors."""

import json

import pytest

from sparse_unsloth.cli import main
from sparse_unsloth.evaluation.model import EvaluationError

import word_models
from outputs import results


def test_published_protocol_through_lm_eval(trained, tmp_path, monkeypatch):
    """lm-eval runs offline; only the model's answers are replaced."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    asked = []

    def answer(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return [found[request.args[0].split("\n")[3]] for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", answer)
    found = {
        "is it": "True it is, not false",
        "which": "answer 2",
        "how many": "It is 3 + 4 = 7.",
        "how much": "1,200.50",
    }
    csr = [("is it", "true"), ("which", "answer1")]
    maths = [("how many", 7.0), ("how much", "1200.50"), ("how much", "12")]
    for suite, rows, scores in (("commonsense", csr, 1 / 2), ("arithmetic", maths, 2 / 3)):
        file = tmp_path / f"{suite}.json"
        file.write_text(json.dumps([{"instruction": text, "input": "", "answer": wanted} for text, wanted in rows]))
        command = ["evaluate", str(trained / "text"), "--suite", suite, "--data", f"mine={file}"]
        assert main([*command, "--output-dir", str(tmp_path)]) == 0
        found_ = results(tmp_path, suite)
        assert found_["scores"] == {"mean": pytest.approx(scores), "mine": pytest.approx(scores)}
        assert len(found_["items"]) == len(rows)
        assert found_["items"]["mine/0"] == 1.0
        assert found_["protocol"] == "published"
    assert asked[0].startswith("Below is an instruction")
    assert asked[0].endswith("### Instruction:\nis it\n\n### Response:\n")


def test_lm_eval_generates_with_the_adapter(trained, tmp_path):
    pytest.importorskip("lm_eval")
    file = word_models.save_rows(tmp_path / "test.jsonl", [{"instruction": word_models.text(3), "answer": "3"}] * 2)
    command = ["evaluate", str(trained / "text"), "--suite", "arithmetic", "--data", f"svamp={file}"]
    assert main([*command, "--max-new-tokens", "2", "--output-dir", str(tmp_path)]) == 0
    assert set(results(tmp_path, "arithmetic")["scores"]) == {"mean", "svamp"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("svamp", "write NAME=FILE, given 'svamp'"),
        ("svamp=none.json", "there is no file none.json"),
        ("svamp={wrong}", "has no instruction and no answer (its columns: question)"),
    ],
)
def test_wrong_data_for_lm_eval(trained, tmp_path, capsys, data, message):
    pytest.importorskip("lm_eval")
    wrong = word_models.save_rows(tmp_path / "wrong.jsonl", [{"question": "a"}])
    command = ["evaluate", str(trained / "text"), "--suite", "arithmetic", "--data", data.format(wrong=wrong)]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_likelihood_metrics_are_collected():
    from sparse_unsloth.evaluation.harness import collect

    found = {
        "results": {
            "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_norm,none": 0.75, "acc_stderr,none": 0.1},
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5},
        },
        "samples": {
            "piqa": [{"doc_id": 3, "filter": "none", "acc": 0.0, "acc_norm": 1.0}],
            "gsm8k": [
                {"doc_id": 0, "filter": "strict-match", "exact_match": 0.0},
                {"doc_id": 0, "filter": "flexible-extract", "exact_match": 1.0},
            ],
        },
    }
    scores, items = collect(found)
    assert scores == {"mean": 0.5, "piqa": 0.75, "gsm8k": 0.25}
    assert items == {"piqa/3": 1.0, "gsm8k/0": 0.0}
    with pytest.raises(EvaluationError, match="gave x no metric"):
        collect({"results": {"x": {"bleu,none": 1.0}}})
