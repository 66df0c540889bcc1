"""Tensors by name over the safetensors shards of a folder, checked before use and read without a memory map.

Reading is a plain `read` into new memory: the pages of a memory map would count as resident, and the process would
crash instead of raising an error when a file is truncated while it is mapped.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from budwood.checkpoints.model_files import model_files
from budwood.errors import RunError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LIMIT = 100_000_000  # bytes; the bound of the safetensors format itself


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor is stored: file, offset of its first byte, dtype, shape."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """The tensors and the metadata of one shard; raises RunError when the header does not fit the file."""
    try:
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT + 1
            if length > HEADER_LIMIT:
                raise ValueError("it does not begin with a safetensors header")
            text = stream.read(length).decode("utf-8")
        header = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(header, ensure_ascii=False).encode()  # raises for a lone surrogate, which is no text
        size = file.stat().st_size
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts by name")
        locations: dict[str, TensorLocation] = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            start, stop = entry["data_offsets"]
            location = TensorLocation(file, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            sized = all(type(size) is int and size >= 0 for size in (start, stop, *location.shape))
            if start != end or stop - start != location.nbytes or not sized:
                raise ValueError(f"the bytes given for {name} do not fit its shape")
            locations[name], end = location, stop
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = f"unknown type {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{file} is truncated or damaged: {reason}; fetch or write it again") from error
    return locations, metadata


class Shards:
    """All tensors of a folder by name. seen: is called with every tensor that is read, and its name.

    Raises UsageError when the folder holds no safetensors, RunError when a shard is missing or damaged.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.seen: Callable[[str, Tensor], None] | None = None
        self.locations: dict[str, TensorLocation] = {}
        for file in files:
            self.locations |= read_header(file)[0]

    @classmethod
    def of_folder(cls, folder: Path) -> "Shards":
        return cls(shard_files(folder))

    @property
    def places(self) -> dict[str, TensorLocation]:
        """Another name of `locations`."""
        return self.locations

    def names(self) -> list[str]:
        return list(self.locations)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.locations[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.locations[name].dtype

    def read(self, name: str) -> Tensor:
        """A new tensor with the stored bits."""
        tensor = read_tensor(self.locations[name])
        if self.seen is not None:
            self.seen(name, tensor)
        return tensor


def read_tensor(location: TensorLocation) -> Tensor:
    tensor = torch.empty(location.shape, dtype=location.dtype)
    if location.nbytes == 0:
        return tensor
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with open(location.file, "rb", buffering=0) as stream:
        stream.seek(location.start)
        filled = 0
        while filled < location.nbytes:  # one read returns at most 2 GiB
            count = stream.readinto(view[filled:])
            if not count:
                raise RunError(f"{location.file} ended early; it was changed or truncated while being read")
            filled += count
    return tensor


def shard_files(folder: Path) -> list[Path]:
    """The files of weights of a folder; see `model_files`."""
    return model_files(folder).shards


def sample(location: TensorLocation, length: int = 4096) -> bytes:
    """The first `length` bytes of a tensor, enough to distinguish one set of weights from another."""
    with open(location.file, "rb") as stream:
        stream.seek(location.start)
        return stream.read(min(length, location.nbytes))
