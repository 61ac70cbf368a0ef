"""Makes tasks of natural text from the Python files of this installation: functions to write, passages to read.

Nothing is downloaded, and nothing of it is kept in the repository. Another installation gives other items: rows of one
table must come from one prepared file. Items of a file are all for training or all held out, so that a held-out
function has no twin in the training items but by copies between files, which are left out too.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "accelerate", "datasets", "huggingface_hub", "matplotlib", "networkx", "nltk", "numpy", "pandas", "peft", "PIL",
    "scipy", "sklearn", "sympy", "torch", "transformers", "trl",
)  # fmt: skip
"""Read besides the standard library, as far as they are installed."""
LEFT_OUT = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "__pycache__", "_vendor"}
HELD_OUT = 8
"""The items of one file in so many are held out."""
MOST_BYTES = 400_000
ASKED = 3
"""Questions about one passage; with one each there are 2,650 items to train on and 300 held out (SmolLM2's tokens)."""


@dataclass(frozen=True)
class Text:
    """An item: what the prompt asks, the answer, the kind of question, and whether it is held out."""

    question: str
    answer: str
    kind: str
    held_out: bool


def python_files() -> Iterator[tuple[str, str]]:
    """Yields ``(name, text)`` of each Python file, in a fixed order; a name begins with its package's."""
    paths = sysconfig.get_paths()
    roots = [("", Path(paths["stdlib"]))] + [(f"{name}/", Path(paths["purelib"], name)) for name in PACKAGES]
    for prefix, root in roots:
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root)
            if LEFT_OUT & set(place.parts) or path.stat().st_size > MOST_BYTES:
                continue
            try:
                yield f"{prefix}{place}", path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def functions(files: Iterable[tuple[str, str]]) -> list[Text]:
    """The functions with a docstring: the prompt is its head and docstring, the answer its body."""
    found: dict[str, Text] = {}
    for name, source in files:
        lines = source.splitlines()
        for node in _nodes(source):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
                continue
            documented = node.body[0].end_lineno
            head = "\n".join(lines[node.lineno - 1 : documented])
            body = "\n".join(lines[documented : node.end_lineno]).strip("\n")
            if isinstance(node.body[1], ast.Raise | ast.Pass) or not body.strip() or not body.isascii():
                continue
            answer = textwrap.indent(textwrap.dedent(body).rstrip(), "    ")
            found.setdefault(answer, Text(textwrap.dedent(head), answer, "function", _is_held_out(name)))
    return list(found.values())


def passages(files: Iterable[tuple[str, str]]) -> list[Text]:
    """Passages of docstrings with up to `ASKED` questions each, which one of its sentences answers word for word."""
    found: dict[str, Text] = {}
    seen: set[str] = set()
    for name, source in files:
        for node in _nodes(source):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            sentences = _sentences(ast.get_docstring(node) or "") if isinstance(node, kinds) else []
            passage = " ".join(sentences)
            if len(sentences) < 4 or passage in seen:
                continue
            seen.add(passage)
            for turn in range(ASKED):
                asked = ask(sentences, random.Random(f"{turn} {passage}"))
                if asked is not None:
                    kind, question, answer = asked
                    item = Text(f"{passage}\n\n{question}", answer, kind, _is_held_out(name))
                    found.setdefault(item.question, item)
    return list(found.values())


def ask(sentences: list[str], chance: random.Random) -> tuple[str, str, str] | None:
    """A question on a passage: its kind, its text, and the answer, one of ``sentences``; None where none is unique."""
    place = chance.randrange(1, len(sentences))
    answer = sentences[place]
    if sentences.count(answer) > 1:
        return None
    if chance.random() < 0.5:
        start = " ".join(sentences[place - 1].split()[:5])
        if sum(sentence.startswith(start) for sentence in sentences) > 1:
            return None
        return "following", f'Which sentence follows the one that begins with "{start}"?', answer
    others = " ".join(sentences[:place] + sentences[place + 1 :]).lower()
    words = [word for word in re.findall(r"[A-Za-z_]{5,}", answer) if word.lower() not in others]
    if not words:
        return None
    return "mentioning", f'Which sentence mentions "{chance.choice(words)}"?', answer


def _nodes(source: str) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return


def _sentences(docstring: str) -> list[str]:
    """The sentences of the paragraphs that are prose: no examples, lists, tables or headings; at most twelve."""
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        text = " ".join(paragraph.split())
        prose = re.fullmatch(r"[A-Z][A-Za-z0-9 ,.;:'\"()`_/*=-]+\.", text) and len(text.split()) >= 8
        if prose and not any(line.startswith((" ", ">>>", "-", "*", ":", "..")) for line in lines):
            sentences += re.split(r"(?<=[.])\s+(?=[A-Z])", text)
    return sentences[:12]


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
