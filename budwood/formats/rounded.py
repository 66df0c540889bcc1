"""What the formats with rounded values share: positions as in a lossless format, recovered weights unrounded.

`nearest` rounds, `pack` accepts only matrices that are rounded already. Integers do not give the dtype of their matrix,
so one more number does: `epsilon`, the machine epsilon of the dtype that the weights are rounded to. A power of two
survives every cast, so a layer that is cast still unpacks the weights of its checkpoint, in the dtype of the cast.
Scales are kept as integers, because a module that is cast casts all its floating parameters.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from budwood.formats.bits import raw, select
from budwood.formats.format import Expected, Format, Found, Refusal, dtype_found, size
from budwood.formats.two_four_compact import put_back
from budwood.sparsity.forecast import Forecast

# By machine epsilon: 2**-7, 2**-10, 2**-23.
ROUNDED_TO = {torch.finfo(dtype).eps: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


class Rounded(Format):
    """`plain` with integers as `values`, their `scales`, and `epsilon [1]`."""

    plain: ClassVar[type[Format]]  # the lossless format with the same positions
    integers: ClassVar[type[Format]]  # the format of `values` and their positions
    kind: ClassVar[str]  # the values, as the command line names them
    scale_type: ClassVar[torch.dtype]
    typed = "epsilon"

    @classmethod
    @abstractmethod
    def quantise(cls, weight: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest integers, int8 [out, in], of the held weights, and their scales as they are stored."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def dequantise(cls, integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] of integers and stored scales."""
        raise NotImplementedError

    @classmethod
    def stored(cls, values: Tensor) -> Tensor:
        """Integers in the order and shape of the plain format -> the tensor that is stored."""
        return values

    @classmethod
    def numbers(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The inverse of `stored`: int8, one element for each value."""
        return tensors["values"]

    @classmethod
    def kept(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        return super().kept({**tensors, "values": cls.numbers(tensors, shape)}, shape)

    @classmethod
    @abstractmethod
    def scales_shape(cls, shape: tuple[int, int], found: Found) -> tuple[int, int]:
        """The shape of `scales`; what is free is taken from `found`."""
        raise NotImplementedError

    @classmethod
    def scales_forecast(cls, shape: tuple[int, int], forecast: Forecast) -> tuple[int, int]:
        """The shape that `scales` will have."""
        return cls.scales_shape(shape, {})

    @classmethod
    @abstractmethod
    def value_fault(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> str | None:
        """What is wrong with scales and values; values on meta are not read. dtype: rounded to, None if unknown."""
        raise NotImplementedError

    @classmethod
    def nearest(cls, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        if weight.dtype not in ROUNDED_TO.values():
            raise Refusal(f"{cls.name} cannot hold this {size(weight)} matrix: it is {weight.dtype}")
        tensors = cls.plain.pack(weight, base)
        ones = torch.ones_like(tensors["values"], dtype=torch.bool)
        held = cls.integers.unpack(tensors | {"values": ones}, (weight.shape[0], weight.shape[1]))  # bool [out, in]
        integers, scales = cls.quantise(weight, held)
        return tensors | {
            "values": cls.stored(select(integers, held).view(tensors["values"].shape)),
            "scales": scales,
            "epsilon": weight.new_full((1,), torch.finfo(weight.dtype).eps),
        }

    @classmethod
    def pack(cls, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        tensors = cls.nearest(weight, base)
        back = cls.unpack(tensors, (weight.shape[0], weight.shape[1]))
        if not torch.equal(raw(back), raw(weight)):
            raise Refusal(
                f"{cls.name} cannot hold this {size(weight)} matrix: its weights are not multiples of a scale; "
                f"round them first (--values {cls.kind})"
            )
        return tensors

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        epsilon = tensors["epsilon"]
        integers = cls.integers.unpack(tensors | {"values": cls.numbers(tensors, shape)}, shape)  # int8 [out, in]
        weight = cls.dequantise(integers, tensors["scales"], ROUNDED_TO[epsilon.item()]).to(epsilon.dtype)
        return put_back(weight, tensors) if "rec_values" in cls.suffixes else weight

    @classmethod
    def nbytes(cls, shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        plain = cls.plain.nbytes(shape, forecast, itemsize=1)
        if plain is None:
            return None
        recovered = round(forecast.recovered or 0) if "rec_values" in cls.suffixes else 0
        scales = math.prod(cls.scales_forecast(shape, forecast))
        return plain + (itemsize - 1) * recovered + cls.scale_type.itemsize * scales + itemsize

    @classmethod
    def expected(cls, shape: tuple[int, int], found: Found) -> Expected:
        typed = dtype_found(found, "epsilon")
        plain = {
            suffix: (typed if suffix == "rec_values" else dtype, sizes)
            for suffix, (dtype, sizes) in cls.plain.expected(shape, found).items()
        }
        return plain | {
            "values": (torch.int8, plain["values"][1]),
            "scales": (cls.scale_type, cls.scales_shape(shape, found)),
            "epsilon": (None, (1,)),
        }

    @classmethod
    def fault(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        epsilon = tensors["epsilon"]
        dtype = None if epsilon.is_meta else ROUNDED_TO.get(epsilon.item())
        if not epsilon.is_meta and dtype is None:
            return "its epsilon does not belong to a dtype that weights are rounded to"
        return cls.value_fault(tensors, dtype) or cls.plain.fault(tensors, shape)
