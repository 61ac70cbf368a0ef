"""Set before anything imports Triton or tokenizers; and what every test has."""

import functools
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # xdist's controller runs no test
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, slowly, against their references
        collect_less()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter import make_interpreter_faster

        make_interpreter_faster()
    from dill import detect

    import quick_torch

    quick_torch.install()
    # datasets hashes what it maps by, with all functions that this calls, each of which dill disassembles every time.
    detect.nestedglobals = functools.cache(detect.nestedglobals)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    paths = str(Path(__file__).parent / "helpers"), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of scripts that tests start
    gc.disable()  # while modules are imported


def collect_less():
    """Lets accelerate look through the youngest objects alone before each training: no GPU's memory is to be freed."""
    from accelerate.utils import memory

    memory.gc = SimpleNamespace(collect=functools.partial(gc.collect, 0))


def pytest_collection_modifyitems(items):
    """What needs the installed Unsloth comes last, when its process is done (`unsloth_process`)."""
    items.sort(key=lambda item: item.get_closest_marker("installed_unsloth") is not None)


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Trainers and tests collect garbage all the time; what is there already need not be looked through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unsloth_process(request, tmp_path_factory):
    """The process of the installed Unsloth that runs the cases of the session's tests, beside them; None without any.

    The workers of pytest-xdist share it.
    """
    marks = [item.get_closest_marker("installed_unsloth") for item in request.session.items]
    names = [mark.args[0] for mark in marks if mark]
    if not names:
        yield None
        return
    from unsloth_on_cpu import UnslothProcess

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with UnslothProcess(shared / "installed_unsloth", names) as process:
        yield process


@pytest.fixture
def unsloth_case(request, unsloth_process):
    """The results of the test's case, by rank, and what the ranks said."""
    return unsloth_process.wait_for(request.node.get_closest_marker("installed_unsloth").args[0])


@pytest.fixture
def poison(monkeypatch):
    """Fresh floating-point tensors hold NaN, so that what a kernel leaves unwritten shows."""
    import torch

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: poisoned(new_empty(*a, **o)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: poisoned(empty_like(*a, **o)))
