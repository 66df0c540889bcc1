"""Bits of weights and bits of masks, used by all formats."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
SLAB = 1 << 22  # elements processed at a time, so that temporaries stay small next to the matrix


def raw(weight: Tensor) -> Tensor:
    """The same bits as signed integers; without the sign bit they sort by magnitude."""
    return weight.view(INTEGERS[weight.element_size()])


def stored(weight: Tensor) -> Tensor:
    """True where a weight has to be stored: any bit is set, so -0.0 and NaN keep their bits."""
    return raw(weight) != 0


def slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Consecutive runs of rows that hold about `SLAB` elements."""
    rows = max(1, SLAB // max(1, shape[1]))
    return (slice(first, first + rows) for first in range(0, shape[0], rows))


def select(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weights, row-major: [out, in], bool [out, in] -> [count]."""
    pieces = [torch.masked_select(weight[rows], mask[rows]) for rows in slabs(weight.shape)]
    return torch.cat([weight.new_empty(0), *pieces])


def columns(mask: Tensor, dtype: torch.dtype, within: int) -> Tensor:
    """The column of every set position, row-major, counted inside segments of `within` columns: -> [count]."""
    pieces = [(mask[rows].nonzero()[:, 1] % within).to(dtype) for rows in slabs(mask.shape)]
    return torch.cat([torch.empty(0, dtype=dtype, device=mask.device), *pieces])


def pack_bits(mask: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in/8)]; least significant bit first."""
    padded = F.pad(mask, (0, -mask.shape[1] % 8)) if mask.shape[1] % 8 else mask.contiguous()
    eights = padded.view(torch.uint8).view(mask.shape[0], -1, 8)  # [out, ceil(in/8), 8]
    packed = eights[..., 0].clone()
    for bit in range(1, 8):
        packed |= eights[..., bit] << bit
    return packed


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """uint8 [out, ceil(width/8)] -> bool [out, width]."""
    bits = look_up(_EIGHTS, packed).view(packed.shape[0], -1)  # [out, 8 * ceil(width/8)]
    return bits[:, :width]


def look_up(table: Tensor, keys: Tensor) -> Tensor:
    """One row of the table for every byte: [256, ...], uint8 [...] -> [keys, ...], flat."""
    return table.to(keys.device).index_select(0, keys.reshape(-1).int())


# On the CPU, even where this is imported under another default device.
_EIGHTS = (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1).bool()  # [256, 8]
