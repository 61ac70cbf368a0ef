"""The benchmark of trainers with a loss of their own: pairs, rewards, random rows, costs and the table."""

import random

import pytest
import torch

from benchmarks.preferences import TASKS, at_random, cost_of_rows, reward, training_figures, wrong_answer
from benchmarks.preferences_table import Measures, markdown
from sparse_unsloth.costs.flops import ModelShape
from sparse_unsloth.rows.choice import RowChoice
from sparse_unsloth.tokens.partition import TokenPartition

SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152)


@pytest.mark.parametrize(
    ("task", "question", "answer", "others"),
    [
        (
            "needle_haystack",
            "Ann likes tea. Bo-Li loves it. Cy eats. \nWho eats? Reply with a name.",
            "Cy",
            "Ann Bo-Li",
        ),
        ("color_cube_rotation", "A cube has:\n- a red top side\n- an indigo right side", "red", "indigo"),
        ("family_relationships", "What is Ann to Bo?", "wife", "son"),
    ],
)
def test_a_wrong_answer_is_another_of_its_kind(task, question, answer, others):
    row = {"task": task, "question": question, "answer": answer}
    found = {wrong_answer(row, ["son", "wife"], random.Random(seed)) for seed in range(20)}
    assert found == set(others.split())


def test_the_reward_is_reasoning_gyms_default():
    from reasoning_gym.dataset import ProceduralDataset

    for text in ("Eoghain", "It is Eoghain.", "Bo", ""):
        assert reward(text, "Eoghain") == ProceduralDataset.score_answer(None, text, {"answer": "Eoghain"})


def test_random_rows_are_as_many_and_do_not_follow_the_gradient():
    labels = torch.full((1, 400), -100)
    labels[:, -1] = 7
    choice, gradient = RowChoice(TokenPartition.from_labels(labels), 0.25), torch.arange(400.0)[:, None]
    largest = choice.select(gradient)
    with at_random(True):
        drawn = choice.select(gradient)
    assert len(drawn) == len(largest)
    assert 100 < drawn.float().mean() < 300 < largest.float().mean()
    assert torch.equal(choice.select(gradient), largest)


def test_rows_save_less_where_another_forward_counts():
    lengths = [(100, 3)] * 4
    found = {task: cost_of_rows(task, SHAPE, lengths) for task in TASKS}
    assert found["reward"] == found["classifier"] < found["dpo"] == found["grpo"] < 0.9
    assert found["reward"] > 0.5


def test_a_dense_step_of_rows_is_an_error():
    steps = [{"loss": 1.0, "sparsity/enabled": 1, "sparsity/context_share": 0.5}, {"loss": 0.5, "sparsity/enabled": 0}]
    with pytest.raises(RuntimeError, match="not every step was sparse"):
        training_figures(steps, "random-rows")
    assert training_figures(steps, "dense")["train_loss"] == "0.50000"
    with pytest.raises(RuntimeError, match="not finite"):
        training_figures([{"loss": float("nan")}], "dense")


def test_differences_are_paired_by_seed():
    scores = {"dense": (0.5, 0.7, 0.9), "rows": (0.4, 0.6, 0.8), "dense-equal-cost": (0.3, 0.6)}
    rows = [
        {"task": "dpo", "arm": arm, "seed": str(seed), "steps": "4", "cost_flops": "1", "score": str(score),
         "loss": "1", "second": "0", "device": "d", "commit": "c"}
        for arm, values in scores.items() for seed, score in enumerate(values)
    ]  # fmt: skip
    text = markdown(rows, {"dpo": Measures("DPO", "accuracy", "margin", True)}, tuple(scores))
    (line,) = [line for line in text.splitlines() if line.startswith("| rows")]
    assert line.split(" | ")[1:5] == ["3", "4", "1.00", "0.600 ± 0.200"]
    assert line.split(" | ")[7].startswith("-0.100 ± 0.000")
    assert line.split(" | ")[8].startswith("+0.050 ± 0.635")
