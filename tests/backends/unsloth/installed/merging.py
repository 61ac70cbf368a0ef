"""Merged micro-batches in the installed Unsloth's own trainer, the one that replaces TRL's, and transformers'."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from sparse_unsloth import attach

from tiny_models import loras, make_base, make_batch
from word_models import save_checkpoint

LENGTHS = [(5, 3), (2, 6), (7, 2), (4, 4), (9, 1), (3, 3), (6, 5), (1, 2), (8, 3), (2, 2)]
"""Of prompts and answers: ten samples, so that an epoch ends with an incomplete step."""
DENSE, ROWS = {"preset": "dense"}, {"backward_rows": 0.9999}  # all of them, through what chooses
LOGGED = ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "num_input_tokens_seen", "step")


def train(
    base, sparsity: dict, folder: Path, trainer: type, config: type, padding_free: bool
) -> tuple[dict, list, list, float]:
    """Trained weights, log lines, shapes of the forwards, and how far training moved the weights at least."""
    from unsloth_on_cpu import fused_by_unsloth

    model = fused_by_unsloth(copy.deepcopy(base), checkpointing=True)
    attach(model, sparsity)
    before = {name: one.detach().clone() for name, one in loras(model).items()}
    shapes = []

    def enter(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            shapes.append(list(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(enter, with_kwargs=True)
    samples = [make_batch(number, lengths=(pair,)) for number, pair in enumerate(LENGTHS)]
    for module in model.modules():  # as Unsloth's loader does; merged ones are longer
        module.max_seq_length = 12
    common = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.5,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "include_num_input_tokens_seen": "all",
    }
    data = [{name: sample[name][0].tolist() for name in ("input_ids", "labels")} for sample in samples]
    if trainer is Trainer:
        args = config(**common, remove_unused_columns=False)
        trainer = trainer(model=model, args=args, train_dataset=data, data_collator=DataCollatorWithFlattening())
    else:
        length = {"max_length": None} if padding_free else {"max_length": 64, "pad_to_multiple_of": 12}
        trainer = trainer(
            model=model,
            args=config(**common, **length, loss_type="nll", padding_free=padding_free, dataset_num_proc=1),
            train_dataset=Dataset.from_list(data),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    weights = {name: one.detach().clone() for name, one in loras(model).items()}
    return weights, log, shapes, min((weights[name] - one).norm().item() for name, one in before.items())


def prepare() -> tuple[torch.nn.Module, Callable]:
    return (
        make_base("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2),
        Trainer._inner_training_loop,
    )


def examine(prepared: tuple[torch.nn.Module, Callable]) -> dict[str, dict]:
    """By trainer: how far weights and log lines are from those without merging, and the shapes of the forwards."""
    base, loop = prepared
    folder = Path.cwd()
    save_checkpoint(folder)
    import trl
    import unsloth
    from unsloth.models import llama, rl
    from unsloth.models._utils import patch_gradient_accumulation_fix

    from unsloth_on_cpu import replace_gpu_kernels

    def _fast_inner_training_loop(self, *args, **kwargs):  # by this name Unsloth knows its own
        return loop(self, *args, **kwargs)

    llama.FastLlamaModel.pre_patch()
    replace_gpu_kernels()
    Trainer._inner_training_loop = _fast_inner_training_loop
    patch_gradient_accumulation_fix(Trainer)
    own = unsloth.UnslothTrainer, unsloth.UnslothTrainingArguments
    rl._patch_trl_rl_trainers("sft_trainer")
    compiled = trl.SFTTrainer, trl.SFTConfig
    assert compiled[0].__name__ == "UnslothSFTTrainer"
    found = {}
    for name, sparsity, kind, padding_free in (
        ("rows, padding-free", ROWS, own, True),
        ("dense, padded", DENSE, own, False),
        ("dense, padding-free, compiled", DENSE, compiled, True),
        ("dense, padding-free, transformers", DENSE, (Trainer, TrainingArguments), True),
    ):
        weights, log, alone, _ = train(base, sparsity, folder, *kind, padding_free)
        ours, ours_log, merged, moved = train(base, {**sparsity, "merge_micro_batches": 4}, folder, *kind, padding_free)
        found[name] = {
            "weights": max(((ours[key] - value).norm() / value.norm()).item() for key, value in weights.items()),
            "log": max(
                abs(line[key] - other[key])
                for line, other in zip(ours_log, log, strict=True)
                for key in LOGGED
                if key in line.keys() | other.keys()
            ),
            "moved": moved,
            "alone": alone,
            "merged": merged,
        }
    return found
