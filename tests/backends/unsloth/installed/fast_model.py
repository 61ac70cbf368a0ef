"""Each mode on models that the installed Unsloth loads by its compiled path (``FastModel``).

The project's kernels run through Triton's interpreter.
"""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_unsloth import FastSparseLanguageModel, attach, detach, get_state
from sparse_unsloth.backends import choose
from sparse_unsloth.bench.families import FAMILIES as LIKE_LLAMA
from sparse_unsloth.bench.families import make_tokenizer, write_models

from decoder_models import FAMILIES as OTHERS
from decoder_models import causal
from recorded_layers import Rerun, share_memory
from tiny_models import always, loss_and_gradients, make_batch
from unsloth_stand_in import packed_batch

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 128}
FAMILIES = {
    "granite": ({"num_hidden_layers": 1}, {"use_gradient_checkpointing": True}, ("channels", "dense graphs")),
    "gemma3": (
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
        {"use_gradient_checkpointing": False, "attn_implementation": "eager"},
        ("rows", "rows graphs"),
    ),
    "gpt_oss": (  # part by part
        {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
        {"use_gradient_checkpointing": True, "attn_implementation": "eager"},
        ("rows",),
    ),
    "olmo2": (  # whose norms stay in float32
        {"num_hidden_layers": 1},
        {"use_gradient_checkpointing": "unsloth", "dtype": torch.float16},
        ("rows", "channels"),
    ),
}
"""By family: changes of the configuration, how it is loaded, and the modes."""
ALMOST_NOTHING = 1e-9
MODES = {
    "rows": ({"backward_rows": 1 - ALMOST_NOTHING}, packed_batch),
    "channels": (always(mlp={"all": ALMOST_NOTHING}, self_attn={"all": ALMOST_NOTHING}), packed_batch),
}
MODES |= {
    "rows graphs": (MODES["rows"][0] | {"cuda_graphs": True}, make_batch),
    "dense graphs": ({"preset": "dense", "cuda_graphs": True}, make_batch),
}


def make(family: str) -> torch.nn.Module:
    """The family's model as users load it, with LoRA that is not zero."""
    changes, options, _ = FAMILIES[family]
    if family not in LIKE_LLAMA:
        kind = replace(OTHERS[family], config={**OTHERS[family].config, **SIZES, **changes})
        causal(kind).save_pretrained(f"models/{family}")
        make_tokenizer().save_pretrained(f"models/{family}")
    else:
        write_models(Path("models"), [family], "peft", **SIZES, **changes)
    options = {"dtype": torch.float32, "max_seq_length": 64, "load_in_4bit": False, "backend": "unsloth", **options}
    model, _ = FastSparseLanguageModel.from_pretrained(f"models/{family}", **options)
    checkpointing = options["use_gradient_checkpointing"]
    model = FastSparseLanguageModel.get_peft_model(
        model, r=4, use_gradient_checkpointing=checkpointing, sparsity="rows"
    )
    detach(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return FastSparseLanguageModel.for_training(model, checkpointing)


def prepare() -> None:
    pass


def examine(prepared: None) -> dict[str, dict]:
    """By family and mode: how many layers run as a whole, and whether passes were replayed.

    And how far loss and gradients are from the same model before attaching, and if they are the same bits afterwards.
    """
    os.environ["SPARSE_UNSLOTH_KERNELS"] = "triton"
    from unsloth.models import loader, vision

    vision.get_device_stats = lambda *args, **options: ("CPU", "", 0.0)
    vision.verify_fp8_support_if_applicable = lambda *args, **options: None
    vision.SUPPORTS_BFLOAT16, loader.is_bfloat16_supported = True, lambda: True  # else Gemma 3 runs in float32
    choose.explain_backend = lambda backend: (backend, "")
    gc.freeze()  # Unsloth's loader collects garbage a dozen times
    found = {}
    for family, (*_, modes) in FAMILIES.items():
        model = make(family)
        for mode in modes:
            setting, make_its_batch = MODES[mode]
            with pytest.MonkeyPatch.context() as patch:
                recorder = Rerun()
                share_memory(patch, recorder)
                batch = {**make_its_batch(lengths=((5, 3), (3, 2))), "use_cache": False}
                loss, gradients = loss_and_gradients(model, batch)
                report = attach(model, setting)
                for _ in range(3 if "cuda_graphs" in setting else 1):
                    ours = loss_and_gradients(model, batch)
                ran = get_state(model).counts.whole_layers
                detach(model)
            after = loss_and_gradients(model, batch)
            errors = [
                ((ours[1][name] - value).norm() / (value.norm() + 1e-6)).item() for name, value in gradients.items()
            ]
            found[f"{family}, {mode}"] = {
                "report": str(report),
                "whole": len(report.layers) == report.whole_layers == ran,
                "parts": [layer.row_parts for layer in report.layers],
                "replayed": recorder.replayed > 0,
                "error": max(*errors, (ours[0] / loss - 1).abs().item()),
                "restored": all(torch.equal(after[1][name], value) for name, value in gradients.items()),
            }
    return found
