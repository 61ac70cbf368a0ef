"""Time of a prompt's forward in generation, dense and sparse prefill side by side on one loaded model.

    python benchmarks/prefill.py --model DIR [--backend unsloth] [--load-in-4bit] --out OUT

Each method is attached to the same model; the first forward of a generation is timed with and without
``sparse_prefill``, in turns, and a row goes to OUT/prefill.csv: medians in milliseconds and their ratio. Adapters and,
without calibration, channels are random: time only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import statistics
import sys
import time
from pathlib import Path


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--backend", default="auto", choices=("auto", "unsloth", "peft"))
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--methods", default="sparse-o2,sparse-50,sparse-25")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8, help="of a dense and a sparse forward (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(words)
    if arguments.backend == "unsloth":
        importlib.import_module("unsloth")  # first, as it asks
    import torch

    from sparse_unsloth import FastSparseLanguageModel, attach, detach
    from sparse_unsloth.bench.methods import sparsity_of
    from sparse_unsloth.study.tables import read_csv, write_csv

    model, _ = FastSparseLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=arguments.length + 8,
        load_in_4bit=arguments.load_in_4bit,
        backend=arguments.backend,
    )
    model = FastSparseLanguageModel.get_peft_model(model, r=16, sparsity={"preset": "dense", "exact_removal": False})
    detach(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def forward() -> float:
        ids = torch.randint(3, model.config.vocab_size, (arguments.batch, arguments.length), generator=generator)
        ids = ids.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    path = arguments.out / "prefill.csv"
    rows = read_csv(path) if path.is_file() else []
    for method in arguments.methods.split(","):
        print(attach(model, {**sparsity_of(method, model.config.num_hidden_layers), "estimator": {"kind": "svd"}}))
        inner = model.get_base_model()  # as generate() calls it
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 + arguments.rounds):
            for sparse in times:
                FastSparseLanguageModel.for_inference(model, sparse_prefill=sparse)
                took = forward()
                if turn > 1:  # the first ones compile
                    times[sparse].append(took)
        dense, sparse = (statistics.median(times[which]) for which in (False, True))
        rows.append(
            {
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "model": Path(arguments.model).name,
                "weights": "4bit" if arguments.load_in_4bit else "16bit",
                "backend": arguments.backend,
                "method": method,
                "prompts": f"{arguments.batch}x{arguments.length}",
                "dense_ms": round(dense, 2),
                "sparse_ms": round(sparse, 2),
                "speed_up": round(dense / sparse, 3),
            }
        )
        write_csv(path, rows)
        print(f"{method}: dense {dense:.1f} ms, sparse prefill {sparse:.1f} ms, {dense / sparse:.2f}x", flush=True)
        detach(model)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose kernels.py would answer to transformers' `import kernels`
    main()
