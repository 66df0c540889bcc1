"""2:4 and the recovered weights with one byte of position each: a count per segment of 256 columns, a column inside it.

At most two of a group of four are recovered, so a count is at most 128 and fits its byte. With 16-bit values
and widths divisible by 256 this takes 9.03125 + 24 d bits per weight, d being the share of recovered weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.formats.bits import columns, select
from budwood.formats.format import Expected, Format, Found, dtype_found, size_found
from budwood.formats.two_four import TwoFour, recovered_fault, skeleton_bytes, split
from budwood.sparsity.forecast import Forecast

SEGMENT = 256  # columns: one byte is the column inside a segment


class TwoFourCompact(Format):
    """`two_four`, and `rec_counts` uint8 `[out, ceil(in/256)]`, `rec_columns` uint8 `[nnz]`, `rec_values`."""

    name = "two_four_compact"
    suffixes = (*TwoFour.suffixes, "rec_counts", "rec_columns", "rec_values")

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        skeleton, recovered = split(weight, base)
        segments = F.pad(recovered, (0, -weight.shape[1] % SEGMENT)).view(weight.shape[0], -1, SEGMENT)
        return skeleton | {
            "rec_counts": segments.sum(2, dtype=torch.uint8),
            "rec_columns": columns(recovered, torch.uint8, within=SEGMENT),
            "rec_values": select(weight, recovered),
        }

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return put_back(TwoFour.unpack(tensors, shape), tensors)

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        if shape[1] % 4 or forecast.recovered is None:
            return None
        counts = shape[0] * -(-shape[1] // SEGMENT)
        return skeleton_bytes(shape, itemsize) + counts + (1 + itemsize) * round(forecast.recovered)

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        count = size_found(found, "rec_values")
        return TwoFour.expected(shape, found) | {
            "rec_counts": (torch.uint8, (shape[0], -(-shape[1] // SEGMENT))),
            "rec_columns": (torch.uint8, (count,)),
            "rec_values": (dtype_found(found, "values"), (count,)),
        }

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        counts = tensors["rec_counts"]
        if int(counts.sum(dtype=torch.int64)) != tensors["rec_columns"].numel():
            return "its counts do not add up to the number of recovered weights"
        rows, columns = recovered_positions(counts, tensors["rec_columns"])
        if bool((columns >= shape[1]).any()):
            return "a recovered weight is beyond the last column"
        return TwoFour.fault(tensors, shape) or recovered_fault(tensors["places"], rows, columns)


def recovered_positions(counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [out, segments], uint8 [nnz] -> row and column of every recovered weight, int64 [nnz] each."""
    index = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts.view(-1).int())  # of segments
    return index // counts.shape[1], index % counts.shape[1] * SEGMENT + columns


def put_back(dense: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Write the recovered weights into the 2:4 part `dense` [out, in], in place; returns it."""
    rows, columns = recovered_positions(tensors["rec_counts"], tensors["rec_columns"])
    dense.view(-1).scatter_(0, rows * dense.shape[1] + columns, tensors["rec_values"])
    return dense
