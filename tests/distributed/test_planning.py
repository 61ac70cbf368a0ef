"""The plan of preset `auto` in two processes: both mend it together, by the slower one, or neither does."""

import os
import socket
from functools import partial
from types import SimpleNamespace

import torch.distributed as dist

from sparse_unsloth.attachment import attach, get_state
from sparse_unsloth.planning import progress
from sparse_unsloth.planning.step_time import StepTime
from sparse_unsloth.runtime import auto

from processes import fork, needs_fork, wait_for
from tiny_models import make_batch, make_lora

PROMPTS = make_batch(lengths=((40, 4), (30, 6)))
BUSY = StepTime(products=1e9, attention=1e9, rows=1, sparse_rows=1, host_layer=1, host_sparse_part=0)
"""Of a device so slow that rows pay; where it is much faster, they do not."""
FORWARDS = 8


def work(rank, folder, ratios):
    """Trains with a clock by which micro-batches take ``ratios[rank]`` of the predicted time."""
    ticking = SimpleNamespace(now=0.0, seconds=0.0)

    def read():
        ticking.now += ticking.seconds
        return ticking.now

    auto.clock, progress.WARM_UP, progress.MEASURED = read, 2, 2
    auto._fitted = lambda state: SimpleNamespace(step_time=BUSY, device="a GPU", backend="peft", dtype="bf16")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = make_lora(num_hidden_layers=2)
    attach(model)
    found = []
    for _ in range(FORWARDS):
        model(**PROMPTS).loss.backward()
        ticking.seconds = ratios[rank] * get_state(model).auto.decision.milliseconds / 1000
        found.append(get_state(model).config.backward_rows)
    (folder / f"rank-{rank}").write_text(" ".join(map(str, found)))
    dist.destroy_process_group()


def shares(folder, ratios):
    """The share of rows of each forward, on both ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = [fork(partial(work, rank, folder, ratios), folder / f"said-{rank}") for rank in range(2)]
    statuses = wait_for(pids)
    said = "\n".join((folder / f"said-{rank}").read_text() for rank in range(2))
    assert statuses == [0, 0], said
    return [(folder / f"rank-{rank}").read_text().split() for rank in range(2)], said


@needs_fork
def test_two_processes_mend_their_plan_together(tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    attach(make_lora(num_hidden_layers=2))  # imports what each process would have to import again
    (first, second), said = shares(tmp_path, (1e-6, 1e-7))
    assert first == second
    assert (first[0], first[-1]) == ("0.25", "1.0")
    assert said.count("auto, mended") == said.count("measured, ") == 1, "one of them says so"
    (first, second), said = shares(tmp_path, (1e-6, 1.0))
    assert set(first) == set(second) == {"0.25"}, "the slower one is right"
    assert "(+0%)" in said
