"""Checks that the installed Unsloth has what the backend needs, on a loaded model and in Unsloth's sources.

`Contract` checks the layers of a model. Importing Unsloth takes most of a minute and a GPU, so `read_contract` reads
the sources instead.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from sparse_unsloth.errors import AttachError
from sparse_unsloth.exact.loss import FUNCTION as FUSED_LOSS
from sparse_unsloth.model.decoder_layer import DecoderLayer

FUSED_MLPS = ("apply_lora_mlp_swiglu", "apply_lora_mlp_geglu_exact", "apply_lora_mlp_geglu_approx")
FAST_LORA = "kernels/fast_lora.py"
LLAMA, MISTRAL, GEMMA_2 = "models/llama.py", "models/mistral.py", "models/gemma2.py"
FUSED_FUNCTIONS = (*FUSED_MLPS, "apply_lora_qkv", "apply_lora_o")
ATTENTIONS = {
    "LlamaAttention_fast_forward": LLAMA,
    "MistralAttention_fast_forward": MISTRAL,
    "Qwen3Attention_fast_forward": "models/qwen3.py",
    "Gemma2Attention_fast_forward": GEMMA_2,
}
"""Attention forwards of all families and their files; Qwen2 and Gemma use Llama's. Whole layers compute the same."""
SLOTS = ("apply_qkv", "apply_o")
"""What they call, and what is replaced where the parts of a layer are hooked."""
KEYWORDS = {
    "PeftModel_fast_forward": (LLAMA, 2),
    "_CausalLM_fast_forward": (LLAMA, 2),
    "MistralForCausalLM_fast_forward": (MISTRAL, 2),
    "LlamaModel_fast_forward": (LLAMA, 2),
    "LlamaDecoderLayer_fast_forward": (LLAMA, 1),
    "GemmaDecoderLayer_fast_forward": ("models/gemma.py", 1),
    "Gemma2DecoderLayer_fast_forward": (GEMMA_2, 1),
}
"""Forwards that take keyword arguments (1), and pass them on to the decoder layers (2)."""


class Contract:
    """Checks that the installed Unsloth still has the functions that the backend replaces, and still calls them."""

    def __init__(self) -> None:
        from unsloth.kernels import fast_lora
        from unsloth.models import llama

        self._functions: ModuleType = fast_lora
        self._plain_qkv = getattr(llama, "original_apply_qkv", None)
        missing = [name for name in FUSED_FUNCTIONS if not hasattr(fast_lora, name)]
        if missing:
            raise AttachError(
                f"The installed Unsloth has no {', '.join(missing)} in unsloth.kernels.fast_lora: its hook points "
                "moved. Install a version that sparse_unsloth is tested with (`sparse-unsloth doctor` lists it), or "
                "use backend='peft'."
            )

    def check_mlp(self, layer: DecoderLayer) -> None:
        """Raises AttachError unless Unsloth put its fused MLP on the layer."""
        slots = (layer.mlp.__dict__.get("_unsloth_forward"), layer.mlp.__dict__.get("forward"))
        fused = [getattr(self._functions, name) for name in FUSED_MLPS]
        if not any(_unwrap(slot) in fused for slot in slots if slot is not None):
            raise self._not_fused(layer, "mlp.forward", "MLP")

    def check_attention(self, layer: DecoderLayer) -> None:
        """Raises AttachError unless Unsloth put its Q, K, V and O functions on the layer, and its class calls them."""
        attention = layer.self_attn
        # Unsloth never fuses biased Q, K, V (Qwen2), and uses its plain function there.
        allowed = [self._functions.apply_lora_qkv, self._plain_qkv]
        if getattr(attention, "apply_qkv", None) not in allowed:
            raise self._not_fused(layer, "self_attn.apply_qkv", "QKV")
        if getattr(attention, "apply_o", None) is not self._functions.apply_lora_o:
            raise self._not_fused(layer, "self_attn.apply_o", "O")
        code = inspect.unwrap(type(attention).forward).__code__
        for name in SLOTS:
            if name not in code.co_consts and name not in code.co_names:
                raise AttachError(
                    f"{layer.name}.self_attn: {type(attention).__name__}.forward of the installed Unsloth does not "
                    f"call {name} any more, so replacing it would change nothing. Use backend='peft'."
                )

    @staticmethod
    def _not_fused(layer: DecoderLayer, slot: str, what: str) -> AttachError:
        return AttachError(
            f"{layer.name}: Unsloth's fused {what} is not in {slot}, so there is nothing to replace. Unsloth fuses it "
            "on its fast path (Llama, Mistral, Qwen2, Qwen2.5, Qwen3, Gemma, Gemma2) when its projections have LoRA, "
            "lora_dropout=0 and bias='none', and the base is not float32, 8-bit or split by FSDP. Change that, leave "
            "the layer dense, or use backend='peft'."
        )


def _unwrap(slot: Any) -> Any:
    """The plain function in a slot that holds a function, a bound method, or a partial of one."""
    function = getattr(slot, "__func__", slot)
    return getattr(function, "func", function)


@dataclass(frozen=True)
class Hook:
    """One thing that the backend needs of Unsloth: what, in which file, for what, and whether it is there."""

    what: str
    file: str
    needed_by: Literal["layers", "loss"]
    found: bool


def find_unsloth() -> Path | None:
    """The installed package's folder, found without importing it."""
    spec = importlib.util.find_spec("unsloth")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def read_contract(folder: Path) -> list[Hook]:
    """Every hook, found or not; a missing file holds none.

    Args:
        folder: the folder of the ``unsloth`` package.
    """
    hooks = []

    def note(what: str, file: str, found: object, needed_by: Literal["layers", "loss"] = "layers") -> None:
        hooks.append(Hook(what, file, needed_by, bool(found)))

    def source(file: str) -> str:
        path = folder / file
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    for name in FUSED_FUNCTIONS:
        note(f"{name}(self, X)", FAST_LORA, re.search(rf"^def {name}\(\s*self,\s*X\b", source(FAST_LORA), re.M))
    for name, file in ATTENTIONS.items():
        for slot in SLOTS:  # ``self.apply_o(...)`` or ``getattr(self, "apply_o", ...)(...)``
            called = re.search(rf'\b{slot}(?:"[^()]*\))?\(', _function(source(file), name))
            note(f"{slot} called by {name}", file, called)
    note("original_apply_qkv", LLAMA, _function(source(LLAMA), "original_apply_qkv"))
    for name, (file, times) in KEYWORDS.items():
        keywords = re.findall(r"\*\*(\w+)", _function(source(file), name))
        passes = keywords and keywords.count(keywords[0]) >= times
        note(f"{name} {'passes' if times > 1 else 'takes'} **kwargs{' on' * (times > 1)}", file, passes)
    imported = re.search(rf"^from .*\b{FUSED_LOSS}\b|^    {FUSED_LOSS},$", source("models/_utils.py"), re.M)
    for file in (LLAMA, MISTRAL):
        called = re.search(rf"\b{FUSED_LOSS}\(", source(file))
        own = re.search(rf"^from .*\b{FUSED_LOSS}\b", source(file), re.M)
        note(f"{FUSED_LOSS} imported and called", file, called and (imported or own), "loss")
    return hooks


def _function(source: str, name: str) -> str:
    """The text of the function ``name``, at any depth; "" where there is none."""
    found = re.search(rf"^( *)def {name}\(.*?(?=^\1[\w@]|\Z)", source, re.M | re.S)
    return "" if found is None else found.group()
