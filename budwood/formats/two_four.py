"""2:4: two values of every four consecutive columns, and a nibble for which two.

The nibble is `p | q << 2` for kept columns `p < q`: the encoding of the hardware, in its natural order. A group with
fewer than two nonzero weights stores zeros as well, at the columns that torch's conversion chooses, so that both give
equal buffers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from budwood.formats.bits import look_up, pack_bits, raw, slabs, stored, unpack_bits
from budwood.formats.format import Expected, Format, Found, Refusal, size
from budwood.sparsity.forecast import Forecast

_COMPLETED = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}  # torch's fillers


def _nibble(code: int) -> int:
    """The nibble of a group whose kept columns are the set bits of `code`."""
    kept = tuple(column for column in range(4) if code >> column & 1)
    p, q = _COMPLETED.get(kept, kept[:2])
    return p | q << 2


def _covered(nibble: int) -> int:
    """The columns a nibble names, as set bits."""
    return 1 << (nibble & 3) | 1 << (nibble >> 2)


def _valid(nibble: int) -> bool:
    """Whether a nibble names two different columns in ascending order."""
    return nibble & 3 < nibble >> 2


# A byte holds two groups, the lower one in the low nibble: in masks as in places.
_PLACES = torch.tensor(
    [_nibble(byte & 15) | _nibble(byte >> 4) << 4 for byte in range(256)], dtype=torch.uint8, device="cpu"
)
_COVERED = torch.tensor(
    [_covered(byte & 15) | _covered(byte >> 4) << 4 for byte in range(256)], dtype=torch.uint8, device="cpu"
)
_VALID = torch.tensor([_valid(byte & 15) and _valid(byte >> 4) for byte in range(256)], device="cpu")


class TwoFour(Format):
    """`values [out, in/2]` in column order, `places` uint8 `[out, ceil(in/8)]`, low nibble = lower group."""

    name = "two_four"
    suffixes = ("values", "places")

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        tensors, recovered = split(weight, base)
        beyond = int(recovered.sum())
        if beyond:
            where = "beyond two of a group of four" if base is None else "outside the 2:4 mask"
            raise Refusal(f"two_four cannot hold this {size(weight)} matrix: {beyond} weights are {where}")
        return tensors

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        dense = tensors["values"].new_zeros(shape)
        return dense.masked_scatter_(covered(tensors["places"], shape[1]), tensors["values"])

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        if shape[1] % 4 or forecast.recovered != 0:
            return None
        return skeleton_bytes(shape, itemsize)

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        out, width = shape
        return {"values": (None, (out, width // 4 * 2)), "places": (torch.uint8, (out, -(-width // 8)))}

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        places, width = tensors["places"], shape[1]
        if width % 4:
            return "its width does not divide by 4"
        valid = look_up(_VALID, places[:, : width // 8]).all()
        if width % 8:
            last = places[:, -1]  # one group only; the high nibble must be 0
            valid = valid & (last < 16).all() & look_up(_VALID, last | last << 4).all()
        return None if bool(valid) else "a group of four does not name two different columns in order"


def skeleton_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of `values` and `places`."""
    return itemsize * shape[0] * (shape[1] // 2) + shape[0] * -(-shape[1] // 8)


def covered(places: Tensor, width: int) -> Tensor:
    """The positions of the 2:4 part, two of every group: uint8 [out, ceil(in/8)] -> bool [out, in]."""
    return unpack_bits(look_up(_COVERED, places).view(places.shape), width)


def recovered_fault(places: Tensor, rows: Tensor, columns: Tensor) -> str | None:
    """What is wrong with recovered positions, int64 [nnz] each, inside the matrix: they must be distinct, in row-major
    order, and outside the 2:4 part of `places`; None if they are.
    """
    flat = rows * (8 * places.shape[1]) + columns
    if bool((flat.diff() <= 0).any()):
        return "the columns of recovered weights do not rise within a row"
    nibbles = places[rows, columns // 8].int() >> columns // 4 % 2 * 4 & 15
    if bool(((nibbles & 3 == columns % 4) | (nibbles >> 2 == columns % 4)).any()):
        return "a recovered weight is at a position of the 2:4 part"
    return None


def split(weight: Tensor, base: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The 2:4 part, and the positions of the recovered weights, which it cannot hold: tensors, bool [out, in].

    Without the 2:4 mask `base` the 2:4 part takes the two largest magnitudes of a group, on ties the lower column.
    Raises `Refusal` if the width does not divide by 4 or `base` keeps more than two of a group.
    """
    out, width = weight.shape
    if width % 4:
        raise Refusal(f"2:4 cannot hold this {size(weight)} matrix: its width does not divide by 4")
    if base is not None and bool((base.reshape(-1, 4).sum(1, dtype=torch.uint8) > 2).any()):
        raise Refusal(f"the 2:4 mask of this {size(weight)} matrix keeps more than two of a group of four")
    values = weight.new_empty(out, width // 2)
    places = torch.empty(out, -(-width // 8), dtype=torch.uint8, device=weight.device)
    recovered = torch.empty(out, width, dtype=torch.bool, device=weight.device)
    for rows in slabs((out, width)):
        piece = weight[rows].contiguous()  # [rows, in]
        two = two_largest(piece) if base is None else base[rows]
        places[rows] = look_up(_PLACES, pack_bits(two)).view(places[rows].shape)
        held = covered(places[rows], width)
        values[rows] = torch.masked_select(piece, held).view(-1, width // 2)
        recovered[rows] = stored(piece) & ~held
    if width % 8:
        places[:, -1] &= 0x0F  # there is no second group
    return {"values": values, "places": places}, recovered


def two_largest(weight: Tensor) -> Tensor:
    """The nonzero weights, at most the two largest of a group: [rows, in] -> bool [rows, in]."""
    keep = stored(weight)
    groups = keep.view(-1, 4)
    crowded = (groups.sum(1, dtype=torch.uint8) > 2).nonzero()[:, 0]
    if crowded.numel():
        bits = raw(weight)
        magnitude = bits.view(-1, 4)[crowded] & torch.iinfo(bits.dtype).max
        magnitude = torch.where(groups[crowded], magnitude, -1)  # a zero ranks below a stored -0.0
        ahead = torch.zeros_like(magnitude, dtype=torch.uint8)  # how many of the group precede each
        for lower in range(4):
            for higher in range(lower + 1, 4):
                first = magnitude[:, lower] >= magnitude[:, higher]
                ahead[:, higher] += first
                ahead[:, lower] += ~first
        groups[crowded] = ahead < 2
    return keep
