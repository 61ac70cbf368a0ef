"""A tiny experiment of the quality benchmark."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.cost import StepTimes
from benchmarks.quality.experiment import Experiment, TrainingSettings
from benchmarks.quality.network import layer_forward
from benchmarks.quality.tasks import Items

from tiny_models import make_base

SPEED = Path(__file__).parents[2] / "benchmarks" / "results" / "speed.csv"


def make_items(seed, count=48, vocab=96):
    """Items of prompts of three lengths, whose answer repeats tokens of the prompt."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.choice([9, 14, 20], count), rng.integers(2, 5, count)
    lengths = prompts + answers
    tokens = rng.integers(3, vocab, (count, lengths.max()))
    tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return Items(tokens, lengths, prompts, rng.integers(0, 2, count))


STEPS = 6


def make_experiment(steps=STEPS, layers=12, dtype=torch.float32, layer=layer_forward):
    model = make_base("llama", num_hidden_layers=layers).eval().requires_grad_(False)
    settings = TrainingSettings(steps, items=48, seeds=2, batch_size=8, lora_rank=4, lora_alpha=8)
    items = [make_items(seed) for seed in range(2)]
    return Experiment(model, settings, items, make_items(9, 20), items, StepTimes(SPEED), dtype, layer, test_batch=8)
