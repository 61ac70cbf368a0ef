"""What both front ends do with a model: build transformers' trainer around it, and train."""

import sys
from types import ModuleType

import pytest
from transformers import Trainer, TrainingArguments

from sparse_unsloth.callback import unregister_from_trainers

from tiny_models import make_batch


@pytest.fixture(autouse=True)
def own_trainers():
    yield
    unregister_from_trainers()


@pytest.fixture
def build_trainer(tmp_path):
    """``build_trainer(model, callbacks)``: a trainer of two steps, of two samples each."""
    batch = make_batch()
    rows = [{name: values[index] for name, values in batch.items()} for index in (0, 1, 2, 0)]

    def build(model, callbacks=()):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))

    return build


@pytest.fixture
def stand_in(monkeypatch):
    """``stand_in("a.b", name=value)``: a module, and its parents, in the place of one that is not installed."""

    def make(path, **names):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if not isinstance(sys.modules.get(name), ModuleType) or end == len(parts):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[path]).update(names)

    return make
