"""What the package needs of Unsloth: the table `NEEDS`, each line with the check that proves it.

Importing Unsloth takes most of a minute and a GPU, so the checks read its sources (`read_contract`). A layer whose
parts are hooked must also hold Unsloth's functions (`HELD`, `check_part`); layers that run as a whole need none of it.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

from sparse_unsloth.errors import AttachError
from sparse_unsloth.exact.loss import FUNCTION as LOSS
from sparse_unsloth.model.decoder_layer import DecoderLayer

LLAMA, MISTRAL, QWEN_3 = "models/llama.py", "models/mistral.py", "models/qwen3.py"
GEMMA, GEMMA_2, LORA = "models/gemma.py", "models/gemma2.py", "kernels/fast_lora.py"
FUSED_MLPS = ("apply_lora_mlp_swiglu", "apply_lora_mlp_geglu_exact", "apply_lora_mlp_geglu_approx")
FUSED_FUNCTIONS = (*FUSED_MLPS, "apply_lora_qkv", "apply_lora_o")
ATTENTIONS = {f"{one}Attention_fast_forward": file for one, file in
              (("Llama", LLAMA), ("Mistral", MISTRAL), ("Qwen3", QWEN_3), ("Gemma2", GEMMA_2))}  # fmt: skip
"""Attention forwards of all families and their files; Qwen2 and Gemma use Llama's. Whole layers compute the same."""
PASSING = {"PeftModel": LLAMA, "_CausalLM": LLAMA, "MistralForCausalLM": MISTRAL, "LlamaModel": LLAMA}
TAKING = {"LlamaDecoderLayer": LLAMA, "GemmaDecoderLayer": GEMMA, "Gemma2DecoderLayer": GEMMA_2}


class Need(NamedTuple):
    """What is needed, in which file, for what (`CURES`), and the check: a pattern in it, or in a function or class."""

    what: str
    file: str
    used_for: str
    pattern: str
    within: str = ""


NEEDS = (  # replaced functions, their callers, forwards that hand on the tokens' roles, the loss, loading, memory
    *(Need(f"{one}(self, X)", LORA, "layers", rf"^def {one}\(\s*self,\s*X\b") for one in FUSED_FUNCTIONS),
    *(Need(f"{slot} called by {one}", file, "layers", rf'\b{slot}(?:"[^()]*\))?\(', one)  # or ``getattr(self, slot)(``
      for one, file in ATTENTIONS.items() for slot in ("apply_qkv", "apply_o")),
    Need("original_apply_qkv", LLAMA, "layers", r"^ *def original_apply_qkv\("),  # of biased Q, K, V (Qwen2)
    *(Need(f"{one}_fast_forward passes **kwargs on", file, "layers", r"\*\*(\w+)[\s\S]*\*\*\1\b", f"{one}_fast_forward")
      for one, file in PASSING.items()),
    *(Need(f"{one}_fast_forward takes **kwargs", file, "layers", r"\*\*\w", f"{one}_fast_forward")
      for one, file in TAKING.items()),
    Need(f"{LOSS} imported", "models/_utils.py", "loss", rf"^from .*\b{LOSS}\b|^    {LOSS},$"),  # by ``import *``
    *(Need(f"{LOSS} called", file, "loss", rf"\b{LOSS}\(") for file in (LLAMA, MISTRAL)),
    *(Need(f"FastLanguageModel.{one}", "models/loader.py", "loading", rf"^    def {one}\(", "FastLanguageModel")
      for one in ("from_pretrained", "get_peft_model", "for_training", "for_inference")),
    Need("_unsloth_gradient_checkpointing", LLAMA, "memory", r"\._unsloth_gradient_checkpointing = "),
)  # fmt: skip
CURES = {
    "layers": "This Unsloth has moved it, and attaching would fail. Install a tested version, or give backend='peft'.",
    "loss": "This Unsloth has moved its fused loss. Install a tested version, or set exact_removal: false.",
    "loading": "No model could be loaded. Install a tested version, or give backend='peft'.",
    "memory": "memory_budget would count layers' inputs that are on the host, and keep too few layers' activations.",
}
"""By what something is needed for: what happens without it, and what helps."""
HELD: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "mlp": {"mlp.forward": ("MLP", FUSED_MLPS)},
    "self_attn": {"self_attn.apply_qkv": ("QKV", ("apply_lora_qkv", "original_apply_qkv")),
                  "self_attn.apply_o": ("O", ("apply_lora_o",))},
}  # fmt: skip
"""By part of a loaded layer: where Unsloth puts its function, what that fuses, and which function it may be."""


def find_unsloth() -> Path | None:
    """The installed package's folder, found without importing it."""
    spec = importlib.util.find_spec("unsloth")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def read_contract(folder: Path) -> dict[Need, bool]:
    """Whether each of `NEEDS` is in ``folder``, that of the ``unsloth`` package; a missing file holds none."""
    paths = {need.file: folder / need.file for need in NEEDS}
    texts = {file: path.read_text(encoding="utf-8") if path.is_file() else "" for file, path in paths.items()}
    return {need: bool(re.search(need.pattern, _part(texts[need.file], need.within), re.M)) for need in NEEDS}


def check_part(layer: DecoderLayer, part: str) -> None:
    """Raises AttachError unless Unsloth put its functions on this part of a loaded layer, and the layer calls them."""
    from unsloth.kernels import fast_lora
    from unsloth.models import llama

    if missing := [name for name in FUSED_FUNCTIONS if not hasattr(fast_lora, name)]:
        raise AttachError(
            f"The installed Unsloth has no {', '.join(missing)} in unsloth.kernels.fast_lora: its hook points moved. "
            "Install a tested version (`sparse-unsloth doctor` lists it), or use backend='peft'."
        )
    module = getattr(layer, part)
    code = inspect.unwrap(type(module).forward).__code__
    for place, (what, names) in HELD[part].items():
        slot = place.partition(".")[2]
        held = [vars(module).get(name) for name in (slot, "_unsloth_forward" if part == "mlp" else slot)]
        allowed = [getattr(fast_lora, name, getattr(llama, name, None)) for name in names]
        if not any(one is not None and _unwrap(one) in allowed for one in held):
            raise AttachError(
                f"{layer.name}: Unsloth's fused {what} is not in {place}, so there is nothing to replace. Unsloth "
                "fuses it on its fast path (Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma, Gemma2) when its projections "
                "have LoRA, lora_dropout=0 and bias='none', and the base is not float32, 8-bit or split by FSDP. "
                "Change that, leave the layer dense, or use backend='peft'."
            )
        if slot != "forward" and slot not in code.co_consts and slot not in code.co_names:
            raise AttachError(
                f"{layer.name}.{part}: {type(module).__name__}.forward of the installed Unsloth does not call {slot} "
                "any more, so replacing it would change nothing. Use backend='peft'."
            )


def _unwrap(slot: Any) -> Any:
    """The plain function in a slot that holds a function, a bound method, or a partial of one."""
    function = getattr(slot, "__func__", slot)
    return getattr(function, "func", function)


def _part(source: str, name: str) -> str:
    """The text of the function or class ``name``, at any depth; all of it for "", and "" where there is none."""
    found = re.search(rf"^( *)(?:def|class) {name}\b.*?(?=^\1[\w@]|\Z)", source, re.M | re.S)
    return source if not name else "" if found is None else found.group()
