"""A small training that ends itself by SIGKILL in the middle of something, and resumes; for `test_kill`.

Every scenario runs in forked processes: one that is killed, one that goes on.
"""

import itertools
import json
import os
import signal
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparse_unsloth import attach, get_state
from sparse_unsloth.channels import calibration
from sparse_unsloth.utils import tensor_file
from sparse_unsloth.utils.checkpoints import last_whole_checkpoint
from sparse_unsloth.utils.tensor_file import write_tensors

from processes import fork, wait_for
from tiny_models import always, make_batch, make_lora

ROWS = [{name: value[0].tolist() for name, value in make_batch(n, lengths=((9, 4),)).items()} for n in range(32)]
STEPS = 6
PLACES = ("calibration", "estimator", "adapter", "optimiser", "trainer state", "step")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, trainer: Trainer) -> None:
    """Lets this process end there: in the first calibration or estimator file, or in the second checkpoint."""
    if place == "calibration":
        calibration.attention_energy = lambda *args: die()
    elif place == "estimator":
        tensor_file.os.replace = lambda *args: die()  # the whole file is written, under another name
    elif place == "step":
        trainer.add_callback(DieInStep())
    else:
        name = {"adapter": "save_model", "optimiser": "_save_optimizer_and_scheduler", "trainer state": None}[place]
        if name is None:
            type(trainer.state).save_to_json = half_a_file
        else:
            original = getattr(trainer, name)

            def wrapped(folder, *args, **kwargs):
                original(folder, *args, **kwargs)
                if str(folder).endswith("-4"):
                    die()

            setattr(trainer, name, wrapped)


def half_a_file(state, path) -> None:
    text = json.dumps(dict(vars(state)), default=str)
    if "checkpoint-4" in str(path):
        Path(path).write_text(text[: len(text) // 2])
        die()
    from dataclasses import asdict

    Path(path).write_text(json.dumps(asdict(state), indent=2, sort_keys=True) + "\n")


class DieInStep(TrainerCallback):
    """After the fifth step's backward."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            die()


def train(folder: Path, place: str | None) -> dict:
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        full_determinism=False,
    )
    model = make_lora()
    estimator = {"kind": "prior", "rank": 4, "calibration_samples": 8, "path": str(folder / "estimator.safetensors")}
    attach(model, always(estimator=estimator, start_step=1, end_step=5))
    trainer = Trainer(model=model, args=args, train_dataset=ROWS)
    if place is not None:
        arm(place, trainer)
    checkpoint = last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "from": None if checkpoint is None else Path(checkpoint).name,
        "losses": [line["loss"] for line in lines],
        "enabled": [line["sparsity/enabled"] for line in lines],
        "weights": [p.detach().double().sum().item() for p in model.parameters() if p.requires_grad],
        "kind": get_state(model).estimator.kind,
    }


def run(out: Path) -> dict:
    """By the place of death: what killed the first process, whether it left an estimator, and what the second did."""
    results = {}
    for place in (None, *PLACES):
        folder = out / str(place).replace(" ", "-")
        folder.mkdir()
        result, said = folder / "result.json", folder / "said.txt"

        def work(place, folder=folder, result=result):
            result.write_text(json.dumps(train(folder, place)))

        killed = None
        if place is not None:
            killed = os.WTERMSIG(*wait_for([fork(partial(work, place), said)]))
        estimator = (folder / "estimator.safetensors").exists()
        assert wait_for([fork(partial(work, None), said)]) == [0], f"{place}: {said.read_text()[-5000:]}"
        results[place] = {"killed": killed, "estimator": estimator, **json.loads(result.read_text())}
    return results


def write_for_ever(path: Path, ready: int) -> None:
    """One tensor file after another; a byte into the pipe ``ready`` once the first is there."""
    for number in itertools.count(1):
        write_tensors(path, {"value": torch.full((300_000,), float(number))}, {"number": str(number)})
        if number == 1:
            os.write(ready, b".")
