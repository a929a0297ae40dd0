"""Reading chosen tensors, and naming what is wrong with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mesh.checkpoint import Checkpoint, layout_bytes
from mesh.errors import CheckpointError

TENSORS = {
    "model.embed_tokens.weight": torch.arange(8.0).view(4, 2),
    "model.layers.0.mlp.experts.0.w1.weight": torch.ones(3, 2, dtype=torch.bfloat16),
    "model.layers.1.mlp.experts.0.w1.weight": torch.zeros(3, 2),
}


def single(directory: Path) -> Path:
    """All tensors in one file."""
    save_file(TENSORS, directory / "model.safetensors")
    return directory


def sharded(directory: Path) -> Path:
    """A file for each tensor: a.safetensors, b.safetensors, c.safetensors."""
    weight_map = {}
    for file, (name, tensor) in zip("abc", TENSORS.items(), strict=True):
        save_file({name: tensor}, directory / f"{file}.safetensors")
        weight_map[name] = f"{file}.safetensors"
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def open_fails(directory: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(directory)


@pytest.mark.parametrize("make", [single, sharded])
def test_reads_by_name_wherever_a_tensor_is(tmp_path, make):
    with Checkpoint(make(tmp_path)) as checkpoint:
        assert checkpoint.names == set(TENSORS) == set(checkpoint)
        for name, tensor in TENSORS.items():
            assert name in checkpoint
            assert torch.equal(checkpoint.tensor(name, tuple(tensor.shape)), tensor)
            assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype("model.embed_tokens.weight") == "float32"
        assert checkpoint.dtype("model.layers.0.mlp.experts.0.w1.weight") == "bfloat16"


def test_tensors_outlive_the_file_and_take_the_asked_dtype(tmp_path):
    with Checkpoint(single(tmp_path)) as checkpoint:
        tensor = checkpoint.tensor("model.embed_tokens.weight", dtype=torch.float16)
    (tmp_path / "model.safetensors").unlink()
    assert tensor.tolist() == TENSORS["model.embed_tokens.weight"].tolist()
    assert tensor.dtype == torch.float16


def test_a_slice_is_read_alone(tmp_path):
    with Checkpoint(single(tmp_path)) as checkpoint:
        rows = checkpoint.slice("model.embed_tokens.weight", (4, 2))
        assert rows[1].tolist() == [2.0, 3.0]
        assert rows[:, 1:].tolist() == [[1.0], [3.0], [5.0], [7.0]]


def test_a_missing_tensor_is_named_with_the_file_where_it_should_be(tmp_path):
    with Checkpoint(sharded(tmp_path)) as checkpoint:
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.experts\.7.* in c\.safetensors"
        ):
            checkpoint.tensor("model.layers.1.mlp.experts.7.w1.weight")
        with pytest.raises(CheckpointError, match="lacks tensor lm_head"):
            checkpoint.shape("lm_head.weight")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    with (
        Checkpoint(single(tmp_path)) as checkpoint,
        pytest.raises(CheckpointError, match=r"embed_tokens.*\[4, 2\].*\[5, 2\]"),
    ):
        checkpoint.tensor("model.embed_tokens.weight", (5, 2))


def test_quantized_tensors_are_refused_by_name(tmp_path):
    save_file({"q": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match="tensor q is stored as U8"),
    ):
        checkpoint.tensor("q")


@pytest.mark.parametrize("kept_bytes", [3, 40, -1])
def test_a_truncated_file_is_named(tmp_path, kept_bytes):
    path = single(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    open_fails(tmp_path, r"model\.safetensors is truncated")


def test_a_truncated_shard_is_named(tmp_path):
    path = sharded(tmp_path) / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    open_fails(tmp_path, r"b\.safetensors is truncated")


def test_a_tensor_in_two_files_is_named_with_both(tmp_path):
    name = "model.embed_tokens.weight"
    save_file({name: TENSORS[name], "other": torch.ones(1)}, sharded(tmp_path) / "b.safetensors")
    write_index(tmp_path, {name: "a.safetensors", "other": "b.safetensors"})
    open_fails(tmp_path, r"embed_tokens\.weight is in both a\.safetensors and b\.safetensors")


def test_an_absent_file_is_named(tmp_path):
    (sharded(tmp_path) / "c.safetensors").unlink()
    open_fails(tmp_path, r"c\.safetensors, which is absent")


def test_an_index_that_does_not_match_its_files_is_refused(tmp_path):
    sharded(tmp_path)
    write_index(tmp_path, {"lm_head.weight": "a.safetensors"})
    open_fails(tmp_path, r"lm_head\.weight is in a\.safetensors, where it is not")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "../elsewhere.safetensors"}])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    open_fails(tmp_path, "no weight_map")


def test_a_directory_without_weights_is_refused(tmp_path):
    open_fails(tmp_path, "holds neither")
    with pytest.raises(CheckpointError, match="holds neither"):
        layout_bytes(tmp_path)


def test_the_layout_is_the_index_or_the_header(tmp_path):
    header = json.loads(layout_bytes(single(tmp_path)))
    assert header["model.embed_tokens.weight"]["shape"] == [4, 2]
    (tmp_path / "model.safetensors").unlink()
    assert b"weight_map" in layout_bytes(sharded(tmp_path))
