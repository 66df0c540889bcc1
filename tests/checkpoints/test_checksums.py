"""An altered, truncated or missing shard is found and named."""

import json

import pytest

from budwood.checkpoints.checksums import INDEX_NAME, index_of, read_index, sha256, verify
from budwood.errors import RunError


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
    "content",
    [
        *("", "[]", "{}"),
        *('{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 1}}'),
        f'{{"weight_map": {{"a": "{"a" * 256}"}}}}',  # longer than a file name may be
        f'{{"weight_map": {{"a": "{"ä" * 128}"}}}}',
    ],
)
def test_a_damaged_index_is_refused(folder, content):
    (folder / INDEX_NAME).write_text(content)
    with pytest.raises(RunError, match="is damaged"):
        verify(folder)
