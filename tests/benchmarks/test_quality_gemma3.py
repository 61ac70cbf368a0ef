"""Tests that a Gemma 3 with fewer tokens is the same model of them, from a small GGUF file."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.quality.__main__ import load_model, make_experiment
from benchmarks.quality.gemma3 import DATA_FILE, FIELD, MODEL_FILE, kept_tokens, main, trim
from benchmarks.quality.table import GEMMA3, MODELS
from benchmarks.quality.tasks import FIELDS, read_items
from sparse_unsloth.errors import SparsityError

gguf = pytest.importorskip("gguf")
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
VOCABULARY, HIDDEN, INNER, HEAD = 50, 64, 96, 32
SHAPES = {
    "attn_q": (2 * HEAD, HIDDEN),
    "attn_k": (HEAD, HIDDEN),
    "attn_v": (HEAD, HIDDEN),
    "attn_output": (HIDDEN, 2 * HEAD),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
NORMS = {
    "attn_norm": HIDDEN,
    "ffn_norm": HIDDEN,
    "post_attention_norm": HIDDEN,
    "post_ffw_norm": HIDDEN,
    "attn_q_norm": HEAD,
    "attn_k_norm": HEAD,
}


@pytest.fixture
def model_file(tmp_path):
    """A Gemma 3 of two layers with 50 tokens."""
    rng, path = np.random.default_rng(0), tmp_path / "whole" / "whole.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    writer.add_tags(["of", "a test"])
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_bos_token_id(2)
    names = {f"blk.{layer}.{name}.weight": size for layer in range(2) for name, size in (SHAPES | NORMS).items()}
    for name, size in (names | {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": HIDDEN}).items():
        values = rng.normal(size=size).astype(np.float32)
        kind = F32 if values.ndim == 1 else Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_data(path, tokens):
    values = np.array(tokens, np.uint32), *(np.array([count], np.int32) for count in (len(tokens), 2, 0))
    np.savez(path, **{f"A/test/{name}": value for name, value in zip(FIELDS, values, strict=True)})
    return path


def test_the_lowest_unused_tokens_are_kept_too():
    assert kept_tokens(np.array([7, 2, 9]), 10, 5).tolist() == [0, 1, 2, 7, 9]
    assert kept_tokens(np.array([7, 2, 9]), 10, 3).tolist() == [2, 7, 9]
    with pytest.raises(SparsityError, match="3 tokens, more than the 2 rows"):
        kept_tokens(np.array([7, 2, 9]), 10, 2)


def test_a_trimmed_model_has_the_rows_of_its_data_and_all_else(tmp_path, model_file):
    tokens = [2, 49, 7, 31, 7]
    data, out, folder = write_data(tmp_path / "data.npz", tokens), tmp_path / "out", tmp_path / "folder"
    trim(model_file, data, out, count=8)
    main(["unpack", str(out / MODEL_FILE), str(folder)])
    whole, trimmed = load_model(str(model_file)), load_model(str(folder))
    assert MODELS[trimmed.config.model_type] == GEMMA3
    kept = [0, 1, 2, 3, 4, 7, 31, 49]
    before, after = whole.state_dict(), trimmed.state_dict()
    assert before.keys() == after.keys()
    for name, values in before.items():
        own = values[kept] if values.shape[0] == VOCABULARY else values
        assert torch.equal(own, after[name]), name
    differs = {name for name, value in whole.config.to_dict().items() if trimmed.config.to_dict().get(name) != value}
    assert differs <= {"vocab_size", "quantization_config", "architectures", "_name_or_path"}
    items = read_items(out / DATA_FILE, "A", "test")
    assert (items.tokens.tolist(), items.lengths.tolist(), items.prompts.tolist()) == ([[2, 7, 5, 6, 5]], [5], [2])
    assert np.load(out / DATA_FILE)["A/test/tokens"].dtype == np.uint16
    device = trimmed.device
    logits = whole(torch.tensor([tokens], device=device)).logits[..., kept]
    torch.testing.assert_close(trimmed(torch.tensor(items.tokens, device=device)).logits, logits)
    fields = gguf.GGUFReader(out / MODEL_FILE).fields
    assert FIELD + "tokens" not in fields, "they take long to read"
    assert fields["general.tags"].contents() == ["of", "a test"]


def test_data_of_another_tokenizer_are_refused(tmp_path, model_file):
    with pytest.raises(SparsityError, match="has token 50, and"):
        trim(model_file, write_data(tmp_path / "data.npz", [2, 50]), tmp_path / "out", count=8)


def test_data_of_the_whole_vocabulary_do_not_reach_a_trimmed_model(tmp_path):
    data, model = write_data(tmp_path / "data.npz", [2, 7, 8]), SimpleNamespace(config=SimpleNamespace(vocab_size=8))
    names = ("steps", "batch_size", "rate", "compile")
    arguments = argparse.Namespace(data=data, items=1, seeds=1, **dict.fromkeys(names))
    with pytest.raises(SystemExit, match="has tokens that the model lacks"):
        make_experiment(arguments, model, "A")
