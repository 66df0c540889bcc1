"""Shards are read as they were written, and a damaged, incomplete or unsafe folder is refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from budwood.checkpoints.reader import DTYPES, Shards, read_header, read_tensor, sample, shard_files
from budwood.errors import RunError, UsageError

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    """One of each dtype, a scalar and an empty one among them."""
    random = torch.Generator().manual_seed(0)
    filled = {str(dtype): torch.randint(0, 2, (3, 5), generator=random).to(dtype) for dtype in DTYPES.values()}
    return {**filled, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def save(file: Path, content: dict[str, Tensor] | None = None, metadata: dict[str, str] | None = None) -> Path:
    save_file(content if content is not None else tensors(), file, metadata)
    return file


def write_raw(file: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, as JSON, and these bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_every_dtype_is_read_bit_for_bit(tmp_path):
    save(tmp_path / "model.safetensors", metadata={"format": "pt"})
    shards = Shards.of_folder(tmp_path)
    assert set(shards.names()) == set(tensors())
    for name, tensor in tensors().items():
        assert (shards.shape(name), shards.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        found = shards.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_header_gives_metadata_and_sizes(tmp_path):
    found, metadata = read_header(save(tmp_path / "a.safetensors", metadata={"format": "pt"}))
    assert metadata == {"format": "pt"}
    assert {name: at.nbytes for name, at in found.items()} == {
        name: tensor.nbytes for name, tensor in tensors().items()
    }


def test_the_first_bytes_of_a_tensor(tmp_path):
    values = torch.arange(2000.0)
    location = read_header(save(tmp_path / "a.safetensors", {"a": values}))[0]["a"]
    assert sample(location) == values.numpy().tobytes()[:4096]
    assert sample(location, 10**6) == values.numpy().tobytes()


def test_each_read_gives_memory_of_its_own(tmp_path):
    save(tmp_path / "model.safetensors")
    shards = Shards.of_folder(tmp_path)
    shards.read("scalar").zero_()
    assert shards.read("scalar") == 2.5


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    file = save(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(RunError, match=r"model\.safetensors is truncated or damaged"):
        Shards.of_folder(tmp_path)


def test_a_file_that_is_too_long_is_refused(tmp_path):
    file = save(tmp_path / "model.safetensors")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(RunError, match=f"should have {size} bytes and has {size + 1}"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        ([], "damaged"),
        ({"a": []}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "damaged"),
        ({"a": entry(0, 8, [2], "F4")}, "unknown type 'F4'"),
        ({"a": entry(0, 8, [3])}, "the bytes given for a do not fit its shape"),
        ({"a": entry(0, 8, [-1, -2])}, "the bytes given for a do not fit its shape"),
        ({"a": entry(0, 8, [0.5, 4])}, "the bytes given for a do not fit its shape"),
        ({"a": entry(4, 8, [1])}, "the bytes given for a do not fit its shape"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, "the bytes given for b do not fit its shape"),
        ({"a": entry(-8, 0, [2])}, "the bytes given for a do not fit its shape"),
        ({"a": entry(0, 4, [1])}, "should have"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, complaint):
    file = write_raw(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(RunError, match=complaint):
        read_header(file)


def test_a_header_of_impossible_length_is_not_read(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(RunError, match="truncated or damaged"):
        read_header(file)


def test_a_file_cut_short_after_its_header_was_read_is_an_error(tmp_path):
    file = save(tmp_path / "a.safetensors", {"a": torch.ones(100)})
    location = read_header(file)[0]["a"]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RunError, match=r"a\.safetensors ended early"):
        read_tensor(location)


def write_index(folder: Path, weight_map: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_those_of_the_index(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"part-{number}.safetensors", {f"a{number}": torch.full((2,), float(number))})
    save(tmp_path / "left-over.safetensors")
    write_index(tmp_path, {"a1": "part-1.safetensors", "a2": "part-2.safetensors"})
    shards = Shards.of_folder(tmp_path)
    assert shards.names() == ["a1", "a2"]
    assert shards.read("a2").tolist() == [2.0, 2.0]


PACKED = {"quant_method": "budwood", "linears": {}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "single"),
        ({"quantization_config": None}, "single"),
        ({"quantization_config": PACKED}, "packed"),
        ({"quantization_config": {**PACKED, "index": "model.safetensors.index.json"}}, "usual"),
        ({"quantization_config": {**PACKED, "index": None}}, "single"),  # saved again by transformers
        ({"transformers_weights": "model.safetensors.index.json"}, "usual"),
        ({"transformers_weights": "other.safetensors"}, "other"),
    ],
)
def test_of_several_weights_those_are_taken_that_transformers_would_load(tmp_path, config, expected):
    for name in ("model.safetensors", "other.safetensors", "usual.safetensors", "packed.safetensors"):
        save(tmp_path / name, {name.partition(".")[0].replace("model", "single"): torch.ones(1)})
    write_index(tmp_path, {"usual": "usual.safetensors"})
    write_index(tmp_path, {"packed": "packed.safetensors"}, "sparse.safetensors.index.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Shards.of_folder(tmp_path).names() == [expected]


@pytest.mark.parametrize("name", ["../model.safetensors", 3, "weights.bin", "/etc/a.safetensors"])
def test_a_config_that_names_other_weights_than_its_folder_s_is_refused(tmp_path, name):
    save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    for config in ({"transformers_weights": name}, {"quantization_config": {**PACKED, "index": name}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RunError, match="no safetensors file of its own folder"):
            shard_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_config_is_refused(tmp_path, text):
    save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        shard_files(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "folder/inside.safetensors"])
def test_an_index_that_names_other_folders_is_refused(tmp_path, name):
    write_index(tmp_path, {"a": name})
    with pytest.raises(RunError, match="the name of a file in the same folder should be"):
        shard_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, {"a": "part-1.safetensors"})
    with pytest.raises(RunError, match=r"lacks part-1\.safetensors"):
        shard_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(RunError, match=r"model\.safetensors\.index\.json is damaged"):
        shard_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_and_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"not even a pickle")
    with pytest.raises(UsageError, match=rf"{name}, a pickle, which can run code"):
        Shards.of_folder(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no safetensors file"):
        shard_files(tmp_path)
