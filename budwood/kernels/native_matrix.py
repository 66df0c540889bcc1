"""A packed matrix made ready for the native library, and the product with it."""

from collections.abc import Mapping, Sequence
from ctypes import CDLL, addressof

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.kernels import native
from budwood.kernels.native import BITMASK, BY_ROWS, INT8, NIBBLES, TYPES, Matrix, Output

# Format: how it names places, and in which tensor. What else such a format may hold: scales, and recovered weights.
CODINGS = {
    "bitmask": (BITMASK, "bitmask"),
    "two_four": (NIBBLES, "places"),
    "bitmask_int8": (BITMASK, "bitmask"),
    "two_four_int8": (NIBBLES, "places"),
    "two_four_compact_int8": (NIBBLES, "places"),
}


class Packed:
    """One matrix `[out, in]` of a format the library reads as it lies in memory.

    Holds pointers into `tensors` and keeps those alive. Made by `prepare`.
    """

    def __init__(self, library: CDLL, matrix: Matrix, shape: tuple[int, int], held: Sequence[Tensor]):
        self.matrix, self.shape, self.held = matrix, shape, held
        self._multiply, self._address = library.budwood_linear, addressof(matrix)

    def linear(self, x: Tensor, bias: Tensor | None = None, way: int = BY_ROWS) -> Tensor | None:
        """`x [..., in] -> [..., out]` in the type of x; None where the path at hand has no such way."""
        type = TYPES.get(x.dtype, INT8)
        if type == INT8 or not x.is_cpu:
            return None
        out, width = self.shape
        x = x.contiguous()
        result = x.new_empty((*x.shape[:-1], out))
        rows = x.numel() // width
        if not rows:
            return result
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        output = Output(result.data_ptr(), None if bias is None else bias.data_ptr(), out, type)
        threads = torch.get_num_threads()
        done = self._multiply(self._address, 1, x.data_ptr(), type, rows, addressof(output), threads, way)
        return result if done else None


def prepare(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Packed | None:
    """The matrix for the library; None where this format, type, device or machine has no native kernel."""
    coded, library = CODINGS.get(format), native.library()
    values = tensors["values"]
    if coded is None or library is None or values.dtype not in TYPES or not shape[0] or not shape[1]:
        return None
    coding, suffix = coded
    places = tensors[suffix]
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors.values()):
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
    held = [values, places, starts]
    if "scales" in tensors:
        matrix.scales = tensors["scales"].data_ptr()  # int32, the bits of float32
        held.append(tensors["scales"])
    if "rec_values" in tensors:
        counts, columns, recovered = (tensors[f"rec_{part}"] for part in ("counts", "columns", "values"))
        begins = F.pad(counts.sum(1, dtype=torch.int64).cumsum(0), (1, 0))
        if int(begins[-1]) != recovered.numel() or recovered.numel() >= 2**31:
            return None
        begins = begins.int()
        matrix.more_counts, matrix.more_columns = counts.data_ptr(), columns.data_ptr()
        matrix.more_values, matrix.more_type = recovered.data_ptr(), TYPES[recovered.dtype]
        matrix.more_starts = begins.data_ptr()
        held += [counts, columns, recovered, begins]
    return Packed(library, matrix, shape, held)


def linears(
    matrices: Sequence[Packed], x: Tensor, biases: Sequence[Tensor | None], way: int = BY_ROWS
) -> list[Tensor | None]:
    """Products of several matrices with the same x in one call; `[None, ...]` where the path has no such way."""
    library = native.library()
    nothing: list[Tensor | None] = [None] * len(matrices)
    if library is None or not x.is_cpu or TYPES.get(x.dtype, INT8) == INT8:
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
    listed = (Matrix * len(matrices))(*(packed.matrix for packed in matrices))
    threads = torch.get_num_threads()
    done = library.budwood_linear(
        addressof(listed), len(matrices), flat.data_ptr(), type, rows, addressof(outputs), threads, way
    )
    return list(results) if done else nothing
