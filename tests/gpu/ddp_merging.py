"""Trains on several GPUs (DDP) by an SFTTrainer, with what `auto` chooses and densely, and compares losses and speed.

A script, not a test: Unsloth patches its process for good, and each arm is a launch of its own. No network is needed.

    python tests/gpu/ddp_merging.py --make /tmp/llama1b --sizes 1b
    for arm in dense auto; do
      torchrun --nproc-per-node 2 tests/gpu/ddp_merging.py --model /tmp/llama1b --arm $arm --out runs/ddp
    done
    torchrun --nproc-per-node 2 tests/gpu/ddp_merging.py --model /tmp/llama1b --arm auto --fail --out runs/ddp
    python tests/gpu/ddp_merging.py --compare runs/ddp

``--fail``: memory runs out on the second process alone, in its second merged micro-batch. Each rank has other
data.
``--arm exact`` is `auto` with every row in backward, ``merged`` with four micro-batches as one by hand. On
a CPU: ``--backend peft --make DIR --sizes tiny``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
}  # fmt: skip
ARMS = {"dense": {"preset": "dense"}, "auto": "auto", "exact": {"preset": "auto", "backward_rows": 1.0}}
ARMS["merged"] = {**ARMS["exact"], "merge_micro_batches": 4}
WARM_UP = 12
TOLERANCE = 0.01
"""Of losses in bf16, which adds in other orders."""


def rows(rank: int, count: int, vocabulary: int, longest: float) -> list[dict]:
    """Chat-sized prompts and answers of random tokens; the second process's are longer."""
    draw, found = random.Random(rank), []
    for _ in range(count):
        prompt, answer = (
            min(int(draw.lognormvariate(mean, 0.6) * longest * (1 + 0.3 * rank)) + 4, 900) for mean in (4.1, 5.4)
        )
        ids = [draw.randrange(10, vocabulary) for _ in range(prompt + answer)]
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def train(args: argparse.Namespace) -> None:
    if args.backend == "unsloth":
        import unsloth  # noqa: F401
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from sparse_unsloth import FastSparseLanguageModel, get_state

    rank = int(os.environ["RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model, tokenizer = FastSparseLanguageModel.from_pretrained(
        str(args.model), max_seq_length=2048, load_in_4bit=args.in_4bit, backend=args.backend,
        **({"device_map": {"": torch.cuda.current_device()}} if cuda else {}),
    )  # fmt: skip
    arguments = {} if args.checkpointing else {"use_gradient_checkpointing": False}
    model = FastSparseLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, random_state=0, sparsity=ARMS[args.arm], **arguments
    )
    data = rows(rank, args.steps * 16, model.config.vocab_size, 1.0 if cuda else 0.1)
    config = SFTConfig(
        output_dir=str(args.out / "trainer"), max_steps=args.steps, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, learning_rate=2e-4, lr_scheduler_type="constant", logging_steps=1, bf16=cuda,
        use_cpu=not cuda, save_strategy="no", report_to="none", disable_tqdm=True, seed=0, padding_free=True,
        max_length=None, gradient_checkpointing=args.checkpointing, ddp_find_unused_parameters=False,
        loss_type="nll",
    )  # fmt: skip
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    state, ends, failed, plan = get_state(model), [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *ignored, **others):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            decision = None if state.auto is None else state.auto.decision
            if decision is not None:
                plan[:] = [*decision.chosen, decision.merged, decision.peak and round(decision.peak / 2**30, 1)]

    def enter(module, given, kwargs):
        hidden = given[0] if given else kwargs["hidden_states"]
        merged = hidden.shape[0] * hidden.shape[1] > args.longest and torch.is_grad_enabled()
        failed.extend([1] * merged)
        if merged and len(failed) == 2:
            raise torch.OutOfMemoryError("as --fail wants it")

    trainer.add_callback(Clock())
    if args.fail and rank == 1:
        layers = model.get_base_model().model.layers
        layers[len(layers) // 2].register_forward_pre_hook(enter, with_kwargs=True)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    plain = [end - begin for begin, end in itertools.pairwise(ends)]
    found = {
        "arm": args.arm + "-failed" * args.fail, "losses": [line["loss"] for line in log],
        "merged": [line.get("sparsity/merged_micro_batches", 1) for line in log],
        "step_s": round(statistics.median(plain[WARM_UP:] or plain), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "graphs_gib": round(state.graphs.memory() / 2**30, 2) if state.graphs else 0, "failed": len(failed) >= 2,
        "plan": plan or None,
        "checksum": float(sum(p.detach().double().abs().sum() for p in model.parameters() if p.requires_grad)),
    }  # fmt: skip
    (args.out / f"{found['arm']}-{rank}.json").write_text(json.dumps(found))
    print(rank, {name: value for name, value in found.items() if name not in ("losses", "merged")}, flush=True)


def compare(folder: Path) -> int:
    """Prints each arm, and what does not hold; returns 1 if something does not."""
    arms, wrong = {}, []
    for path in sorted(folder.glob("*-[0-9].json")):
        found = json.loads(path.read_text())
        arms.setdefault(found["arm"], []).append(found)
    for name, ranks in arms.items():
        first = ranks[0]
        peaks = " and ".join(f"{one['peak_gib']} + graphs {one['graphs_gib']}" for one in ranks)
        print(
            f"{name}: {first['step_s']} s a step, merged {first['merged'][-1]}, plan {first['plan']}, peak {peaks} GiB"
        )
        if len({json.dumps([one["merged"], one["plan"]]) for one in ranks}) > 1:
            wrong.append(f"{name}: the ranks' plans differ")
        if len({one["checksum"] for one in ranks}) > 1:
            wrong.append(f"{name}: the ranks' weights differ")
        if "failed" in name and not any(one["failed"] for one in ranks):
            wrong.append(f"{name}: memory never ran out")
        exact = first["plan"] is None or first["plan"][0] == 1
        pairs = list(zip(first["losses"], arms["dense"][0]["losses"], strict=True))
        if exact and max(abs(ours / other - 1) for ours, other in pairs) > TOLERANCE:
            wrong.append(f"{name}: the losses are not those of dense training")
    print(*(wrong or ["all holds"]), sep="\n")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--sizes", choices=SIZES, default="1b")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--arm", choices=ARMS, default="auto")
    parser.add_argument("--backend", default="unsloth")
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--in-4bit", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of a micro-batch that is not merged, at most")
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    if args.make is not None:
        from sparse_unsloth.bench.families import write_models

        write_models(args.make.parent, ("llama",), **SIZES[args.sizes])
        (args.make.parent / "llama").rename(args.make)
        return 0
    if args.compare is not None:
        return compare(args.compare)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
