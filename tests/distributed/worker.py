"""What two processes and one both compute in `test_distributed`; forked from it, or launched.

PYTHONPATH=tests/helpers accelerate launch ... tests/distributed/worker.py OUT
PYTHONPATH=tests/helpers python tests/distributed/worker.py OUT
"""

import json
import os
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from sparse_unsloth import attach, get_state
from sparse_unsloth.errors import SparsityError

from tiny_models import always, loras, make_base, make_batch, make_lora

STEPS, ACCUMULATION, RANKS = 3, 2, 2
FOUR_BIT = {"hidden_size": 128, "intermediate_size": 256}
"""Nested quantisation wants blocks of 64 within a row; a storage that can be sharded wants float."""
NO_CHANNELS = {"mlp": {}, "self_attn": {}}
FEW, EVERY = NO_CHANNELS | {"backward_rows": 0.25}, NO_CHANNELS | {"backward_rows": 0.9999}
"""Of a backward pass; the second is rounded up to all rows."""
CASES = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "every row context": {"sparsity": {"dense_tokens": "none"}},
    "4-bit": {"four_bit": True, "checkpointing": True},
    "few rows": {"sparsity": FEW},
    "few rows, 4-bit": {"sparsity": FEW, "four_bit": True, "checkpointing": True},
    "every row": {"sparsity": EVERY, "checkpointing": True},
}
LEFT_OUT = {"ddp": ("few rows, 4-bit",), "fsdp2": ("every row context", "few rows")}
"""Cases whose pairs of settings the others have: what of a case depends on sharding meets it elsewhere."""
TRAINERS = {"ddp": ("trainer", "trainer, few rows", "trainer, merged"), "fsdp2": ("trainer", "trainer, merged")}
"""The second meets sharding as a case, and a trainer under DDP."""


def micro_batch(step: int, number: int, rank: int) -> dict[str, torch.Tensor]:
    """One rank's micro-batch: in some it has no context rows, or no dense ones, and the other rank has both."""
    batch = make_batch(seed=100 * step + 10 * number + rank)
    if (step, number, rank) in ((0, 1, 1), (2, 0, 0)):
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    if (step, number, rank) in ((1, 0, 1), (1, 1, 0)):
        batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch


def make_model(checkpointing: bool = False, four_bit: bool = False, sparsity: dict | None = None):
    base = make_base("llama", **(FOUR_BIT if four_bit else {}))
    if four_bit:
        pack(base)
    model = make_lora(base=base)
    attach(model, always(**(sparsity or {})))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def pack(base) -> None:
    """Quantises the decoder layers' projections, in a storage that FSDP2 can shard."""
    for name, module in list(base.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", quant_storage=torch.float32
            )
            packed.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", quant_storage=torch.float32, module=packed
            )
            parent, _, child = name.rpartition(".")
            setattr(base.model.layers.get_submodule(parent), child, packed.to("cpu"))


def train(model, ranks: range, scale: float) -> dict:
    """Losses of each step and the trained parameters; ``ranks`` are those whose micro-batches are this process's."""
    get_state(model).begin_training("loop", max_steps=STEPS)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        get_state(model).set_step(step)
        batches = [micro_batch(step, number, rank) for number in range(ACCUMULATION) for rank in ranks]
        every = [micro_batch(step, number, rank) for number in range(ACCUMULATION) for rank in range(RANKS)]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in every)
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=tokens).loss
            (loss * scale).backward()
            total += loss.detach()
        optimiser.step()
        optimiser.zero_grad()
        get_state(model).verify_step()
        losses.append(total)
    losses = torch.stack(losses)
    if scale != 1:
        dist.all_reduce(losses)
    return {"losses": losses, **{strip(name): whole(p).detach().clone() for name, p in loras(model).items()}}


def strip(name: str) -> str:
    return name.removeprefix("module.")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def alone(case: str) -> dict:
    """One process with the whole global batch."""
    return train(make_model(**CASES[case]), range(RANKS), scale=1)


def together(case: str, how: str) -> dict:
    model = make_model(**CASES[case])
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model)
    rank = dist.get_rank()
    return train(model, range(rank, rank + 1), scale=RANKS)


# A trainer, launched by accelerate

ROWS = [{name: value[0].tolist() for name, value in make_batch(n, lengths=((9, 4),)).items()} for n in range(16)]


def run_trainer(folder: Path, processes: int, sparsity: dict) -> dict:
    """Four steps of four samples each, two of them sparse."""
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // processes,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        max_grad_norm=0.0,
        optim="sgd",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        average_tokens_across_devices=True,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate has FSDP for accelerators only, so the CPU has to pass for one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = make_lora()
    attach(model, always(**sparsity, start_step=1, end_step=3))
    model.enable_input_require_grads()
    trainer = Trainer(model=model, args=args, train_dataset=ROWS)
    trainer.train()
    log = trainer.state.log_history
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    trainer.save_model(str(folder / "adapter"))
    estimator = get_state(model).estimator
    return {
        "sharded": sharded,
        "losses": torch.tensor([line["loss"] for line in log if "loss" in line]),
        "enabled": [line["sparsity/enabled"] for line in log if "loss" in line],
        "merged": [line.get("sparsity/merged_micro_batches", 1) for line in log if "loss" in line],
        "gain": torch.zeros(0) if estimator is None else estimator.layers[1].gain["mlp"],
        "parameters": {name: whole(p).detach().clone() for name, p in loras(model).items()},
    }


def run_trainers(folder: Path, processes: int, names: tuple[str, ...]) -> dict[str, dict]:
    """With an estimator that is calibrated when training begins, with few rows in backward, and merged micro-batches.

    One process does not merge, so that merged micro-batches are compared with those that ran one by one.
    """
    kind = {"kind": "prior", "rank": 4, "calibration_samples": 8, "path": str(folder / "estimator.safetensors")}
    merge = {"merge_micro_batches": 4} if processes > 1 else {}
    channels = {"mlp": {"1-2": 0.5}, "self_attn": {"1-2": 0.5}, "estimator": kind}
    settings = {
        "trainer": (folder, channels),
        "trainer, few rows": (folder / "rows", FEW),
        "trainer, merged": (folder / "merged", EVERY | merge),
    }
    return {name: run_trainer(settings[name][0], processes, settings[name][1]) for name in names}


# Faults that one rank alone could hide


def faults() -> dict[str, str]:
    """What each rank says where something is wrong on one of them."""
    found = {}
    rank = dist.get_rank()
    # Rank 1 holds other weights.
    model = make_lora(seed=rank)
    attach(model, always())
    found["other weights"] = message_of(lambda: get_state(model).begin_training("loop", max_steps=3))
    # Rank 0 cannot make an estimator.
    model = make_lora()
    attach(model, always(estimator={"kind": "prior"}))
    found["rank 0 fails"] = message_of(lambda: get_state(model).begin_training("loop", max_steps=3))
    # Nobody began.
    model = make_lora()
    attach(model, always())
    found["not begun"] = message_of(lambda: model(**make_batch()))
    # FSDP2 around each projection of the MLP.
    for case, pick in (("small units", "mlp.down_proj"), ("lora units", "mlp.down_proj.lora_A.default")):
        model = make_lora()
        attach(model, always())
        for name, module in model.named_modules():
            if name.endswith(pick):
                fully_shard(module)
        found[case] = message_of(lambda model=model: get_state(model).begin_training("loop", max_steps=3))
    return found


def message_of(function) -> str:
    try:
        function()
    except SparsityError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        results = {case: alone(case) for case in CASES}
        results |= run_trainers(folder, 1, TRAINERS["ddp"])
        torch.save(results, folder / "alone.pt")
        return
    PartialState(cpu=True)
    how = "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"
    rank = dist.get_rank()
    results = {"how": how, "world": dist.get_world_size()}
    results |= run_trainers(folder, RANKS, TRAINERS[how])
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # from here on there is no accelerate between
    for case in CASES:
        if case not in LEFT_OUT[how]:
            results[case] = together(case, how)
    if how == "ddp":
        (folder / f"faults-{rank}.json").write_text(json.dumps(faults()))
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
