"""The matrix unchanged: the fallback that can store everything, and that any reader understands."""

from collections.abc import Mapping

from torch import Tensor

from budwood.formats.format import Expected, Format, Found
from budwood.sparsity.forecast import Forecast


class Dense(Format):
    """`weight [out, in]`."""

    name = "dense"
    suffixes = ("weight",)
    typed = "weight"

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        return {"weight": weight.contiguous()}

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return tensors["weight"].view(shape)

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        return itemsize * shape[0] * shape[1]

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        return {"weight": (None, shape)}

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        return None
