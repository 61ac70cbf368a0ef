"""Makes data sets of real text with given lengths: documentation and sources of Python's standard library.

    python benchmarks/real_text.py [TOKENIZER_FOLDER]     (prints the lengths beside their targets)

Nothing is downloaded, and nothing is random but the order: lengths are the quantiles of a log-normal distribution with
the given median and 90th percentile, so that a few dozen samples already have both. Tokens are those of the model's
tokenizer; a random model gets one of 8,192 tokens, trained on the same text (`make_tokenizer`).
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import random
import statistics
import sys
import sysconfig
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Lengths = tuple[int, int]
"""Median and 90th percentile, in tokens."""
Z90 = statistics.NormalDist().inv_cdf(0.9)
SPECIAL = "<|begin|>", "<|end|>", "<|pad|>", "<|turn|>", "<|text|>"
"""The first tokens: beginning and end of a text, padding, and what opens a turn and its text."""
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}<|text|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant<|text|>{% endif %}"
)
VOCABULARY, TRAINED_ON = 8192, 1_500_000
"""Tokens of `make_tokenizer`, and the characters that it is trained on."""


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    Attributes:
        prompt, answer: lengths without the chat template; with it where ``whole``.
        share: of the tokens that are context, the template's among them.
        max_length: the longest sample, in tokens, for the trainer.
        opening: of every prompt.
        of_prompt, of_answer: the text that each is made of, "prose" or "code".
        whole: every sample has the same length, with the template.
    """

    prompt: Lengths
    answer: Lengths
    share: float
    opening: str
    of_prompt: str
    of_answer: str
    max_length: int = 4096
    whole: bool = False


KINDS = {
    "chat": Kind((60, 130), (230, 380), 0.26, "What does this do?\n", "prose", "code", 2048),
    "passages": Kind((420, 800), (185, 320), 0.70, "Answer from these passages.\n\n", "prose", "prose"),
    "long-prompts": Kind((800, 1400), (70, 120), 0.92, "Describe this code in a few words.\n\n", "code", "prose"),
    "code": Kind((512, 512), (512, 512), 0.50, "Write the functions described here.\n\n", "prose", "code", whole=True),
    "long16k": Kind(
        (15872, 15872), (512, 512), 0.97, "Summarise this document.\n\n", "code", "prose", 16640, whole=True
    ),
}  # fmt: skip


@functools.cache
def corpus() -> dict[str, tuple[str, ...]]:
    """Returns real text in pieces, in ASCII: "prose", docstrings and the language's reference; "code", functions."""
    prose, code = [], []
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Python without its documentation
        topics = {}
    for text in topics.values():
        paragraphs = [part for part in text.split("\n\n") if len(part) > 80]
        prose += ["\n\n".join(paragraphs[at : at + 4]) for at in range(0, len(paragraphs), 4)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if documentation := ast.get_docstring(node):
                prose.append(f"{path.stem}.{node.name}: {documentation}")
            if not isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno > 3:
                code.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
    pieces = {"prose": prose, "code": code}
    return {kind: tuple(text.encode("ascii", "ignore").decode() for text in pieces[kind]) for kind in pieces}


def make_tokenizer():
    """Trains a byte-level tokenizer with a chat template on the text; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for pieces in corpus().values() for text in pieces]
    random.Random(0).shuffle(texts)
    used = sum(end <= TRAINED_ON for end in itertools.accumulate(map(len, texts)))
    tokenizer.train_from_iterator(texts[:used], trainer)
    begin, end, pad, *others = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad,
        additional_special_tokens=others,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def make_rows(kind: str, tokenizer, count: int, seed: int = 0) -> list[dict]:
    """Makes ``count`` samples with TRL's columns of conversations, ``prompt`` and ``completion``.

    Args:
        tokenizer: of the model, with a chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template: give the folder of an instruct model")
    of, rng = KINDS[kind], random.Random(f"{kind} {seed}")
    ahead, behind = template_tokens(tokenizer) if of.whole else (0, 0)
    prompts, answers = (lengths(*given, count) for given in (of.prompt, of.answer))
    rng.shuffle(prompts)
    rng.shuffle(answers)
    texts = {name: _Text(name, tokenizer, rng) for name in dict.fromkeys((of.of_prompt, of.of_answer))}
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        question = texts[of.of_prompt].take(prompt - ahead, of.opening)
        reply = texts[of.of_answer].take(answer - behind)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": reply}],
            }
        )
    return rows


class _Text:
    """The pieces of one kind of text in random order, from the beginning again where they end."""

    def __init__(self, name: str, tokenizer, rng: random.Random):
        self._pieces = list(corpus()[name])
        rng.shuffle(self._pieces)
        self._next, self._tokenizer = 0, tokenizer

    def take(self, count: int, opening: str = "") -> str:
        """Returns a text of ``count`` tokens, give or take one where it is cut: whole pieces, but for the last."""
        ids = self._encode(opening) if opening else []
        while len(ids) < count:
            text = self._pieces[self._next % len(self._pieces)]
            self._next += 1
            ids += self._encode(text + "\n\n")
        return self._tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def lengths(median: int, ninth: int, count: int) -> list[int]:
    """Returns the quantiles of a log-normal distribution with this median and 90th percentile, ascending."""
    sigma, normal = math.log(ninth / median) / Z90, statistics.NormalDist()
    return [round(median * math.exp(sigma * normal.inv_cdf((at + 0.5) / count))) for at in range(count)]


def template_tokens(tokenizer) -> tuple[int, int]:
    """Returns the tokens that the chat template adds to a prompt (with the opening of the answer), and to an answer."""
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "a"}]}
    one = len(tokenizer.encode("a", add_special_tokens=False))
    prompt, whole = token_counts(row, tokenizer)
    return prompt - one, whole - prompt - one


def token_counts(row: dict, tokenizer) -> tuple[int, int]:
    """Returns the tokens of the prompt with the template, and of the whole sample, as TRL prepares them."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)
    return len(prompt["input_ids"]), len(whole["input_ids"])


def describe(kind: str, rows: Sequence[dict], tokenizer) -> list[tuple[str, float, float]]:
    """Measures samples: ``(what, found, target)`` of lengths in tokens and of the context's share."""
    of = KINDS[kind]
    counts = [token_counts(row, tokenizer) for row in rows]
    ahead, behind = (0, 0) if of.whole else template_tokens(tokenizer)
    found = []
    for name, target, sizes in (
        ("prompt", of.prompt, [prompt - ahead for prompt, _ in counts]),
        ("answer", of.answer, [whole - prompt - behind for prompt, whole in counts]),
    ):
        deciles = statistics.quantiles(sizes, n=10, method="inclusive")
        found += [(f"{name} median", deciles[4], target[0]), (f"{name} p90", deciles[8], target[1])]
    share = sum(prompt for prompt, _ in counts) / sum(whole for _, whole in counts)
    return [*found, ("context share", share, of.share)]


def report(kind: str, rows: Sequence[dict], tokenizer) -> str:
    """Formats `describe` in a line."""
    parts = [
        f"{what} {found:.0%} (target {target:.0%})" if what == "context share" else f"{what} {found:.0f} ({target})"
        for what, found, target in describe(kind, rows, tokenizer)
    ]
    return f"{kind:12} {len(rows)} samples: {', '.join(parts)}"


def main(words: Sequence[str]) -> None:
    if words:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(words[0])
    else:
        tokenizer = make_tokenizer()
    for kind in KINDS:
        print(report(kind, make_rows(kind, tokenizer, 16 if kind == "long16k" else 240), tokenizer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
