"""Rebuilds Gemma 3's tokenizer from a GGUF file, which transformers converts wrongly.

The file has tokens, their scores and kinds. Byte-pair merges follow from the scores: each token is merged from every
pair of tokens that it consists of, better tokens first. A prompt must begin with ``<bos>``, as the chat template does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens in a GGUF file."""
SPACE = "▁"
FIELD = "tokenizer.ggml."
TEMPLATE = (
    "<bos><start_of_turn>user\n{% for message in messages %}{{ message.content }}"
    "{% if not loop.last %}\n\n{% endif %}{% endfor %}<end_of_turn>\n<start_of_turn>model\n"
)
"""Of a file without one (a base model): the turns of Gemma's tuned models, for one prompt with its system message."""


def merges_of(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the pairs that become one token, in the order in which they are merged."""
    places = {token: place for place, token in enumerate(tokens)}
    found = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        for cut in range(1, len(token)) if kind == NORMAL else ():
            pair = token[:cut], token[cut:]
            if pair[0] in places and pair[1] in places:
                found.append((-score, places[pair[0]], places[pair[1]], pair))
    return [pair for *_, pair in sorted(found)]


def build(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], template: str) -> Any:
    """Returns the tokenizer, as one of transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(tokens)}
    merges = merges_of(tokens, scores, kinds)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [
        AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL
    ]
    backend.add_special_tokens(special)
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def gemma3_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a Gemma 3 in a GGUF file."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens, scores, kinds = (fields[FIELD + name].contents() for name in ("tokens", "scores", "token_type"))
    template = fields.get("tokenizer.chat_template")
    return build(tokens, scores, kinds, TEMPLATE if template is None else template.contents())
