"""The schedule is a pure function of the step."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_unsloth.config.schedule import Schedule
from sparse_unsloth.errors import ConfigError


def scales(schedule, max_steps):
    return [schedule.scale(step, max_steps) for step in range(max_steps)]


def test_fractions():
    assert scales(Schedule(0.05, 0.75), 20) == [0.0] + [1.0] * 14 + [0.0] * 5


def test_steps():
    assert scales(Schedule(2, 5), 8) == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_fractions_round_up_to_whole_steps_and_not_beyond():
    assert Schedule(0.05, 1.0).sparse_steps(10) == range(1, 10)
    assert Schedule(0.07, 1.0).sparse_steps(100) == range(7, 100)
    assert Schedule(0.0, 0.29).sparse_steps(100) == range(0, 29)


def test_1_0_never_ends_and_the_int_1_is_a_step():
    assert Schedule(0.0, 1.0).scale(10**9, 10) == 1.0
    assert scales(Schedule(0, 1), 3) == [1.0, 0.0, 0.0]


def test_a_training_too_short_for_the_window_is_dense():
    schedule = Schedule(50, 200)
    assert scales(schedule, 20) == [0.0] * 20
    assert not schedule.sparse_steps(20)


def test_max_steps_must_be_known():
    with pytest.raises(ConfigError, match="max_steps: must be at least 1 to place start_step and end_step, given 0"):
        Schedule(0.05, 0.75).scale(0, 0)


bounds = st.one_of(st.floats(0, 1), st.integers(0, 300))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bounds, bounds, st.integers(1, 200))
def test_scale_is_1_exactly_on_the_sparse_steps(start, end, max_steps):
    schedule = Schedule(start, end)
    values = scales(schedule, max_steps)
    assert set(values) <= {0.0, 1.0}
    assert [step for step, value in enumerate(values) if value > 0] == list(schedule.sparse_steps(max_steps))


def test_importing_the_schedule_and_config_leaves_transformers_alone():
    modules = "sparse_unsloth.config.sparsity, sparse_unsloth.config.schedule"
    code = f"import sys, {modules}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
