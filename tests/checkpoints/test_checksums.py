"""Altered, truncated and missing shards are detected and named; invalid positions are refused."""

import json

import pytest
import torch
from folders import prune

from budwood.checkpoints.checksums import INDEX_NAME, index_of, read_index, sha256, verify
from budwood.checkpoints.soundness import CHECKS, check_layout, check_positions
from budwood.errors import RunError
from budwood.formats import FORMATS


@pytest.fixture
def folder(tmp_path):
    weight_map = {}
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 1000)
        weight_map[f"{name}.weight"] = f"{name}.safetensors"
    digests = {file: sha256(tmp_path / file) for file in weight_map.values()}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index_of(weight_map, 2000, digests)))
    return tmp_path


def test_a_whole_checkpoint_passes_by_folder_and_by_index(folder):
    verify(folder)
    verify(folder / INDEX_NAME)


def test_one_changed_byte_is_found(folder):
    content = bytearray((folder / "b.safetensors").read_bytes())
    content[500] ^= 1
    (folder / "b.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"b\.safetensors was altered"):
        verify(folder)


def test_a_truncated_shard_is_found(folder):
    content = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(content[:-1])
    with pytest.raises(RunError, match=r"a\.safetensors was altered or truncated"):
        verify(folder)


def test_a_missing_shard_is_found(folder):
    (folder / "b.safetensors").unlink()
    with pytest.raises(RunError, match=r"b\.safetensors is missing"):
        verify(folder)


def test_a_shard_without_digest_is_found(folder):
    index = read_index(folder / INDEX_NAME)
    del index["metadata"]["sha256"]["b.safetensors"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"no sha256 of b\.safetensors"):
        verify(folder)


def test_an_index_without_digests_has_nothing_to_compare(folder):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": "a.safetensors"}}))
    verify(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(folder, content):
    (folder / INDEX_NAME).write_text(content)
    with pytest.raises(RunError, match="is damaged"):
        verify(folder)


def packed(format, shape=(32, 72)):
    torch.manual_seed(0)
    weight = prune(torch.randn(shape), recovered=0.0 if format in ("two_four", "two_four_int8") else 0.05)
    return FORMATS[format].nearest(weight)


def layout(tensors):
    return {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}


def test_every_format_is_checked():
    assert set(CHECKS) == set(FORMATS)


@pytest.mark.parametrize("shape", [(32, 72), (16, 264), (8, 512), (4, 4)])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_tensors_pass_the_checks(format, shape):
    tensors = packed(format, shape)
    check_layout("x", format, shape, layout(tensors))
    check_positions("x", format, shape, tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_no_tensor_may_be_missing_or_of_another_size_or_type(format):
    tensors = packed(format)
    for suffix, tensor in tensors.items():
        others = {key: value for key, value in tensors.items() if key != suffix}
        with pytest.raises(RunError, match=rf"lacks x\.{suffix}"):
            check_layout("x", format, (32, 72), layout(others))
        wrong = tensor.to(torch.int64)
        with pytest.raises(RunError, match=rf"x\.{suffix} does not fit"):
            check_layout("x", format, (32, 72), layout(tensors | {suffix: wrong}))
        with pytest.raises(RunError, match="does not fit"):
            check_layout("x", format, (32, 72), layout(tensors | {suffix: tensor.reshape(1, 1, -1)}))
        with pytest.raises(RunError, match="does not fit"):
            check_layout("x", format, (36, 80), layout(tensors))


def outside(tensor, index, value):
    tensor = tensor.clone()
    tensor.view(-1)[index] = value
    return tensor


DAMAGE = [
    ("two_four", "places", 0, 0b0000_0000),  # one column twice
    ("two_four", "places", 0, 0b0100_0001),  # in the wrong order
    ("bitmask", "bitmask", 0, 0b1111_1111),  # more weights than values
    ("two_four_compact", "rec_counts", 0, 255),
    ("two_four_compact", "rec_columns", 0, 200),  # the row has 72 columns
    ("two_four_csr", "rec_offsets", 0, 1),
    ("two_four_csr", "rec_offsets", 5, 2**31 - 1),
    ("two_four_csr", "rec_offsets", 5, -1),
    ("two_four_csr", "rec_offsets", 32, 0),
    ("two_four_csr", "rec_columns", 0, 72),
    ("two_four_csr", "rec_columns", 0, -1),
    ("two_four_ell", "ell_columns", 0, 18),
    ("two_four_ell", "ell_columns", 0, -1),
    ("two_four_int8", "places", 0, 0),
    ("two_four_int8", "scales", 3, 0x7F800000),  # infinite
    ("bitmask_int8", "bitmask", 0, 0b1111_1111),
    ("bitmask_int8", "epsilon", 0, 0.5),  # of no type
    ("two_four_compact_int8", "rec_columns", 0, 200),
]


@pytest.mark.parametrize(("format", "suffix", "index", "value"), DAMAGE)
def test_positions_outside_the_matrix_are_refused(format, suffix, index, value):
    tensors = packed(format)
    tensors[suffix] = outside(tensors[suffix], index, value)
    with pytest.raises(RunError, match="x is damaged"):
        check_positions("x", format, (32, 72), tensors)


def test_bits_beyond_the_last_column_are_refused():
    tensors = FORMATS["bitmask"].pack(prune(torch.randn(4, 12)))
    tensors["bitmask"][0, 1] |= 0x80
    with pytest.raises(RunError, match="beyond the last"):
        check_positions("x", "bitmask", (4, 12), tensors)
