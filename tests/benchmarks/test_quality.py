"""Tests the quality benchmark's lockstep harness against the library, its costs, and its tables."""

import argparse
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from quality_experiment import SPEED, STEPS, make_experiment, make_items

from benchmarks.quality import cosines, network
from benchmarks.quality.__main__ import keep_settings
from benchmarks.quality.batches import Batch, Batches, Counts, Layout, training_batches
from benchmarks.quality.cost import StepTimes, measured_method, training_flops
from benchmarks.quality.fitting import calibrate
from benchmarks.quality.lockstep import Adapters, Lockstep, Sparsity
from benchmarks.quality.network import (
    DENSE,
    PROJECTIONS,
    Mode,
    read_network,
    sparse_rows,
)
from benchmarks.quality.report import draw as draw_report
from benchmarks.quality.report import markdown
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.table import DenseCurve, append_rows, holm, read_rows, with_equivalents
from benchmarks.quality.tasks import Items, worked_steps
from sparse_unsloth import attach
from sparse_unsloth.bench.methods import LLAMA_3_8B, flop_limit
from sparse_unsloth.bench.shapes import shape_of
from sparse_unsloth.costs.flops import ModelShape, TrainingStep, step_flops
from sparse_unsloth.runtime.context import CONTEXT_ARGUMENT

from family_models import make_family
from tiny_models import loras, loss_and_gradients, make_batch, make_lora

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

CLOSE = {"rtol": 1e-5, "atol": 1e-7}
"""Norms, rotary angles and losses of transformers are fp32, whatever the weights are."""


def items_of(batch) -> Items:
    """A collated batch, padded on the right, as the benchmark stores items."""
    mask, labels = batch["attention_mask"].numpy(), batch["labels"].numpy()
    lengths = mask.sum(1)
    prompts = lengths - (labels != -100).sum(1)
    return Items(batch["input_ids"].numpy() * mask, lengths, prompts, np.zeros(len(lengths), dtype=np.int64))


def adapters_of(model) -> list[list[torch.Tensor]]:
    """A and B of each projection of each layer, in the benchmark's order."""
    found = loras(model)
    layers = []
    for index in range(model.config.num_hidden_layers):
        tensors = []
        for name in PROJECTIONS:
            part = "self_attn" if name in PROJECTIONS[:4] else "mlp"
            key = f"base_model.model.model.layers.{index}.{part}.{name}.lora_%s.default.weight"
            tensors += [found[key % "A"].detach(), found[key % "B"].detach()]
        layers.append(tensors)
    return layers


class Harness:
    """The harness with two seeds: the model's own adapter, and another one, which must not matter to the first."""

    def __init__(self, model, batches, rank=4):
        self.network = read_network(model, torch.float64, lora_scale=2.0)
        self.adapters = Adapters(self.network, (5, 6), rank)
        self.adapters.load(0, adapters_of(model))
        self.sparsity = Sparsity(self.network, 2, 8)
        self.lockstep = Lockstep(self.network, self.adapters, self.sparsity)
        items = [items_of(batch) for batch in batches]
        count, longest = len(items[0]), max(item.tokens.shape[1] for item in items)
        self.layout = Layout(((count, longest),))
        order = np.arange(count)[None, None].repeat(2, 0)
        self.batches = [Batches([item] * 2, order, self.layout, "cpu").batch(0) for item in items]

    def gradients(self, mode, batch=0):
        """The loss and LoRA gradients of the first seed."""
        gradients = self.lockstep.gradients(self.batches[batch], self.layout, mode)
        return self.lockstep.losses[0], [gradient[0] for gradient in gradients]


def assert_equals_library(harness, mode, model, batch, **tolerance):
    loss, gradients = loss_and_gradients(model, batch)
    ours, our_gradients = harness.gradients(mode)
    torch.testing.assert_close(ours, loss, check_dtype=False, **tolerance)
    expected = [gradients[name] for name in gradients]
    places = [gradient for layer in _names(model) for gradient in (gradients[name] for name in layer)]
    assert len(places) == len(our_gradients) == len(expected)
    for mine, theirs in zip(our_gradients, places, strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False, **tolerance)


def _names(model):
    layers = []
    for index in range(model.config.num_hidden_layers):
        names = []
        for name in PROJECTIONS:
            part = "self_attn" if name in PROJECTIONS[:4] else "mlp"
            names += [f"base_model.model.model.layers.{index}.{part}.{name}.lora_{x}.default.weight" for x in "AB"]
        layers.append(names)
    return layers


def set_selection(harness, selections):
    """Masks of the channels that the library chose in its forward."""
    tensors = harness.sparsity.tensors
    for (index, _), chosen in selections.items():
        tensors.channels[index] = False
        tensors.channels[index][:, chosen.channels] = True


def make_model(**changes):
    return make_lora("llama", dtype=torch.float64, **changes)


def attached(model, batch, **config):
    """``model`` attached, always sparse, calibrated on ``batch``; and what it chooses there."""
    attach(model, {"start_step": 0, "end_step": 1.0, **config}, calibration_samples=[batch])
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(**batch).loss.backward()
    hook.remove()
    return seen[-1][CONTEXT_ARGUMENT].selections


def test_dense_step_is_that_of_the_model():
    model, batch = make_model(), make_batch()
    assert_equals_library(Harness(model, [batch]), DENSE, model, batch, **CLOSE)


def test_dense_step_of_gemma_is_that_of_the_model():
    model, batch = make_family("Gemma3", sliding_window=16, query_pre_attn_scalar=16), make_batch()
    assert_equals_library(Harness(model, [batch]), DENSE, model, batch, **CLOSE)
    with pytest.raises(ValueError, match="longer than the window of 8"):
        Harness(make_family("Gemma3", sliding_window=8, query_pre_attn_scalar=16), [batch]).gradients(DENSE)


def test_given_channels_equal_the_library():
    model, batch = make_model(), make_batch()
    selections = attached(model, batch, mlp={"1-2": 0.6}, criterion="magnitude")
    harness = Harness(model, [batch])
    set_selection(harness, selections)
    assert_equals_library(harness, Mode("forward"), model, batch, **CLOSE)


def test_contextual_channels_are_those_of_the_library():
    model, batch = make_model(), make_batch()
    selections = attached(model, batch, mlp={"1-2": 0.6}, estimator={"kind": "prior", "rank": 8})
    harness = Harness(model, [batch])
    calibration = calibrate(model, [items_of(batch)] * 2, count=3)
    tensors = harness.sparsity.tensors
    for name in ("down", "up_gate", "up_up", "gain"):
        getattr(tensors, name).copy_(getattr(calibration, name))
    tensors.keep.copy_(torch.tensor([128, len(selections[1, "mlp"].channels), len(selections[2, "mlp"].channels)]))
    assert_equals_library(harness, Mode("forward", contextual=True), model, batch, **CLOSE)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_rows_are_those_of_the_library(share):
    model, batch = make_model(), make_batch()
    attach(model, {"backward_rows": share})
    harness = Harness(model, [batch])
    harness.sparsity.keep([round(share * 128)] * 3)
    assert_equals_library(harness, Mode("rows"), model, batch, **CLOSE)


def test_every_frozen_product_is_in_fp8(monkeypatch):
    model, batch = make_model(), make_batch()
    harness, seen = Harness(model, [batch]), []
    product = network.fp8_product
    monkeypatch.setattr(network, "fp8_product", lambda x, *rest: (seen.append(rest), product(x, *rest))[1])
    loss, gradients = harness.gradients(Mode(precision="fp8"))
    # Of three layers q, k and v; o; gate and up; down, in both directions; nobody needs the first input's gradient.
    assert len(seen) == 3 * 4 * 2 - 1
    exact_loss, exact = harness.gradients(DENSE)
    assert loss == pytest.approx(exact_loss.item(), rel=0.05)
    flat = [torch.cat([one.flatten() for one in found]) for found in (gradients, exact)]
    assert 0.95 < torch.nn.functional.cosine_similarity(*flat, dim=0) < 0.99999


@pytest.fixture(scope="module")
def experiment():
    return make_experiment()


def test_batches_hold_the_items_in_little_padding():
    items = [make_items(seed) for seed in range(2)]
    batches = training_batches(items, size=8, steps=7, seeds=(0, 1), device="cpu")
    assert batches.layout.groups[0][1] >= batches.layout.groups[-1][1]
    seen = set()
    for step in range(6):
        batch = batches.batch(step)
        assert batch.ids.shape == (2, batches.layout.rows)
        start = 0
        for count, length in batches.layout.groups:
            rows = batch.ids[0, start : start + count * length].view(count, length)
            seen |= {tuple(row[row > 0].tolist()) for row in rows}
            start += count * length
    own = {tuple(row[:length].tolist()) for row, length in zip(items[0].tokens, items[0].lengths, strict=True)}
    assert seen == own, "an epoch shows every item once"
    first, counts = batches.batch(6), batches.counts[6][1]
    assert not torch.equal(first.ids, batches.batch(0).ids), "the second epoch has an order of its own"
    assert counts.context == int(first.context[1].sum())
    assert counts.loss == int((first.weights[1] > 0).sum())
    assert counts.dense + counts.context == sum(counts.lengths)
    after = first.ids[1].roll(-1)[first.loss_rows[1]]
    real = first.weights[1] > 0
    assert torch.equal(first.targets[1][real], after[real].long())
    assert 0 < batches.padding_share < 0.3


def distinct_arms():
    """One setting of each way to train; the others differ in numbers alone."""
    found = {}
    for name, setting in SETTINGS.items():
        found.setdefault((setting.mode, setting.selector), name)
    return list(found.values())


@pytest.mark.parametrize("name", distinct_arms())
def test_every_arm_trains(name, experiment):
    outcome = experiment.run(SETTINGS[name])
    assert len(outcome.losses) == round(STEPS * SETTINGS[name].steps)
    assert all(np.isfinite(outcome.losses))
    assert all(0 < figures.answer_nll < 20 for figures in (*outcome.dense, *outcome.sparse))
    if SETTINGS[name].mode.kind == "forward":
        assert outcome.sparse[0].answer_nll != outcome.dense[0].answer_nll
    else:
        assert outcome.sparse == outcome.dense


def test_runs_repeat_and_seeds_differ(experiment):
    first, second = (experiment.run(SETTINGS["random"]) for _ in range(2))
    assert first.dense == second.dense
    assert first.losses == second.losses
    assert first.dense[0] != first.dense[1]


def dense_gradients():
    """An experiment whose adapters are not zero, its first batch, and the dense gradients and losses of that."""
    experiment = make_experiment(steps=2, layers=3, dtype=torch.float64)
    lockstep, batch = experiment.lockstep, experiment.batches.batch(0)
    torch.manual_seed(0)
    lockstep.adapters.master.normal_(0, 0.1)
    lockstep.adapters.refresh()
    whole = lockstep.gradients(batch, experiment.batches.layout, DENSE)
    return experiment, batch, whole, lockstep.losses.clone()


def test_rows_of_small_gradient_send_none_into_the_layer():
    experiment, batch, whole, losses = dense_gradients()
    lockstep, layout = experiment.lockstep, experiment.batches.layout
    context, inner = batch.context, 128
    errors = {}
    for share, mode in itertools.product((1.0, 0.5, 0.1, 0.0), (Mode("rows"), Mode("rows", random_rows=True))):
        lockstep.sparsity.keep((round(share * inner),) * 3)
        ours = lockstep.gradients(batch, layout, mode)
        torch.testing.assert_close(lockstep.losses, losses)
        errors[share, mode.random_rows] = sum(
            (one - other).square().sum() for one, other in zip(whole, ours, strict=True)
        )
    assert max(errors[1.0, False], errors[1.0, True]) < 1e-20
    assert 1e-9 < errors[0.5, False] < errors[0.1, False] < errors[0.0, False] == pytest.approx(errors[0.0, True])
    assert errors[0.5, False] < errors[0.5, True]
    # The gradient of one layer's output, row by row.
    y = torch.randn(2, context.shape[1], 8, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(y)
    lockstep.sparsity.keep((inner // 4,) * 3)
    sparse_rows(y, lockstep.sparsity(0), context[..., None], experiment.network, Mode("rows")).backward(gradient)
    for seed in range(2):
        count = -(-int(context[seed].sum()) // 4)
        rows = context[seed].nonzero()[:, 0]
        largest = rows[gradient[seed, rows].norm(dim=-1).topk(count).indices]
        expected = gradient[seed].clone()
        expected[[row for row in rows if row not in largest]] = 0
        torch.testing.assert_close(y.grad[seed], expected)


def test_rows_left_out_cost_what_the_cost_model_says():
    dense = [(0.0, 0.0)] * 30
    for name, share in (("default", 0.25), ("rows-10", 0.1)):
        assert one_step(name) == pytest.approx(counted(dense, backward_rows=share).total, rel=1e-3)
    assert one_step("rows-10") < one_step("default") < one_step("dense")


def test_shares_that_fall_with_depth_cost_their_mean():
    keep = SETTINGS["falling-25"].keep(30, 1536)
    assert keep[0] == 768 > keep[15] > keep[28] > keep[29] == 1
    assert sum(keep) / 30 / 1536 == pytest.approx(0.25, abs=1e-3)
    assert one_step("falling-25") == pytest.approx(one_step("default"), rel=0.02)
    assert measured_method(SETTINGS["falling-25"]) == "rows-25"
    assert measured_method(SETTINGS["falling-10"]) == "rows-10"


def test_steps_are_those_of_adamw_with_clipping():
    experiment = make_experiment(steps=2, layers=3)
    lockstep, batches = experiment.lockstep, experiment.batches
    expected = lockstep.adapters.master[:1].clone().requires_grad_()
    optimiser = torch.optim.AdamW([expected], lr=0.01, weight_decay=0.0)
    for step in range(2):
        gradients = lockstep.gradients(batches.batch(step), batches.layout, DENSE)
        expected.grad = torch.cat([gradient[:1].flatten(1) for gradient in gradients], dim=1)
        torch.nn.utils.clip_grad_norm_([expected], 1.0)
        optimiser.step()
        lockstep.step(batches.batch(step), batches.layout, DENSE, 0.01)
        torch.testing.assert_close(lockstep.adapters.master[:1], expected.detach())


def test_plans_follow_the_schedule():
    plans = SETTINGS["channels-50"].plan(100, 30, 1536)
    sparse = [step for step, plan in enumerate(plans) if plan.mode != DENSE]
    assert sparse == list(range(5, 75))
    assert plans[6].keep == (1536, *[768] * 29)
    assert plans[75].keep == (1536,) * 30
    assert all(plan.mode == DENSE for plan in SETTINGS["dense"].plan(10, 30, 1536))
    assert all(plan.mode.kind == "rows" for plan in SETTINGS["default"].plan(10, 30, 1536))


SMOLLM2_SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152)
COUNT = Counts(dense=96, context=1216, loss=80, lengths=(82,) * 16)


def one_step(name, step=0, steps=1, **changes):
    setting = dataclasses.replace(SETTINGS[name], start=0, end=1.0, **changes)
    plans = setting.plan(steps, 30, 1536)
    return training_flops(SMOLLM2_SHAPE, plans, [COUNT] * steps, lora_rank=16, factor_rank=8)[step]


def counted(sparsity, **options):
    tokens = COUNT.dense, COUNT.context
    removed = {"head_tokens": COUNT.loss, "last_layer_tokens": COUNT.loss}
    options = {"input_requires_grad": False, "checkpointing": True, **removed, **options}
    return step_flops(SMOLLM2_SHAPE, sparsity, TrainingStep(*tokens, COUNT.lengths, 16, **options))


def test_flops_are_those_of_the_cost_model():
    dense, half = [(0.0, 0.0)] * 30, [(0.0, 0.0), *[(0.5, 0.0)] * 29]
    assert one_step("dense") == counted(dense).total
    assert one_step("channels-50") == counted(half, estimator_rank=8).total
    assert one_step("random") == counted(half).total


def test_times_are_measured_ones_or_scaled(tmp_path):
    times = StepTimes(SPEED)
    assert 0.4 < times.share(0.5, 0.75) < 1
    assert times.share(1.0, 0.75) == 1
    assert times.share(0.5, 0.75) < times.share(0.7, 0.75)
    text = SPEED.read_text().splitlines()
    rows = [line.replace("sparse-o2", "sparse-50") for line in text if "H200" in line and "sparse-o2" in line]
    table = tmp_path / "speed.csv"
    table.write_text("\n".join([text[0], *[line for line in text[1:] if "H200" in line], *rows]) + "\n")
    measured = StepTimes(table)
    assert measured.source(measured_method(SETTINGS["channels-50"])) == "measured"
    assert measured.share(0.7, 0.749, "sparse-50") == pytest.approx(387.76 / 743.81, rel=0.02)
    assert measured_method(dataclasses.replace(SETTINGS["random"], mlp={"1-29": 0.75})) == "sparse-25"
    assert measured_method(SETTINGS["dense"]) is None


def test_times_of_chosen_rows_are_taken_by_name_alone(tmp_path):
    """Their savings do not predict channel sparsity, nor do steps without checkpointing predict steps with it."""
    table = tmp_path / "speed.csv"
    text = SPEED.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in text if "rows-" not in line and ",False," not in line))
    times, without = StepTimes(SPEED), StepTimes(table)
    assert times.share(0.5, 0.75) == without.share(0.5, 0.75)
    assert times.share(0.5, 0.75, "sparse-o2") == without.share(0.5, 0.75, "sparse-o2")
    assert (times.source("rows-25"), without.source("rows-25")) == ("measured", "scaled")
    code, long = (shape_of(name).context_tokens / shape_of(name).tokens for name in ("codefeedback", "long8k"))
    assert times.share(0.6, code, "rows-25") == pytest.approx(562.80 / 761.35)
    assert times.share(0.6, long, "rows-10") == pytest.approx(530.46 / 894.60)


def make_rows(values, task="A", model="SmolLM2-135M"):
    """Rows of ``{config: (cost, losses by seed)}``."""
    common = {"date": "2026-11-26T00:00:00+00:00", "commit": "abc", "device": "cpu", "model": model, "task": task}
    return [
        {
            **common, "config": config, "seed": seed, "cost_flops": cost, "cost_time": cost, "answer_nll": loss,
            "answer_nll_sparse_forward": loss, "token_accuracy": 0.9, "exact_match": 0.8,
            "equivalent_dense_steps": float("nan"),
        }
        for config, (cost, losses) in values.items()
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


CURVE = {"dense": (1.0, (0.1, 0.11, 0.1)), "dense-50": (0.5, (0.2, 0.22, 0.2)), "dense-30": (0.3, (0.4, 0.44, 0.4))}


def test_equivalent_steps_interpolate_logarithms():
    curve = DenseCurve([(1.0, 0.1), (0.5, 0.2), (0.3, 0.4)])
    assert curve.share(0.2) == pytest.approx(0.5)
    assert curve.share(np.sqrt(0.1 * 0.2)) == pytest.approx(np.sqrt(0.5))
    assert curve.loss(np.sqrt(0.5)) == pytest.approx(np.sqrt(0.1 * 0.2))
    assert np.isnan(curve.share(0.5))
    assert np.isnan(curve.loss(0.2))
    assert 1 < curve.share(0.08) < 2
    flat = DenseCurve([(1.0, 0.21), (0.5, 0.2), (0.3, 0.4)])
    assert flat.share(0.2) == pytest.approx(0.5), "a longer training that is worse could have stopped earlier"


def test_report_finds_what_beats_and_what_loses_to_a_shorter_run(tmp_path):
    better, worse = (0.12, 0.131, 0.121), (0.3, 0.34, 0.31)
    rows = make_rows({**CURVE, "default": (0.6, better), "random": (0.6, worse)})
    append_rows(tmp_path / "quality.csv", rows[:5])
    append_rows(tmp_path / "quality.csv", rows[5:])
    read = read_rows(tmp_path / "quality.csv")
    known = {row["config"]: row["equivalent_dense_steps"] for row in with_equivalents(read)}
    assert known["default"] > 0.6 > known["random"] > 0.3
    text = markdown(read)
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert lines["default"][9].startswith("-0.0")
    assert float(lines["default"][10].strip("<")) < 0.05
    assert lines["random"][9].startswith("+0.1")
    draw_report(read, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])


def test_steps_of_a_sum_are_written_out():
    assert worked_steps("42 - 25 - 73") == "42 - 25 = 17, 17 - 73 = -56. The answer is -56"
    assert worked_steps("-4 + 10 - 3") == "-4 + 10 = 6, 6 - 3 = 3. The answer is 3"


def test_less_context_than_was_measured_costs_what_its_flops_say():
    times = StepTimes(SPEED)
    least = shape_of("codefeedback")
    at, share = least.context_tokens / least.tokens, 562.80 / 761.35
    assert times.share(0.6, at, "rows-25") == pytest.approx(share), "measured"
    chat = times.share(0.91, 0.26, "rows-25")
    assert 0.9 < chat < 0.94, "of real chat, where three quarters of the tokens are answers"
    assert times.share(1.0, 0.0, "rows-25") == 1
    saved = 1 - 1 / flop_limit("codefeedback", "rows-25", LLAMA_3_8B)
    assert times.share(1 - saved, at - 1e-6, "rows-25") == pytest.approx(share), "no step for the model that was timed"


def test_models_are_compared_with_their_own_dense_runs(tmp_path):
    other = {name: (cost, [3 * loss for loss in losses]) for name, (cost, losses) in CURVE.items()}
    rows = make_rows({**CURVE, "default": (0.6, (0.15, 0.17, 0.14))})
    rows += make_rows({**other, "default": (0.6, (0.45, 0.51, 0.42))}, model="Gemma-3-270M")
    append_rows(tmp_path / "quality.csv", rows)
    first, second = (
        [row["equivalent_dense_steps"] for row in with_equivalents(read_rows(tmp_path / "quality.csv"))
         if (row["model"], row["config"]) == (model, "default")]
        for model in ("SmolLM2-135M", "Gemma-3-270M")
    )  # fmt: skip
    assert first == pytest.approx(second)
    text = markdown(rows)
    assert text.index("## SmolLM2-135M, A") < text.index("## Gemma-3-270M, A")
    assert {row["model"] for row in read_rows(RESULTS / "quality.csv")} == {"SmolLM2-135M", "Gemma-3-270M"}
    arguments = argparse.Namespace(out=tmp_path, steps=3, items=4, seeds=1, batch_size=2, rate=0.1)
    assert keep_settings(arguments, "SmolLM2-135M", "A") == "A 3 steps rate 0.1"
    arguments.items = 5
    keep_settings(arguments, "Gemma-3-270M", "A")
    with pytest.raises(SystemExit, match=r"SmolLM2-135M was trained on task A 3 steps rate 0\.1 with"):
        keep_settings(arguments, "SmolLM2-135M", "A")


def test_cosines_are_of_the_benchmarks_own_rows():
    experiment, batch, whole, _ = dense_gradients()
    one = [tensor[:1] for tensor in whole]
    network, layout = experiment.network, experiment.batches.layout
    adapters = Adapters(network, (0,), 4)
    adapters.master.copy_(experiment.adapters.master[:1])
    adapters.refresh()
    layers = cosines.Layers(network)
    lockstep = Lockstep(network, adapters, Sparsity(network, 1, 1), layers)
    alone = Batch(*(getattr(batch, field.name)[:1] for field in dataclasses.fields(Batch)))
    for dense, ours in zip(one, lockstep.gradients(alone, layout, DENSE), strict=True):
        torch.testing.assert_close(ours, dense)
    norms = [dict(layers.norms)] * 2
    experiment.sparsity.keep((32,) * 3)
    expected = experiment.lockstep.gradients(batch, layout, Mode("rows"))
    rules = cosines.rules_from(norms)
    layers.rule = rules["quarter"]
    for theirs, ours in zip(expected, lockstep.gradients(alone, layout, DENSE), strict=True):
        torch.testing.assert_close(ours, theirs[:1])
    for layer, share in enumerate(rules["energy 95 %"].shares):
        loss, context = (rows.square() for rows in norms[0][layer])
        ranked, count = context.sort(descending=True).values, round(share * len(context))
        held = [(loss.sum() + ranked[:rows].sum()) / (loss.sum() + context.sum()) for rows in range(count + 1)]
        assert held[count] >= 0.95 > max([0, *held[:count]])
