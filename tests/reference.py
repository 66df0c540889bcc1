"""Results of the published programs on tiny models: tests/data/reference."""

import json
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent / "data" / "reference"


def model(name):
    """The folder of a tiny model, without a tokenizer."""
    return ROOT / "models" / name


def tokens():
    """[8 windows, 32 tokens]"""
    return load_file(ROOT / "models" / "tokens.safetensors")["input_ids"]


def tensors(file):
    return load_file(ROOT / f"{file}.safetensors")


def record(file):
    return json.loads((ROOT / f"{file}.json").read_text("utf-8"))
