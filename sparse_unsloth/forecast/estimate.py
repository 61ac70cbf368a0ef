"""Estimates tokens, FLOPs, time and memory of a training from its recipe, without running a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_unsloth.bench.table import read_rows
from sparse_unsloth.config.sparsity import PRESETS, SparsityConfig
from sparse_unsloth.costs.memory import (
    Memory,
    fused_logits,
    logit_bytes,
    peak_memory,
    plain_logits,
    sparse_layer_activations,
)
from sparse_unsloth.data.datasets import length_filter, load_dataset_for
from sparse_unsloth.errors import ConfigError
from sparse_unsloth.forecast.model import Model, backend_of, has_whole_layers, read_model
from sparse_unsloth.forecast.result import Estimate, Preset, Step, time_ratio
from sparse_unsloth.forecast.speed_table import MODELS, fit_table
from sparse_unsloth.forecast.tokens import TokenStatistics, read_tokens
from sparse_unsloth.layer.attention import CAPTURABLE
from sparse_unsloth.planning.decide import Facts, Speed, decide
from sparse_unsloth.planning.fits import Fitted, choose, load
from sparse_unsloth.planning.work import (
    OUTPUT_NORMS,
    MicroBatch,
    Plan,
    Work,
    backward_rows_of,
    batch_work,
    logit_rows,
    mark_repeated,
)
from sparse_unsloth.training.keys import SEQ_CLS

if TYPE_CHECKING:
    from sparse_unsloth.training.recipe import Recipe

SAMPLES = 1000
"""The default number of samples to read."""


def estimate(
    recipe: Recipe, samples: int | None = SAMPLES, device: str | None = None, speed_table: str | Path | None = None
) -> Estimate:
    """Estimates the training of ``recipe``. Reads the model's configuration and tokenizer, not its weights.

    Args:
        recipe: a recipe of `load_recipe`.
        samples: the number of samples to read, drawn by the recipe's seed; None for all.
        device: a part of the name of a measured GPU; None takes the newest measurements.
        speed_table: a table of `sparse-unsloth bench` to fit instead of the package's.

    Raises:
        SparsityError: model or data cannot be loaded or do not fit the recipe, or there is no loss token.
    """
    if recipe.model.lora_task_type == SEQ_CLS:
        raise ConfigError("estimate counts the tokens of text recipes; a classifier (SEQ_CLS) it cannot estimate yet.")
    if recipe.training.use_cpu and (device is not None or speed_table is not None):
        raise ConfigError("--device, --speed-table: are of GPUs, and this training has use_cpu: true; leave them out.")
    model, tokenizer = read_model(recipe)
    backend, reason = backend_of(recipe, model.model_type, recipe.training.use_cpu)
    training = recipe.training
    name = recipe.model.model_name_or_path
    fits = length_filter(recipe.data, name, training.max_length, training, tokenizer)
    data, _ = load_dataset_for(
        recipe.data, False, training.completion_only_loss, fits, text_field=training.dataset_text_field
    )
    batches, tokens = read_tokens(recipe, data, tokenizer, backend, model.model_type, samples)
    fitted = None
    if not recipe.training.use_cpu:
        dtype = "4bit" if model.in_4bit else "bf16"
        fitted = choose(_fits(speed_table, model), backend, dtype, device)
    plan = _plan(recipe, model, backend)
    attention = recipe.model.attn_implementation in (None, *CAPTURABLE)
    capturable = fitted is not None and plan.whole_layers and recipe.sparsity.exact_removal and attention
    auto = recipe.sparsity.is_auto
    if auto:
        recipe = replace(recipe, sparsity=_decided(recipe, plan, batches, tokens.layout, fitted, capturable))
        plan = replace(plan, backward_rows=recipe.sparsity.backward_rows)
    unsloth, accumulation = backend == "unsloth", recipe.training.gradient_accumulation_steps
    exact, is_sparse = replace(plan.dense(), precision=plan.precision), plan.is_sparse

    def step(plan: Plan, removal: bool) -> Step:
        return _step([batch_work(plan, batch, removal) for batch in batches], accumulation, fitted)

    def step_with_graphs(plan: Plan) -> Step:
        longer = [batch.padded_to_bucket(tokens.layout) for batch in mark_repeated(batches, tokens.layout)]
        captured = replace(plan, captured=True)
        return _step([batch_work(captured, batch, True) for batch in longer], accumulation, fitted, with_graphs=True)

    dense = step(plan.dense(), removal=False)
    dense_exact = step(plan.dense(), removal=True) if unsloth else None
    removal = recipe.sparsity.exact_removal
    presets = {}
    for name in PRESETS:
        preset = SparsityConfig(preset=name)
        if preset.is_sparse(model.shape.num_layers):
            layers = tuple(map(tuple, preset.layer_sparsity(model.shape.num_layers)))
            precision = plan.precision if plan.precision == "fp8" and preset.row_sparse else "bf16"
            kind = replace(plan, layers=layers, backward_rows=preset.backward_rows, precision=precision)
            graphs = capturable and recipe.sparsity.cuda_graphs
            other = step_with_graphs(kind) if graphs else step(kind, removal)
            presets[name] = Preset(dense.flops / other.flops, time_ratio(dense, other))
    count = _optimiser_steps(recipe, tokens)
    sparse_share = len(recipe.sparsity.schedule.sparse_steps(count)) / count if is_sparse else 0.0
    return Estimate(
        model=model,
        dataset=recipe.data.dataset_name,
        backend=backend,
        backend_reason=reason,
        tokens=tokens,
        sequences=recipe.training.per_device_train_batch_size,
        accumulation=accumulation,
        dense=dense,
        dense_exact=dense_exact,
        sparse=step(plan, removal=removal and not unsloth) if is_sparse else None,
        sparse_exact=step(plan, removal=True) if is_sparse and unsloth else None,
        exact_removal=unsloth and removal,
        optimiser_steps=count,
        sparse_share=sparse_share,
        presets=presets,
        fitted=fitted,
        memory=_memory(
            recipe,
            model,
            plan,
            batches,
            sparse=sparse_share == 1,
            layout=tokens.layout if capturable and recipe.sparsity.cuda_graphs else None,
        ),
        dense_layer_0=model.layers[0][0] == 0,
        backward_rows=recipe.sparsity.backward_rows,
        checkpointing=plan.checkpointing,
        recorded=step_with_graphs(plan if is_sparse else exact) if capturable else None,
        cuda_graphs=recipe.sparsity.cuda_graphs,
        precision=plan.precision,
        fp8=step(exact, removal) if plan.precision != "bf16" and plan.whole_layers else None,
        auto=auto,
    )


def _decided(
    recipe: Recipe,
    plan: Plan,
    batches: Sequence[MicroBatch],
    layout: str,
    fitted: Fitted | None,
    capturable: bool,
) -> SparsityConfig:
    """What `auto` would decide for the training of ``recipe``, without what only its GPU tells (free memory)."""
    asked = recipe.sparsity
    facts = Facts(
        replace(plan.dense(), precision=plan.precision),
        mark_repeated(batches, layout),
        layout,
        None if fitted is None else Speed(fitted.step_time),
        removal=asked.exact_removal,
        no_graphs="" if capturable else "not predicted",
        checkpointed=plan.shape.num_layers if plan.checkpointing else 0,
        no_budget="the free memory is not known",
        given={name: getattr(asked, name) for name in asked.model_fields_set},
    )
    decision = decide(facts)
    return asked.decided(backward_rows=decision.backward_rows, cuda_graphs=decision.cuda_graphs)


def _plan(recipe: Recipe, model: Model, backend: str) -> Plan:
    sparsity = recipe.sparsity
    return Plan(
        model.shape,
        model.layers,
        backend,
        checkpointing=recipe.training.gradient_checkpointing,
        chunked_loss=backend == "peft" and recipe.training.loss_type == "chunked_nll",
        lora_rank=recipe.model.lora_r,
        lora_targets=model.lora_targets,
        estimator_rank=sparsity.estimator.rank if sparsity.criterion == "estimator" else 0,
        eager_attention=model.eager_attention,
        backward_rows=sparsity.backward_rows,
        whole_layers=has_whole_layers(recipe, model.model_type, backend),
        output_norm=model.model_type in OUTPUT_NORMS,
        precision=sparsity.precision,
        in_4bit=model.in_4bit,
    )


def _step(works: Sequence[Work], accumulation: int, fitted: Fitted | None, with_graphs: bool = False) -> Step:
    """Scales the average micro-batch to an optimiser step; ``with_graphs``: with the host time of `cuda_graphs`."""
    flops = sum(work.flops for work in works) * accumulation / len(works)
    if fitted is None:
        return Step(flops, None, host_bound=False)
    model = fitted.step_time
    milliseconds = sum(map(model.with_graphs if with_graphs else model, works)) * accumulation / len(works)
    host_bound = not with_graphs and sum(map(model.host, works)) > sum(map(model.device, works))
    return Step(flops, milliseconds, host_bound)


def _fits(speed_table: str | Path | None, model: Model) -> list[Fitted]:
    if speed_table is None:
        return load()
    if not Path(speed_table).is_file():
        raise ConfigError(f"--speed-table: there is no file {speed_table}")
    rows = read_rows(Path(speed_table))
    fitted = fit_table(rows, MODELS | {Path(model.name).name: model.shape})
    if not fitted:
        raise ConfigError(
            f"--speed-table: {speed_table} has too few rows to fit, which must be of {', '.join(MODELS)} or of "
            f"{Path(model.name).name}, dense and sparse: `sparse-unsloth bench --model DIR --arms padded "
            "--methods sparse-o1,sparse-o2 --shapes all,host` measures them."
        )
    return fitted


def _optimiser_steps(recipe: Recipe, tokens: TokenStatistics) -> int:
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    micro_batches = tokens.micro_batches * tokens.dataset_samples / tokens.samples
    return max(math.ceil(micro_batches / training.gradient_accumulation_steps * training.num_train_epochs), 1)


def _memory(
    recipe: Recipe, model: Model, plan: Plan, batches: Sequence[MicroBatch], sparse: bool, layout: str | None
) -> Memory:
    """Predicts the peak.

    Args:
        sparse: every step leaves something out.
        layout: of the batches, if they are captured in CUDA graphs; else None.
    """
    checkpointing = {False: "off", True: "unsloth" if plan.backend == "unsloth" else "on"}
    through: dict[str, Any] = {}
    activation_bytes = 4 if recipe.training.use_cpu and not recipe.training.bf16 else 2
    largest = max(batches, key=lambda batch: batch.rows)
    if sparse and all(batch.context for batch in batches):
        if plan.row_sparse:
            through["backward_rows"] = max(backward_rows_of(plan, batch) for batch in batches)
        through["recomputed"] = sparse_layer_activations(
            model.shape,
            [mlp for mlp, _ in plan.layers],
            largest.rows,
            max(batch.dense for batch in batches),
            plan.lora_rank,
            activation_bytes,
        )

    def logits(head: int) -> float:
        if plan.backend == "unsloth":
            return fused_logits(model.shape, head, logit_bytes())
        return (
            0.0
            if plan.chunked_loss or recipe.training.use_liger_kernel
            else plain_logits(model.shape, head, activation_bytes)
        )

    def rows_of_head(batch: MicroBatch) -> int:
        return logit_rows(plan, batch, recipe.sparsity.exact_removal)

    captured = []
    if layout is not None:
        padded = [batch.padded_to_bucket(layout) for batch in mark_repeated(batches, layout)]
        captured = sorted({(batch.rows, logits(rows_of_head(batch))) for batch in padded})
    return peak_memory(
        model.shape,
        linear=model.linear,
        other=model.other,
        adapter=model.adapter,
        rows=largest.rows,
        checkpointing=checkpointing[plan.checkpointing],
        in_4bit=model.in_4bit,
        weight_bytes=model.weight_bytes,
        activation_bytes=activation_bytes,
        logits=max(logits(rows_of_head(batch)) for batch in batches),
        estimator_rank=plan.estimator_rank,
        sparse_parts=plan.sparse_parts,
        whole_layers=plan.whole_layers,
        skips_output=recipe.sparsity.exact_removal,
        fp8=recipe.sparsity.fp8,
        captured=captured,
        **through,
    )
