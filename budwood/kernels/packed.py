"""A packed matrix made ready for the native library, and the product with it."""

from collections.abc import Mapping, Sequence
from ctypes import byref

import torch
from torch import Tensor

from budwood.kernels import native
from budwood.kernels.native import BITMASK, BY_ROWS, NIBBLES, TYPES, Matrix, Output

CODINGS = {"bitmask": (BITMASK, "bitmask"), "two_four": (NIBBLES, "places")}  # format: how it names places, and where
ALIGNED = 8  # bytes: places are read as words


class Packed:
    """One matrix `[out, in]` of a format the library reads as it lies in memory.

    Holds pointers into `tensors` and keeps those alive. Made by `prepare`.
    """

    def __init__(self, matrix: Matrix, shape: tuple[int, int], held: Sequence[Tensor]):
        self.matrix, self.shape = matrix, shape
        self.held = held
        self.key = tuple(tensor.data_ptr() for tensor in held)

    def linear(self, x: Tensor, bias: Tensor | None = None, way: int = BY_ROWS) -> Tensor | None:
        """`x [..., in] -> [..., out]` in the type of x; None where the path at hand has no such way."""
        return linears([self], x, [bias], way)[0]


def prepare(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Packed | None:
    """The matrix for the library; None where this format, type, device or machine has no native kernel."""
    coded = CODINGS.get(format)
    values = tensors["values"]
    if coded is None or native.library() is None or values.dtype not in TYPES or not shape[0] or not shape[1]:
        return None
    coding, suffix = coded
    places = tensors[suffix]
    if (
        values.device.type != "cpu"
        or places.device.type != "cpu"
        or not (values.is_contiguous() and places.is_contiguous())
    ):
        return None
    starts = native.starts(places, *shape, coding)
    if starts is None or int(starts[-1]) != values.numel():
        return None
    matrix = Matrix(
        values=values.data_ptr(),
        places=places.data_ptr(),
        starts=starts.data_ptr(),
        out=shape[0],
        in_=shape[1],
        count=values.numel(),
        stride=places.shape[1],
        type=TYPES[values.dtype],
        coding=coding,
    )
    return Packed(matrix, shape, (values, places, starts))


def linears(
    matrices: Sequence[Packed], x: Tensor, biases: Sequence[Tensor | None], way: int = BY_ROWS
) -> list[Tensor | None]:
    """Products of several matrices with the same x in one call; `[None, ...]` where the path has no such way."""
    library = native.library()
    nothing: list[Tensor | None] = [None] * len(matrices)
    if library is None or x.device.type != "cpu" or x.dtype not in TYPES or x.dtype == torch.int8:
        return nothing
    width = matrices[0].shape[1]
    flat = x.contiguous()
    rows = flat.numel() // width
    results = [flat.new_empty(*x.shape[:-1], packed.shape[0]) for packed in matrices]
    kept = [None if bias is None else bias.to(x.dtype).contiguous() for bias in biases]
    if not rows:
        return list(results)
    type = TYPES[x.dtype]
    outputs = (Output * len(matrices))(
        *(
            Output(result.data_ptr(), None if bias is None else bias.data_ptr(), packed.shape[0], type)
            for packed, result, bias in zip(matrices, results, kept, strict=True)
        )
    )
    listed = matrices[0].matrix if len(matrices) == 1 else (Matrix * len(matrices))(*(m.matrix for m in matrices))
    threads = torch.get_num_threads()
    done = library.budwood_linear(byref(listed), len(matrices), flat.data_ptr(), type, rows, outputs, threads, way)
    return list(results) if done else nothing
