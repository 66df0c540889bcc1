"""The formats whose values are int8, with a scale for each row and 256 columns."""

from collections.abc import Mapping

import torch
from torch import Tensor

from budwood.formats.bitmask import Bitmask
from budwood.formats.format import Found
from budwood.formats.rounded import Rounded
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact
from budwood.sparsity.integers import LARGEST, LEADING, SEGMENT, SMALLEST, dequantise, quantise


class Int8(Rounded):
    """`plain` with int8 `values`; `scales` int32 `[out, ceil(in/256)]`, the bits of float32; `epsilon [1]`."""

    kind = "int8"
    scale_type = torch.int32

    @classmethod
    def quantise(cls, weight: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        integers, scales = quantise(weight, held)
        return integers, scales.view(torch.int32)

    @classmethod
    def dequantise(cls, integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantise(integers, scales.view(torch.float32), dtype)

    @classmethod
    def scales_shape(cls, shape: tuple[int, int], found: Found) -> tuple[int, int]:
        return shape[0], -(-shape[1] // SEGMENT)

    @classmethod
    def value_fault(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> str | None:
        bits = tensors["scales"]
        scales = bits.view(torch.float32)
        if not bool((scales.isfinite() & (scales >= SMALLEST) & (bits & LEADING == bits)).all()):
            return "a scale is not a positive finite number of 17 significant bits"
        if not tensors["values"].is_meta and bool((tensors["values"] < -LARGEST).any()):
            return f"a value is below {-LARGEST}, which no rounding gives"
        return None


class TwoFourInt8(Int8):
    """At most two of every four consecutive columns, all of them int8."""

    name = "two_four_int8"
    suffixes = (*TwoFour.suffixes, "scales", "epsilon")
    plain = integers = TwoFour


class BitmaskInt8(Int8):
    """Any mask, all values int8."""

    name = "bitmask_int8"
    suffixes = (*Bitmask.suffixes, "scales", "epsilon")
    plain = integers = Bitmask


class TwoFourCompactInt8(Int8):
    """The 2:4 part int8, the recovered weights in the dtype of the matrix."""

    name = "two_four_compact_int8"
    suffixes = (*TwoFourCompact.suffixes, "scales", "epsilon")
    plain, integers = TwoFourCompact, TwoFour
