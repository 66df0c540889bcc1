"""Writes one safetensors file, always the same bytes for the same tensors and metadata.

The library's own writer keeps metadata in an order that changes from run to run, and builds the whole file in memory
first; finished shards must be comparable byte by byte.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from budwood.checkpoints.reader import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_shard(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Header, then the tensors: wide dtypes first so that all stay aligned, then by name. Flushed to disk."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": CODES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            if tensors[name].numel():
                stream.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
