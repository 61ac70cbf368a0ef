"""Plans a training by its data, its device and the forecast of its steps, when it begins (preset `auto`).

Gathers the facts, lets `sparse_unsloth.planning` decide, attaches the model as decided, prints the table, and after
some micro-batches compares the forecast with what was measured. The random state is left as it was, so that a training
that is planned to be exact sees its data in the order that it has without this package.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sparse_unsloth.config.sparsity import BACKWARD_ROWS
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.costs.memory import Forward
from sparse_unsloth.errors import AttachError, ConfigError
from sparse_unsloth.layer.attention import CAPTURABLE
from sparse_unsloth.model.adapters import refuse_dropout
from sparse_unsloth.model.training_flags import in_backward
from sparse_unsloth.ops.dispatch import use_kernels
from sparse_unsloth.planning.decide import Decision, Facts, Forwards, Kept, Speed, decide, mend, pooled
from sparse_unsloth.planning.fits import Fitted, choose, load
from sparse_unsloth.planning.progress import Outcome, Watch, of_all
from sparse_unsloth.planning.table import table
from sparse_unsloth.planning.work import OUTPUT_NORMS, PADDED, PADDING_FREE, MicroBatch, Plan, mark_repeated
from sparse_unsloth.runtime.checkpoint_planner import CheckpointPlanner, counted
from sparse_unsloth.runtime.merging import MEMORY_SHARE, fits, is_planned
from sparse_unsloth.runtime.state import SparsityState, get_state
from sparse_unsloth.tokens.batch import Batch, read_batch
from sparse_unsloth.tokens.merge import agreed, extents, grouped, join, starts, why_alone
from sparse_unsloth.tokens.partition import TokenPartition, is_sequence_classifier, partition_of
from sparse_unsloth.utils.distributed import from_all, has_group, is_main, rank, world_size

SAMPLES = 16
"""Micro-batches of the data that are read before a training begins."""
FREE_SHARE = 0.9
"""Of the memory that is free when training begins; the rest is for fragmentation."""
MOST_SAMPLES = 64
"""As many of them at most where an optimiser step has more than `SAMPLES`."""
NO_LOOP = "merging them needs a trainer, and data of which some micro-batches can be read beforehand"
NOT_BY_ITSELF = "where rows are left out only by hand (sparsity='rows'): docs/training.md has what they cost"
SHARDED = "the model is sharded (FSDP, ZeRO-3), where the plan cannot change it; name what you want (sparsity='rows')"

clock = time.perf_counter


def plan_from_data(
    state: SparsityState,
    dataset: Any,
    collate_fn: Callable[[list], Mapping[str, Any]] | None,
    *,
    batch_size: int,
    micro_batches: int,
    step: int = 1,
    no_merging: str = NO_LOOP,
    resumed: int = 0,
    own_loss: str = "",
) -> None:
    """Plans a training that begins, by micro-batches of its data set; by its first forward where these cannot be read.

    Args:
        state: of a model that was attached with preset `auto`.
        dataset, collate_fn, batch_size: as the trainer makes its micro-batches.
        micro_batches: how many the training has left; ``step``: how many of them an optimiser step has.
        no_merging: why none of them may run as one, whatever they hold; "" where they may.
        resumed: the optimiser steps that were done before.
        own_loss: the trainer's class name, if it computes a loss of its own.
    """
    state.auto.decision, state.auto.watch, state.auto.micro_batches = None, None, micro_batches
    state.auto.own_loss = own_loss
    batches = _sample(dataset, collate_fn, batch_size, step)
    if all(from_all(bool(batches))):
        _plan(state, batches, f"auto, resumed after step {resumed}" if resumed else "auto", step, no_merging)


def before_forward(state: SparsityState, arguments: Mapping[str, Any]) -> None:
    """Plans at the first training forward, if nothing did before, and measures later ones."""
    auto = state.auto
    if not torch.is_grad_enabled() or in_backward() or (auto.decision is not None and auto.watch is None):
        return
    batch = read_batch(arguments)
    if batch.labels is None or batch.labels.is_meta:
        if auto.decision is None:
            state.warn_once(
                "auto: training forwards come without labels, by which it plans, so training is exact and nothing is "
                "captured. sparsity='dense' says the same; see cuda_graphs and memory_budget."
            )
        return
    if auto.decision is None:
        _plan(state, [batch], "auto, by the first micro-batch")
    else:
        _measure(state, batch)


def _plan(state: SparsityState, batches: Sequence[Batch], title: str, step: int = 1, no_merging: str = NO_LOOP) -> None:
    """Decides by the facts of all processes, so that each comes to the same plan; every one must call it."""
    with _same_random_state():
        decision = _settle(state, decide(pooled(from_all(_gather(state, batches, step, no_merging)))))
    state.auto.watch = None if decision.facts.plan is None else Watch(decision)
    _say(table(decision, title))


def _measure(state: SparsityState, batch: Batch) -> None:
    """Notes that a forward begins; compares and mends the plan once enough were measured."""
    watch, device = state.auto.watch, _device(state)
    tokens = None
    if watch.measures:
        tokens = _count(state, _roles(state, batch), batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    outcome = watch.note(clock(), tokens, state.counts.captured_layers > 0)
    if has_group():  # each comes to an outcome at its own time, and all have to change the plan together
        outcome = of_all(from_all(outcome)) if watch.compares else None
    if outcome is not None:
        state.auto.watch = None
        _compare(state, outcome)


def _compare(state: SparsityState, outcome: Outcome) -> None:
    """Says how the forecast came out, and mends the plan where it was wrong."""
    before = state.auto.decision
    one = "a micro-batch" if before.merged == 1 else "a merged micro-batch"
    said = f"sparse_unsloth auto: {outcome.measured:.3g} ms {one} measured, "
    if outcome.predicted is None:
        said += "nothing predicted"
    else:
        said += f"{outcome.predicted:.3g} predicted ({round(outcome.ratio - 1, 2) + 0.0:+.0%})"
    after = mend(before, outcome.ratio, outcome.captured) if world_size() == 1 or has_group() else None
    if after is not None and (after.chosen, after.merged) != (before.chosen, before.merged):
        with _same_random_state():
            after = _settle(state, after)
        _say([f"{said}; the plan changes.", *table(after, "auto, mended")])
    else:
        _say([said if after is None else f"{said}; by that the plan stays as it is."])


def _settle(state: SparsityState, decision: Decision) -> Decision:
    """Attaches the model as decided; where it cannot be, as the next best decision says. Returns what was done.

    Every process must call it, with the same decision: where one cannot, none does.

    Raises:
        AttachError: the model cannot be attached with what was set by hand.
    """
    while True:
        error = None
        try:
            _attach(state, decision)
        except AttachError as caught:
            error = caught
        failure = next(filter(None, from_all("" if error is None else str(error))), "")
        if not failure:
            state.auto.decision, state.auto.was_decided = decision, True
            return decision
        facts, given = decision.facts, decision.facts.given
        reason = failure.removeprefix("cuda_graphs: ").removesuffix(" Set cuda_graphs: false.")
        if decision.cuda_graphs and "cuda_graphs" not in given and not facts.no_graphs:
            facts = replace(facts, no_graphs=reason)
        elif decision.backward_rows < 1 and "backward_rows" not in given and not facts.no_rows:
            facts = replace(facts, no_rows=reason)
        else:
            raise error or AttachError(failure)
        decision = decide(facts)


def _attach(state: SparsityState, decision: Decision) -> None:
    budget = _budget(state) if decision.facts.kept else None
    config = state.auto.asked.decided(
        backward_rows=decision.backward_rows,
        cuda_graphs=decision.cuda_graphs,
        memory_budget=budget,
        merge_micro_batches=decision.merged if decision.merged > 1 else None,
    )
    attached = get_state(state.model) is state
    if attached and (state.config.backward_rows, state.config.cuda_graphs) == (
        config.backward_rows,
        config.cuda_graphs,
    ):
        state.config = config
    else:
        state.auto.attach_again(state, config)
    if state.planner is not None:
        state.planner.restore()
    state.planner = None if config.memory_budget is None else state.plan_checkpoints(config.memory_budget)


# -- Facts ------------------------------------------------------------------------------------------------------------


def _gather(state: SparsityState, batches: Sequence[Batch], step: int, no_merging: str) -> Facts:
    """What this process knows; every process must call it."""
    asked, model = state.auto.asked, state.model
    given = {name: getattr(asked, name) for name in asked.model_fields_set}
    fitted, sharded = _fitted(state), _is_sharded(model)
    budget = None if sharded else _budget(state)
    if is_planned(state) and fitted is None:  # FLOPs know nothing of what merging saves
        no_merging = no_merging or "no comparable step was measured, so the gain of merging them is not predicted"
    groups, why_not = _agreed(*(({}, no_merging) if no_merging else _groups(state, batches, budget, step)))
    try:
        plan = _dense_plan(state)
        roles = [_roles(state, batch) for batch in batches]
    except ConfigError as error:  # of a model whose layers are not alike, or of labels that are not one per token
        return Facts(None, (), given=given, unknown=str(error))
    layout = PADDED if batches[0].layout == "padded" else PADDING_FREE
    checkpointed = sum(bool(getattr(layer.module, "gradient_checkpointing", False)) for layer in state.layers)
    plan = replace(plan, checkpointing=checkpointed > 0)
    forwards = _forwards(state, batches, roles, layout, budget)
    why_none = "as you set it" if "memory_budget" in given else SHARDED if sharded else "a CPU's memory is not planned"
    return Facts(
        plan,
        forwards.batches,
        layout=layout,
        speed=None if fitted is None else Speed(fitted.step_time),
        source="" if fitted is None else f"steps measured on {fitted.device} ({fitted.backend}, {fitted.dtype})",
        removal=asked.exact_removal,
        no_graphs=SHARDED if sharded else _why_no_graphs(state),
        no_rows=SHARDED if sharded else _why_no_rows(state),
        checkpointed=checkpointed,
        kept=forwards.kept,
        budget=0 if budget is None else _planner(state, budget, False).budget,
        no_budget=why_none,
        micro_batches=state.auto.micro_batches,
        merged={most: _merged(state, batches, numbers, layout, budget) for most, numbers in groups.items()},
        no_merging=why_not,
        given=given,
    )


def _forwards(
    state: SparsityState, batches: Sequence[Batch], roles: Sequence[TokenPartition], layout: str, budget: float | None
) -> Forwards:
    sizes = mark_repeated([_count(state, *one) for one in zip(roles, batches, strict=True)], layout)
    kept = None
    if budget is not None:
        padded = [one.padded_to_bucket(layout) for one in sizes]
        kept = {rows: _kept(state, budget, roles, padded, rows) for rows in (False, True)}
    return Forwards(sizes, kept)


def _groups(
    state: SparsityState, batches: Sequence[Batch], budget: float | None, step: int
) -> tuple[dict[int, list[list[int]]], str]:
    """The numbers of ``batches`` that run as one, with 2, 4, 8, ... of an optimiser step as far as they fit.

    What was set by hand is the only number. Without any number, why.
    """
    asked = state.auto.asked.merge_micro_batches
    if not is_planned(state) and not asked:
        return {}, ""
    steps = [batches[first : first + step] for first in range(0, len(batches), step)]
    found = [extents([one.arguments for one in of_step]) for of_step in steps]
    reason = next((why for _, why in found if why), "")
    if reason:
        return {}, reason
    limit = MEMORY_SHARE if budget is None and _device(state).type == "cuda" else budget
    planner, keeps = None if limit is None else _planner(state, limit, False), not (is_planned(state) or budget is None)
    numbers = [2**power for power in range(1, step.bit_length()) if 2**power < step] + [step]
    if not is_planned(state):
        numbers = [step if asked is True else min(asked, step)]
    fit, options, fewest = partial(fits, planner=planner, keeps=keeps), {}, len(batches)
    for most in numbers:
        of_steps = [grouped(one, most, fit, reorder=world_size() == 1) for one, _ in found]
        groups = [[at * step + number for number in group] for at, one in enumerate(of_steps) for group in one]
        if len(groups) == fewest:
            break
        options[most], fewest = groups, len(groups)
    return options, "" if options else why_alone([one for of_step, _ in found for one in of_step], keeps)


def _agreed(groups: dict[int, list[list[int]]], reason: str) -> tuple[dict[int, list[list[int]]], str]:
    """The groups that every process can run, as the trainer's processes agree in each step, or why there are none."""
    every = from_all((groups, reason))
    found = next((why for _, why in every if why), "")
    if found or len(every) == 1:
        return ({}, found) if found else (groups, "")
    common = [most for most in groups if all(most in one for one, _ in every)]
    if len({sum(map(len, one[most])) for one, _ in every for most in common}) > 1:
        return groups, ""  # of samples that are not equally large
    return {most: agreed(list(zip(*(starts(one[most]) for one, _ in every), strict=True))) for most in common}, ""


def _merged(
    state: SparsityState, batches: Sequence[Batch], groups: list[list[int]], layout: str, budget: float | None
) -> Forwards:
    """The forwards of ``batches`` where those of each group run as one."""
    joined = [
        read_batch(join([batches[number].arguments for number in group])) if len(group) > 1 else batches[group[0]]
        for group in groups
    ]
    return _forwards(state, joined, [_roles(state, one) for one in joined], layout, budget)


def _dense_plan(state: SparsityState) -> Plan:
    """The costs of dense training.

    Raises:
        ConfigError: they are not known for such a model.
    """
    config, layer = state.model.config, state.layers[0]
    shape = ModelShape.from_config(config)
    adapters = getattr(state.model, "peft_config", {}).values()
    targets = [name.partition(".")[2] for name, module in layer.projections().items() if hasattr(module, "lora_A")]
    return Plan(
        shape,
        ((0.0, 0.0),) * shape.num_layers,
        state.backend.name,
        lora_rank=max((getattr(adapter, "r", 0) for adapter in adapters), default=0),
        lora_targets=tuple(targets),
        estimator_rank=0,
        eager_attention=getattr(config.get_text_config(), "_attn_implementation", None) == "eager",
        whole_layers=use_kernels(next(layer.module.parameters())),
        output_norm=config.get_text_config().model_type in OUTPUT_NORMS,
        precision=state.auto.asked.precision,
        in_4bit=_in_4bit(state.model),
    )


def _fitted(state: SparsityState) -> Fitted | None:
    """The step times that come nearest to this GPU, backend and dtype; None without a GPU."""
    device = _device(state)
    if device.type != "cuda":
        return None
    fits, name = load(), torch.cuda.get_device_name(device)
    same = [one for one in fits if one.device == name] or fits
    dtype = "4bit" if _in_4bit(state.model) else "bf16"
    return choose(same, state.backend.name, dtype) or choose(same, "unsloth", dtype)


def _in_4bit(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.uint8 for parameter in model.parameters())


def _why_no_graphs(state: SparsityState) -> str:
    devices = {next(layer.module.parameters()).device for layer in state.layers}
    parameter = next(state.layers[0].module.parameters())
    if parameter.device.type != "cuda":
        return "CUDA graphs need an NVIDIA GPU"
    if len(devices) > 1:
        return "the layers are on several devices, and a CUDA graph is of one"
    if not state.auto.asked.exact_removal:
        return "they need exact_removal: true"
    return "" if use_kernels(parameter) else "Triton's kernels do not run here"


def _why_no_rows(state: SparsityState) -> str:
    if state.auto.asked.dense_tokens == "none":
        return "dense_tokens: none makes answers context, and rows of answers are never left out by size"
    if is_sequence_classifier(state.model):
        return f"a classifier's loss reads one row of a sequence, {NOT_BY_ITSELF}"
    if state.auto.own_loss:
        return f"{state.auto.own_loss} computes a loss of its own, {NOT_BY_ITSELF}"
    try:
        for layer in state.layers:
            refuse_dropout(layer)
    except AttachError as error:
        return str(error)
    return ""


def _is_sharded(model: nn.Module) -> bool:
    """Whether parameters are split over processes."""
    return any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened")
        for parameter in model.parameters()
    )


def _budget(state: SparsityState) -> float | None:
    """`SparsityConfig.memory_budget` of this training: as given, or a share of what is free; None: no budget."""
    asked = state.auto.asked
    if "memory_budget" in asked.model_fields_set:
        return asked.memory_budget
    devices = {next(layer.module.parameters()).device for layer in state.layers}
    if any(device.type != "cuda" for device in devices):
        return None
    shares = []
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        unused = free + torch.cuda.memory_reserved(device) - used
        shares.append((used + FREE_SHARE * unused) / total)
    return min(shares)


def _planner(state: SparsityState, budget: float, rows: bool) -> CheckpointPlanner:
    return CheckpointPlanner(
        state.model,
        state.layers,
        state.layer_sparsity,
        budget,
        row_layers={layer.index: True for layer in state.layers} if rows else {},
        backward_rows=_share(state) if rows else 1.0,
        fused_loss=state.backend.name == "unsloth",
        config=state.auto.asked,
    )


def _share(state: SparsityState) -> float:
    asked = state.auto.asked
    return asked.backward_rows if asked.row_sparse else BACKWARD_ROWS


def _kept(
    state: SparsityState, budget: float, roles: Sequence[TokenPartition], padded: Sequence[MicroBatch], rows: bool
) -> Kept:
    """What fits of forwards with these ``roles``, and of the same ones captured, which are ``padded``."""
    planner = _planner(state, budget, rows)

    def forecast(partitions: Sequence[TokenPartition], held: int = 0) -> tuple[float, list[Forward]]:
        found = [planner.forecast(one, 1.0 if rows and one.num_context else 0.0, held) for one in partitions]
        return sum(kept for kept, _ in found) / len(found), [forward for _, forward in found]

    kept, alone = forecast(roles)
    inside = [counted(one.dense, one.context + one.padding, 0, one.loss) for one in padded]
    _, captured = forecast(inside)
    pool = max(map(planner.memory.pool, captured))
    _, beside = forecast(roles, int(pool) if len({one.rows for one in captured}) > 1 else 0)
    return Kept(kept, planner.peak(alone), planner.peak(beside, captured))


def _count(state: SparsityState, roles: TokenPartition, batch: Batch) -> MicroBatch:
    """The tokens of ``batch``, with the lengths of what attention computes: of a whole row where a mask tells
    documents apart (docs/how-it-works.md, section 5.4).
    """
    tokens = MicroBatch.of(roles, batch)
    kind = getattr(state.model.config.get_text_config(), "_attn_implementation", None)
    masked = state.backend.name == "peft" and batch.layout != "padded" and kind in CAPTURABLE
    return replace(tokens, lengths=(tokens.rows,)) if masked and roles.shape[0] == 1 else tokens


def _roles(state: SparsityState, batch: Batch) -> TokenPartition:
    unpadded = state.backend.name == "unsloth"
    return partition_of(state.model, batch, state.auto.asked.dense_tokens, padding_masked=not unpadded)


def _sample(dataset: Any, collate_fn: Callable | None, batch_size: int, step: int) -> list[Batch]:
    """Some micro-batches of a data set, of whole optimiser steps, other ones on each process; none where not known.

    That is where it cannot be read without using it up, or tells no labels.
    """
    if collate_fn is None or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return []
    size, count = max(batch_size, 1), min(SAMPLES // world_size() // step * step or step, MOST_SAMPLES)
    chosen = random.Random(rank()).sample(range(len(dataset)), min(len(dataset), count * size))
    if len(chosen) > size:
        chosen = chosen[: len(chosen) // size * size]
    with _same_random_state():
        try:
            rows = [copy.copy(dataset[index]) for index in chosen]  # collators may change them
            made = [collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)]
        except Exception:  # whatever a data set does: the first forward is planned by instead, and the table says so
            return []
    batches = [read_batch(batch) for batch in made if isinstance(batch, Mapping)]
    return [batch for batch in batches if batch.labels is not None and batch.inputs is not None]


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Leaves the random states of Python, NumPy and PyTorch as they were."""
    import numpy

    python, numpys = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpys)


def _device(state: SparsityState) -> torch.device:
    return next(state.layers[0].module.parameters()).device


def _say(lines: list[str]) -> None:
    if is_main():
        print(*lines, sep="\n", flush=True)
