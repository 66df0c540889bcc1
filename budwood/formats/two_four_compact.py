"""2:4 and the recovered weights with one byte of place each: a count per 256 columns, a column inside them.

At most two of a group of four are recovered, so a count is at most 128 and fits its byte. With 16-bit values
and widths divisible by 256 this takes 9.03125 + 24 d bits per weight, d being the share of recovered weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.formats.bits import columns, select
from budwood.formats.format import Format
from budwood.formats.two_four import TwoFour, skeleton_bytes, split
from budwood.sparsity.forecast import Forecast

BLOCK = 256  # columns that one byte can tell apart


class TwoFourCompact(Format):
    """`two_four`, and `rec_counts` uint8 `[out, ceil(in/256)]`, `rec_columns` uint8 `[nnz]`, `rec_values`."""

    name = "two_four_compact"
    suffixes = (*TwoFour.suffixes, "rec_counts", "rec_columns", "rec_values")

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        skeleton, recovered = split(weight, base)
        blocks = F.pad(recovered, (0, -weight.shape[1] % BLOCK)).view(weight.shape[0], -1, BLOCK)
        return skeleton | {
            "rec_counts": blocks.sum(2, dtype=torch.uint8),
            "rec_columns": columns(recovered, torch.uint8, within=BLOCK),
            "rec_values": select(weight, recovered),
        }

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return put_back(TwoFour.unpack(tensors, shape), tensors)

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        if shape[1] % 4 or forecast.recovered is None:
            return None
        counts = shape[0] * -(-shape[1] // BLOCK)
        return skeleton_bytes(shape, itemsize) + counts + (1 + itemsize) * round(forecast.recovered)


def put_back(dense: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """`dense` [out, in], changed in place: the 2:4 part and now the recovered weights too."""
    counts = tensors["rec_counts"]  # [out, blocks]
    blocks = torch.arange(counts.numel(), device=dense.device).repeat_interleave(counts.view(-1).int())
    row, block = blocks // counts.shape[1], blocks % counts.shape[1]
    flat = row * dense.shape[1] + block * BLOCK + tensors["rec_columns"]
    dense.view(-1).scatter_(0, flat, tensors["rec_values"])
    return dense
