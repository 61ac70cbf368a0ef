"""Runs one training step of small random models in many settings and saves what came out.

A script, not a test: Unsloth patches its process for good, so each backend has one of its own.

    python tests/gpu/compare_backends.py unsloth|peft MODELS_FOLDER OUT.pt FAMILY,FAMILY,...

``OUT.pt``: ``steps``, ``{(family, "4bit" | "bf16", checkpointing, sparsity, layout): {"loss", "gradients"}}``, and
``prefill``, the logits of two decoded tokens by ``(backend, family, "4bit" | "bf16", sparse prefill)``.
"""

import gc
import sys
from pathlib import Path

import torch

from sparse_unsloth.bench.trial import load

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
NOTHING_DROPPED = 1e-9
LENGTHS = (200, 256, 131, 256)
PROMPTS = (150, 200, 100, 255)


def sparsity_settings():
    common = {"criterion": "magnitude", "start_step": 0, "end_step": 1.0}
    return {
        "plain": None,
        "exact-removal": {"preset": "dense"},
        "nothing-dropped": {"mlp": {"all": NOTHING_DROPPED}, "self_attn": {"all": NOTHING_DROPPED}, **common},
        "sparse": {"mlp": {"1-3": 0.75}, "self_attn": {"2-3": 0.5}, **common},
        "every row": {"backward_rows": 1 - NOTHING_DROPPED},
        "few rows": {"backward_rows": 0.25},
        "sparse, all rows": {"mlp": {"1-3": 0.75}, "self_attn": {"2-3": 0.5}, "exact_removal": False, **common},
    }


def settings(backend, families):
    """``(family, four_bit, checkpointing, sparsities)`` that a backend runs."""
    if backend == "peft":
        return [
            ("llama", four_bit, mode, ("sparse", "few rows")) for four_bit in (False, True) for mode in (False, True)
        ]
    everything = tuple(sparsity_settings())
    runs = [(family, False, "unsloth", everything) for family in families if family != "llama"]
    if "llama" in families:
        runs += [
            ("llama", four_bit, mode, everything) for four_bit in (False, True) for mode in (False, True, "unsloth")
        ]
    return runs


def batches(vocab_size, device):
    """The same samples padded on the right, and padding-free as TRL under Unsloth sends them."""
    generator = torch.Generator().manual_seed(0)
    longest = max(LENGTHS)
    ids = torch.full((len(LENGTHS), longest), 2)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        ids[row, :length] = torch.randint(3, vocab_size, (length,), generator=generator)
        labels[row, prompt:length] = ids[row, prompt:length]
        mask[row, :length] = 1
    keep = mask.bool()
    padded = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    packed = {
        "input_ids": ids[keep][None],
        "labels": labels[keep][None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "packed_seq_lengths": torch.tensor(LENGTHS, dtype=torch.int32),
        "use_cache": False,
    }
    return [
        {name: value.to(device) if hasattr(value, "to") else value for name, value in b.items()}
        for b in (padded, packed)
    ]


def step(model, batch):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach().float().item(), gradients


def decode(model, sparse_prefill):
    """Logits ``[2, batch, vocabulary]`` of two tokens behind prompts of one length."""
    from sparse_unsloth import FastSparseLanguageModel

    FastSparseLanguageModel.for_inference(model, sparse_prefill=sparse_prefill)
    ids = torch.randint(3, model.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(2))
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), max_new_tokens=2,
        do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    FastSparseLanguageModel.for_training(model)
    return torch.stack(out.logits).float().cpu()


def main():
    from sparse_unsloth import attach, detach

    backend, folder, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    families = sys.argv[4].split(",")
    results, prefill = {}, {}
    for family, four_bit, mode, sparsities in settings(backend, families):
        model = load(backend, folder / family, "4bit" if four_bit else "bf16", mode)
        padded, packed = batches(model.config.vocab_size, model.device)
        dtype = "4bit" if four_bit else "bf16"
        for sparsity in sparsities:
            if sparsity != "plain":
                attach(model, sparsity_settings()[sparsity])
            for layout, batch in (("padded", padded), ("packed", packed)):
                if layout == "packed" and (backend == "peft" or family == "gemma2"):
                    continue
                loss, gradients = step(model, batch)
                results[family, dtype, mode, sparsity, layout] = {"loss": loss, "gradients": gradients}
                print(backend, family, dtype, mode, sparsity, layout, f"loss {loss:.5f}", flush=True)
            if sparsity == "sparse" and family != "gemma2" and not mode:
                for wanted in (False, True):
                    prefill[backend, family, dtype, wanted] = decode(model, wanted)
            if sparsity != "plain":
                detach(model)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    torch.save({"steps": results, "prefill": prefill}, out)


if __name__ == "__main__":
    main()
