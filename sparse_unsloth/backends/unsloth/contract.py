"""Checks that the installed Unsloth has what the backend needs, on a loaded model and in Unsloth's sources.

`Contract` checks the layers of a model. Importing Unsloth takes most of a minute and a GPU, so `read_contract` reads
the sources instead.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from sparse_unsloth.errors import AttachError
from sparse_unsloth.exact.loss import FUNCTION as FUSED_LOSS
from sparse_unsloth.model.decoder_layer import DecoderLayer

ATTENTION = "run_attention"
"""The function that Unsloth's attention modules call for attention."""
FUSED_MLPS = ("apply_lora_mlp_swiglu", "apply_lora_mlp_geglu_exact", "apply_lora_mlp_geglu_approx")
FAST_LORA = "kernels/fast_lora.py"
LLAMA, MISTRAL = "models/llama.py", "models/mistral.py"
FUSED_FUNCTIONS = (*FUSED_MLPS, "apply_lora_qkv", "apply_lora_o")
ATTENTIONS = {
    "LlamaAttention_fast_forward": LLAMA,
    "MistralAttention_fast_forward": MISTRAL,
    "Qwen3Attention_fast_forward": "models/qwen3.py",
    "Gemma2Attention_fast_forward": "models/gemma2.py",
}
"""Attention forwards of all families and their files; Qwen2 and Gemma use Llama's."""
CAPTURED = [name for name in ATTENTIONS if "Gemma" not in name]
"""Attention forwards of layers that can be captured as whole layers."""
SLOTS = ("apply_qkv", "apply_o")
PASS_KWARGS = {
    "PeftModel_fast_forward": LLAMA,
    "_CausalLM_fast_forward": LLAMA,
    "MistralForCausalLM_fast_forward": MISTRAL,
    "LlamaModel_fast_forward": LLAMA,
}
"""Forwards through which a keyword argument reaches the decoder layers."""
TAKE_KWARGS = {
    "LlamaDecoderLayer_fast_forward": LLAMA,
    "GemmaDecoderLayer_fast_forward": "models/gemma.py",
    "Gemma2DecoderLayer_fast_forward": "models/gemma2.py",
}
"""Forwards of decoder layers, whose hook removes the keyword argument."""


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
    needed_by: Literal["layers", "loss", "documents"]
    found: bool


def find_unsloth() -> Path | None:
    """The installed package's folder, found without importing it."""
    spec = importlib.util.find_spec("unsloth")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def read_contract(folder: Path) -> list[Hook]:
    """Every hook, found or not; a missing or unreadable file holds none.

    Args:
        folder: the folder of the ``unsloth`` package.
    """
    sources = _Sources(folder)
    hooks = []
    for name in FUSED_FUNCTIONS:
        parameters = _parameters(sources.function(FAST_LORA, name))
        hooks.append(Hook(f"{name}(self, X)", FAST_LORA, "layers", parameters[:2] == ["self", "X"]))
    for name, file in ATTENTIONS.items():
        called = _called(sources.function(file, name))
        hooks += [Hook(f"{slot} called by {name}", file, "layers", slot in called) for slot in SLOTS]
        if name in CAPTURED:
            hooks.append(Hook(f"{ATTENTION} called by {name}", file, "documents", ATTENTION in called))
    hooks.append(Hook("original_apply_qkv", LLAMA, "layers", sources.function(LLAMA, "original_apply_qkv") is not None))
    for name, file in PASS_KWARGS.items():
        function = sources.function(file, name)
        hooks.append(Hook(f"{name} passes **kwargs on", file, "layers", _passes_kwargs(function)))
    for name, file in TAKE_KWARGS.items():
        keywords = _keywords(sources.function(file, name))
        hooks.append(Hook(f"{name} takes **kwargs", file, "layers", keywords is not None))
    for file in (LLAMA, MISTRAL):
        found = sources.binds(file, FUSED_LOSS) and FUSED_LOSS in _called(sources.tree(file))
        hooks.append(Hook(f"{FUSED_LOSS} imported and called", file, "loss", found))
    return hooks


class _Sources:
    """Parsed files of a package, each read once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, file: str) -> ast.Module | None:
        if file not in self._trees:
            try:
                self._trees[file] = ast.parse((self._folder / file).read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                self._trees[file] = None
        return self._trees[file]

    def function(self, file: str, name: str) -> ast.FunctionDef | None:
        """The function of this name, at any depth; None where there is none."""
        for node in _walk(self.tree(file)):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        return None

    def binds(self, file: str, name: str) -> bool:
        """Whether ``file`` has a global ``name``: defined, imported, or star-imported from a file beside it."""
        for node in getattr(self.tree(file), "body", ()):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return True
            if not isinstance(node, ast.ImportFrom):
                continue
            if any((alias.asname or alias.name) == name for alias in node.names):
                return True
            beside = f"{Path(file).parent.as_posix()}/{node.module}.py"
            if node.names[0].name == "*" and node.level == 1 and beside != file and self.binds(beside, name):
                return True
        return False


def _walk(tree: ast.AST | None) -> Iterator[ast.AST]:
    return iter(()) if tree is None else ast.walk(tree)


def _parameters(function: ast.FunctionDef | None) -> list[str]:
    return [] if function is None else [argument.arg for argument in function.args.args]


def _keywords(function: ast.FunctionDef | None) -> str | None:
    """The name of the parameter that takes further keyword arguments."""
    return function.args.kwarg.arg if function is not None and function.args.kwarg else None


def _passes_kwargs(function: ast.FunctionDef | None) -> bool:
    keywords = _keywords(function)
    return keywords is not None and any(
        keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == keywords
        for call in _walk(function)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    )


def _called(tree: ast.AST | None) -> set[str]:
    """Names that are called: ``name(...)``, ``object.name(...)``, ``getattr(object, "name", ...)(...)``."""
    names = set()
    for call in _walk(tree):
        if not isinstance(call, ast.Call):
            continue
        function = call.func
        if isinstance(function, ast.Name):
            names.add(function.id)
        elif isinstance(function, ast.Attribute):
            names.add(function.attr)
        elif isinstance(function, ast.Call):
            names |= {argument.value for argument in function.args if isinstance(argument, ast.Constant)}
    return names
