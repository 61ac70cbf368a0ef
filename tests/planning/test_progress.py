"""What is measured of a training, and how it is compared with what was predicted."""

import pytest

from sparse_unsloth.bench.methods import LLAMA_3_8B
from sparse_unsloth.planning.decide import Facts, Speed, decide
from sparse_unsloth.planning.progress import MEASURED, PATIENCE, WARM_UP, Watch
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.planning.work import MicroBatch, Plan

H100 = StepTime(products=1.6, attention=1.5, rows=138, sparse_rows=21, host_layer=8, host_sparse_part=0.1)
PLAN = Plan(LLAMA_3_8B, ((0.0, 0.0),) * 32, estimator_rank=0)


def batch(tokens):
    return MicroBatch(tokens, 0, 0, tokens, (tokens,))


def decision(tokens=16384, **changes):
    return decide(Facts(PLAN, (batch(tokens),), "padding-free", Speed(H100), given={}, **changes))


def drive(watch, seconds, batches=None, captured=lambda number: True):
    """Notes forwards at these distances until something comes out; returns it and how many there were."""
    now = 0.0
    for number, wait in enumerate(seconds):
        now += wait
        one = (batches[number % len(batches)] if batches else batch(16384)) if watch.measures else None
        outcome = watch.note(now, one, captured(number))
        if outcome is not None:
            return outcome, number + 1
    return None, len(seconds)


def test_the_warm_up_does_not_count_and_the_rest_is_a_median():
    made = decision()
    right = made.milliseconds / 1000
    seconds = [10.0] * (WARM_UP + 1) + [right, right, right * 50, right] * MEASURED
    outcome, count = drive(Watch(made), seconds)
    assert count == WARM_UP + 1 + MEASURED
    assert outcome.ratio == pytest.approx(1)
    assert outcome.predicted == pytest.approx(made.milliseconds)
    assert outcome.captured


def test_every_micro_batch_is_compared_with_its_own_prediction():
    sizes = [4096, 16384]
    made = decision(no_graphs="none")
    times = [decision(size, no_graphs="none").milliseconds / 1000 for size in sizes]
    seconds = [1.0] * (WARM_UP + 1) + [2 * times[number % 2] for number in range(WARM_UP, WARM_UP + 40)]
    outcome, _ = drive(Watch(made), seconds, [batch(size) for size in sizes])
    assert outcome.ratio == pytest.approx(2)


def test_graphs_pad_a_micro_batch_by_the_one_before_it(monkeypatch):
    """Sizes that are no bucket: what is predicted for one depends on whether the one before had that size."""
    one, other = batch(1090), batch(1080)
    made = decide(Facts(PLAN, (one, one), "padding-free", Speed(H100), given={"cuda_graphs": True}))
    seen, watch = [], Watch(made)
    monkeypatch.setattr(watch, "_predict", lambda each: seen.append(each.padded_to_bucket("padding-free").rows) or 1.0)
    drive(watch, [0.1] * (WARM_UP + 5), [one, one, other, other, one, one])
    assert seen == [1152, 1104, 1152, 1088, 1152]


def test_with_graphs_only_replayed_micro_batches_count():
    made = decision(1000)
    assert made.cuda_graphs
    fast = made.milliseconds / 1000
    seconds = [1.0] * (WARM_UP + 1) + [fast if number % 3 == 0 else 1.0 for number in range(WARM_UP + 1, 200)]
    outcome, count = drive(Watch(made), seconds, [batch(1000)], captured=lambda number: number % 3 == 0)
    assert outcome.ratio == pytest.approx(1, rel=1e-2)  # batches of one length are padded a little less
    assert count > WARM_UP + 2 * MEASURED


def test_graphs_that_are_never_replayed_are_told():
    outcome, count = drive(Watch(decision(1000)), [0.1] * 500, captured=lambda number: False)
    assert not outcome.captured
    assert count == WARM_UP + PATIENCE + 1


def test_without_a_forecast_the_measured_time_is_told():
    made = decide(Facts(PLAN, (batch(1000),), given={}, no_graphs="no GPU"))
    outcome, _ = drive(Watch(made), [0.25] * 100)
    assert (outcome.predicted, outcome.measured, outcome.ratio) == (None, pytest.approx(250), 1.0)
