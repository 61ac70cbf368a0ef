"""Times steps on micro-batches that all differ in length, as in real data.

    python benchmarks/mixed_lengths.py --model /tmp/llama8b --out runs/mixed --seconds 540
    python benchmarks/mixed_lengths.py --out runs/mixed --table

`sparse-unsloth bench` repeats one shape. Here each micro-batch has ``--documents`` documents of random tokens, prompts
of 250 tokens in the median and answers of 120 (log-normal, sigma 0.6 and 0.7), padded or concatenated (flat:
padding-free, Unsloth's default). Arms run in separate processes, our methods in another, as in the bench (``--backend
peft``: of PEFT without Unsloth), and are compared with stock Unsloth and with the best arm. Every method runs the same
micro-batches four times, because sizes recur in a long training: graphs are captured in the third round and replayed in
the fourth, whose time counts. An arm runs them once to warm up, padded twice (layers are compiled, CUDA graphs
captured), and then until a round is about as quick as the quickest. Tokens are those of the documents. Each is checked
first; rows are appended to ``mixed_lengths.csv``.

With ``--shapes`` the same processes time these shapes of the bench too, before the micro-batches, into ``speed.csv``
beside it: a model is loaded once for both. ``--seconds`` limits the time; called again on the same machine within two
hours the job resumes where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sparse_unsloth.bench.arms import PADDED, arm_notes, arm_of, replan_arm, why_unavailable
from sparse_unsloth.bench.models import as_collated
from sparse_unsloth.bench.processes import Budget, Parent, emit, first_line, processes_of, serve, warm_up
from sparse_unsloth.bench.runs import Plan, fill, layouts_of, load_for, pieces_of, printed_table, run_to_resume
from sparse_unsloth.bench.shapes import shapes_of
from sparse_unsloth.bench.table import ARM_COLUMNS, SPEED, Kind, read_table
from sparse_unsloth.cli import bench
from sparse_unsloth.graphs.recorder import RUNS_BEFORE_CAPTURE
from sparse_unsloth.utils.options import whole

COLUMNS = (
    "date", "commit", "device", "versions", "model", "dtype", "layout", "method", "documents", "steps", "tokens",
    "recording_s", "round_s", "recorded_share", "kinds", "peak_gib", "used_gib", *ARM_COLUMNS, "checkpointing",
)  # fmt: skip
MIXED = Kind(COLUMNS, ("documents", "steps"), "round_s", lambda row: 1000 * float(row["round_s"]) / int(row["steps"]))
METHODS = "dense-graphs,rows-25,rows-25-graphs,sparse-o2-graphs"
ROUNDS = RUNS_BEFORE_CAPTURE + 2
ARM_ROUNDS = {"flat": 2, "padded": 3}
"""Fewest rounds of an arm: at the second pass CUDA graphs of compiled layers are captured."""
MOST_ROUNDS = 6
SHAPE_STEPS = ("--warmup", "2", "--steps", "4")
"""Of the bench, for ``--shapes``."""
PROMPT, ANSWER = (250, 0.6), (120, 0.7)
LONGEST = 2048


def make_batches(layout: str, documents: int, steps: int, vocab_size: int, seed: int = 0) -> list[dict]:
    """Makes micro-batches on the CPU, as a collator does; ``layout`` is "padded" or "flat"."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(median: float, sigma: float) -> int:
        return max(4, min(LONGEST // 2, round(median * (sigma * torch.randn((), generator=generator)).exp().item())))

    batches = []
    for _ in range(steps):
        sizes = [(draw(*PROMPT), draw(*ANSWER)) for _ in range(documents)]
        length = max(map(sum, sizes))
        ids = torch.randint(10, vocab_size, (documents, length), generator=generator)
        position = torch.arange(length)[None]
        prompts, ends = (torch.tensor(column)[:, None] for column in zip(*((p, p + a) for p, a in sizes), strict=True))
        mask = position < ends
        labels = ids.where(mask & (position >= prompts), torch.tensor(-100))
        if layout == "padded":
            batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask.long()})
            continue
        labels[:, 0] = -100
        batches.append(
            {
                "input_ids": ids[mask][None],
                "labels": labels[mask][None],
                "position_ids": position.expand_as(ids)[mask][None],
                "packed_seq_lengths": ends.flatten().int(),
            }
        )
    return batches


def round_of(model, batches: list[dict], optimiser, graphs) -> tuple[float, int]:
    """Runs a round; returns its seconds, and the number of captured or replayed forwards."""
    import torch

    replayed, last = 0, None if graphs is None else graphs.forward_number
    torch.cuda.synchronize()
    began = time.perf_counter()
    for batch in batches:
        with torch.autocast("cuda", torch.bfloat16):
            moved = {name: values.cuda(non_blocking=True) for name, values in as_collated(model, batch).items()}
            loss = model(**moved).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if graphs is not None and graphs.forward_number != last:
            replayed, last = replayed + 1, graphs.forward_number
    torch.cuda.synchronize()
    return time.perf_counter() - began, replayed


def measure(model, piece: dict, batches: list[dict]) -> dict:
    """Measures an arm, or an attached method; returns the columns of the table."""
    import torch

    from sparse_unsloth import get_state
    from sparse_unsloth.bench.speed import frozen_heap

    state = get_state(model)
    graphs = None if state is None else state.graphs
    if graphs is not None:
        graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    replayed = []

    def step() -> float:
        seconds, count = round_of(model, batches, optimiser, graphs)
        replayed.append(count)
        return seconds

    with frozen_heap():
        if piece["arm"]:
            rounds = warm_up(step, ARM_ROUNDS[piece["layout"]], MOST_ROUNDS)
        else:
            rounds = [step() for _ in range(ROUNDS)]
    peak = torch.cuda.max_memory_allocated() + (0 if graphs is None else graphs.memory())
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {
        "recording_s": round(rounds[-2] - rounds[-1], 3), "round_s": round(rounds[-1], 3),
        "recorded_share": round(replayed[-1] / len(batches), 3),
        "kinds": 0 if graphs is None else len(graphs.captured_keys),
        "peak_gib": round(peak / 2**30, 3), "used_gib": round((total - free) / 2**30, 3),
        "warmup_s": round(sum(rounds[:-1]), 1),
    }  # fmt: skip


def tokens_of(batches: list[dict]) -> int:
    """Counts the tokens of the documents, without padding."""
    return sum(int(batch.get("packed_seq_lengths", batch.get("attention_mask")).sum()) for batch in batches)


def time_all(model, left: list[dict], write: Callable[[dict], None], budget: Budget, checked: set[str]) -> None:
    """Times every remaining piece on this model; a piece that cannot be timed is written with the reason.

    Args:
        checked: arms and methods that were checked in this process.
    """
    import torch

    from sparse_unsloth.bench.checks import plain_steps
    from sparse_unsloth.bench.speed import attached, check_arm, check_method

    pieces = defaultdict(list)
    for piece in left:
        pieces[piece["arm"] or piece["method"]].append(piece)

    def time_pieces(name: str, arm) -> None:
        for piece in list(pieces[name]):
            documents, steps = int(piece["documents"]), int(piece["steps"])
            batches = make_batches(piece["layout"], documents, steps, model.config.vocab_size)
            if arm is not None:
                replan_arm(arm, model, documents, LONGEST)
            try:
                with budget.piece():
                    found = measure(model, piece, batches)
                note = "" if arm is None else arm_notes(arm, model)
            except torch.OutOfMemoryError:
                found, note = {}, "out of memory"
            write(piece | found | {"tokens": tokens_of(batches), "note": note})
            pieces[name].remove(piece)
            if found:
                say(name, piece, found, tokens_of(batches), note)

    for name in list(pieces):
        arm = arm_of(name) if pieces[name][0]["arm"] else None
        try:
            if arm is not None:
                if why := why_unavailable(arm, model):
                    raise NotThere(why)
                if name not in checked:
                    began = time.perf_counter()
                    found = check_arm(model, arm)
                    print(f"{name}: {found} ({time.perf_counter() - began:.1f} s)", flush=True)
                time_pieces(name, arm)
                continue
            plain = plain_steps(model) if name not in checked else None  # anew: the method before has trained it
            with attached(model, name):
                if plain is not None:
                    print(f"{name}: {check_method(model, name, plain)}", flush=True)
                time_pieces(name, None)
        except NotThere as why:
            fail(pieces[name], str(why), write)
        except Exception as error:
            traceback.print_exc()
            fail(pieces[name], f"NOT TIMED: {first_line(error)}", write)


class NotThere(Exception):
    """The arm does nothing on this model."""


def fail(pieces: list[dict], why: str, write: Callable[[dict], None]) -> None:
    """Writes rows without a time, with the reason."""
    for piece in pieces:
        print(f"{piece['arm'] or piece['method']}: {why}", flush=True)
        write(piece | {"note": why})


def say(name: str, piece: dict, found: dict, tokens: int, note: str) -> None:
    """Prints the figures in one line."""
    milliseconds = 1000 * found["round_s"] / int(piece["steps"])
    print(
        f"{piece['documents']:>3} {piece['layout']:7} {name:17} {milliseconds:7.1f} ms a step, "
        f"{tokens / found['round_s']:6.0f} tokens/s, {found['recorded_share']:.0%} replayed, {found['kinds']} sizes "
        f"captured in {found['recording_s']:.1f} s, warmed up in {found['warmup_s']:.1f} s, "
        f"peak {found['peak_gib']:.2f} GiB, in use {found['used_gib']:.2f}  {note}".rstrip(),
        flush=True,
    )


def plans_of(args: argparse.Namespace) -> dict[str, Plan]:
    """Returns the plans of both tables, by the name in children's rows; shapes come first, see `measure_in_child`."""
    from sparse_unsloth.bench.speed import cases_of

    cases = [{"documents": count, "steps": str(args.steps)} for count in args.documents]
    plans = {"mixed": Plan(args.out / "mixed_lengths.csv", MIXED, pieces_of(args, cases), args.run)}
    if args.shapes:
        of_shapes = copy.copy(args)
        of_shapes.layouts = [PADDED]
        plans["speed"] = Plan(args.out / "speed.csv", SPEED, pieces_of(of_shapes, cases_of(args)), args.run)
    return plans


def measure_in_child(args: argparse.Namespace) -> None:
    """Loads the model of this process, and times its arms or methods that the tables lack.

    Shapes come first: Unsloth disables its CUDA graphs permanently after more than 8 shapes.
    """
    from sparse_unsloth.bench import speed

    plans, budget = plans_of(args), Budget(args.deadline)
    left = {name: [one for one in plan.left() if is_of(one, args)] for name, plan in plans.items()}
    model = load_for(args, max(LONGEST, *(shape.length for shape in args.shapes.values()), 0))
    checked = set()
    if left.get("speed"):
        words = ["--model", args.model, "--dtype", args.dtype, "--shapes", ",".join(args.shapes), *SHAPE_STEPS]
        words += [
            "--checkpointing",
            args.checkpointing,
            "--arms",
            ",".join(args.arms),
            "--methods",
            ",".join(args.methods),
        ]
        run = speed.Run(
            bench.parse([*words, "--out", str(plans["speed"].path)]), model, partial(_emit, "speed"), budget
        )
        run.measure(left["speed"])
        checked = {one["arm"] or one["method"] for one in left["speed"]} - run.failed
    time_all(model, left["mixed"], partial(_emit, "mixed"), budget, checked)


def is_of(piece: dict, args: argparse.Namespace) -> bool:
    """Whether a child with these words times the piece."""
    return piece["arm"] in args.arms if piece["arm"] else piece["method"] in args.methods


def _emit(table: str, row: dict) -> None:
    emit(table=table, row=row)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("runs/mixed"))
    parser.add_argument("--dtype", choices=("4bit", "bf16"), default="4bit")
    bench.add_arm_options(parser)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--layouts", default="flat,padded", help="of the methods; default: %(default)s")
    parser.add_argument("--documents", default="4,16", help="in each micro-batch; default: %(default)s")
    parser.add_argument("--steps", type=whole(), default=24, help="micro-batches of a round")
    parser.add_argument("--shapes", default="", help="of `sparse-unsloth bench`: timed in the same processes")
    bench.add_run_options(parser)
    args = parser.parse_args(argv)
    if args.model is None and not args.table:
        parser.error("--model is needed, a checkpoint folder or hub name")
    bench.resolve_arms_and_methods(args)
    args.layouts = layouts_of(args.layouts)
    args.documents = args.documents.split(",")
    args.shapes = shapes_of(args.shapes) if args.shapes else {}
    args.rank = 16
    return args


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns 1 if something has no time yet, or cannot be timed."""
    args = parse(argv)
    if args.child:
        return serve(partial(measure_in_child, args))
    if not args.table:
        complete = conduct(args, argv)
    for path, kind in ((args.out / "mixed_lengths.csv", MIXED), (args.out / "speed.csv", SPEED)):
        if any(row["run"] == args.run or not args.run for row in read_table(path, kind.columns)):
            print(printed_table(path, kind, args.run), flush=True)
    return 0 if args.table else int(not complete)


def conduct(args: argparse.Namespace, argv: list[str]) -> bool:
    """Times everything in children; returns whether all of it has a time. Sets ``args.run``."""
    from sparse_unsloth.bench.speed import describe, device_name

    common = describe(args, device_name())
    args.run = args.run or run_to_resume(plans_of(args).values(), common, args.date)
    print(f"run {args.run}", flush=True)
    plans = plans_of(args)
    for plan in plans.values():
        plan.common.update(common)
    command = [sys.executable, __file__, *argv, "--run", args.run, "--date", args.date]
    with Parent(args.seconds).listening() as parent:
        return fill(plans, processes_of(list(args.arms), args.methods), command, parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
