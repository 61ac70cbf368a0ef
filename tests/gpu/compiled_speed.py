"""Times plain Unsloth's compiled layers against row sparsity, on random models of 4B sizes, at 4,096 and 8,192 tokens.

    python tests/gpu/compiled_speed.py --out OUT [--seconds 120] [--models gemma3,qwen3_vl,qwen3_5] [--layers 12]

One sequence with a prompt of 80 %, bf16 weights, LoRA of rank 16, Unsloth's checkpointing. Each arm runs in a process
of its own; the processes load and warm up together, and time one after the other. The table has the median step, the
ratio to stock, the peak memory, and the share of the step in which the GPU runs kernels. Weights and tokens are random,
images are left out, and Qwen3-VL and Qwen3.5 have a small vision tower. Exit code 1 if a time is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compiled_rows import VISION_WIDTH, save_words

COMMON = {
    "hidden_size": 2560, "max_position_embeddings": 32768, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
ROPE = {
    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
}  # fmt: skip
MODELS = {
    "gemma3": {
        "vocab_size": 262208, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256,
    },
    "qwen3_vl": {
        "vocab_size": 151936, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": ROPE,
    },
    "qwen3_5": {
        "vocab_size": 248320, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "rope_parameters": {**ROPE, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
    },
}  # fmt: skip
"""The text decoders of Gemma-3-4B, Qwen3-VL-4B and Qwen3.5-4B."""
ARMS = {
    "stock": (None, {}),
    "rows": ({"backward_rows": 0.25}, {}),
    "stock, uncompiled layers": (None, {"UNSLOTH_BLOCK_COMPILE": "0"}),
    "rows, graphs": ({"backward_rows": 0.25, "cuda_graphs": True}, {}),
}
"""By arm: what is attached, and variables of its process."""
TOKENS, PROMPT = (4096, 8192), 0.8
WARMUP, STEPS, RANK = 4, 5, 16
SECONDS = 120


def write_model(name: str, folder: Path, layers: int | None, sizes: dict[str, Any] | None = None) -> None:
    """Draws the weights on the GPU and writes them.

    Args:
        layers: instead of the model's own number.
        sizes: instead of the model's own, for a rehearsal.
    """
    import transformers

    from decoder_models import QWEN_IMAGES

    config = {**COMMON, **MODELS[name], **({"num_hidden_layers": layers} if layers else {}), **(sizes or {})}
    vision = {
        "hidden_size": VISION_WIDTH, "intermediate_size": 2 * VISION_WIDTH, "depth": 2, "num_heads": 2,
        "out_hidden_size": config["hidden_size"], "deepstack_visual_indexes": [0] if name == "qwen3_vl" else [],
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if name == "gemma3":
            model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))
        else:
            kind = transformers.Qwen3VLForConditionalGeneration
            kind = transformers.Qwen3_5ForConditionalGeneration if name == "qwen3_5" else kind
            whole = kind.config_class(text_config=config, vision_config=vision, tie_word_embeddings=True, **QWEN_IMAGES)
            model = kind(whole)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="3GB")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {count / 1e9:.2f}B parameters, {config['num_hidden_layers']} layers", flush=True)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    save_words(folder, images=name != "gemma3")


@contextlib.contextmanager
def turn(lock: Path, alone: bool) -> Iterator[None]:
    """Waits for the GPU: alone for timing, or together with others that warm up."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def load(folder: Path):
    """The checkpoint with LoRA of rank `RANK`, nothing attached, ready to train."""
    from sparse_unsloth import FastSparseLanguageModel, detach

    model, _ = FastSparseLanguageModel.from_pretrained(
        str(folder), max_seq_length=max(TOKENS), dtype=torch.bfloat16, load_in_4bit=False, backend="unsloth"
    )
    model = FastSparseLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK, sparsity="rows")
    detach(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return FastSparseLanguageModel.for_training(model)


def run_arm(args: argparse.Namespace) -> int:
    """Times the arm at each number of tokens; a line each, as soon as it is there."""
    import unsloth  # noqa: F401

    from sparse_unsloth import attach, get_state
    from sparse_unsloth.bench.profiling import covered
    from sparse_unsloth.bench.shapes import Shape
    from sparse_unsloth.bench.speed import Stepper

    began, (name, arm) = time.time(), args.arm.split(": ")
    model = load(args.folder)
    config, _ = ARMS[arm]
    found = {"model": name, "arm": arm}
    if config is not None:
        report = attach(model, config)
        print(report, flush=True)
        state = get_state(model)
        state.begin_training(driver="benchmark", max_steps=1_000_000)
        state.set_step(0)
        found["layers"] = f"{report.num_sparse} of {report.num_layers} rows, {report.whole_layers} whole"
    print(f"loaded after {time.time() - began:.0f} s", flush=True)
    lock = args.folder.parent / "lock"
    with args.lines.open("a") as lines:
        for tokens in TOKENS:
            step = Stepper(model, Shape(1, tokens, round(tokens * (1 - PROMPT))))
            for _ in range(WARMUP):
                with turn(lock, alone=False):
                    step()
            with turn(lock, alone=True):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                step()
                times = [step() for _ in range(STEPS)]
                peak = torch.cuda.max_memory_allocated() / 2**30
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                    step()
            kernels = [
                (event.time_range.start, event.time_range.end)
                for event in trace.events()
                if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            ]
            graphs = None if config is None else get_state(model).graphs
            figures = {
                "tokens": tokens,
                "ms": round(statistics.median(times), 1),
                "from": round(min(times), 1),
                "to": round(max(times), 1),
                "gpu_busy_ms": round(covered(kernels) / 1000, 1),
                "peak_gib": round(peak + (0 if graphs is None else graphs.memory() / 2**30), 2),
                "at_s": round(time.time() - began),
            }
            lines.write(json.dumps(found | figures) + "\n")
            lines.flush()
            print(found | figures, flush=True)
    return 0


def log_of(folder: Path, name: str, arm: str) -> Path:
    """Where an arm's process says what it does; a name without spaces."""
    return folder / f"{name}_{arm.replace(', ', '_').replace(' ', '_')}.log"


COLUMNS = "model", "arm", "layers", "tokens", "ms", "from", "to", "ratio", "gpu_busy_ms", "peak_gib", "at_s"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the ratio is stock's time by the arm's."""
    stock = {(row["model"], row["tokens"]): row["ms"] for row in rows if row["arm"] == "stock"}
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in sorted(rows, key=lambda row: (row["model"], row["tokens"])):
        base = stock.get((row["model"], row["tokens"]))
        row = row | ({"ratio": round(base / row["ms"], 2)} if base else {})
        lines.append(f"| {' | '.join(str(row.get(column, '')) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--arms", default=";".join(ARMS), help="parted by semicolons")
    parser.add_argument("--layers", type=int, help="instead of the models' own number")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    if args.arm:
        return run_arm(args)
    deadline, root, running = time.time() + args.seconds, Path(__file__).resolve().parents[2], {}
    lines = args.out / "compiled-speed.jsonl"
    lines.write_text("")
    sys.path[:0] = str(root), str(root / "tests" / "helpers")
    paths = str(root), str(root / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            write_model(name, Path(folder) / name, args.layers)
            for arm in args.arms.split(";"):
                place = Path(folder) / f"run {name} {arm}"
                place.mkdir()
                words = ["--arm", f"{name}: {arm}", "--folder", str(Path(folder) / name), "--lines", str(lines)]
                with log_of(Path(folder), name, arm).open("w") as log:
                    running[name, arm] = subprocess.Popen(
                        [sys.executable, __file__, "--out", str(args.out), *words],
                        cwd=place, env={**environment, **ARMS[arm][1]}, stdout=log, stderr=subprocess.STDOUT,
                    )  # fmt: skip
        while any(process.poll() is None for process in running.values()) and time.time() < deadline:
            time.sleep(0.5)
        for key, process in running.items():
            if process.poll() != 0:
                said = log_of(Path(folder), *key).read_text()[-1500:]
                print(f"--- {': '.join(key)}: exit code {process.poll()}\n{said}", flush=True)
            process.kill()
            process.wait()
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    text = table(rows)
    (args.out / "compiled-speed.md").write_text(text)
    print(text, flush=True)
    return int(len(rows) < len(running) * len(TOKENS))


if __name__ == "__main__":
    sys.exit(main())
