"""Checksummed files: what was written comes back, and every damage is noticed."""

import pytest
import torch
from safetensors.torch import save_file

from sparse_unsloth.errors import EstimatorError
from sparse_unsloth.utils.tensor_file import DamagedFileError, read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, -2], dtype=torch.int64)}


def test_what_was_written_comes_back(tmp_path):
    path = tmp_path / "folder" / "file.safetensors"
    write_tensors(path, TENSORS, {"kind": "prior"})
    write_tensors(path, {**TENSORS, "a": TENSORS["a"].T}, {"kind": "svd"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"kind": "svd"}
    torch.testing.assert_close(tensors, {**TENSORS, "a": TENSORS["a"].T}, rtol=0, atol=0)
    assert [each.name for each in path.parent.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "changed value", "changed metadata"])
def test_damage_is_noticed(tmp_path, damage):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"kind": "prior"})
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-3]
    elif damage == "changed value":
        content[-1] ^= 1
    else:
        content = content.replace(b"prior", b"Prior")
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="damaged"):
        read_tensors(path)


def test_files_of_others_are_told_apart(tmp_path):
    save_file(TENSORS, tmp_path / "file.safetensors")
    with pytest.raises(EstimatorError, match="no estimator of this package, so it is not overwritten"):
        read_tensors(tmp_path / "file.safetensors")
