"""Tries row sparsity in the trainers that compute their own loss, and writes their table in docs/training.md.

``python tests/helpers/trainer_table.py [trainer ...]`` prints the table; with ``--write`` it is written.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from sparse_unsloth import attach, get_state
from sparse_unsloth.runtime.state import SparsityState

from tiny_models import COMMON, loras, make_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- trainers -->\n", "<!-- end of trainers -->\n"
HEAD = """| trainer | roles come from | context share | every row kept | quarter |
| --- | --- | ---: | ---: | ---: |
"""
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
EVERY_ROW, QUARTER = 1 - 1e-9, 0.25
STEPS, SAMPLES, TOLERANCE = 2, 8, 1e-10
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %} {% else %}"
    "<s> {{ m['content'] }} {% endif %}{% endfor %}"
)


@dataclass
class Result:
    """What a training gave.

    Attributes:
        roles: what its token roles came from.
        context: the share of context tokens; ``idle``: of completions without loss, where that is logged.
        error: the largest relative difference of the gradient from dense training, with every row kept.
        cosine: the smallest one of the gradient with a quarter of the context tokens.
        problems: what is wrong.
    """

    roles: str = ""
    context: float = 0.0
    idle: float | None = None
    error: float = 0.0
    cosine: float = 1.0
    problems: list[str] = field(default_factory=list)


def text(count: int, seed: int) -> str:
    """So many words, each with a space after it."""
    generator = torch.Generator().manual_seed(seed)
    return "".join(f"w{token} " for token in torch.randint(3, COMMON["vocab_size"], (count,), generator=generator))


def rows(**columns: int | Callable[[int], Any]) -> Any:
    """A data set; columns of so many words, or as functions of the sample's number."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                name: size(number) if callable(size) else text(size + number % 3, 100 * number + place)
                for place, (name, size) in enumerate(columns.items())
            }
            for number in range(SAMPLES)
        ]
    )


def messages(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": text(9, number)},
        {"role": "assistant", "content": text(4 + number % 2, 50 + number)},
    ]


def make_model(task: str = "CAUSAL_LM", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 1}
    kind = "CausalLM" if task == "CAUSAL_LM" else "SequenceClassification"
    base = getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**{**COMMON, **sizes}))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type=task))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.05)
    return model.double()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "optim": "sgd", "gradient_checkpointing": False, **changes,
    }  # fmt: skip


def of_trl(name: str, model: nn.Module, folder: Path, data: Any, extra: Any = None, **changes: Any) -> Any:
    """TRL's trainer of this name.

    Raises:
        ImportError: the installed TRL has none.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    source = importlib.import_module("trl")
    if not hasattr(source, f"{name}Trainer"):
        source = importlib.import_module(f"trl.experimental.{name.lower()}")
    config = getattr(source, f"{name}Config")(**settings(folder, **changes))
    tokenizer = make_tokenizer(TEMPLATE)
    make = getattr(source, f"{name}Trainer")
    return make(model=model, args=config, train_dataset=data, processing_class=tokenizer, **(extra or {}))


def plain_trainer(model: nn.Module, folder: Path, loss: Callable | None = None, **changes: Any) -> Any:
    """transformers' own trainer, of padded samples whose prompts have no labels."""
    samples = []
    for number in range(SAMPLES):
        ids = torch.randint(3, 96, (16,), generator=torch.Generator().manual_seed(number))
        samples.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < 10 + number % 3, -100)})
    arguments = transformers.TrainingArguments(**settings(folder, **changes))
    return transformers.Trainer(model=model, args=arguments, train_dataset=samples, compute_loss_func=loss)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A focal loss."""
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * (1 - torch.exp(-losses)) ** 2).mean()


def reward(completions: list[str], **_: Any) -> list[float]:
    """The second group of four completions has no best one, so its advantages are zero."""
    same = len(completions) // 2
    return [float(len(set(text.split()))) * (number < same) for number, text in enumerate(completions)]


def teacher() -> dict[str, Any]:
    return {"teacher_model": make_model(seed=5).merge_and_unload()}


PREFERENCES = {"prompt": 12, "chosen": 5, "rejected": 4}
SAMPLED = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8}
TRAINERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "SFT": lambda model, folder: of_trl("SFT", model, folder, rows(prompt=12, completion=5)),
    'SFT, `loss_type="dft"`': lambda model, folder: of_trl(
        "SFT", model, folder, rows(prompt=12, completion=5), loss_type="dft"
    ),
    "Trainer, `label_smoothing_factor`": partial(plain_trainer, label_smoothing_factor=0.1),
    "Trainer, `compute_loss_func`": partial(plain_trainer, loss=own_loss),
    "DPO": lambda model, folder: of_trl("DPO", model, folder, rows(**PREFERENCES)),
    "KTO": lambda model, folder: of_trl(
        "KTO", model, folder, rows(prompt=12, completion=5, label=lambda number: number % 2 == 0)
    ),
    "ORPO": lambda model, folder: of_trl("ORPO", model, folder, rows(**PREFERENCES)),
    "CPO": lambda model, folder: of_trl("CPO", model, folder, rows(**PREFERENCES)),
    "GKD": lambda model, folder: of_trl(
        "GKD", model, folder, rows(messages=messages), teacher(), lmbda=0.0, max_new_tokens=4
    ),
    "GRPO": lambda model, folder: of_trl("GRPO", model, folder, rows(prompt=12), {"reward_funcs": reward}, **SAMPLED),
    "RLOO": lambda model, folder: of_trl("RLOO", model, folder, rows(prompt=12), {"reward_funcs": reward}, **SAMPLED),
    "Reward": lambda model, folder: of_trl("Reward", model, folder, rows(chosen=12, rejected=9)),
}


def problems_of(name: str, folder: Path, kinds: Iterable[str] = tuple(CHECKPOINTING)) -> Result:
    """Trains two steps, and compares each step's gradient with that of the same loss in dense training.

    Raises:
        ImportError: this trainer is not installed.
    """
    result = Result()
    model = make_model("SEQ_CLS" if name == "Reward" else "CAUSAL_LM")
    attach(model, {"backward_rows": QUARTER})
    trainer = TRAINERS[name](model, folder)
    model = trainer.model
    labelled: set[bool] = set()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: labelled.add("labels" in kwargs) if torch.is_grad_enabled() else None, with_kwargs=True
    )
    trainer.compute_loss = partial(_compared, result, trainer.compute_loss, tuple(kinds))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result.roles = (
        "labels" if True in labelled else "the row that the head reads" if name == "Reward" else "the gradient"
    )
    result.context = sum(entry["sparsity/context_share"] for entry in log) / len(log)
    result.idle = log[0].get("sparsity/completion_without_loss")
    if len(log) != STEPS or not all(entry["sparsity/enabled"] == 1 for entry in log):
        result.problems.append("a step was not sparse")
    return result


def _compared(
    result: Result, compute_loss: Callable, kinds: Iterable[str], model: nn.Module, inputs: Any, **options: Any
):
    """Compares the gradients of the same loss, then computes it for the trainer."""
    state = get_state(model)
    for kind in kinds:
        model.gradient_checkpointing_disable()
        if kind != "none":
            model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[kind]})
            model.enable_input_require_grads()
        dense, every, quarter = (
            _gradient(state, share, compute_loss, model, inputs, options) for share in (None, EVERY_ROW, QUARTER)
        )
        error = ((every - dense).norm() / dense.norm()).item()
        cosine = torch.cosine_similarity(quarter, dense, dim=0).item()
        result.error, result.cosine = max(result.error, error), min(result.cosine, cosine)
        if not error <= TOLERANCE:
            result.problems.append(f"{kind}: every row kept, and {error:.1g} from dense training")
        if not 0.5 < cosine < 1 - 1e-9:
            result.problems.append(f"{kind}: a quarter of the rows, and the cosine is {cosine:.3f}")
    model.gradient_checkpointing_disable()
    return compute_loss(model, dict(inputs), **options)


def _gradient(
    state: SparsityState, share: float | None, compute_loss: Callable, model: nn.Module, inputs: Any, options: Any
) -> torch.Tensor:
    """The gradient with this share of the context tokens; None: of dense training."""
    before = state.scale, state.config
    state.scale = 0.0 if share is None else before[0]
    state.config = state.config.model_copy(update={"backward_rows": share or 1.0})
    try:
        compute_loss(model, dict(inputs), **options).backward()
        found = torch.cat(
            [parameter.grad.flatten() for parameter in loras(model).values() if parameter.grad is not None]
        )
    finally:
        state.scale, state.config = before
    model.zero_grad()
    return found.clone()


def table(results: dict[str, Result]) -> Iterable[str]:
    """The lines of the table."""
    for name, result in results.items():
        wrong = "; ".join(result.problems)
        yield (
            f"| {name} | {result.roles} | {result.context:.0%} | {wrong or f'{result.error:.0e}'} | "
            f"{result.cosine:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", default=list(TRAINERS), help="default: all")
    parser.add_argument("--write", action="store_true", help="write the table of all trainers")
    options = parser.parse_args()
    results = {}
    for name in TRAINERS if options.write else options.trainers:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = problems_of(name, Path(folder))
        print(*table({name: results[name]}), results[name].idle or "", file=sys.stderr)
    found = HEAD + "\n".join(table(results)) + "\n"
    if not options.write:
        print(found)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + found + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
