"""Forks the test process, so that a child need not import torch and transformers again."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

needs_fork = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a process that CUDA began in cannot be forked: hide the GPU, as `make test` does"
)


def fork(function: Callable[[], object], said: Path) -> int:
    """The id of a forked process that calls ``function`` and prints into ``said``; `wait_for` must follow."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        torch.set_num_threads(1)  # OpenMP's others are not in this process, and would be waited for
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(pids: list[int]) -> list[int]:
    """The processes' statuses, as `os.waitpid` returns them."""
    return [os.waitpid(pid, 0)[1] for pid in pids]
