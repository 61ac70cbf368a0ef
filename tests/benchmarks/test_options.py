"""The scripts of benchmarks/ refuse numbers out of bounds before they load anything, with the option's name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("benchmarks/rank.py speed --steps -3", "--steps: must be an integer from 1 on, given '-3'"),
        ("benchmarks/multi_gpu.py --gpus 0", "--gpus: must be an integer from 1 on, given '0'"),
        ("benchmarks/end_to_end.py --steps abc", "--steps: must be an integer from 1 on, given 'abc'"),
        ("benchmarks/prefill.py --seconds nan", "--seconds: must be a number of at least 0, given 'nan'"),
        ("benchmarks/calibrate.py --out x --budget 2", "--budget: must be a number above 0 and below 1"),
        ("benchmarks/long_sequence.py --memory-budget -1", "--memory-budget: must be a number above 0"),
        ("-m benchmarks.quality run --seeds 0", "--seeds: must be an integer from 1 on"),
        ("-m benchmarks.kernel_suite --seconds -1", "--seconds: must be a number of at least 0"),
        ("benchmarks/recipes.py --steps 0", "--steps: must be an integer from 1 on"),
        ("benchmarks/fp8_products.py --rows 0", "--rows: must be an integer from 1 on"),
        ("benchmarks/mixed_lengths.py --steps 0", "--steps: must be an integer from 1 on"),
        ("-m benchmarks.quality.gpu --seconds -1", "--seconds: must be a number of at least 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(words, message):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
