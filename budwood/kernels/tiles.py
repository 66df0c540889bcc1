"""Weights repacked into tiles, the layout for AVX2: docs/kernels.md. The file's tensors follow from it exactly."""

import sys
from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, byref, c_int32
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from budwood.kernels import native
from budwood.kernels.arena import LINE, Arena
from budwood.kernels.native import TILES, Matrix
from budwood.kernels.native_matrix import CODINGS, NativeMatrix, native_matrix

LIMIT = 1.1  # times the bytes of the file's tensors: matrices that would take more stay as they are
Header = tuple[Sequence[int], torch.dtype]


@dataclass(frozen=True)
class Tiles:
    """One matrix in tiles.

    memory: uint8. headers: shapes and dtypes of the file's tensors that are packed, by suffix. rest: the other tensors.
    """

    memory: Tensor
    format: str
    headers: Mapping[str, Header]
    rest: Mapping[str, Tensor]
    matrix: NativeMatrix

    def unpack(self) -> dict[str, Tensor]:
        """The file's tensors by suffix, new at every call and equal bit for bit to those that were packed."""
        library = native.library()
        assert library is not None, "the library that packed the tiles"
        with torch.inference_mode(False):  # they may become parameters, which are needed outside of it too
            tensors = {suffix: torch.empty(tuple(size), dtype=dtype) for suffix, (size, dtype) in self.headers.items()}
            tensors |= {suffix: tensor.clone() for suffix, tensor in self.rest.items()}
        parts = [tensors[suffix].data_ptr() if suffix in tensors else None for suffix in packed_suffixes(self.format)]
        library.budwood_tiles_unpack(self.memory.data_ptr(), *parts)
        return tensors


def packed_suffixes(format: str) -> tuple[str, ...]:
    """What the library packs, in its order; a format may lack some of them."""
    return ("values", CODINGS[format][1], "scales", "rec_counts", "rec_columns", "rec_values")


def pack(
    format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], arena: Arena | None = None
) -> Tiles | None:
    """The matrix `[out, in]` of a file's tensors in tiles, in `arena` if it fits; None where the file's layout is better.

    That is so where the processor expands bitmasks quickly, where tiles would take more than `LIMIT` times the bytes, and
    where the library cannot read the format.
    """
    library = native.library()
    source = native_matrix(format, shape, tensors) if library is not None and native.has_tiles() else None
    if library is None or source is None:
        return None
    kind, extras = c_int32(), torch.empty(shape[0], dtype=torch.int32)
    size = library.budwood_tiles_plan(addressof(source.matrix), byref(kind), extras.data_ptr())
    if not 0 < size <= LIMIT * sum(tensor.nbytes for tensor in tensors.values()):
        return None
    memory = arena.take(size) if arena is not None else None
    if memory is None:
        room = torch.zeros(size + LINE, dtype=torch.uint8)
        start = -room.data_ptr() % LINE
        memory = room[start : start + size]
    if not library.budwood_tiles_pack(addressof(source.matrix), kind, extras.data_ptr(), memory.data_ptr()):
        return None
    matrix = Matrix(
        values=memory.data_ptr(),
        out=shape[0],
        in_=shape[1],
        count=source.matrix.count,
        type=source.matrix.type,
        coding=TILES,
    )
    packed = packed_suffixes(format)
    headers = {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in tensors.items() if suffix in packed}
    rest = {suffix: tensor.detach().clone() for suffix, tensor in tensors.items() if suffix not in packed}
    return Tiles(memory, format, headers, rest, NativeMatrix(library, matrix, shape, [memory]))


class FileParameters(dict):
    """The `_parameters` of a layer in tiles. Whoever asks for a tensor of the file gets the layer back in the file's layout.

    So a state dict, `.to()`, offloading and adapters find ordinary parameters, and a change in place is a change of the
    weight. Names, and the bias, can be read without that.
    """

    def __init__(self, suffixes: Sequence[str], bias: Parameter | None, restore: Callable[[], dict[str, Any]]):
        super().__init__({**dict.fromkeys(suffixes), "bias": bias})
        self.restore = restore

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) if name == "bias" else self.restore()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def at_hand(self) -> list[Any]:
        """The parameters that exist while the layer is in tiles: its bias."""
        return [value for value in super().values() if value is not None]


def _of_the_restored(name: str) -> Callable[..., Any]:
    def method(self: FileParameters, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.restore(), name)(*args, **kwargs)

    return method


_READING = ("__iter__", "__eq__", "__or__", "__ror__", "keys", "values", "items", "copy")
_WRITING = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "setdefault", "update", "clear")
for _name in (*_READING, *_WRITING):
    setattr(FileParameters, _name, _of_the_restored(_name))


def held_elsewhere(parameters: Mapping[str, Parameter], suffixes: Sequence[str], known: Sequence[Tensor]) -> bool:
    """Whether anyone but `parameters`, and the tensors `known`, could change one of these tensors in place."""
    for suffix in suffixes:
        own = 1 + sum(tensor.data_ptr() == parameters[suffix].data_ptr() for tensor in known)
        if sys.getrefcount(parameters[suffix]) > 2:  # the dictionary and the argument
            return True
        if parameters[suffix].is_shared() or _holders(parameters[suffix]) > own:
            return True
    return False


def _holders(tensor: Tensor) -> int:
    """The number of tensors that share the storage of this one, itself included."""
    storage = tensor.untyped_storage()  # holds it once more
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1
