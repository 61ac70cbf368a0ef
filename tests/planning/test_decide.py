"""What a plan chooses at the borders of its rules, what was set by hand, and how a wrong forecast mends it."""

from dataclasses import replace

import pytest

from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.costs.memory import GIB
from sparse_unsloth.planning import decide as rules
from sparse_unsloth.planning.decide import Facts, Forwards, Kept, Speed, cost, decide, mend
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.planning.table import table
from sparse_unsloth.planning.work import MicroBatch, Plan

H100 = StepTime(products=1.6, attention=1.5, rows=138, sparse_rows=21, host_layer=8, host_sparse_part=0.1)
PLAN = Plan(LLAMA_3_8B, ((0.0, 0.0),) * 32, estimator_rank=0)


def batch(tokens, context):
    """One document with this share of context."""
    inside = round(tokens * context)
    return MicroBatch(tokens - inside, inside, 0, tokens - inside, (tokens,))


def facts(tokens=2048, context=0.26, **changes):
    kept = {False: Kept(0, 7 * GIB), True: Kept(0, 7 * GIB)}
    made = Facts(PLAN, (batch(tokens, context),), "padding-free", Speed(H100), checkpointed=32, kept=kept, budget=GIB)
    return replace(made, given={}, **changes)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_small_micro_batches_are_captured_and_large_ones_are_not():
    small, large = decide(facts(1000)), decide(facts(16384, 0.9))
    assert small.cuda_graphs
    assert small.reasons["cuda_graphs"].startswith("launch-bound: ")
    assert small.gains["cuda_graphs"] == pytest.approx(
        cost(small.facts, 1.0, False, 0) / cost(small.facts, 1.0, True, 0)
    )
    assert small.gains["cuda_graphs"] > 1.5
    assert not large.cuda_graphs
    assert "the GPU is the limit" in large.reasons["cuda_graphs"]


def test_what_cannot_be_captured_is_not():
    one = decide(facts(1000, no_graphs="no GPU"))
    assert (one.cuda_graphs, one.reasons["cuda_graphs"]) == (False, "no GPU")


@pytest.mark.parametrize("more", [False, True])
def test_capturing_has_to_pay_within_the_training(more):
    known = facts(1000)
    saved = cost(known, 1.0, False, 0) - cost(known, 1.0, True, 0)
    enough = rules.RUNS_BEFORE + int(32 * rules.CAPTURE_MS / saved) + 1
    one = decide(replace(known, micro_batches=enough - (not more)))
    assert one.cuda_graphs is more
    assert ("would not pay within" in one.reasons["cuda_graphs"]) is not more


# -- Rows -------------------------------------------------------------------------------------------------------------


def test_rows_need_a_gain(monkeypatch):
    known = facts(8192, 0.5, no_graphs="none")
    gain = cost(known, 1.0, False, 0) / cost(known, 0.25, False, 0)
    monkeypatch.setattr(rules, "ROWS_GAIN", gain * 1.001)
    exact = decide(known)
    assert exact.chosen == (1.0, False)
    assert exact.reasons["backward_rows"] == (
        f"context is 50% of your tokens: rows would give {gain:.2f}x, so training is exact"
    )
    monkeypatch.setattr(rules, "ROWS_GAIN", gain * 0.999)
    assert decide(known).chosen == (0.25, False)
    assert decide(known).gains["backward_rows"] == pytest.approx(gain)


def test_the_border_is_ten_percent():
    assert rules.ROWS_GAIN == 1.1
    shares = {context: decide(facts(8192, context)).backward_rows for context in (0.0, 0.1, 0.9)}
    assert shares == {0.0: 1.0, 0.1: 1.0, 0.9: 0.25}


def test_a_launch_bound_step_gains_nothing_of_rows():
    assert decide(facts(600, 0.9, no_graphs="none")).backward_rows == 1.0


def test_without_measured_steps_flops_decide():
    cpu = {"speed": None, "no_graphs": "no GPU", "plan": replace(PLAN, whole_layers=False)}
    one = decide(facts(8192, 0.9, **cpu))
    assert (one.backward_rows, one.milliseconds) == (0.25, None)
    assert decide(facts(8192, 0.05, **cpu)).chosen == (1.0, False)


def test_rows_that_cannot_be_had():
    one = decide(facts(8192, 0.9, no_rows="dropout"))
    assert (one.backward_rows, one.reasons["backward_rows"]) == (1.0, "dropout")


# -- Memory -----------------------------------------------------------------------------------------------------------


def test_layers_that_fit_make_the_step_faster():
    memory = [{False: Kept(layers, 30 * GIB), True: Kept(layers, 20 * GIB)} for layers in (0, 32)]
    few, many = (decide(facts(8192, no_rows="none", no_graphs="none", kept=kept)) for kept in memory)
    assert (few.kept, many.kept) == (0, 32)
    assert few.gains["memory_budget"] is None
    assert many.gains["memory_budget"] == pytest.approx(few.milliseconds / many.milliseconds)
    assert many.gains["memory_budget"] > 1.2
    assert many.peak == 30 * GIB


def test_rows_are_planned_with_their_own_memory():
    one = decide(facts(8192, 0.9, kept={False: Kept(0, 30 * GIB), True: Kept(8, 20 * GIB)}))
    assert (one.kept, one.peak) == (8, 20 * GIB)


def test_without_a_budget_or_checkpointing_nothing_is_kept():
    assert decide(facts(kept=None, no_budget="a CPU")).reasons["memory_budget"] == "a CPU"
    off = decide(facts(checkpointed=0))
    assert (off.kept, off.gains["memory_budget"]) == (0, None)
    assert "checkpointing is off" in off.reasons["memory_budget"]


# -- Merged micro-batches ---------------------------------------------------------------------------------------------


def steps(tokens, kept=(0, 0, 0, 0), **changes):
    """Two optimiser steps of eight such micro-batches, 1, 2, 4 or 8 in a forward, with so many layers kept."""
    memory = [{rows: Kept(layers, (7 + layers) * GIB) for rows in (False, True)} for layers in kept]
    one, merged = batch(tokens, 0.26), {}
    for most, of in zip((2, 4, 8), memory[1:], strict=True):
        joined = MicroBatch(most * one.dense, most * one.context, 0, most * one.loss, one.lengths * most)
        merged[most] = Forwards((joined,) * (16 // most), of)
    return facts(tokens, **{"batches": (one,) * 16, "kept": memory[0], "merged": merged, "no_merging": "", **changes})


def every_way(known):
    """The cost of each number of merged micro-batches, with graphs and without."""
    return {
        (merged, graphs): cost(known, 1.0, graphs, known.forwards(merged).kept[False].layers, merged)
        for merged in (1, *known.merged)
        for graphs in (False, True)
    }


def test_launches_are_saved_by_merging_where_graphs_cannot_be_had():
    one = decide(steps(300, no_graphs="none"))
    costs = every_way(one.facts)
    assert one.merged == 8
    assert one.milliseconds == pytest.approx(costs[8, False])
    assert one.gains["merge_micro_batches"] == pytest.approx(costs[1, False] / costs[8, False])
    assert one.gains["merge_micro_batches"] > 3
    assert one.peak == 7 * GIB
    assert one.reasons["merge_micro_batches"].startswith("up to 8 of a step fit in a forward: ")
    assert "  micro-batches    8 as one" in "\n".join(table(one))


@pytest.mark.parametrize("tokens", [100, 300, 600, 1000, 2000, 4000])
def test_the_best_of_graphs_and_merging_with_the_fewest_merged(tokens):
    one = decide(steps(tokens, no_rows="none"))
    costs = every_way(one.facts)
    best = min(costs.values())
    assert one.milliseconds == costs[one.merged, one.cuda_graphs]
    assert best <= one.milliseconds <= rules.MERGE_GAIN * rules.GRAPHS_GAIN * best
    assert all(costs[merged, graphs] > best for merged, graphs in costs if merged < one.merged)


def test_large_micro_batches_run_one_by_one():
    one = decide(steps(16384))
    assert (one.merged, one.gains["merge_micro_batches"]) == (1, None)
    assert one.reasons["merge_micro_batches"].startswith("merging up to ")
    assert one.reasons["merge_micro_batches"].endswith(" of them would give 1.01x")
    assert "  micro-batches    one by one     -" in "\n".join(table(one))


def test_merged_micro_batches_dequantise_their_weights_once():
    """So merging pays where graphs leave the GPU as the limit, and weights are in 4 bits."""
    four, sixteen = (decide(steps(4000, plan=replace(PLAN, in_4bit=kind), no_rows="none")) for kind in (True, False))
    assert (four.merged > 1, sixteen.merged) == (True, 1)
    assert four.gains["merge_micro_batches"] > 1.02


def test_memory_for_activations_and_for_merging_are_weighed():
    """Merging saves little host time here, and costs the layers that keep their activations."""
    same = decide(steps(3500, kept=(32, 32, 32, 32), no_graphs="none", no_rows="none"))
    assert (same.merged > 1, same.kept, same.peak) == (True, 32, 39 * GIB)
    fewer = decide(steps(3500, kept=(32, 0, 0, 0), no_graphs="none", no_rows="none"))
    assert (fewer.merged, fewer.kept) == (1, 32)


def test_capturing_has_to_pay_by_forwards_not_by_micro_batches():
    known = replace(steps(300, no_rows="none"), given={"merge_micro_batches": 8})
    saved = 8 * (cost(known, 1.0, False, 0, 8) - cost(known, 1.0, True, 0, 8))
    enough = 8 * (rules.RUNS_BEFORE + int(32 * rules.CAPTURE_MS / saved) + 1)
    pays = [decide(replace(known, micro_batches=enough - less)).cuda_graphs for less in (0, 8)]
    assert pays == [True, False]


@pytest.mark.parametrize(("asked", "merged"), [(True, 8), (False, 1), (None, 1)])
def test_merging_by_hand_stays(asked, merged):
    known = replace(steps(8192 if asked else 300, no_graphs="none"), given={"merge_micro_batches": asked})
    one = decide(known if asked else replace(known, merged={}))
    assert (one.merged, one.reasons["merge_micro_batches"]) == (merged, "as you set it")


def test_what_cannot_be_merged_is_not():
    one = decide(steps(300, merged={}, no_merging="the model has an encoder"))
    assert (one.merged, one.reasons["merge_micro_batches"]) == (1, "the model has an encoder")
    asked = decide(replace(one.facts, no_merging="no GPU", given={"merge_micro_batches": True}))
    assert (asked.merged, asked.reasons["merge_micro_batches"]) == (1, "as you set it, but no GPU")


def test_fewer_are_merged_where_memory_ran_out():
    before = decide(steps(300, kept=(4, 3, 2, 1), no_graphs="none"))
    assert [(one.merged, one.kept) for one in (before, *map(before.merging_at_most, (7, 3, 1)))] == [
        (8, 1), (4, 2), (2, 3), (1, 4)
    ]  # fmt: skip
    assert decide(before.merging_at_most(3).facts).merged == 2
    none = decide(before.merging_at_most(1).facts)
    assert none.merged == 1
    assert none.reasons["merge_micro_batches"].startswith("two together ran out of memory")


def test_a_plan_comes_to_merge_where_the_gpu_is_faster_than_predicted():
    before = decide(steps(4096, plan=replace(PLAN, in_4bit=False), no_graphs="none", no_rows="none"))
    after = mend(before, 0.3)
    assert (before.merged, after.merged > 1) == (1, True)
    assert after.facts.speed.device == pytest.approx(0.3, rel=0.05)
    again = mend(after, 2.0)
    assert again.facts.speed.device == pytest.approx(2 * after.facts.speed.device, rel=0.1)


# -- FP8 --------------------------------------------------------------------------------------------------------------


def test_a_precision_that_was_asked_for_is_forecast_and_none_is_chosen():
    busy = facts(8192, 0.9)
    bf16, fp8 = (decide(replace(busy, plan=replace(PLAN, precision=kind))) for kind in ("bf16", "fp8"))
    assert 1.25 < bf16.milliseconds / fp8.milliseconds < 1.6
    assert (bf16.facts.plan.precision, bf16.backward_rows, fp8.backward_rows) == ("bf16", 0.25, 0.25)
    context = decide(replace(busy, plan=replace(PLAN, precision="fp8-context")))
    assert (context.backward_rows, context.reasons["backward_rows"]) == (
        1.0, "precision: fp8-context is for dense training"
    )  # fmt: skip


# -- What was set by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"cuda_graphs": False}, (1.0, False)),
        ({"cuda_graphs": True}, (1.0, True)),
        ({"backward_rows": 0.5}, (0.5, True)),
        ({"backward_rows": 1.0}, (1.0, True)),
    ],
)
def test_what_is_set_by_hand_stays(given, chosen):
    large = given.get("cuda_graphs") is True
    one = decide(replace(facts(16384 if large else 1000, 0.05), given=given))
    assert one.chosen == chosen
    assert one.reasons[next(iter(given))].startswith("as you set it")


def test_rows_by_hand_hold_without_gain_and_dense_by_hand_with_one():
    assert decide(replace(facts(8192, 0.0), given={"backward_rows": 0.25})).backward_rows == 0.25
    assert decide(replace(facts(8192, 0.95), given={"backward_rows": 1.0})).backward_rows == 1.0


def test_a_model_without_known_costs_is_exact():
    one = decide(Facts(None, (batch(8192, 0.9),), given={}, unknown="no sizes"))
    assert (one.chosen, one.milliseconds, one.peak) == ((1.0, False), None, None)
    assert one.reasons["backward_rows"] == "training is exact, as nothing is predicted: no sizes"
    by_hand = decide(Facts(None, (batch(8192, 0.9),), given={"backward_rows": 0.25, "cuda_graphs": True}))
    assert by_hand.chosen == (0.25, True)


# -- Mending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "wrong"), [(1.14, False), (1.16, True), (0.86, False), (0.84, True)])
def test_a_plan_is_mended_where_it_was_wrong_by_more_than_15_percent(ratio, wrong):
    assert (mend(decide(facts(1000)), ratio) is not None) is wrong


def test_graphs_go_where_the_gpu_is_slower_than_predicted():
    before = decide(facts(1300, no_rows="none"))
    assert before.cuda_graphs
    after = mend(before, 6.0)
    assert not after.cuda_graphs
    assert after.milliseconds == pytest.approx(6 * before.milliseconds, rel=0.1)


def test_a_training_that_began_exactly_stays_exact():
    before = decide(facts(1300, 0.9))
    assert before.chosen == (1.0, True)
    after = mend(before, 6.0)
    assert after.chosen == (1.0, False)
    assert after.reasons["backward_rows"].startswith("rows would give 1.")
    by_rows = decide(facts(8192, 0.9))
    assert (by_rows.backward_rows, mend(by_rows, 2.0).backward_rows) == (0.25, 0.25)


def test_graphs_stay_where_the_host_is_faster_than_predicted():
    after = mend(decide(facts(1000)), 0.5)
    assert after.cuda_graphs
    assert after.facts.speed.host == pytest.approx(0.5, rel=0.01)


def test_the_side_that_decided_a_step_is_corrected():
    launch_bound = decide(replace(facts(1000), given={"cuda_graphs": False}))
    assert mend(launch_bound, 2.0).facts.speed == Speed(H100, host=pytest.approx(2.0, rel=0.01))
    busy = decide(replace(facts(8192), given={"cuda_graphs": False}))
    assert mend(busy, 2.0).facts.speed == Speed(H100, device=pytest.approx(2.0, rel=0.01))


def test_graphs_that_nothing_replayed_go_whatever_the_time():
    after = mend(decide(facts(1000)), 1.0, captured=False)
    assert not after.cuda_graphs
    assert "hardly a forward replayed" in after.reasons["cuda_graphs"]
    assert mend(decide(facts(16384, 0.9)), 1.0, captured=False) is None


# -- The table --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_and_why_in_at_most_eight_lines():
    one = decide(facts(1000, source="steps measured on a GPU", no_graphs="x" * 999))
    lines = table(one, "auto")
    assert len(lines) <= 8
    assert all(len(line) < 200 for line in lines)
    text = "\n".join(lines)
    assert lines[0] == "sparse_unsloth auto: 1000 tokens a micro-batch, 26% context (1 read)"
    assert "exact " in lines[1]
    assert "context is 26% of your tokens: rows would give 1." in lines[1]
    assert "merging" not in text
    assert "the micro-batches of an optimiser step are not known" in text
    assert lines[-1].startswith(f"  predicted: {one.milliseconds:.0f} ms a micro-batch, 7.0 GiB at the peak, by steps")
    quick = "\n".join(table(decide(facts(1000, kept={False: Kept(16, GIB), True: Kept(16, GIB)}))))
    assert "on             2.1" in quick
    assert "16 of 32 layers" in quick
    assert "no time (gains are of FLOPs), no memory" in "\n".join(table(decide(facts(speed=None, kept=None))))


# -- Several processes ------------------------------------------------------------------------------------------------


def test_of_several_processes_the_most_careful_counts():
    def one(tokens, layers, peak, speed, most, **reasons):
        kept = {False: Kept(layers, peak, 2 * peak), True: Kept(layers, peak, 2 * peak)}
        made = facts(tokens, speed=Speed(replace(H100, products=speed)), source=f"{speed}", **reasons)
        merged = {number: Forwards((batch(tokens * number, 0.26),), kept) for number in most}
        return replace(made, kept=kept, budget=peak, merged=merged, no_merging="")

    alone = one(1000, 7, GIB, 1.6, (2, 4))
    assert rules.pooled([alone]) is alone
    other = one(3000, 3, 2 * GIB, 3.2, (2,), no_rows="dropout")
    for order in ([alone, other], [other, alone]):
        both = rules.pooled(order)
        assert sorted(batch.rows for batch in both.batches) == [1000, 3000]
        assert both.kept[False] == both.kept[True] == both.merged[2].kept[True] == Kept(3, 2 * GIB, 4 * GIB)
        assert (both.budget, both.no_rows, both.no_graphs, list(both.merged)) == (GIB, "dropout", "", [2])
        assert sorted(batch.rows for batch in both.merged[2].batches) == [2000, 6000]
        assert (both.speed.step_time.products, both.source) == (3.2, "3.2"), "the slower device"
    first, second = (decide(rules.pooled(order)) for order in ([alone, other], [other, alone]))
    assert (first.chosen, first.merged, first.milliseconds) == (second.chosen, second.merged, second.milliseconds)
    none = rules.pooled([alone, replace(other, merged={})])
    assert (none.merged, none.no_merging) == ({}, "not every process has room for two of them together")
    why = rules.pooled([alone, replace(other, no_merging="padded")])
    assert (why.merged, why.no_merging) == ({}, "padded")
    assert rules.pooled([replace(alone, merged={}), replace(other, merged={})]).no_merging == ""
    assert rules.pooled([alone, replace(other, speed=None)]).speed is None
    assert rules.pooled([alone, replace(other, kept=None)]).kept is None
    assert rules.pooled([alone, Facts(None, (), given={}, unknown="experts")]).plan is None


def test_the_peak_is_that_of_what_was_chosen():
    kept = {False: Kept(0, 7 * GIB, 9 * GIB), True: Kept(0, 6 * GIB, 8 * GIB)}
    for given, peak in (
        ({"cuda_graphs": True, "backward_rows": 1.0}, 9),
        ({"cuda_graphs": False, "backward_rows": 1.0}, 7),
        ({"cuda_graphs": True, "backward_rows": 0.25}, 8),
    ):
        one = decide(replace(facts(kept=kept), given=given))
        assert one.peak == peak * GIB
        assert f"{peak}.0 GiB at the peak" in table(one)[-1]
