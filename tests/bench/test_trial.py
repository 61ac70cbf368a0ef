import itertools

import pytest

from sparse_unsloth.bench.trial import DTYPES, combinations, parse

CHOSEN = {
    "unsloth": ("unsloth,True,False", "padded,padding-free,packed"),
    "peft": ("True,False", "padded,packed"),
}


def combinations_of(backend, *options):
    checkpointing, layouts = CHOSEN[backend]
    words = ["--backend", backend, "--checkpointing", checkpointing, "--layouts", layouts, "--out", "trials.jsonl"]
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
