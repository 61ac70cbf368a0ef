"""Rebuilds Gemma 3's tokenizer from a GGUF file, which transformers converts wrongly, and makes the file small.

    python -m benchmarks.quality.gemma3 trim --model FILE.gguf --data .quality/gemma3.npz --out FOLDER
    python -m benchmarks.quality.gemma3 unpack FOLDER/model.gguf MODEL      # as a folder of transformers

The file has tokens, their scores and kinds. Byte-pair merges follow from the scores: each token is merged from every
pair of tokens that it consists of, better tokens first. A prompt must begin with ``<bos>``, as the chat template does.

Two thirds of the file are the rows of 262,144 tokens. `trim` keeps those that the prepared data use, and the lowest
others, which are the most frequent; every setting then chooses among the same fewer tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_unsloth.errors import SparsityError

VOCABULARY = 2**15
"""Rows that `trim` keeps."""
EMBEDDING = "token_embd.weight"
MODEL_FILE, DATA_FILE = "model.gguf", "gemma3.npz"
"""What `trim` writes."""
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


def kept_tokens(used: np.ndarray, vocabulary: int, count: int) -> np.ndarray:
    """Returns ``count`` token numbers in rising order, int64: the used ones, and the lowest of the others.

    Special tokens (padding, ends, turns) and the first merges have the lowest numbers of ``vocabulary``, so that those
    keep theirs. ``used`` are distinct token numbers.

    Raises:
        SparsityError: more are used.
    """
    if len(used) > count:
        raise SparsityError(f"the data use {len(used)} tokens, more than the {count} rows to keep")
    others = np.setdiff1d(np.arange(vocabulary), used)
    return np.sort(np.concatenate([used, others[: count - len(used)]])).astype(np.int64)


def trim(model: Path, data: Path, out: Path, count: int = VOCABULARY) -> None:
    """Writes a GGUF file with ``count`` rows of embeddings and no tokenizer, and the data with their new numbers.

    All tensors keep their quantised bytes.

    Raises:
        SparsityError: the data use more tokens, or tokens that the model lacks.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    with np.load(data) as file:
        arrays = dict(file)
    texts = [name for name in arrays if name.endswith("/tokens")]
    used = np.unique(np.concatenate([np.unique(arrays[name]) for name in texts]))
    reader = GGUFReader(model)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    vocabulary = len(tensors[EMBEDDING].data)
    if used[-1] >= vocabulary:
        raise SparsityError(
            f"{data} has token {used[-1]}, and {model} {vocabulary} tokens: they do not belong together"
        )
    kept = kept_tokens(used, vocabulary, count)
    out.mkdir(parents=True, exist_ok=True)
    for name in texts:
        arrays[name] = np.searchsorted(kept, arrays[name]).astype(np.uint16 if count <= 2**16 else np.uint32)
    np.savez_compressed(out / DATA_FILE, **arrays)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out / MODEL_FILE, architecture)
    for name, field in reader.fields.items():
        known = name.startswith("GGUF.") or name in ("general.architecture", f"{architecture}.vocab_size")
        if known or (name.startswith(FIELD) and field.types[0] == GGUFValueType.ARRAY):
            continue
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    writer.add_vocab_size(count)
    for name, tensor in tensors.items():
        rows = tensor.data[kept] if name == EMBEDDING else tensor.data
        writer.add_tensor(name, np.ascontiguousarray(rows), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sizes = ", ".join(f"{name} {(out / name).stat().st_size / 1e6:.1f} MB" for name in (MODEL_FILE, DATA_FILE))
    print(f"{len(used)} of {vocabulary} tokens are used, {count} kept; {sizes}")


def unpack(gguf: Path, folder: Path) -> None:
    """Writes a GGUF model as a folder of transformers, which loads in a second."""
    from benchmarks.quality.__main__ import load_model

    begun, model = folder.with_name(folder.name + ".part"), load_model(str(gguf))
    # transformers 5.17 refuses to save what it read from a GGUF file, although Gemma 3's weights are dense by then.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(begun)
    begun.rename(folder)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trimming = commands.add_parser("trim", help="a GGUF file and data with fewer tokens")
    trimming.add_argument("--model", type=Path, required=True, help="the GGUF file")
    trimming.add_argument("--data", type=Path, required=True, help="what `prepare` wrote with its tokenizer")
    trimming.add_argument("--out", type=Path, required=True, help=f"folder of {MODEL_FILE} and {DATA_FILE}")
    unpacking = commands.add_parser("unpack", help="a GGUF file as a folder of transformers")
    unpacking.add_argument("gguf", type=Path)
    unpacking.add_argument("folder", type=Path)
    own = parser.parse_args(words)
    if own.command == "trim":
        trim(own.model, own.data, own.out)
    else:
        unpack(own.gguf, own.folder)


if __name__ == "__main__":
    main()
