"""How many channels a sparsity keeps, and which parts of a model are sparse."""

import pytest

from sparse_unsloth.config.layer_rules import LayerSparsity, keep_count, sparse_parts


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [(128, 0.0, 128), (128, 0.25, 96), (128, 0.75, 32), (14336, 0.99, 143), (10, 0.26, 7), (8, 0.999, 1), (1, 0.5, 1)],
)
def test_what_a_sparsity_keeps(size, sparsity, kept):
    assert keep_count(size, sparsity) == kept


def test_sparse_parts_come_by_depth():
    layers = [LayerSparsity(0.0, 0.0), LayerSparsity(0.5, 0.25), LayerSparsity(0.0, 0.5), LayerSparsity(0.9, 0.0)]
    assert sparse_parts(layers) == [(1, "mlp"), (1, "self_attn"), (2, "self_attn"), (3, "mlp")]
