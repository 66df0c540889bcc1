"""The formats whose values are int8 with scales: positions as in the lossless format, recovered weights as they are.

`nearest` rounds, `pack` takes only what is rounded already. An int8 does not tell the dtype of its matrix, so one more
number does: `epsilon`, the machine epsilon of the dtype that the weights are rounded to. Powers of two survive every
cast, so a layer that is cast still unpacks the very weights of its folder, in the dtype that it was cast to.
"""

from typing import ClassVar

import torch
from torch import Tensor

from budwood.formats.bitmask import Bitmask
from budwood.formats.bits import raw, select
from budwood.formats.format import Format, Refusal, size
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact, put_back
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.integers import SEGMENT, dequantise, quantise

# By machine epsilon: 2**-7, 2**-10, 2**-23.
ROUNDED_TO = {torch.finfo(dtype).eps: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


class Int8(Format):
    """`plain` with int8 `values`; `scales` int32 `[out, ceil(in/256)]`, the bits of float32; `epsilon [1]`.

    The scales are kept as integers, because a module that is cast casts all its floating parameters.
    """

    plain: ClassVar[type[Format]]  # the lossless format it follows
    integers: ClassVar[type[Format]]  # the one that holds `values` and their places
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
                f"{cls.name} cannot hold this {size(weight)} matrix: its weights are no multiples of a scale; "
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
