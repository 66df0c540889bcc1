"""Any mask: the stored values row by row, and one bit per position for where they are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from budwood.formats.bits import look_up, pack_bits, select, stored, unpack_bits
from budwood.formats.format import Expected, Format, Found, size_found
from budwood.sparsity.forecast import Forecast

_ONES = (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1).sum(1)  # [256], set bits


class Bitmask(Format):
    """`values [nnz]` row-major; `bitmask` uint8 `[out, ceil(in/8)]`, least significant bit first."""

    name = "bitmask"
    suffixes = ("values", "bitmask")

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        mask = stored(weight)  # [out, in]
        return {"values": select(weight, mask), "bitmask": pack_bits(mask)}

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        mask = unpack_bits(tensors["bitmask"], shape[1])
        dense = torch.zeros(shape, dtype=tensors["values"].dtype, device=mask.device)
        return dense.masked_scatter_(mask, tensors["values"])

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        return itemsize * round(forecast.nonzeros) + shape[0] * -(-shape[1] // 8)

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        bits = (shape[0], -(-shape[1] // 8))
        return {"values": (None, (size_found(found, "values"),)), "bitmask": (torch.uint8, bits)}

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        bits = tensors["bitmask"]  # [out, ceil(in/8)]
        if shape[1] % 8 and bool((bits[:, -1] >> shape[1] % 8).any()):
            return "its bitmask marks columns beyond the last"
        if marked(bits) != tensors["values"].numel():
            return "its bitmask does not mark as many weights as there are values"
        return None


def marked(bits: Tensor) -> int:
    """The number of positions that a bitmask marks."""
    return int(look_up(_ONES, bits).sum())
