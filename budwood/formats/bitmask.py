"""Any mask: the stored values row by row, and one bit per position that says which they are."""

import torch
from torch import Tensor

from budwood.formats.bits import pack_bits, select, stored, unpack_bits
from budwood.formats.format import Format
from budwood.sparsity.forecast import Forecast


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
