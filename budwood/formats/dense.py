"""The matrix as it is: the fallback that always fits, and the file any reader understands."""

from torch import Tensor

from budwood.formats.format import Format
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
