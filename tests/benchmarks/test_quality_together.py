"""Tests FP8 in the quality benchmark, and settings that train at once."""

import math
import time

import pytest
import torch
from quality_experiment import SPEED, make_experiment

from benchmarks.quality.__main__ import train_in_turns
from benchmarks.quality.cost import FP8_TIME, StepTimes, costs
from benchmarks.quality.network import Mode, frozen_products
from benchmarks.quality.settings import SETTINGS
from sparse_unsloth.errors import SparsityError
from sparse_unsloth.ops.fp8 import Fp8Stack
from sparse_unsloth.ops.projection import BaseWeight


def test_fp8_products_are_those_of_the_library():
    torch.manual_seed(0)
    weights = [torch.randn(16, 32), 3 * torch.randn(32, 32)]
    stack = Fp8Stack(torch.empty(0, 32), [BaseWeight(weight) for weight in weights], False)
    x, context = torch.randn(2, 5, 32, requires_grad=True), torch.rand(2, 5, 1) < 0.5
    gradient = torch.randn(2, 5, 48)
    expected, expected_gradient = stack.matmul(x.detach().flatten(0, 1)), torch.empty(10, 32)
    stack.matmul_transposed(gradient.flatten(0, 1), expected_gradient)
    exact = torch.cat([x.detach() @ weight.t() for weight in weights], dim=-1), gradient @ torch.cat(weights)
    for precision, rounded in (("fp8", torch.ones_like(context)), ("fp8-context", context)):
        y = torch.cat(list(frozen_products(x, weights, context, Mode(precision=precision))), dim=-1)
        (found,) = torch.autograd.grad(y, x, gradient)
        for ours, theirs, unrounded in zip((y, found), (expected, expected_gradient), exact, strict=True):
            wanted = torch.where(rounded, theirs.view_as(ours), unrounded)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(ours[context[..., 0]], unrounded[context[..., 0]], rtol=1e-3, atol=1e-3)


def test_settings_trained_at_once_are_those_trained_alone():
    experiment, names = make_experiment(steps=3, layers=2), ["dense", "default", "dense-65"]
    waiting, found = list(names), {}
    train_in_turns(waiting, [experiment, experiment.twin()], math.inf, found.__setitem__)
    assert not waiting
    for name in names:
        assert found[name].losses == experiment.run(SETTINGS[name]).losses
    waiting = ["dense", "fp8"]
    train_in_turns(waiting, [experiment], time.perf_counter(), found.__setitem__)
    assert waiting == ["fp8"], "the second one would not end in time"


def test_losses_that_are_not_finite_are_not_stored():
    experiment = make_experiment(steps=3, layers=1)
    experiment.batches.batch(1).weights.fill_(math.nan)
    found = {}
    with pytest.raises(SparsityError, match="training loss of step 1 is nan; nothing is stored"):
        train_in_turns(["dense"], [experiment], math.inf, found.__setitem__)
    assert not found


def test_fp8_takes_the_time_of_its_products():
    times = StepTimes(SPEED)
    for name, expected in (("dense", 1.0), ("fp8", FP8_TIME), ("fp8-context", 1 - 0.8 * (1 - FP8_TIME))):
        assert costs(SETTINGS[name], [5, 5], [5, 5], 0, times, 0.8) == pytest.approx((1.0, expected))
