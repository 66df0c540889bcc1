"""Headers of safetensors files that the library of the format refuses are refused here too, in a sentence."""

import json
import struct

import pytest
from safetensors import SafetensorError, safe_open

from budwood.checkpoints.reader import read_header
from budwood.errors import RunError

SOUND = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def write(folder, text):
    file = folder / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    return file


def test_a_sound_header_is_read(tmp_path):
    locations, metadata = read_header(write(tmp_path, json.dumps({**SOUND, "__metadata__": {"x": "é😀"}}).encode()))
    assert locations["a"].shape == (2, 2)
    assert metadata == {"x": "é😀"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"a": {**SOUND["a"], "data_offsets": [0.0, 16.0]}}),
        json.dumps({"a": {**SOUND["a"], "data_offsets": [0, 16.0]}}),
        json.dumps({"a": {**SOUND["a"], "data_offsets": [False, 16]}}),
        json.dumps({"a": {**SOUND["a"], "shape": [2, 2.0]}}),
        json.dumps({"\ud800": SOUND["a"]}),
        json.dumps({**SOUND, "__metadata__": {"x": "\udfff"}}),
        json.dumps({"a": {**SOUND["a"], "\ud800": 1}}),
        json.dumps({"a": {**SOUND["a"], "\ud800": 1}}).replace("\\ud", "\\uD"),
        json.dumps({**SOUND, "__metadata__": {"x": 1}}),
        json.dumps({**SOUND, "__metadata__": ["x"]}),
        json.dumps({**SOUND, "__metadata__": "x"}),
        json.dumps([SOUND]),
        '{"a": ' + "[" * 5000,
    ],
)
def test_what_the_format_does_not_allow_is_refused(tmp_path, text):
    file = write(tmp_path, text.encode())
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(RunError, match="truncated or damaged"):
        read_header(file)
