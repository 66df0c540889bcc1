"""The interface of a storage format: pack without loss or refuse, unpack bit for bit, predict bytes, check a file."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from budwood.sparsity.forecast import Forecast

Sizes = tuple[int, ...]
Found = Mapping[str, tuple[torch.dtype, Sizes]]  # suffix -> dtype and shape of a tensor, as a file header gives them
Expected = dict[str, tuple[torch.dtype | None, Sizes]]  # the same as a format needs them; None: any floating dtype


class Refusal(ValueError):
    """The format cannot store this matrix without loss; the message is one sentence that gives the reason."""


class Format(Protocol):
    """One way to store one matrix `[out, in]`. A weight counts as zero only if all its bits are zero."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]  # of the tensors: a file names each `<linear>.<suffix>`
    typed: ClassVar[str] = "values"  # the tensor that has the dtype of the matrix
    placing: ClassVar[tuple[str, ...]] = ()  # tensors of values whose zeros say where a weight is

    @classmethod
    def nearest(cls, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors of the nearest matrix that the format can store: `pack`, except in formats that round values."""
        return cls.pack(weight, base)

    @classmethod
    def kept(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        """The values that are stored, one element each."""
        return [tensor for suffix, tensor in tensors.items() if suffix.endswith("values")]

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors by suffix. `base`: bool [out, in], the 2:4 mask where it is known. Raises `Refusal`."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The matrix `[out, in]` that was packed, bit for bit, in the dtype of the values."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        """The bytes of the packed tensors; None where the format cannot store such a matrix."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        """Dtype and size of every tensor for a matrix of this shape; what is free in the format is taken from `found`.

        `found` may lack tensors and may have any dtypes and sizes.
        """
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        """What is wrong with the positions in tensors of the `expected` dtypes and sizes; None if nothing.

        Without a fault the tensors are sound: `unpack` stays inside the matrix, and packing what it returns, with the
        same 2:4 mask and no stored value zero, gives the same positions. So no two kernels can read them differently.
        Values are not read, but for those in `placing`: they may be on the meta device, and a cast may have made some
        of them zero.
        """
        raise NotImplementedError


def by_name(*formats: type[Format]) -> dict[str, type[Format]]:
    """The formats by their names; raises `TypeError` where one lacks a method of the interface."""
    for format in formats:
        missing = sorted(getattr(format, "__abstractmethods__", ()))
        if missing:
            raise TypeError(f"the format {format.__name__} does not define {', '.join(missing)}; add them to its class")
    return {format.name: format for format in formats}


def size_found(found: Found, suffix: str, dimension: int = 0) -> int:
    """One size of a found tensor; 0 where there is no such tensor or dimension."""
    sizes = found[suffix][1] if suffix in found else ()
    return sizes[dimension] if len(sizes) > dimension else 0


def dtype_found(found: Found, suffix: str) -> torch.dtype | None:
    """The dtype of a found tensor; None where there is none, or it is not of floating point."""
    dtype = found[suffix][0] if suffix in found else None
    return dtype if dtype is not None and dtype.is_floating_point else None


def size(weight: Tensor) -> str:
    """The shape as messages give it: "4096 x 4096"."""
    return " x ".join(map(str, weight.shape))
