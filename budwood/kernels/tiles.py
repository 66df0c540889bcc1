"""Weights repacked into tiles, the layout for AVX2: docs/kernels.md. The file's tensors follow from it exactly."""

from collections.abc import Iterable, Mapping, Sequence
from ctypes import addressof, byref, c_int32
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.formats import FORMATS
from budwood.formats.int4 import Int4, pack_nibbles
from budwood.kernels import native
from budwood.kernels.arena import LINE, Arena, size_in_arena
from budwood.kernels.native import TILES, Matrix
from budwood.kernels.native_matrix import CODINGS, IN_TILES_ONLY, NativeMatrix, readable

LIMIT = 1.1  # times the bytes of the file's tensors: matrices that would take more stay as they are
ROOM = 1.75  # the same for 4-bit codes, of which no other layout is multiplied: room for most; others find their own
Header = tuple[Sequence[int], torch.dtype]


@dataclass(frozen=True)
class Tiles:
    """One matrix in tiles.

    memory: uint8. headers: shapes and dtypes of the file's tensors that are packed, by suffix. rest: the other tensors.
    codes: the shape of 4-bit values as one number each.
    """

    memory: Tensor
    format: str
    headers: Mapping[str, Header]
    rest: Mapping[str, Tensor]
    matrix: NativeMatrix
    codes: Sequence[int] = ()

    def unpack(self) -> dict[str, Tensor]:
        """The file's tensors by suffix, new at every call and equal bit for bit to those that were packed."""
        library = native.library()
        assert library is not None, "the library that packed the tiles"
        with torch.inference_mode(False):  # they may become parameters, which are needed outside of it too
            tensors = {suffix: torch.empty(tuple(size), dtype=dtype) for suffix, (size, dtype) in self.headers.items()}
            tensors |= {suffix: tensor.clone() for suffix, tensor in self.rest.items()}
        read = dict(tensors)
        if self.format in IN_TILES_ONLY:  # the library has a byte for each code, and scales in float32
            read["values"] = torch.empty(tuple(self.codes), dtype=torch.int8)
            read["scales"] = torch.empty(tuple(self.headers["scales"][0]), dtype=torch.float32)
        parts = [read[suffix].data_ptr() if suffix in read else None for suffix in packed_suffixes(self.format)]
        library.budwood_tiles_unpack(self.memory.data_ptr(), *parts)
        if self.format in IN_TILES_ONLY:
            tensors["values"].copy_(pack_nibbles(read["values"]))
            tensors["scales"].copy_(read["scales"].view(torch.int32) >> 16)
        return tensors


def room(format: str, tensors: Iterable[Tensor]) -> int:
    """Bytes of an arena for the tensors of a matrix, or for its tiles."""
    times = ROOM if format in IN_TILES_ONLY and native.has_int4_tiles() else LIMIT if native.has_tiles() else 1
    return -(-int(sum(map(size_in_arena, tensors)) * times) // LINE) * LINE


def packed_suffixes(format: str) -> tuple[str, ...]:
    """What the library packs, in its order; a format may lack some of them."""
    return ("values", CODINGS[format][1], "scales", "rec_counts", "rec_columns", "rec_values")


def pack(
    format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], arena: Arena | None = None
) -> Tiles | None:
    """The matrix `[out, in]` of a file's tensors in tiles, in `arena` if it fits; None where the file's layout is kept.

    That is so where the processor expands bitmasks quickly, where tiles would take more than `LIMIT` times the bytes,
    and where the library cannot read the format. 4-bit codes are in tiles wherever there are kernels for them.
    """
    library, int4 = native.library(), format in IN_TILES_ONLY
    wanted = native.has_int4_tiles() if int4 else native.has_tiles()
    source = readable(format, shape, tensors) if library is not None and wanted else None
    if library is None or source is None:
        return None
    kind, entries = c_int32(), torch.empty(shape[0], dtype=torch.int32)
    size = library.budwood_tiles_plan(addressof(source.matrix), byref(kind), entries.data_ptr())
    if size <= 0 or (not int4 and size > LIMIT * sum(tensor.nbytes for tensor in tensors.values())):
        return None
    memory = arena.take(size) if arena is not None else None
    if memory is None:
        room = torch.zeros(size + LINE, dtype=torch.uint8)
        start = -room.data_ptr() % LINE
        memory = room[start : start + size]
    if not library.budwood_tiles_pack(addressof(source.matrix), kind, entries.data_ptr(), memory.data_ptr()):
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
    own = FORMATS[format]
    codes = own.numbers(tensors, shape).shape if issubclass(own, Int4) else ()
    return Tiles(memory, format, headers, rest, NativeMatrix(library, matrix, shape, [memory]), codes)
