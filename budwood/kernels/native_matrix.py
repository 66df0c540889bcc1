"""A packed matrix as the native library reads it, and products with one or several of them."""

from collections.abc import Mapping, Sequence
from ctypes import CDLL, addressof
from struct import Struct

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.errors import RunError
from budwood.formats import FORMATS, ROUNDED
from budwood.formats.checks import check_layout
from budwood.formats.int4 import Int4, group_of
from budwood.kernels import native
from budwood.kernels.native import BITMASK, BY_ROWS, DENSE, INT4, INT8, MAX_FEW_ROWS, NIBBLES, OUTPUT, TYPES, Matrix

# Format: how positions are coded, and in which tensor. Scales and recovered weights are found by their suffixes.
CODINGS = {
    "bitmask": (BITMASK, "bitmask"),
    "two_four": (NIBBLES, "places"),
    "bitmask_int8": (BITMASK, "bitmask"),
    "two_four_int8": (NIBBLES, "places"),
    "two_four_compact_int8": (NIBBLES, "places"),
    "bitmask_int4": (BITMASK, "bitmask"),
    "two_four_int4": (NIBBLES, "places"),
    "two_four_compact_int4": (NIBBLES, "places"),
    "dense_int4": (DENSE, ""),
}
IN_TILES_ONLY = {format.name for format in ROUNDED["int4"].values()}


REMEDY = "give the tensors of one packed matrix, all of them"


def check_input(x: Tensor, width: int) -> None:
    """Raises RuntimeError, as torch does, where the last dimension of x is not the width of the matrix."""
    if x.shape[-1:] != (width,):
        raise RuntimeError(f"a matrix with {width} columns cannot be multiplied with x {list(x.shape)}")


def rounded_bias(bias: Tensor, out: int, dtype: torch.dtype) -> Tensor:
    """The bias `[out]` as the library reads it. Raises RuntimeError where it does not have this size."""
    return bias.to(dtype).expand(out).contiguous()


class Products:
    """Products of one x with several matrices `[out, in]` of one width, in one call of the library."""

    def __init__(self, library: CDLL, matrices: Sequence[Matrix]):
        self.outs, self.width = [matrix.out for matrix in matrices], matrices[0].in_
        self._array = (Matrix * len(matrices))(*matrices)
        self._address, self._multiply = addressof(self._array), library.budwood_linear
        self._pack_outputs = Struct(OUTPUT * len(matrices)).pack
        self._like: tuple[torch.Size, torch.dtype, list[Tensor]] | None = None  # the last x, and results for it

    def of(self, x: Tensor, biases: Sequence[Tensor | None], kernel: int) -> list[Tensor] | None:
        """`x [..., in] -> [..., out]` for each matrix; None where this processor path has no such kernel."""
        type = TYPES.get(x.dtype, INT8)
        check_input(x, self.width)
        if type == INT8 or not x.is_cpu or not all(bias is None or bias.is_cpu for bias in biases):
            return None
        x = x.contiguous()
        rows, results = x.numel() // self.width, self._results(x)
        if not rows:
            return results
        held = []  # rounded biases, alive during the call
        outputs: list[int] = []
        for out, result, bias in zip(self.outs, results, biases, strict=True):
            rounded = None if bias is None else rounded_bias(bias, out, x.dtype)
            held.append(rounded)
            outputs += (result.data_ptr(), 0 if rounded is None else rounded.data_ptr(), out, type)
        packed, threads = self._pack_outputs(*outputs), torch.get_num_threads()
        done = self._multiply(self._address, len(results), x.data_ptr(), type, rows, packed, threads, kernel)
        return results if done else None

    def _results(self, x: Tensor) -> list[Tensor]:
        """An empty `[..., out]` for each matrix; a tensor like another is made in half the time."""
        like = self._like
        if like is None or like[0] != x.shape or like[1] != x.dtype:
            made = [x.new_empty((*x.shape[:-1], out)) for out in self.outs]
            if x.numel() > MAX_FEW_ROWS * self.width:
                return made
            like = self._like = x.shape, x.dtype, made
        return [torch.empty_like(result) for result in like[2]]


class NativeMatrix:
    """One matrix `[out, in]` in a format that the library reads without conversion. Made by `native_matrix`.

    Holds pointers into the tensors `held` and keeps those alive.
    """

    def __init__(self, library: CDLL, matrix: Matrix, shape: tuple[int, int], held: Sequence[Tensor]):
        self.library, self.matrix, self.shape, self.held = library, matrix, shape, held
        self._products = Products(library, [matrix])

    def linear(self, x: Tensor, bias: Tensor | None = None, kernel: int = BY_ROWS) -> Tensor | None:
        """`x [..., in] -> [..., out]` in the dtype of x; None where this processor path has no such kernel."""
        found = self._products.of(x, [bias], kernel)
        return None if found is None else found[0]


class MatrixGroup:
    """Several matrices of one width, multiplied with the same x in one call of the library."""

    def __init__(self, matrices: Sequence[NativeMatrix]):
        self.matrices = list(matrices)
        self._products = Products(matrices[0].library, [matrix.matrix for matrix in matrices])

    def linear(self, x: Tensor, biases: Sequence[Tensor | None], kernel: int = BY_ROWS) -> list[Tensor] | None:
        """`x [..., in] -> [..., out]` for each matrix; None where this processor path has no such kernel."""
        return self._products.of(x, biases, kernel)


def native_matrix(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> NativeMatrix | None:
    """The matrix for the library; None where there is no native kernel for this format, dtype, device or machine.

    Raises RunError where the tensors do not describe a matrix `[out, in]`: all that kernels index by is checked here.
    """
    return None if format in IN_TILES_ONLY else readable(format, shape, tensors)


def readable(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> NativeMatrix | None:
    """The same for products or for packing into tiles: 4-bit codes, in a byte each, are not multiplied otherwise."""
    if format in IN_TILES_ONLY:
        return None if native.library() is None else int4_matrix(format, shape, tensors)
    coded, library = CODINGS.get(format), native.library()
    values = tensors["values"]
    if coded is None or library is None or values.dtype not in TYPES or not shape[0] or not shape[1]:
        return None
    coding, suffix = coded
    places = tensors[suffix]
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors.values()):
        return None
    found = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    check_layout("SparseLinear", format, shape, found, REMEDY)
    recovered = tensors.get("rec_values")
    if recovered is not None and (recovered.dtype not in TYPES or recovered.numel() >= 2**31):
        return None
    starts = native.starts(places, *shape, coding)
    if starts is None:
        return None
    if int(starts[-1]) != values.numel():
        raise unsound(format, shape, tensors)
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
    if recovered is not None:
        begins = F.pad(tensors["rec_counts"].sum(1, dtype=torch.int64).cumsum(0), (1, 0))
        if int(begins[-1]) != recovered.numel():
            raise unsound(format, shape, tensors)
        held += add_recovered(matrix, tensors, begins.int())
    if not library.budwood_sound(addressof(matrix)):
        raise unsound(format, shape, tensors)
    return NativeMatrix(library, matrix, shape, held)


def add_recovered(matrix: Matrix, tensors: Mapping[str, Tensor], begins: Tensor) -> list[Tensor]:
    """Points the matrix to the recovered weights; returns the tensors that it then reads. begins: int32 [out + 1]."""
    counts, columns, recovered = tensors["rec_counts"], tensors["rec_columns"], tensors["rec_values"]
    matrix.more_counts, matrix.more_columns = counts.data_ptr(), columns.data_ptr()
    matrix.more_values, matrix.more_type = recovered.data_ptr(), TYPES[recovered.dtype]
    matrix.more_starts = begins.data_ptr()
    return [counts, columns, recovered, begins]


def int4_matrix(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> NativeMatrix | None:
    """A matrix of 4-bit codes to be packed into tiles; None where the library cannot read it.

    Raises RunError where the tensors do not describe a matrix `[out, in]`.
    """
    kind, (coding, suffix), (out, width) = FORMATS[format], CODINGS[format], shape
    if not out or not width or any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors.values()):
        return None
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    check_layout("SparseLinear", format, shape, found, REMEDY)
    recovered = tensors.get("rec_values")
    if recovered is not None and (recovered.dtype not in TYPES or recovered.numel() >= 2**31):
        return None
    if kind.fault(tensors, shape):
        raise unsound(format, shape, tensors)
    assert issubclass(kind, Int4)
    codes, scales = kind.numbers(tensors, shape).contiguous(), (tensors["scales"].int() << 16).view(torch.float32)
    places = tensors.get(suffix)
    if places is not None:
        starts = native.starts(places, out, width, coding)
    else:
        starts = torch.arange(out + 1).mul_(width).int() if out * width < 2**31 else None
    if starts is None:
        return None
    matrix = Matrix(
        values=codes.data_ptr(),
        places=None if places is None else places.data_ptr(),
        starts=starts.data_ptr(),
        scales=scales.data_ptr(),
        out=out,
        in_=width,
        count=codes.numel(),
        stride=0 if places is None else places.shape[1],
        type=INT4,
        coding=coding,
        group=group_of(width, scales.shape[1]),
    )
    held = [codes, starts, scales] + ([] if places is None else [places])
    if recovered is not None:
        held += add_recovered(matrix, tensors, F.pad(tensors["rec_counts"].sum(1).cumsum(0), (1, 0)).int())
    library = native.library()
    assert library is not None, "asked before"
    return NativeMatrix(library, matrix, shape, held)


def unsound(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> RunError:
    """Says what is wrong with tensors that cannot be multiplied."""
    fault = FORMATS[format].fault(tensors, shape) or "its positions contradict each other"
    return RunError(f"the tensors of a SparseLinear cannot be multiplied: {fault}; {REMEDY}")


def refuse_unsound(format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """For tensors that are multiplied by unpacking: RunError where they do not describe a matrix `[out, in]`.

    Tensors on meta hold nothing to check. Values are not read, as a cast or training may have made some of them zero.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    found = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    check_layout("SparseLinear", format, shape, found, REMEDY)
    placing = FORMATS[format].placing
    positions = {suffix: tensor.to("meta") if suffix in placing else tensor for suffix, tensor in tensors.items()}
    if FORMATS[format].fault(positions, shape):
        raise unsound(format, shape, positions)
