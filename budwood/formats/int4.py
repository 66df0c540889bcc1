"""The formats whose values are 4-bit codes, two in a byte, with a scale for each row and group of columns.

The code with the lower index is in the low nibble, in two's complement. A group has 128 columns. Weights that are
multiples of the scales of groups of 64 columns already are stored with those, twice as many: how many there are tells.
A scale is kept as int16, the bits of bfloat16; its product with a code is exact in the dtype of the matrix.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from budwood.formats.bitmask import Bitmask, marked
from budwood.formats.bits import slabs
from budwood.formats.format import Expected, Format, Found, size_found
from budwood.formats.rounded import Rounded
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact
from budwood.sparsity.codes import FINE, GROUP, LEADING, dequantise4, limits, quantise4
from budwood.sparsity.forecast import Forecast

UNUSED = "a nibble that holds no code is not 0"


class Int4(Rounded):
    """`plain` with `values` uint8, two codes each; `scales` int16 `[out, ceil(in/128)]` or for 64; `epsilon [1]`."""

    kind = "int4"
    scale_type = torch.int16

    @classmethod
    def quantise(cls, weight: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = quantise4(weight, held, group_of_levels(weight, held))
        return codes, (scales.view(torch.int32) >> 16).to(torch.int16)

    @classmethod
    def dequantise(cls, integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        group = group_of(integers.shape[1], scales.shape[1])
        return dequantise4(integers, (scales.int() << 16).view(torch.float32), dtype, group)

    @classmethod
    def stored(cls, values: Tensor) -> Tensor:
        return pack_nibbles(values)

    @classmethod
    def numbers(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return unpack_nibbles(tensors["values"])

    @classmethod
    def scales_shape(cls, shape: tuple[int, int], found: Found) -> tuple[int, int]:
        fine = -(-shape[1] // FINE)
        return shape[0], fine if size_found(found, "scales", 1) == fine else -(-shape[1] // GROUP)

    @classmethod
    def scales_forecast(cls, shape: tuple[int, int], forecast: Forecast) -> tuple[int, int]:
        return shape[0], -(-shape[1] // (forecast.group or GROUP))

    @classmethod
    def nbytes(cls, shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        whole = super().nbytes(shape, forecast, itemsize)
        if whole is None:
            return None
        # What one byte for each value is too much.
        count = round(forecast.nonzeros) if cls.integers is Bitmask else shape[0] * (shape[1] // 4 * 2)
        return whole - count // 2

    @classmethod
    def expected(cls, shape: tuple[int, int], found: Found) -> Expected:
        expected = super().expected(shape, found)
        sizes = expected["values"][1]
        if cls.integers is not Bitmask:  # whose number of values is that of the file
            sizes = (*sizes[:-1], -(-sizes[-1] // 2))
        return expected | {"values": (torch.uint8, sizes)}

    @classmethod
    def value_fault(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> str | None:
        bits = tensors["scales"].int() << 16
        smallest, largest = limits(dtype or torch.float32)
        magnitude = bits.view(torch.float32).abs()
        if not bool(((magnitude >= smallest) & (magnitude <= largest) & (bits & LEADING == bits)).all()):
            return "a scale is not a number of 5 significant bits of a magnitude that is stored"
        return None


class TwoFourInt4(Int4):
    """At most two of every four consecutive columns."""

    name = "two_four_int4"
    suffixes = (*TwoFour.suffixes, "scales", "epsilon")
    plain = integers = TwoFour


class BitmaskInt4(Int4):
    """Any mask; `values` has half as many bytes as there are codes, rounded up."""

    name = "bitmask_int4"
    suffixes = (*Bitmask.suffixes, "scales", "epsilon")
    plain = integers = Bitmask

    @classmethod
    def numbers(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return unpack_nibbles(tensors["values"])[: marked(tensors["bitmask"])]

    @classmethod
    def fault(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        count, values = marked(tensors["bitmask"]), tensors["values"]
        odd = count % 2 and count // 2 + 1 == values.numel() and not values.is_meta
        if odd and int(values[-1]) >> 4:
            return UNUSED
        numbers = torch.empty(count if values.numel() == -(-count // 2) else 2 * values.numel(), device="meta")
        return super().fault({**tensors, "values": numbers}, shape)


class TwoFourCompactInt4(Int4):
    """The 2:4 part in 4 bits, the recovered weights in the dtype of the matrix."""

    name = "two_four_compact_int4"
    suffixes = (*TwoFourCompact.suffixes, "scales", "epsilon")
    plain, integers = TwoFourCompact, TwoFour


class Whole(Format):
    """Every weight of a matrix as `values [out, in]`: the positions of `DenseInt4`."""

    name = "dense"
    suffixes = ("values",)

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        return {"values": weight.contiguous()}

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return tensors["values"]

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        return itemsize * shape[0] * shape[1]

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        return {"values": (None, shape)}

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        return None


class DenseInt4(Int4):
    """Every weight of a matrix; `values` uint8 `[out, ceil(in/2)]`."""

    name = "dense_int4"
    suffixes = ("values", "scales", "epsilon")
    plain = integers = Whole

    @classmethod
    def numbers(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return unpack_nibbles(tensors["values"])[:, : shape[1]]

    @classmethod
    def nbytes(cls, shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        scales = math.prod(cls.scales_forecast(shape, forecast))
        return shape[0] * -(-shape[1] // 2) + cls.scale_type.itemsize * scales + itemsize

    @classmethod
    def fault(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        values = tensors["values"]
        if shape[1] % 2 and not values.is_meta and bool((values[:, -1] >> 4).any()):
            return UNUSED
        return super().fault(tensors, shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 [..., n] in [-8, 7] -> uint8 [..., ceil(n/2)]; the lower index in the low nibble, the last may be unused."""
    nibbles = (codes & 15).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> int8 [..., 2 n]."""
    codes = torch.empty(*packed.shape, 2, dtype=torch.int8, device=packed.device)
    signed = packed.view(torch.int8)
    codes[..., 0], codes[..., 1] = (signed << 4) >> 4, signed >> 4
    return codes.flatten(-2)


def group_of(width: int, scales: int) -> int:
    """The columns of a group, from the number of scales in a row."""
    return GROUP if scales == -(-width // GROUP) else FINE


def group_of_levels(weight: Tensor, held: Tensor) -> int:
    """FINE where the held weights are exactly what such groups can hold and groups of GROUP columns cannot; else GROUP.

    The rest of a matrix is only looked at where its first rows give no answer.
    """
    for rows in (slice(4), *slabs((weight.shape[0], weight.shape[1]))):
        piece, kept = weight[rows], held[rows]
        plain = torch.where(kept, piece, 0)
        if not torch.equal(dequantise4(*quantise4(piece, kept, FINE), weight.dtype, FINE), plain):
            return GROUP
    coarse = dequantise4(*quantise4(weight, held, GROUP), weight.dtype, GROUP)
    return GROUP if torch.equal(coarse, torch.where(held, weight, 0)) else FINE
