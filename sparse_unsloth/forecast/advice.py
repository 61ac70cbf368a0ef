"""Gives advice on an estimate: what to expect, whether sparsity is worth it, what would help."""

from __future__ import annotations

from collections.abc import Iterator

from sparse_unsloth.data.ledger import most_likely_cut, without_loss
from sparse_unsloth.forecast.model import WHOLE_LAYERS
from sparse_unsloth.forecast.result import Estimate, time_ratio

WORTH_IT = 1.1
"""Speed-up of the whole training from which sparsity may be worth what it costs in quality."""
WORTH_SAYING = 1.02
FEW_CONTEXT = 0.5
MUCH_PADDING = 0.1
MANY_CUT = 0.05
FEW_ROWS = 0.1
"""Smallest share of the context rows that matched dense training of the same cost (benchmarks/results/quality.md)."""
ROWS_QUALITY = (
    "The forward pass is exact, and on five tasks of the benchmark (small models) this matched or beat dense training "
    "of the same cost."
)
FP8_QUALITY = {
    "fp8": "what it costs in quality was not measured",
    "fp8-context": "on four tasks, with a small model, its losses were 0.000 to 0.001 above bf16's, and 0.03 ± 0.04 on "
    "the steepest",
}
"""By `SparsityConfig.precision`, for fine-tuning at equal steps (benchmarks/results/quality.md)."""
ROWS_FIRST = (
    "For quality take `sparsity: rows` first: on a small model it matched or beat dense training of the same cost, "
    "which presets that leave out channels did not."
)


def advice(estimate: Estimate) -> list[str]:
    """Returns sentences in the order of their weight; the first says what to expect."""
    return [*_expectation(estimate), *_hints(estimate)]


def _expectation(estimate: Estimate) -> Iterator[str]:
    share = estimate.tokens.context_share
    if estimate.tokens.context == 0:
        yield (
            "No token is context: every token is a loss token, so nothing can be sparse. Give "
            "prompt and completion columns (completion_only_loss), or messages with assistant_only_loss: true."
        )
        return
    begin = f"{share:.0%} of your tokens are context"
    if estimate.sparse is None:
        best = _best_preset(estimate)
        kind = "auto trains exactly" if estimate.auto else "this recipe is dense"
        yield f"{begin}; {kind}. {best}"
    elif estimate.speedup is None:
        yield (
            f"{begin}: a dense step has {estimate.flops_ratio:.2f}x the FLOPs of a sparse one. No step of this backend "
            "was measured, so the speed-up is not predicted; it is below that."
        )
    else:
        yield (
            f"{begin}: expect about {estimate.speedup:.2f}x for a sparse step{_range(estimate, estimate.speedup)} and "
            f"{estimate.whole_speedup:.2f}x for the whole training, of which {estimate.sparse_share:.0%} is sparse."
        )
    yield from _worth(estimate)


def _worth(estimate: Estimate) -> Iterator[str]:
    if estimate.sparse is None:
        return
    gain = estimate.whole_speedup
    if gain is None:
        share = estimate.sparse_share
        gain = 1 / (share / estimate.flops_ratio + 1 - share)
    free = estimate.free_speedup
    if gain < WORTH_IT and not estimate.auto:
        instead = "train densely (sparsity: dense)"
        if free is not None and estimate.exact_removal and free > WORTH_SAYING:
            instead += f", which skipping unused rows makes {free:.2f}x as fast, with the same results"
        what = f"gains only some {gain - 1:.0%} here" if gain > WORTH_SAYING else "gains no time here"
        cost = "it" if estimate.row_sparse else "sparsity costs quality, and it"
        yield f"Not worth it: {cost} {what}. Rather {instead}."
    elif estimate.row_sparse:
        few = f"Fewer than {FEW_ROWS:.0%} of the context rows did worse: take backward_rows: 0.25."
        yield (
            f"{few if estimate.backward_rows < FEW_ROWS else ROWS_QUALITY} On your data compare with a dense run that "
            f"stops after the same time ({1 / gain:.0%} of the steps)."
        )
    else:
        yield (
            "Sparsity costs quality, more on small models: compare with a dense run that stops after the same time "
            f"({1 / gain:.0%} of the steps) before you rely on it."
        )
    if free is not None and estimate.exact_removal and gain >= WORTH_IT and free > 0.8 * gain:
        yield f"Most of that comes without any approximation: `sparsity: dense` alone is expected at {free:.2f}x."


def _hints(estimate: Estimate) -> Iterator[str]:
    tokens = estimate.tokens
    if 0 < tokens.context_share < FEW_CONTEXT:
        yield (
            "Only prompt tokens can be sparse: instructions, examples, documents or tool descriptions gain where they "
            "stand in the prompt (or in a user or system turn), not in the answer. If all turns of a conversation "
            "are answers to train on, nothing needs to change."
        )
    padding = tokens.share("padding")
    if padding > MUCH_PADDING:
        yield (
            f"{padding:.0%} of the rows that a dense step computes are padding: packing: true, or the Unsloth backend "
            "(padding-free by default), avoids them at no cost."
        )
    if estimate.auto:
        what = f"backward_rows: {estimate.backward_rows:g}" if estimate.row_sparse else "exact training"
        graphs = "cuda_graphs: true" if estimate.cuda_graphs else "no CUDA graphs"
        yield (
            f"auto would choose {what} and {graphs} by this forecast. It decides when training begins, and then also "
            "how many layers keep their activations, by the memory that is free."
        )
    if estimate.precision != "bf16":
        yield from _fp8(estimate)
    yield from _host(estimate)
    if estimate.row_sparse and not estimate.checkpointing:
        yield (
            "gradient_checkpointing: true stores far less, and costs less here than in dense training: with "
            "exact_removal its recompute leaves out the MLP of the rows that the backward pass leaves out."
        )
    if estimate.sparse is not None and not estimate.dense_layer_0:
        yield (
            "Layer 0's MLP is sparse in this recipe; on a small model it costs more quality than all others together. "
            "Leave it dense."
        )
    if estimate.sparse is not None and estimate.sparse_share == 0:
        yield "No optimiser step lies between start_step and end_step: the whole training will be dense."
    if estimate.sparse is not None and tokens.context:
        yield from _presets(estimate)
    if tokens.truncated > MANY_CUT * tokens.samples:
        yield most_likely_cut(tokens.truncated, tokens.samples)
    if tokens.dropped:
        yield without_loss(tokens.dropped, tokens.samples)
    if tokens.without_loss:
        yield f"{tokens.without_loss} of {tokens.samples} samples have no loss token: they cost time and train nothing."


def _fp8(estimate: Estimate) -> Iterator[str]:
    if estimate.fp8 is None:
        yield f"precision: {estimate.precision} needs layers that run as a whole; attaching will refuse this training."
        return
    gain = time_ratio(estimate.dense_exact or estimate.dense, estimate.fp8)
    predicted = "" if gain is None else f" A dense step is expected at {gain:.2f}x of bf16's speed."
    yield (
        f"precision: {estimate.precision} is approximate ({FP8_QUALITY[estimate.precision]}).{predicted} The gain is "
        "that of the products of one layer on an H200, where a dense step of an 8B of 8,192 tokens became 1.40x as "
        "fast. It needs an NVIDIA GPU from compute capability 8.9 on."
    )


def _host(estimate: Estimate) -> Iterator[str]:
    step = estimate.sparse_as_trained or estimate.dense_as_trained
    gain = estimate.graphs_speedup
    if estimate.cuda_graphs and estimate.recorded is None and estimate.fitted is not None:
        yield (
            "The times are those without cuda_graphs: it is predicted with exact_removal and PyTorch's attention, "
            f"without DoRA, and for layers of {', '.join(WHOLE_LAYERS[estimate.backend])}."
        )
    if not estimate.cuda_graphs and gain is not None and gain > WORTH_IT:
        kept = "the same gradients" if estimate.sparse else "nothing left out"
        yield (
            f"The GPU waits for its host: `cuda_graphs: true` is expected to make a step {gain:.2f}x as fast, with "
            f"{kept}."
        )
    elif estimate.sparse is not None and step.host_bound:
        yield (
            f"With {estimate.tokens.rows:.0f} rows a micro-batch the host's launches take longer than the GPU's sparse "
            "step: a larger per_device_train_batch_size (and fewer gradient_accumulation_steps) gains more."
        )


def _presets(estimate: Estimate) -> Iterator[str]:
    told = [f"{name} {preset.speedup or preset.flops_ratio:.2f}x" for name, preset in estimate.presets.items()]
    if told:
        what = "a sparse step" if estimate.fitted else "FLOPs of a step, dense over sparse"
        first = "" if estimate.row_sparse else f" {ROWS_FIRST}"
        published = "o1 (the conservative one) and o2 are the published recipes for large models."
        yield f"Presets on this data, {what}: {', '.join(told)}.{first} {published}"


def _best_preset(estimate: Estimate) -> str:
    told = [f"{name} about {preset.speedup or preset.flops_ratio:.2f}x" for name, preset in estimate.presets.items()]
    unit = "" if estimate.fitted else " fewer FLOPs"
    return f"A sparse step would give: {', '.join(told)}{unit}. {ROWS_FIRST}" if told else ""


def _range(estimate: Estimate, speedup: float) -> str:
    """Formats the range of the speed-up within the median error of predictions, where it is known."""
    error = estimate.fitted.errors.speedup_median
    return "" if error is None else f" ({speedup / (1 + error):.2f}x to {speedup * (1 + error):.2f}x)"
