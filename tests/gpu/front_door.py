"""Runs the quickstart and the examples on random models, as a newcomer would, each in its own process, all at once.

A script, not a test: it needs no network, and a CUDA GPU for what it is about (without one everything runs on the CPU).

    python tests/gpu/front_door.py --out DIR [--tokenizer FOLDER] [--seconds 240] [--small]

``OUT/front-door.txt`` has the table and the end of what each process said, written whenever one ends; the quickstart's
report lies beside it. The exit code is 1 if one failed or was not over in time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
VARIANTS = {"grpo": [{}, {"SPARSITY": "rows"}, {"BACKEND": "unsloth"}, {"BACKEND": "unsloth", "SPARSITY": "rows"}]}
"""Environment variables that an example reads; those not named run once, without."""
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
SAID = 5000
"""Characters of the end of what a process said that are kept."""


def write_model(folder: Path, tokenizer: Path | None, small: bool) -> None:
    """Writes a random model of Llama-3.2-1B's sizes, or of the examples', with ``tokenizer`` or one of bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(EXAMPLES))
    import tiny

    words = tiny.tokenizer() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    tokens = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    gpu = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**(tiny.SIZES if small else LLAMA_1B), **tokens, bos_token_id=None))
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def commands(work: Path, args: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Returns ``(command line, environment variables)`` of each process by its name."""
    words = ["quickstart", "--model", str(work / "model"), "--steps", str(args.steps), "--test-size", "24"]
    found = {
        "quickstart": (
            [sys.executable, "-m", "sparse_unsloth.cli", *words, "--output-dir", str(work / "quickstart")],
            {},
        )
    }
    for path in sorted(EXAMPLES.glob("*.py")):
        if path.stem in ("tiny", "write_notebooks"):
            continue
        for variables in VARIANTS.get(path.stem, [{}]):
            name = " ".join([path.stem, *variables.values()])
            # Eight rows need no process for each core, which Unsloth would start.
            found[name] = [sys.executable, str(path)], {"TINY": "1", "UNSLOTH_DATASET_NUM_PROC": "none", **variables}
    return found


def row(name: str, code: int | None, seconds: float, said: str) -> str:
    """Returns a line of the table: name, outcome, seconds, and what the process said of backend and loss."""
    outcome = {None: "not over", 0: "passed"}.get(code, f"FAILED ({code})")
    backend = re.findall(r"sparse_unsloth: backend (\w+)|attached \((\w+)\)|context tokens \((\w+)\)", said)
    used = "/".join(dict.fromkeys(word for match in backend for word in match if word))
    loss = re.findall(r"'train_loss': '?([-\d.e]+)", said)
    last = said.strip().splitlines()[-1][:70] if code and said.strip() else ""
    return f"{name:22} {outcome:12} {seconds:5.0f} s  {used:14} {loss[-1] if loss else '':8} {last}"


def main() -> int:
    """Runs all; returns 1 if one failed or was not over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer with a chat template; default: one of bytes")
    parser.add_argument("--seconds", type=float, default=240, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of the quickstart (default: %(default)s)")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--small", action="store_true", help="a model of two layers for the quickstart too")
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="front-door-"))
    running, lines, logs = {}, {}, {}
    shared = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
    chosen = {name: command for name, command in commands(work, args).items() if args.only in name}
    if "quickstart" in chosen:
        write_model(work / "model", args.tokenizer, args.small)
    for name, (words, variables) in chosen.items():
        folder = work / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        log = (work / f"{folder.name}.txt").open("w+")
        environment = {**os.environ, **shared, **variables}
        running[name] = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT), log
    while running:
        late = time.perf_counter() - began > args.seconds
        for name, (process, log) in list(running.items()):
            code = process.poll()
            if code is None and not late:
                continue
            process.kill()
            log.seek(0)
            logs[name] = log.read()[-SAID:]
            lines[name] = row(name, code, time.perf_counter() - began, logs[name])
            del running[name]
            print(lines[name], flush=True)
            ends = "\n\n".join(f"===== {other}\n{text}" for other, text in logs.items())
            (args.out / "front-door.txt").write_text("\n".join(lines.values()) + "\n\n" + ends + "\n")
            if name == "quickstart":
                for file in (work / name).glob("*.*"):
                    if file.suffix in (".md", ".json", ".png"):
                        shutil.copy(file, args.out)
                if code == 0:
                    print((args.out / "results.md").read_text(), flush=True)
        time.sleep(0.2)
    print("", *(lines[name] for name in chosen), sep="\n")
    shutil.rmtree(work, ignore_errors=True)
    return int(any("passed" not in line for line in lines.values()))


if __name__ == "__main__":
    sys.exit(main())
