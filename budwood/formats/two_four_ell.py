"""2:4 and the recovered weights in square blocks, equally many in every block row (WRP, algorithm 2).

This is Blocked-ELL. A block holds zeros where the 2:4 part holds the weight. A block row that needs fewer blocks than
the others also stores the lowest block columns it does not use: every index is a real block, and no reader needs a
special case.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from budwood.formats.bits import INTEGERS, stored
from budwood.formats.format import Expected, Format, Found, Refusal, dtype_found, size, size_found
from budwood.formats.two_four import TwoFour, covered, skeleton_bytes, split
from budwood.sparsity.forecast import Forecast

LARGEST_SIDE = 128
SIDES = (4, 8, 16, 32, 64, LARGEST_SIDE)


class TwoFourEll(Format):
    """`two_four`, and `ell_columns` int32 `[out/side, count]` ascending, `ell_values [out, count*side]`."""

    name = "two_four_ell"
    suffixes = (*TwoFour.suffixes, "ell_columns", "ell_values")
    placing = ("ell_values",)

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        skeleton, recovered = split(weight, base)
        found = smallest_block(recovered.view(weight.shape[0], -1, 4).any(2), weight.element_size())
        if found is None:
            raise Refusal(f"two_four_ell cannot hold this {size(weight)} matrix: its height does not divide by 4")
        return skeleton | pack_blocks(weight, recovered, *found)

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        dense = TwoFour.unpack(tensors, shape)
        rows, count = tensors["ell_columns"].shape
        side = shape[0] // rows
        tiles = dense.view(rows, side, -1, side)
        index = tensors["ell_columns"].long()[:, None, :, None].expand(rows, side, count, side)
        values = tensors["ell_values"].view(rows, side, count, side)
        tiles.scatter_(2, index, torch.where(stored(values), values, tiles.gather(2, index)))
        return dense

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        block = forecast.block or ((4, 0) if forecast.recovered == 0 else None)
        if block is None or shape[0] % block[0] or shape[1] % block[0] or shape[1] % 4:
            return None
        return skeleton_bytes(shape, itemsize) + block_bytes(shape[0], block, itemsize)

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        rows, count = size_found(found, "ell_columns", 0), size_found(found, "ell_columns", 1)
        side = shape[0] // rows if rows else 0
        return TwoFour.expected(shape, found) | {
            "ell_columns": (torch.int32, (shape[0] // side if side else 0, count)),
            "ell_values": (dtype_found(found, "values"), (shape[0], count * side)),
        }

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        out, width = shape
        columns = tensors["ell_columns"].long()  # [out/side, count]
        side = out // max(1, columns.shape[0])
        if side not in SIDES or columns.shape[0] * side != out or width % side:
            return "its blocks do not divide the matrix"
        if bool(((columns < 0) | (columns >= width // side)).any()):
            return "a recovered block is outside the columns"
        if bool((columns.diff(dim=1) <= 0).any()):
            return "the block columns do not rise within a block row"
        fault, values = TwoFour.fault(tensors, shape), tensors["ell_values"]
        if fault or values.is_meta:
            return fault
        index = columns[:, None, :, None].expand(columns.shape[0], side, columns.shape[1], side)
        recovered = torch.zeros(shape, dtype=torch.bool, device=values.device)
        recovered.view(columns.shape[0], side, -1, side).scatter_(2, index, stored(values).view(index.shape))
        if bool((recovered & covered(tensors["places"], width)).any()):
            return "a recovered weight is at a position of the 2:4 part"
        crowded = recovered.view(out, -1, 4).any(2)
        found, itemsizes = (side, columns.shape[1]), (values.element_size(), *INTEGERS)  # it may have been cast
        if not any(smallest_block(crowded, itemsize) == found for itemsize in itemsizes):
            return "its blocks are not the smallest that hold its recovered weights"
        if not torch.equal(columns, chosen_blocks(recovered, side, columns.shape[1])[0]):
            return "a block without recovered weights is not the lowest that is free"
        return None


def block_bytes(out: int, block: tuple[int, int], itemsize: int) -> int:
    """Bytes of `ell_values` and `ell_columns`, `block` being (side, count per block row)."""
    side, count = block
    return itemsize * out * count * side + 4 * (out // side) * count


def smallest_block(crowded: Tensor, itemsize: int) -> tuple[int, int] | None:
    """The (side, count per block row) of the fewest bytes; None if 4 x 4 blocks do not divide the matrix.

    `crowded`: bool [out, in/4], the groups with a recovered weight. Of equal sizes the larger side.
    """
    found = [(side, int(tiles.sum(1).max())) for side, tiles in _tilings(crowded)]
    return min(found, key=lambda block: (block_bytes(crowded.shape[0], block, itemsize), -block[0]), default=None)


def _tilings(crowded: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(side, the tiles of that side with a recovered weight), for the sides 4, 8, ... that divide it."""
    if crowded.shape[0] % 4:
        return
    side, tiles = 4, crowded.view(-1, 4, crowded.shape[1]).any(1)  # [out/4, in/4]
    yield side, tiles
    while side < LARGEST_SIDE and tiles.shape[0] % 2 == 0 and tiles.shape[1] % 2 == 0:
        side, tiles = 2 * side, tiles.view(tiles.shape[0] // 2, 2, -1, 2).any(3).any(1)
        yield side, tiles


def chosen_blocks(recovered: Tensor, side: int, count: int) -> tuple[Tensor, int]:
    """The columns of `count` blocks of every block row, those with recovered weights and then the lowest others, in
    ascending order, int64 [block rows, count]; and the most that one row needs. recovered: bool [out, in].
    """
    out, width = recovered.shape
    used = recovered.view(out // side, side, width // side, side).any(3).any(1)  # [block rows, block columns]
    chosen = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, :count].sort(1).values
    return chosen, int(used.sum(1).max())


def pack_blocks(weight: Tensor, recovered: Tensor, side: int, count: int) -> dict[str, Tensor]:
    """The blocks that hold recovered weights: [out, in], bool [out, in] -> ell_columns, ell_values.

    Raises `Refusal` if the side does not divide the matrix or a row of blocks needs more than `count`.
    """
    out, width = weight.shape
    if out % side or width % side:
        raise Refusal(f"blocks of {side} x {side} do not divide this {size(weight)} matrix")
    chosen, most = chosen_blocks(recovered, side, count)
    if not most <= count <= width // side:
        raise Refusal(f"{count} blocks of {side} x {side} per block row were asked for, {most} are needed")
    index = chosen[:, None, :, None].expand(-1, side, -1, side)
    values = weight.masked_fill(~recovered, 0).reshape(out // side, side, width // side, side).gather(2, index)
    return {"ell_columns": chosen.int(), "ell_values": values.reshape(out, count * side)}
