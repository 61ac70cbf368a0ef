"""Settings of the quality benchmark that train at once on the GPU end like those that train alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.__main__ import train_in_turns
from benchmarks.quality.cost import StepTimes
from benchmarks.quality.experiment import Experiment, TrainingSettings
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.tasks import Items

from tiny_models import make_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SPEED = Path(__file__).parents[2] / "benchmarks" / "results" / "speed.csv"
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
STEPS = 60


def make_items(seed, count=64):
    rng = np.random.default_rng(seed)
    prompts, lengths = rng.integers(100, 200, count), np.full(count, 240)
    return Items(rng.integers(3, 96, (count, 240)), lengths, prompts, np.zeros(count, dtype=np.int64))


def test_settings_at_once_end_like_those_alone():
    model = make_base("llama", num_hidden_layers=6, **SIZES).eval().requires_grad_(False).cuda()
    items, settings = [make_items(seed) for seed in range(5)], TrainingSettings(STEPS, items=64, batch_size=8)
    experiment = Experiment(model, settings, items, make_items(9), items, StepTimes(SPEED), torch.bfloat16)
    names = ["dense", "default", "fp8", "fp8-context"]
    alone = {name: experiment.run(SETTINGS[name]).losses for name in names}
    found, twins = {}, [experiment.twin() for _ in names[1:]]
    train_in_turns(list(names), [experiment, *twins], math.inf, found.__setitem__)
    for name in names:
        assert all(np.isfinite(figures.answer_nll) for figures in found[name].dense)
        np.testing.assert_allclose(found[name].losses, alone[name], rtol=0.02)
