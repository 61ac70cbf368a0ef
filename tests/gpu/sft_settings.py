"""What `sft_runs` trains and on what, and the outcomes of its checks."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass

STEPS, BATCH, LENGTH, SAMPLES = 20, 8, 512, 640
FIRST_SPARSE, FIRST_DENSE_AGAIN = 2, 18
"""Of 20 steps, counted from 0, with start_step 0.1 and end_step 0.9."""

SAME_CODE, OTHER_CODE = (0.01, 0.99), (0.08, 0.9)
"""The relative error of logits that is allowed, and the share of tokens that must be predicted alike: through the same
code, and through another implementation. On this model bfloat16 alone brings 0.025 and 0.976."""


@dataclass(frozen=True)
class Run:
    """One training: its weights, its batch layout, and how channels are chosen."""

    four_bit: bool
    layout: str
    estimator: str

    @property
    def name(self) -> str:
        return f"{'4bit' if self.four_bit else 'bf16'}-{self.layout}"


RUNS = (
    Run(False, "padded", "prior"),
    Run(False, "free", "svd"),
    Run(False, "packed", "prior"),
    Run(True, "padded", "svd"),
    Run(True, "free", "prior"),
    Run(True, "packed", "svd"),
)
LAYOUTS = {"padded": {"padding_free": False}, "free": {}, "packed": {"packing": True}}
SAVED = ("bf16-free", "4bit-padded")
"""The runs whose adapter is saved and loaded again; the bf16 one is merged too."""

NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo",
    "Irene", "Jonas", "Karin", "Lukas", "Maria", "Nora", "Oscar", "Paula",
)  # fmt: skip
THINGS = (
    "tea", "chess", "jazz", "bread", "maps", "kites", "clocks", "roses",
    "trains", "soup", "poetry", "boats", "cheese", "tennis", "ferns", "puzzles",
)  # fmt: skip
WORDS = (
    "river", "stone", "cloud", "lamp", "garden", "window", "paper", "silver", "bridge", "forest", "candle", "mirror"
)  # fmt: skip


class Checks:
    """Outcomes by name; the first false one does not end the job, since time on the machine is short."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict] = {}

    def __call__(self, name: str, passed: bool, detail: object = "") -> None:
        self.outcomes[name] = {"passed": bool(passed), "detail": str(detail)}
        print(f"  {'ok    ' if passed else 'FAILED'} {name}: {detail}", flush=True)

    def attempt(self, name: str, function, *args):
        """What ``function`` returns; an exception becomes a failed check, and None is returned."""
        try:
            return function(*args)
        except Exception:
            self(name, False, traceback.format_exc())
            return None

    @property
    def failed(self) -> list[str]:
        return [name for name, outcome in self.outcomes.items() if not outcome["passed"]]


def samples(count: int, seed: int) -> list[dict]:
    """Prompts and completions of two verifiable tasks: who likes what, among many statements, and reversed words."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        if number % 4 < 3:
            people, liked = rng.sample(NAMES, 14), rng.sample(THINGS, 14)
            which = rng.randrange(14)
            facts = " ".join(f"{person} likes {thing}." for person, thing in zip(people, liked, strict=True))
            question, answer = (
                f"{facts}\nWho likes {liked[which]}? Reply with the name only.",
                people[which],
            )
        else:
            chosen = rng.sample(WORDS, rng.randint(4, 8))
            question = f"Write these words in the opposite order, separated by spaces: {' '.join(chosen)}"
            answer = " ".join(reversed(chosen))
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return rows


def sparsity(num_layers: int, estimator: str, **schedule) -> dict:
    """Half of the MLP channels in every layer but the first; attention stays dense."""
    return {
        "mlp": {f"1-{num_layers - 1}": 0.5},
        "estimator": {"kind": estimator, "calibration_samples": 32},
        "start_step": 0.1,
        "end_step": 0.9,
        **schedule,
    }
