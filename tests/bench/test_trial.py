import itertools
import os

import pytest
import torch

from sparse_unsloth import attach, get_state
from sparse_unsloth.bench.chosen_rows import TrialError, noted_rows
from sparse_unsloth.bench.trial import (
    DTYPES,
    MODES,
    _check_rows,
    combinations,
    parse,
    step,
)
from sparse_unsloth.ops import stored_rows
from sparse_unsloth.ops.dispatch import VARIABLE
from sparse_unsloth.rows.choice import RowChoice

from tiny_models import make_batch
from unsloth_stand_in import StandIn
from whole_layers import make_model, small_batch

CHOSEN = {
    "unsloth": ("unsloth,True,False", "padded,padding-free,packed"),
    "peft": ("True,False", "padded,packed"),
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--families lama", "--families: there is no 'lama'; there are llama, "),
        ("--families llama,qwen", "--families: there is no 'qwen'; there are llama, "),
        ("--dtypes bf16,fp7", "--dtypes: there is no 'fp7'; there are bf16, 4bit"),
        ("--modes dence", "--modes: there is no 'dence'; there are dense, rows"),
        ("--layouts pad", "--layouts: there is no 'pad'; there are padded"),
        ("--checkpointing Tru", "--checkpointing: there is no 'Tru'; there are unsloth, True, False"),
        ("--out .", "--out: . is a folder"),
    ],
)
def test_names_that_do_not_exist_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--backend", "peft", "--models", "models", "--out", "trials.jsonl", *words.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def combinations_of(backend, *options):
    checkpointing, layouts = CHOSEN[backend]
    words = [
        "--backend",
        backend,
        "--checkpointing",
        checkpointing,
        "--layouts",
        layouts,
        "--out",
        "trials.jsonl",
        "--models",
        "models",
    ]
    return combinations(parse([*words, *options]))


@pytest.mark.parametrize("backend", list(CHOSEN))
def test_in_every_other_combination_any_two_values_meet(backend):
    every = combinations_of(backend)
    some = combinations_of(backend, "--every-other")
    assert set(some) < set(every)
    assert len(some) == len(every) // 2
    for one, other in itertools.combinations(range(3), 2):
        assert {(kind[one], kind[other]) for kind in some} == {(kind[one], kind[other]) for kind in every}


def test_processes_of_one_dtype_each_try_the_same():
    apart = [kind for dtype in DTYPES for kind in combinations_of("unsloth", "--every-other", "--dtypes", dtype)]
    assert apart == combinations_of("unsloth", "--every-other")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here; tests/gpu covers it")
@pytest.mark.parametrize("fault", ["", "saved rows", "chosen rows", "half a gradient", "a layer less"])
def test_rows_by_whole_layers_are_compared_with_the_models_own_code(fault, monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    model, batch = make_model(StandIn(monkeypatch)), small_batch(lambda lengths: make_batch(lengths=((9, 6), (7, 5))))
    attach(model, {**MODES["rows"][1], "exact_removal": False})
    tokens, chosen = batch["input_ids"].numel(), []
    with monkeypatch.context() as patch:
        if fault == "saved rows":
            own = stored_rows.gather
            patch.setattr(stored_rows, "gather", lambda tensors, rows: own(tensors, (rows + 1) % tokens))
        if fault == "chosen rows":
            own = RowChoice.select
            patch.setattr(RowChoice, "select", lambda self, gradient: own(self, 1 / gradient.norm(dim=1, keepdim=True)))
            with pytest.raises(TrialError, match="left out has a larger gradient"), noted_rows(chosen):
                step(model, batch)
            return
        with noted_rows(chosen):
            ours = step(model, batch)
    if fault == "half a gradient":
        ours = ours[0], {name: gradient / 2 for name, gradient in ours[1].items()}
    if fault == "a layer less":
        chosen = chosen[:-1]
    assert len(chosen) == 3 - (fault == "a layer less")
    if fault:
        with pytest.raises(TrialError, match="model's own code"):
            _check_rows(model, batch, ours, chosen, 3)
    else:
        assert _check_rows(model, batch, ours, chosen, 3) < 1e-5
        assert get_state(model).ran == get_state(model).expected_parts()
    assert os.environ[VARIABLE] == "triton"
