"""Row sparsity on Unsloth's compiled path (``FastModel``, ``FastVisionModel``), on small random models of its families.

    python tests/gpu/compiled_rows.py --out OUT [--seconds 150] [--only "qwen3_vl unsloth padded,..."]

Each case (family, gradient checkpointing, layout, and "4bit" for such weights) runs in a process of its own. It trains
steps of changing lengths with plain Unsloth, with every row kept and with a quarter of the context tokens. With every
row kept, loss and gradients must be plain Unsloth's; a quarter must give "n of n layers", the dense loss and a cosine
of the gradient above `LEAST_COSINE`; and neither may compile after the warm-up, or break a graph, where plain Unsloth
does not. Exit code 1 on any failure. Table and figures go to ``OUT/compiled-rows.md`` and ``.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

FAMILIES = "gemma3", "qwen3_5", "gpt_oss", "qwen3_vl", "gemma3n", "gemma4"
CASES = tuple(
    f"{family} {kind}"
    for kind in ("unsloth padded", "True packed")
    for family in FAMILIES
    if not (kind == "True packed" and family in ("gemma3n", "gemma4"))
)
"""What is tried: every family with both kinds of checkpointing and both layouts, the last two with one of each."""
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
"""Of all families; the rest is that of `decoder_models`."""
CHANGES = {
    "gemma3": {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_5": {**LINEAR_ATTENTION, "layer_types": ["linear_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_vl": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8], "mrope_interleaved": True,
    }},
    "gemma3n": {"sliding_window": 48, "laurel_rank": 16, "vocab_size_per_layer_input": 1024,
                "hidden_size_per_layer_input": 32, "num_hidden_layers": 4},
    "gemma4": {"sliding_window": 48, "vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 32,
               "num_hidden_layers": 4},
}  # fmt: skip
VISION_WIDTH = 128
IMAGE_TOKENS = {"<|image_pad|>": 7, "<|video_pad|>": 8, "<|vision_start|>": 9, "<|vision_end|>": 10}
SHARPER = 2.0
"""The factor of the matrices' initial values, so that attention tells tokens apart."""
LENGTHS = (200, 150), (256, 200), (131, 100), (255, 231)
"""``(tokens, tokens of the prompt)`` of the documents of the batch whose gradients are compared."""
WARM = ((120, 90), (64, 40), (190, 160), (77, 60)), ((99, 70), (256, 200), (31, 20), (140, 100)), LENGTHS
STEADY = ((201, 160), (90, 50), (174, 120), (61, 40)), ((222, 200), (111, 80), (45, 30), (190, 150)), LENGTHS
"""Batches of the steps before and after which compilations are counted: of new lengths."""
ALMOST_NOTHING = 1e-9
ROWS = {"every row": {"backward_rows": 1 - ALMOST_NOTHING}, "quarter": {"backward_rows": 0.25}}
LEAST_COSINE = 0.5
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 0.03
"""Relative, of bf16 arithmetic in another order (`sparse_unsloth.bench.trial`)."""
NOISE = 2.0
"""Gradients may be so many times as far from compiled layers as plain Unsloth's uncompiled layers are: a router or
attention near a tie decides otherwise after another rounding."""
SECONDS, AT_ONCE = 150, 10
LINES = "compiled-rows.jsonl"


# -- In the parent, which never imports Unsloth ------------------------------------------------------------------------


def write_model(family: str, folder: Path) -> None:
    """Writes a checkpoint of random weights with a tokenizer, or a processor, of words."""
    from sparse_unsloth.bench.families import NORM_SPREAD

    from decoder_models import FAMILIES as MODELS
    from decoder_models import QWEN3_VISION, QWEN_IMAGES, causal, with_images

    kind = replace(MODELS[family], config={**MODELS[family].config, **SIZES, **CHANGES.get(family, {})})
    build = kind.build
    if family == "qwen3_vl":
        sizes = {"hidden_size": VISION_WIDTH, "intermediate_size": 2 * VISION_WIDTH, "out_hidden_size": 256}
        build = with_images({**QWEN3_VISION, **sizes}, **QWEN_IMAGES)
    torch.manual_seed(0)
    model = (build or causal)(kind).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(NORM_SPREAD * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(SHARPER)
    model.save_pretrained(folder)
    save_words(folder, images=kind.inputs is not None)


def save_words(folder: Path, images: bool) -> None:
    """Saves a tokenizer of words; with ``images`` in a processor of Qwen3-VL's kind."""
    import transformers

    from sparse_unsloth.bench.families import make_tokenizer

    tokenizer = make_tokenizer(IMAGE_TOKENS if images else None)
    if images:
        parts = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen3VLVideoProcessor()
        transformers.Qwen3VLProcessor(*parts, chat_template=tokenizer.chat_template).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)


def file_of(models: Path, case: str, ending: str) -> Path:
    """The file of a case, in a folder that is deleted; all results are in one file too, as few files come back."""
    return models / f"{case.replace(' ', '_')}.{ending}"


def start(case: str, models: Path, out: Path) -> subprocess.Popen:
    """Starts the process of a case in a folder of its own, where Unsloth writes its compiled modules."""
    place = models / f"run {case}"
    place.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--case", case, "--models", str(models), "--out", str(out)]
    with file_of(models, case, "log").open("w") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_all(cases: list[str], models: Path, out: Path, deadline: float) -> dict[str, int | None]:
    """Runs the cases, `AT_ONCE` at a time; returns their exit codes, None where the time was up."""
    waiting, running, codes, began = list(cases), {}, {}, time.time()
    while waiting or running:
        for case in waiting[: AT_ONCE - len(running)]:
            running[case] = start(case, models, out)
            waiting.remove(case)
        time.sleep(0.2)
        late = time.time() > deadline
        for case, process in list(running.items()):
            if process.poll() is None and not late:
                continue
            codes[case] = process.poll()
            process.kill()
            process.wait()
            del running[case]
            print(f"{case}: exit code {codes[case]} after {time.time() - began:.0f} s", flush=True)
            if codes[case] != 0:
                print(file_of(models, case, "log").read_text()[-2500:], flush=True)
        if late:
            return codes | dict.fromkeys(waiting)
    return codes


COLUMNS = "case", "arm", "layers", "parts", "loss", "gradient", "noise", "cosine", "warm", "steady", "breaks", "s"


def table(models: Path, cases: list[str], codes: dict[str, int | None]) -> tuple[str, bool]:
    """Markdown of all results, and whether anything failed or is missing."""
    lines, failures = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)], []
    for case in cases:
        file = file_of(models, case, "jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        for row in rows:
            cells = [row.get(column, "") for column in COLUMNS]
            lines.append(f"| {' | '.join(f'{c:.2g}' if isinstance(c, float) else str(c) for c in cells)} |")
            failures += [f"{case}, {row['arm']}: {problem}" for problem in row["problems"]]
        missing = 1 + len(ROWS) - len(rows)
        if missing or codes.get(case) not in (0, 1):
            failures.append(f"{case}: exit code {codes.get(case)}, {missing} of {1 + len(ROWS)} arms missing")
    lines += ["", f"**{len(failures)} failures.**" if failures else "**No failures.**", ""]
    lines += [f"- {failure}" for failure in failures]
    return "\n".join(lines) + "\n", bool(failures)


# -- In a case's process -----------------------------------------------------------------------------------------------


def make_case_batch(model: nn.Module, layout: str, documents: tuple, images: bool) -> dict[str, Any]:
    """A micro-batch, with an image in each padded document where the model has a vision tower."""
    from sparse_unsloth.bench.trial import make_batch

    device = next(model.parameters()).device
    batch = make_batch(layout, SIZES["vocab_size"], device, "unsloth", documents)
    ids = batch["input_ids"]
    ids[(ids >= 7) & (ids <= 10)] = 11
    if images and layout == "padded":
        ids[:, 1] = 9
        ids[:, 2:6] = 7
        ids[:, 6] = 10
        pixels = torch.randn(16 * len(ids), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
        batch |= {
            "pixel_values": pixels.to(device),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids), device=device),
            "mm_token_type_ids": (ids == 7).long(),
        }
    return batch


@contextlib.contextmanager
def counted(found: dict[str, Any], name: str) -> Iterator[None]:
    """Adds to ``found`` how many frames torch.compile compiles meanwhile, and where graphs break."""
    from torch._dynamo.utils import counters

    frames, breaks = counters["frames"]["ok"], Counter(counters["graph_break"])
    yield
    found[name] = counters["frames"]["ok"] - frames
    for reason, count in (Counter(counters["graph_break"]) - breaks).items():
        found.setdefault("break_reasons", {})[reason[:400]] = count
    found["breaks"] = sum(found.get("break_reasons", {}).values())


def train(model: nn.Module, case: str, found: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Trains the warm-up and the steady steps; returns loss and gradients of the last."""
    from sparse_unsloth.bench.trial import step

    layout, images = case.split()[2], case.startswith("qwen3_vl")
    with counted(found, "warm"):
        for documents in WARM:
            torch.manual_seed(0)  # for routers with noise
            step(model, make_case_batch(model, layout, documents, images))
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    with counted(found, "steady"):
        for documents in STEADY:
            torch.manual_seed(0)
            last = step(model, make_case_batch(model, layout, documents, images))
    torch._logging.set_logs()
    return last


def apart(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative difference of all gradients together, and their cosine."""
    ours, plain = (torch.cat([one[name].flatten() for name in sorted(plain)]) for one in (ours, plain))
    return ((ours - plain).norm() / plain.norm()).item(), torch.cosine_similarity(ours, plain, dim=0).item()


def try_case(case: str, models: Path) -> Iterator[dict[str, Any]]:
    """Yields the figures and problems of each arm: plain Unsloth, every row kept, a quarter of the rows."""
    from sparse_unsloth import attach, detach
    from sparse_unsloth.backends.patching import Uncompiled
    from sparse_unsloth.bench.arms import compiled_layers
    from sparse_unsloth.bench.models import CHECKPOINTING
    from sparse_unsloth.bench.trial import load, step

    family, checkpointing, layout, *dtype = case.split()
    began = time.time()
    model = load("unsloth", models / family, *(dtype or ["bf16"]), CHECKPOINTING[checkpointing], sparsity="rows")
    plain = {"case": case, "arm": "stock", "problems": [], "loaded_s": round(time.time() - began, 1)}
    loss, gradients = train(model, case, plain)
    blocks = compiled_layers(model)
    plain |= {"loss": loss, "parts": f"{len(blocks)} layers compiled"}
    switches = [Uncompiled(layer) for layer in blocks]
    batch = make_case_batch(model, layout, STEADY[-1], case.startswith("qwen3_vl"))
    uncompiled: dict[str, Any] = {}
    with counted(uncompiled, "warm"):
        torch.manual_seed(0)
        _, eager = step(model, batch)
    plain["uncompiled_break_reasons"] = uncompiled.get("break_reasons", {})
    for switch in switches:
        switch.remove()
    plain["noise"], _ = apart(eager, gradients)
    yield plain | {"s": round(time.time() - began, 1)}
    for arm, config in ROWS.items():
        began, found = time.time(), {"case": case, "arm": arm, "problems": []}
        try:
            report = attach(model, config)
            print(report, flush=True)
            found["layers"] = f"{report.num_sparse} of {report.num_layers}"
            parts = dict.fromkeys(part for layer in report.layers for part in layer.row_parts or ("Llama's",))
            found["parts"] = f"{', '.join(parts)}; {report.whole_layers} whole"
            found["loss"], ours = train(model, case, found)
            found["gradient"], found["cosine"] = apart(ours, gradients)
            found["noise"], _ = apart(ours, eager)  # from plain Unsloth's uncompiled layers
            found["problems"] = problems_of(found, plain, exact=arm == "every row")
        except Exception as error:
            traceback.print_exc()
            found["problems"].append(f"{type(error).__name__}: {error}"[:600])
        finally:
            detach(model)
        yield found | {"s": round(time.time() - began, 1)}


def problems_of(found: dict[str, Any], plain: dict[str, Any], exact: bool) -> list[str]:
    """What an arm's figures show to be wrong."""
    problems, (sparse, layers) = [], found["layers"].split(" of ")
    if sparse != layers:
        problems.append(f"only {found['layers']} layers")
    if not abs(found["loss"] / plain["loss"] - 1) < LOSS_TOLERANCE:
        problems.append(f"the loss is {found['loss']:.5f} instead of {plain['loss']:.5f}")
    limit = max(GRADIENT_TOLERANCE, NOISE * plain["noise"])
    if exact and not found["gradient"] <= limit:
        problems.append(f"every row kept, and gradients are {found['gradient']:.3g} off (allowed {limit:.3g})")
    if exact and not found["noise"] <= limit:
        problems.append(f"every row kept, and gradients are {found['noise']:.3g} off uncompiled layers")
    if not exact and not LEAST_COSINE < found["cosine"] < 1 - 1e-6:
        problems.append(f"the cosine with the dense gradient is {found['cosine']:.6f}")
    if found["steady"] > plain["steady"]:
        problems.append(f"{found['steady']} compilations after the warm-up, plain Unsloth {plain['steady']}")
    stock = plain.get("break_reasons", {}).keys() | plain["uncompiled_break_reasons"].keys()
    new = found.get("break_reasons", {}).keys() - stock
    problems += [f"graph break that plain Unsloth does not have: {reason[:300]}" for reason in sorted(new)]
    return problems


def run_case(case: str, models: Path, out: Path) -> int:
    """Writes a line for each arm as soon as it is there; returns 1 if something is wrong."""
    from sparse_unsloth.bench.trial import compile_untuned

    compile_untuned()
    import unsloth  # noqa: F401

    failed = False
    with file_of(models, case, "jsonl").open("w") as own, (out / LINES).open("a") as lines:
        for found in try_case(case, models):
            failed |= bool(found["problems"])
            for file in (own, lines):
                file.write(json.dumps(found) + "\n")
                file.flush()
            print(json.dumps(found), flush=True)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    parser.add_argument("--only", default=",".join(CASES), help="cases, parted by commas")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    return args


def main() -> int:
    args = parse()
    if args.case:
        return run_case(args.case, args.models, args.out)
    root = Path(__file__).resolve().parents[2]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(root), str(root / "tests" / "helpers"), os.environ.get("PYTHONPATH")))
    )
    sys.path[:0] = str(root), str(root / "tests" / "helpers")
    deadline, cases = time.time() + args.seconds, args.only.split(",")
    (args.out / LINES).write_text("")
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        for family in dict.fromkeys(case.split()[0] for case in cases):
            write_model(family, models / family)
        codes = run_all(cases, models, args.out, deadline)
        text, failed = table(models, cases, codes)
    (args.out / "compiled-rows.md").write_text(text)
    print(text, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
