"""2:4: two values of every four consecutive columns, and a nibble that says which two.

The nibble is `p | q << 2` for kept columns `p < q`: the hardware's own encoding, in its natural order. A
group with fewer than two stored weights takes a zero along, at the place torch's conversion would choose, so
that buffers made from either are equal.
"""

import torch
from torch import Tensor

from budwood.formats.bits import look_up, pack_bits, raw, slabs, stored, unpack_bits
from budwood.formats.format import Format, Refusal, size
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


# A byte holds two groups, the lower one in the low nibble: of mask bits as of places.
_PLACES = torch.tensor([_nibble(byte & 15) | _nibble(byte >> 4) << 4 for byte in range(256)], dtype=torch.uint8)
_COVERED = torch.tensor([_covered(byte & 15) | _covered(byte >> 4) << 4 for byte in range(256)], dtype=torch.uint8)


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


def skeleton_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Bytes of `values` and `places`, whatever the weights."""
    return itemsize * shape[0] * (shape[1] // 2) + shape[0] * -(-shape[1] // 8)


def covered(places: Tensor, width: int) -> Tensor:
    """The positions held by the 2:4 part, two of every group: uint8 [out, ceil(in/8)] -> bool [out, in]."""
    return unpack_bits(look_up(_COVERED, places).view(places.shape), width)


def split(weight: Tensor, base: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The 2:4 part, and where the weights are that it leaves over: tensors, bool [out, in].

    `base` names the 2:4 part; without it a group gives its two largest magnitudes, on ties the lower column.
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
        places[:, -1] &= 0x0F  # there is no such group
    return {"values": values, "places": places}, recovered


def two_largest(weight: Tensor) -> Tensor:
    """The stored weights, but of a group at most its two largest: [rows, in] -> bool [rows, in]."""
    keep = stored(weight)
    groups = keep.view(-1, 4)
    crowded = (groups.sum(1, dtype=torch.uint8) > 2).nonzero()[:, 0]
    if crowded.numel():
        bits = raw(weight)
        magnitude = bits.view(-1, 4)[crowded] & torch.iinfo(bits.dtype).max
        magnitude = torch.where(groups[crowded], magnitude, -1)  # a zero never comes before a stored -0.0
        ahead = torch.zeros_like(magnitude, dtype=torch.uint8)  # how many of the group precede each
        for lower in range(4):
            for higher in range(lower + 1, 4):
                first = magnitude[:, lower] >= magnitude[:, higher]
                ahead[:, higher] += first
                ahead[:, lower] += ~first
        groups[crowded] = ahead < 2
    return keep
