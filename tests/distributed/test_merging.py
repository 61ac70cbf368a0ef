"""Merged micro-batches in two processes (gloo, DDP) of a real SFTTrainer: by a plan of `auto`, and by hand.

Everything is as with micro-batches one by one: the weights, the logs, and what is left where memory runs out on one.
"""

import itertools
import logging
import os
import socket
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from sparse_unsloth import get_state
from sparse_unsloth.errors import AttachError
from sparse_unsloth.planning import progress
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.runtime import auto, together
from sparse_unsloth.runtime.checkpoint_planner import CheckpointPlanner

from processes import fork, needs_fork, wait_for
from tiny_models import loras
from trainer_models import DENSE, EIGHT, MERGED, TIMES, model_of, trl_trainer, words_tokenizer

LAUNCH_BOUND = StepTime(products=1e-9, attention=1e-9, rows=1e-9, sparse_rows=1e-9, host_layer=5, host_sparse_part=0)
BUSY = StepTime(1e9, 1e9, 1e9, 1, host_layer=5, host_sparse_part=0)
AUTO = {"preset": "auto", "backward_rows": 1.0}
DATA = (
    [(5, 3), (2, 6), (7, 2), (4, 4), (9, 1), (3, 3), (6, 5), (1, 2), (8, 3), (2, 2), (5, 5), (3, 7)] * 2,
    [(9, 3), (8, 6), (7, 5), (6, 4), (9, 7), (8, 3), (6, 5), (5, 6), (8, 3), (9, 2), (7, 5), (6, 7)] * 2,
)
"""The lengths of prompts and answers on each process."""
FIGURES = ("entropy", "mean_token_accuracy")
"""Of TRL's, which are means over a micro-batch."""


class Decisions(TrainerCallback):
    """The plan at the end of each step."""

    def __init__(self, model):
        self.model, self.found = model, []

    def on_step_end(self, *args, **kwargs):
        decision = get_state(self.model).auto.decision
        largest = max(batch.rows for batch in decision.facts.forwards(decision.merged).batches)
        read = len(decision.facts.batches)
        self.found.append((decision.chosen, decision.merged, decision.milliseconds, read, largest))


def train(folder, sparsity, tokenizer, name, prepare=None, resume=None, data=DATA, **changes):
    """One training on this process: what it came to, and what is compared with others."""
    model = model_of(sparsity)
    if prepare is not None:
        prepare(model)
    changes = {"max_steps": 3, "loss_type": "nll", "ddp_backend": "gloo"} | changes
    trainer = trl_trainer(model, folder / name, tokenizer, data[dist.get_rank()], **changes)
    watch = Decisions(model)
    if get_state(model).auto is not None:
        trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert type(trainer.model_wrapped).__name__ in ("PeftModelForCausalLM", "DistributedDataParallel")
    log = trainer.state.log_history
    return {
        "weights": {key: one.detach().clone() for key, one in loras(trainer.model).items()},
        "log": [
            {key: value for key, value in line.items() if not any(word in key for word in (*TIMES, *FIGURES))}
            for line in log
        ],
        "merged": [line[MERGED] for line in log if MERGED in line],
        "plans": watch.found,
    }


def work(rank, folder, function):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in ranks.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    auto._fitted = lambda state: SimpleNamespace(step_time=LAUNCH_BOUND, device="a GPU", backend="peft", dtype="bf16")
    logging.getLogger("sparse_unsloth").addHandler(logging.StreamHandler(sys.stdout))
    # transformers reads optimisers' states into the process's device, "cpu:0", which torch does not know.
    torch.serialization.register_package(0, lambda one: None, lambda one, where: one if where == "cpu:0" else None)
    tokenizer = words_tokenizer(folder / f"words-{rank}")
    torch.save(function(folder, tokenizer), folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def on_both(function, folder):
    """What ``function(folder, tokenizer)`` returns on each of two processes, and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    said = [folder / f"said-{rank}" for rank in range(2)]
    statuses = wait_for([fork(partial(work, rank, folder, function), said[rank]) for rank in range(2)])
    texts = [file.read_text() for file in said]
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in texts)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)], texts


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Leaves the variables of the processes as they were."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def assert_same(ours, expected, steps=None, but=()):
    torch.testing.assert_close(ours["weights"], expected["weights"], rtol=1e-6, atol=2e-5)  # TRL's loss is in float32
    lines, others = (
        [{key: value for key, value in line.items() if key not in (MERGED, *but)} for line in one["log"]]
        for one in (ours, expected)
    )
    assert len(lines) == len(others)
    for line, other in zip(lines[:steps], others[:steps], strict=True):
        assert line == {key: pytest.approx(value, rel=1e-5, abs=1e-12) for key, value in other.items()}


def planned(folder, tokenizer):
    saved = {"save_strategy": "steps", "save_steps": 1}
    found = {
        "expected": train(folder, DENSE, tokenizer, "dense"),
        "auto": train(folder, AUTO, tokenizer, "auto", **saved),
        "by hand": train(folder, EIGHT, tokenizer, "hand"),
        "all at once": train(folder, AUTO, tokenizer, "few", gradient_accumulation_steps=2, max_grad_norm=0.1),
        "of all at once": train(folder, DENSE, tokenizer, "few-d", gradient_accumulation_steps=2, max_grad_norm=0.1),
    }
    found["again"] = train(folder, AUTO, tokenizer, "again", resume=folder / "auto" / "checkpoint-1", **saved)
    return found


@needs_fork
def test_auto_merges_in_both_processes(tmp_path):
    """Each reads other data, and both come to one plan; resumed, too."""
    found, said = on_both(planned, tmp_path)
    for one in found:
        for name in ("auto", "by hand"):
            assert_same(one[name], one["expected"])
            assert one[name]["merged"] == [4, 4, 4]
        assert_same(one["all at once"], one["of all at once"])
        assert one["all at once"]["merged"] == [2, 2, 2]
        assert_same(one["again"], one["auto"], steps=3, but=("num_tokens",))  # TRL counts those since it was resumed
        assert one["again"]["merged"][-2:] == [4, 4]
        assert one["auto"]["plans"] == found[0]["auto"]["plans"]
        assert one["auto"]["plans"][0][:4] == ((1.0, False), 4, 2.5, 16)
    torch.testing.assert_close(found[0]["auto"]["weights"], found[1]["auto"]["weights"], rtol=0, atol=0)
    assert "up to 4 of a step fit in a forward" in said[0]
    assert "sparse_unsloth auto" not in said[1], "one of them says so"


def little_memory(folder, tokenizer):
    """The second process has room for 25 tokens, the first one for 60."""
    room, asked = (60, 25)[dist.get_rank()], []

    def fits(planner, tokens, of=None, held=0):
        asked.append(tokens)
        return tokens <= room

    expected = train(folder, DENSE, tokenizer, "dense")
    CheckpointPlanner.fits = fits
    sparsity = {**AUTO, "memory_budget": 1.5}
    ours = train(folder, sparsity, tokenizer, "auto", gradient_checkpointing=True)
    return {"expected": expected, "ours": ours, "asked": max(asked)}


@needs_fork
def test_the_process_with_the_least_memory_decides(tmp_path):
    found, _ = on_both(little_memory, tmp_path)
    for one in found:
        assert_same(one["ours"], one["expected"])
        assert one["ours"]["plans"] == found[0]["ours"]["plans"]
        assert one["ours"]["merged"] == found[0]["ours"]["merged"]
        assert 1 < max(one["ours"]["merged"]) <= 2
        assert one["ours"]["plans"][0][-1] <= 25, "of the first one's micro-batches too"
        assert one["asked"] > 25


def memory_runs_out(where, folder, tokenizer):
    """On the second process alone, in its first merged micro-batch of more than 20 tokens."""
    failed = []

    def fail(*ignored):
        failed.append(where)
        raise torch.OutOfMemoryError("as a test wants it")

    def enter(module, args, kwargs, output):
        graded = torch.is_grad_enabled()
        if failed or kwargs["input_ids"].shape[1] <= 20 or graded == (where == "proof"):
            return None
        if where == "backward":
            output.loss.register_hook(fail)
            return None
        return fail()

    def prepare(model):
        if dist.get_rank() == 1:
            model.get_base_model().register_forward_hook(enter, with_kwargs=True)

    return {
        "expected": train(folder, DENSE, tokenizer, "dense"),
        "ours": train(folder, AUTO, tokenizer, "auto", prepare),
        "rows": train(folder, AUTO | {"backward_rows": 0.9999}, tokenizer, "rows"),
        "failed": failed,
    }


@needs_fork
@pytest.mark.parametrize("where", ["forward", "backward", "proof"])
def test_memory_runs_out_on_one_of_them(where, tmp_path):
    found, said = on_both(partial(memory_runs_out, where), tmp_path)
    assert [one["failed"] for one in found] == [[], [where]]
    for one in found:
        assert_same(one["ours"], one["expected"])
        assert one["ours"]["merged"][-1] == 2, "half as many"
        assert [plan[1] for plan in one["ours"]["plans"]] == [2, 2, 2]
    assert "4 micro-batches together ran out of memory. They ran again one by one, and at most 2 run" in said[0]


def mended(folder, tokenizer):
    """Forwards take a thousandth of a second, so that launches are the limit: not what was predicted."""
    ticks = itertools.count()
    auto.clock = lambda: next(ticks) / (1000, 990)[dist.get_rank()]
    progress.WARM_UP = progress.MEASURED = 2
    expected = train(folder, DENSE, tokenizer, "dense", max_steps=4)
    auto._fitted = lambda state: SimpleNamespace(step_time=BUSY, device="a GPU", backend="peft", dtype="bf16")
    return {"expected": expected, "ours": train(folder, AUTO, tokenizer, "auto", max_steps=4)}


@needs_fork
def test_both_mend_their_plan_to_merge(tmp_path):
    found, said = on_both(mended, tmp_path)
    for one in found:
        assert_same(one["ours"], one["expected"])
        assert one["ours"]["plans"] == found[0]["ours"]["plans"]
        assert [plan[1] for plan in one["ours"]["plans"]] == [1, 4, 4, 4]
        assert one["ours"]["merged"][-2:] == [4, 4]
    assert said[0].count("auto, mended") == 1


def cannot_attach(folder, tokenizer):
    """The second process refuses rows."""
    attach = auto._attach

    def refuse(state, decision):
        if dist.get_rank() == 1 and decision.backward_rows < 1:
            raise AttachError("not on this GPU")
        attach(state, decision)

    auto._attach = refuse
    auto._fitted = lambda state: SimpleNamespace(
        step_time=StepTime(1e9, 1e9, 1, 1, host_layer=1, host_sparse_part=0), device="a GPU", backend="peft", dtype="?"
    )
    return train(
        folder,
        {"preset": "auto", "merge_micro_batches": False},
        tokenizer,
        "auto",
        data=[[(40, 4)] * 8] * 2,
        max_steps=1,
    )


@needs_fork
def test_what_one_cannot_do_none_does(tmp_path):
    found, said = on_both(cannot_attach, tmp_path)
    assert found[0]["plans"] == found[1]["plans"]
    assert found[0]["plans"][0][0] == (1.0, False)
    assert "not on this GPU" in said[0]


def gradients(folder, tokenizer):
    """Averaged ones of parameters of two dtypes, of which the second process lacks one, and both lack another."""
    rank, together.BUCKET = dist.get_rank(), 20
    model = torch.nn.ParameterDict(
        {
            **{f"{number}": torch.nn.Parameter(torch.zeros(3, 2)) for number in range(3)},
            "of doubles": torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)),
            "frozen": torch.nn.Parameter(torch.zeros(2), requires_grad=False),
            "unused": torch.nn.Parameter(torch.zeros(2)),
            "lacking": torch.nn.Parameter(torch.zeros(2)),
        }
    )
    for number, (name, one) in enumerate(model.items(), start=1):
        if name not in ("frozen", "unused") and (name, rank) != ("lacking", 1):
            one.grad = torch.full_like(one, number * (rank + 1))
    together.average(model)
    assert model["0"].grad[0, 0] == rank + 1, "nothing without DDP"
    together.average(torch.nn.parallel.DistributedDataParallel(model))
    return {name: one.grad for name, one in model.items()}


@needs_fork
def test_averages_of_gradients(tmp_path):
    found, _ = on_both(gradients, tmp_path)
    for one in found:
        means = {name: gradient if gradient is None else gradient.unique().tolist() for name, gradient in one.items()}
        expected = {"0": [1.5], "1": [3.0], "2": [4.5], "of doubles": [9.0], "frozen": None, "unused": None}
        assert means == expected | {"lacking": [2.5]}
        assert one["of doubles"].dtype == torch.float64
