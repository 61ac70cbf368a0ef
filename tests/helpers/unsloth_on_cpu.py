"""Runs the installed Unsloth on the CPU, in a process that all tests share.

Its norm, RoPE and gated unit have GPU kernels only; PyTorch functions with the same results replace them. Everything
else is Unsloth's own code.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from tiny_models import make_lora

UNSLOTH_ON_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_FUSED_CE_COMPILE_DISABLE": "1",
}
"""Of a process that imports Unsloth here."""
CASES = Path(__file__).parents[1] / "backends" / "unsloth" / "installed"
"""What such a process runs."""


class UnslothProcess:
    """Runs cases of `CASES` one after the other, in ``folder``; the first that asks for a folder starts the process."""

    def __init__(self, folder: Path, names: list[str]):
        self._folder, self._process = folder, None
        try:
            folder.mkdir()
        except FileExistsError:
            return
        with (folder / "said.txt").open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(CASES), str(folder), *names],
                cwd=folder,
                env={**os.environ, **UNSLOTH_ON_CPU},
                stdout=said,
                stderr=said,
            )

    def __enter__(self) -> "UnslothProcess":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            if any(error):
                self._process.kill()
            self._process.wait()

    def wait_for(self, name: str) -> tuple[list, list[str]]:
        """What each rank of a case found and said, once it has ended; an AssertionError with its end if it failed."""
        folder = self._folder / name
        while not (folder / "ended").exists():
            over = (self._folder / "over").exists()
            assert not over or (folder / "ended").exists(), (self._folder / "said.txt").read_text()[-6000:]
            time.sleep(0.1)
        said = [file.read_text() for file in sorted(folder.glob("said-*.txt"))]
        found = sorted(folder.glob("found-*.json"))
        assert len(found) == len(said), "\n".join(text[-6000:] for text in said)
        return [json.loads(file.read_text()) for file in found], said


def fused_by_unsloth(base: nn.Module, checkpointing: bool) -> nn.Module:
    """A LoRA model of ``base`` as Unsloth's ``get_peft_model`` leaves it, in float32."""
    from unsloth.models import llama

    rotary = base.model.rotary_emb
    if not isinstance(rotary, Rotary):  # the merged model of an earlier one has it already
        base.model.rotary_emb = rotary = Rotary(rotary, base.config.max_position_embeddings)
    for layer in base.model.layers:
        layer.self_attn.rotary_emb = rotary
        layer.self_attn.apply_qkv, layer.self_attn.apply_o = llama.original_apply_qkv, llama.original_apply_o
    model = make_lora(base=base)
    model.max_seq_length = base.config.max_position_embeddings
    return llama.FastLlamaModel.patch_peft_model(model, use_gradient_checkpointing=checkpointing).train()


class Rotary(nn.Module):
    """Cosines and sines ``[positions, head_dim]`` of transformers, with the interface of Unsloth's rotary embedding."""

    def __init__(self, rotary: nn.Module, length: int):
        super().__init__()
        self.tables = tuple(table[0] for table in rotary(torch.zeros(1), torch.arange(length)[None]))
        # As Unsloth 2026.10.6 reads them for Gemma 2.
        self.multi_gpu_cos_cached, self.multi_gpu_sin_cached = ({None: table} for table in self.tables)

    def extend_rope_embedding(self, *args, **kwargs):
        pass

    def get_cached(self, *args, **kwargs):
        return self.tables


def replace_gpu_kernels() -> None:
    """Replaces Unsloth's Triton kernels, and makes the changes that Unsloth makes only when it loads a model itself."""
    import bitsandbytes
    from transformers import Trainer
    from unsloth.kernels import fast_lora, swiglu, utils
    from unsloth.models import gemma, gemma2, llama, mistral, qwen3

    def rms_norm(norm, x, gemma=False, **kwargs):
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        return (norm.weight + gemma) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    def rope(q, k, cos, sin, positions=None):
        positions = torch.arange(q.shape[2])[None] if positions is None else positions.long()
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        return tuple(x * cos + modeling_llama.rotate_half(x) * sin for x in (q, k))

    def dequantize(weight, quant_state=None, out=None, use_global_buffer=False, dtype=None):
        whole = weight if quant_state is None else bitsandbytes.functional.dequantize_4bit(weight, quant_state)
        return whole if dtype is None else whole.to(dtype)

    for module in (fast_lora, utils):
        module.fast_dequantize = dequantize

    def geglu_backward(dh, e, g):
        with torch.enable_grad():
            leaf = e.detach().requires_grad_()
            f = F.gelu(leaf, approximate="tanh")
        (de,) = torch.autograd.grad(f, leaf, dh * g)
        return f.detach() * g, dh * f.detach(), de

    for module in (gemma, gemma2, llama, mistral, qwen3):
        module.fast_rms_layernorm, module.fast_rope_embedding = rms_norm, rope
    if hasattr(qwen3, "_qk_norm_rope"):  # since 2026.10.8
        qwen3._qk_norm_rope.QK_NORM_ROPE_ENABLED = False
    llama.DEVICE_TYPE_TORCH = "cpu"
    fast_lora.swiglu_fg_kernel = lambda e, g: F.silu(e) * g
    fast_lora.swiglu_DWf_DW_dfg_kernel = swiglu._DWf_DW_dfg_traced
    fast_lora.geglu_approx_forward_kernel = lambda e, g: F.gelu(e, approximate="tanh") * g
    fast_lora.geglu_approx_backward_kernel = geglu_backward
    # It fuses nothing over float32, which makes results exact here.
    llama._base_weight_dtype = lambda projection: torch.bfloat16

    def _fast_inner_training_loop(*args, **kwargs):
        raise NotImplementedError("The trainer is not part of this.")

    Trainer._inner_training_loop = _fast_inner_training_loop
