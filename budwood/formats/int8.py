"""The formats whose values are int8 with scales: positions as in the lossless format, recovered weights unrounded.

`nearest` rounds, `pack` accepts only matrices that are rounded already. An int8 does not give the dtype of its
matrix, so one more number does: `epsilon`, the machine epsilon of the dtype that the weights are rounded to. A power of
two survives every cast, so a layer that is cast still unpacks the weights of its checkpoint, in the dtype of the cast.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from budwood.formats.bitmask import Bitmask
from budwood.formats.bits import raw, select
from budwood.formats.format import Expected, Format, Found, Refusal, dtype_found, size
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact, put_back
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.integers import LARGEST, LEADING, SEGMENT, SMALLEST, dequantise, quantise

# By machine epsilon: 2**-7, 2**-10, 2**-23.
ROUNDED_TO = {torch.finfo(dtype).eps: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


class Int8(Format):
    """`plain` with int8 `values`; `scales` int32 `[out, ceil(in/256)]`, the bits of float32; `epsilon [1]`.

    The scales are kept as integers, because a module that is cast casts all its floating parameters.
    """

    plain: ClassVar[type[Format]]  # the lossless format with the same positions
    integers: ClassVar[type[Format]]  # the format of `values` and their positions
    typed = "epsilon"

    @classmethod
    def nearest(cls, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        if weight.dtype not in ROUNDED_TO.values():
            raise Refusal(f"{cls.name} cannot hold this {size(weight)} matrix: it is {weight.dtype}")
        tensors = cls.plain.pack(weight, base)
        ones = torch.ones_like(tensors["values"], dtype=torch.bool)
        held = cls.integers.unpack(tensors | {"values": ones}, (weight.shape[0], weight.shape[1]))  # bool [out, in]
        integers, scales = quantise(weight, held)
        return tensors | {
            "values": select(integers, held).view(tensors["values"].shape),
            "scales": scales.view(torch.int32),
            "epsilon": weight.new_full((1,), torch.finfo(weight.dtype).eps),
        }

    @classmethod
    def pack(cls, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        tensors = cls.nearest(weight, base)
        back = cls.unpack(tensors, (weight.shape[0], weight.shape[1]))
        if not torch.equal(raw(back), raw(weight)):
            raise Refusal(
                f"{cls.name} cannot hold this {size(weight)} matrix: its weights are not multiples of a scale; "
                "round them first (--values int8)"
            )
        return tensors

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        epsilon = tensors["epsilon"]
        integers = cls.integers.unpack(tensors, shape)  # int8 [out, in]
        weight = dequantise(integers, tensors["scales"].view(torch.float32), ROUNDED_TO[epsilon.item()])
        return weight.to(epsilon.dtype)

    @classmethod
    def nbytes(cls, shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        plain = cls.plain.nbytes(shape, forecast, itemsize=1)
        return None if plain is None else plain + 4 * shape[0] * -(-shape[1] // SEGMENT) + itemsize

    @classmethod
    def expected(cls, shape: tuple[int, int], found: Found) -> Expected:
        typed = dtype_found(found, "epsilon")
        plain = {
            suffix: (typed if suffix == "rec_values" else dtype, sizes)
            for suffix, (dtype, sizes) in cls.plain.expected(shape, found).items()
        }
        return plain | {
            "values": (torch.int8, plain["values"][1]),
            "scales": (torch.int32, (shape[0], -(-shape[1] // SEGMENT))),
            "epsilon": (None, (1,)),
        }

    @classmethod
    def fault(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        bits, epsilon = tensors["scales"], tensors["epsilon"]
        scales = bits.view(torch.float32)
        if not bool((scales.isfinite() & (scales >= SMALLEST) & (bits & LEADING == bits)).all()):
            return "a scale is not a positive finite number of 17 significant bits"
        if not epsilon.is_meta and epsilon.item() not in ROUNDED_TO:
            return "its epsilon does not belong to a dtype that weights are rounded to"
        if not tensors["values"].is_meta and bool((tensors["values"] < -LARGEST).any()):
            return f"a value is below {-LARGEST}, which no rounding gives"
        return cls.plain.fault(tensors, shape)


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

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return put_back(super().unpack(tensors, shape), tensors)

    @classmethod
    def nbytes(cls, shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        alone = super().nbytes(shape, forecast, itemsize)
        return None if alone is None else alone + (itemsize - 1) * round(forecast.recovered or 0)
