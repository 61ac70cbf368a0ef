"""Runs recipes from end to end on one GPU, without a network: trains dense and sparse, evaluates, compares.

SmolLM2-135M-Instruct is trained by the recipes codefeedback and wizardlm on local files of their columns. The script
makes these from the Python sources of installed packages: functions to write from their documentation, and functions to
explain. Then HumanEval is generated and scored, and the runs are compared. This tests the pipeline, and the effect of
sparsity in it; a model of this size and so few steps say nothing about 8B models.

    python benchmarks/recipes.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --work DIR --out OUT --seconds 480

Seed 0 of all four trainings comes first, then further seeds while time is left. Finished work in ``--work`` is not
repeated. ``--out`` gets the comparisons, the completions' scores and every run's figures.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from sparse_unsloth.utils.options import real, whole

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_FUSED_CE_COMPILE_DISABLE": "1",
    "UNSLOTH_DATASET_NUM_PROC": "none",
}
SPARSITY = {"dense": ["--sparsity", "dense"], "sparse": ["--sparsity", "dense", "--sparsity.mlp", '{"1-29": 0.5}']}
RECIPES = ("codefeedback", "wizardlm")
SAMPLES, HELD_OUT, EVALUATION_SECONDS = 3000, 64, 110
FUNCTIONS = 4500
"""Enough to draw from: some do not fit the recipe's length."""
PACKAGES = ("torch", "numpy", "transformers", "networkx", "sympy")


def functions() -> Iterator[tuple[str, str, str, list[str]]]:
    """``(name, documentation, code without it, neighbours)`` of documented functions of installed packages."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        roots += [Path(folder) for folder in spec.submodule_search_locations] if spec else []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if {"test", "tests", "testing", "site-packages"} & set(path.relative_to(root).parts):
                continue
            try:
                source = path.read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (SyntaxError, ValueError, OSError):
                continue
            found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            heads = [f"def {node.name}({ast.unparse(node.args)})" for node in found]
            for place, node in enumerate(found):
                documentation = ast.get_docstring(node)
                if not documentation or not 60 <= len(documentation) <= 900 or len(node.body) < 2:
                    continue
                bare = ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []})
                code = ast.unparse(ast.fix_missing_locations(bare))
                if 80 <= len(code) <= 900:
                    yield node.name, documentation, textwrap.dedent(code), heads[max(0, place - 4) : place + 5]


def make_data(folder: Path) -> None:
    """``codefeedback.jsonl`` (query, answer) and ``wizardlm.jsonl`` (instruction, output) in ``folder``."""
    by_name: dict[str, list] = {}
    for name, *entry in functions():
        by_name[name] = entry
        if len(by_name) == FUNCTIONS:
            break
    else:
        raise SystemExit(f"only {len(by_name)} documented functions are installed; {FUNCTIONS} are needed.")
    found = list(by_name.items())
    random.Random(0).shuffle(found)
    code, prose = [], []
    for name, (documentation, source, neighbours) in found:
        block = f"```python\n{source}\n```"
        around = "\n".join(neighbours)
        task = f"Write the Python function `{name}`.\n\n{documentation}\n\nIts module defines:\n{around}"
        code.append({"query": task, "answer": f"Here is the function.\n\n{block}\n\nIt does what was asked."})
        asked = f"Say in a few sentences what `{name}` does.\n\n{block}\n\nIts module defines:\n{around}"
        prose.append({"instruction": asked, "output": documentation})
    for name, rows in (("codefeedback", code), ("wizardlm", prose)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def convert(gguf: Path, model: Path) -> None:
    """Converts the GGUF file to a checkpoint once, in a process that has not imported Unsloth."""
    if (model / "config.json").is_file():
        return
    partial = model.with_name(f"{model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    code = "import sys, pathlib as p, sparse_unsloth.data.smollm2 as s; s.convert_gguf(*map(p.Path, sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, str(gguf.resolve()), str(partial)], check=True)
    partial.rename(model)


def train(name: str, kind: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Trains one run of the recipe, unless it is finished; returns its folder."""
    from sparse_unsloth.training.recipe import load_recipe
    from sparse_unsloth.training.run import run

    folder = arguments.work / f"{name}-{kind}-{seed}"
    metrics = folder / "metrics.json"
    if metrics.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "model_name_or_path": arguments.work / "model", "output_dir": folder, "seed": seed,
        "backend": arguments.backend, "dataset_name": arguments.work / f"{name}.jsonl",
        "dataset_size": arguments.samples, "dataset_test_size": arguments.held_out,
        "max_steps": arguments.steps, "learning_rate": 5e-4, "save_strategy": "no",
        "logging_steps": max(1, arguments.steps // 24), "disable_tqdm": "true", "optim": "adamw_torch",
        **arguments.changes,
    }  # fmt: skip
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    recipe = load_recipe(name, [*words, *SPARSITY[kind]])
    began = time.perf_counter()
    try:
        found = run(recipe).metrics
    except Exception:
        # GPU time is short: a run that was trained and not evaluated is used too.
        if not metrics.is_file():
            raise
        traceback.print_exc()
        found = json.loads(metrics.read_text()) | {"evaluation": {"eval_loss": float("nan")}}
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    print(
        f"== {folder.name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, held out {found['evaluation']['eval_loss']:.4f}, "
        f"{found['tokens_per_second']:.0f} tokens/s, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return folder


def command(*words: str | Path) -> None:
    """Runs ``sparse-unsloth ...`` in a new process, which Unsloth has not patched."""
    print(f"== sparse-unsloth {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "sparse_unsloth.cli", *map(str, words)], check=True)


def gather(folders: dict[str, list[Path]], out: Path) -> None:
    """Packs figures and completions of every run into one archive, without the adapters."""
    kept = {"metrics.json", "recipe.yaml", "environment.json", "results.json", "generated_completions.jsonl"}
    with tarfile.open(out / "runs.tar.gz", "w:gz") as archive:
        for folder in (folder for group in folders.values() for folder in group):
            for path in sorted(folder.rglob("*")):
                if path.name in kept:
                    archive.add(path, path.relative_to(folder.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="model, data and runs")
    parser.add_argument("--out", type=Path, required=True, help="results, eight files at most")
    parser.add_argument(
        "--seconds", type=real(least=0), default=480, help="in all; what is begun is ended (default: 480)"
    )
    parser.add_argument("--steps", type=whole(), default=60, help="of each training (default: 60)")
    parser.add_argument("--seeds", type=whole(), default=3, help="at most so many (default: 3)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--limit", type=whole(), help="HumanEval's first so many problems")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal at tiny size")
    arguments = parser.parse_args()
    began = time.perf_counter()
    os.environ.update(ENVIRONMENT)
    arguments.changes, arguments.samples, arguments.held_out = {}, SAMPLES, HELD_OUT
    if arguments.cpu:
        arguments.samples, arguments.held_out = 48, 4
        arguments.changes = {"use_cpu": "true", "bf16": "false", "dtype": "float32", "max_length": 384}
        arguments.backend = "peft"
        arguments.changes |= {"per_device_train_batch_size": 1, "gradient_checkpointing": "false"}
    else:
        importlib.import_module("unsloth")
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    convert(arguments.gguf, arguments.work / "model")
    if not (arguments.work / "wizardlm.jsonl").is_file():
        make_data(arguments.work)
    print(f"== ready after {time.perf_counter() - began:.0f} s", flush=True)

    folders: dict[str, list[Path]] = {name: [] for name in RECIPES}
    for seed in range(arguments.seeds):
        started = time.perf_counter()
        for name in RECIPES:
            folders[name] += [train(name, kind, seed, arguments) for kind in SPARSITY]
        now = time.perf_counter()
        if now - began + (now - started) + EVALUATION_SECONDS > arguments.seconds:
            break
    limit = [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    longest = "8" if arguments.cpu else "320"
    suite = ["--suite", "humaneval", "--execute-code", "--max-new-tokens", longest, "--batch-size", "164", *limit]
    command("evaluate", *folders["codefeedback"], *suite)
    command("evaluate", folders["codefeedback"][0], "--base", *suite)
    gather(folders, arguments.out)
    missing = [name for name in ("scipy", "matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"== not compared here, {', '.join(missing)} is missing: unpack runs.tar.gz and compare its folders")
    for name in () if missing else RECIPES:
        folder = arguments.work / f"comparison-{name}"
        command("compare", *folders[name], "--output-dir", folder)
        for suffix in ("md", "json", "png"):
            shutil.copy(folder / f"comparison.{suffix}", arguments.out / f"{name}.{suffix}")
    base = folders["codefeedback"][0] / "evaluation-base" / "humaneval" / "results.json"
    print(
        f"== base model: {json.loads(base.read_text())['scores']}; all done after {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
