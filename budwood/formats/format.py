"""What every storage format offers: pack without loss or refuse, unpack bit for bit, foretell the bytes."""

from typing import ClassVar, Protocol

from torch import Tensor

from budwood.sparsity.forecast import Forecast


class Refusal(ValueError):
    """The format would lose something of this matrix; the message is one sentence that says what."""


class Format(Protocol):
    """One way to store one matrix `[out, in]`. A weight counts as zero only if all its bits are zero."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]  # of the tensors, as they follow the name of the linear in a file
    typed: ClassVar[str] = "values"  # the tensor that has the dtype of the matrix

    @classmethod
    def nearest(cls, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors of the nearest matrix that the format holds: of this one, unless it rounds values."""
        return cls.pack(weight, base)

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors by suffix. `base`: bool [out, in], the 2:4 mask where it is known. Raises `Refusal`."""

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The matrix `[out, in]` that was packed, bit for bit, in the dtype of the values."""

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        """The bytes of the packed tensors; None where the format cannot hold such a matrix."""


def size(weight: Tensor) -> str:
    """The shape as a message tells it."""
    return " x ".join(map(str, weight.shape))
