"""Chooses the kernel of a product: for few rows, sparse or in panels for many, or unpack and multiply with torch.

The kernels are timed once per process on one matrix, for a few numbers of rows. Without timings the number of rows
decides.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from budwood.kernels import native
from budwood.kernels.native import BY_ROWS, FEW_ROWS, MAX_FEW_ROWS, PANELS, SPARSE, TILES
from budwood.kernels.native_matrix import NativeMatrix
from budwood.timing import interleaved

UNPACK = -1
NAMES = {BY_ROWS: "by rows", FEW_ROWS: "few", SPARSE: "sparse", PANELS: "panels", UNPACK: "unpack"}
ROWS = (4, 8, 16, 64, 512)  # timed; a product of n rows uses the winner of the smallest of these that is at least n
ALWAYS_FEW = 2
NEVER_FEW = 64  # above this number of rows the kernel for few rows is not timed
ROUNDS = 7

# The dtype of the activations; that of the values, as the library numbers them; whether the matrix is in tiles.
Kind = tuple[torch.dtype, int, bool]


@dataclass(frozen=True)
class Choice:
    """The kernel that won, and the seconds of all that were timed, by name."""

    kernel: int
    seconds: dict[str, float]


_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def exact() -> Iterator[None]:
    """Inside, packed weights are unpacked and multiplied by torch: bit for bit what the dense model computes."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def is_exact() -> bool:
    """Whether this runs inside `exact`."""
    return _exact.get()


measured: dict[Kind, dict[int, Choice]] = {}


def kind_of(matrix: NativeMatrix, dtype: torch.dtype) -> Kind:
    """What matrices have in common that are equally fast with activations of this dtype."""
    return dtype, matrix.matrix.type, matrix.matrix.coding == TILES


def kernel_for(matrix: NativeMatrix, rows: int, dtype: torch.dtype) -> int:
    """The kernel for `rows` rows of activations of this dtype."""
    if rows <= ALWAYS_FEW:
        return FEW_ROWS
    found = measured.get(kind_of(matrix, dtype))
    if found:
        return next((choice.kernel for limit, choice in found.items() if rows <= limit), found[ROWS[-1]].kernel)
    if rows <= MAX_FEW_ROWS:
        return FEW_ROWS
    return BY_ROWS if native.has(SPARSE) else UNPACK


def linear(matrix: NativeMatrix, input: Tensor, bias: Tensor | None) -> Tensor | None:
    """`input [..., in] -> [..., out]` by the native library; None where unpacking is chosen."""
    if is_exact():
        return None
    rows = input.numel() // matrix.shape[1]
    kernel = FEW_ROWS if rows <= ALWAYS_FEW else kernel_for(matrix, rows, input.dtype)
    return None if kernel == UNPACK else matrix.linear(input, bias, kernel)


def measure(matrix: NativeMatrix, unpacked: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Time the kernels on this matrix and keep the fastest; does nothing where this kind was measured before.

    unpacked: the product by unpacking the same matrix.
    """
    kind = kind_of(matrix, dtype)
    if kind in measured:
        return
    found = {}
    for rows in ROWS:
        input = torch.ones(rows, matrix.shape[1], dtype=dtype)
        kernels = (FEW_ROWS, SPARSE, PANELS) if rows <= NEVER_FEW else (SPARSE, PANELS)
        available = [kernel for kernel in kernels if matrix.linear(input, None, kernel) is not None]
        products: dict[int, Callable[[], object]] = {
            kernel: partial(matrix.linear, input, None, kernel) for kernel in available
        }
        if rows > NEVER_FEW or len(available) < 2:  # up to there the other kernel is always faster than unpacking
            products[UNPACK] = partial(unpacked, input)
        found[rows] = fastest(products)
    measured[kind] = found


def fastest(products: Mapping[int, Callable[[], object]]) -> Choice:
    """The kernel with the smallest median seconds, timed in turns.

    The median and not the best call: another load on the core slows some kernels more than others.
    """

    def run(product: Callable[[], object], turn: int) -> None:
        product()

    times = interleaved({kernel: partial(run, product) for kernel, product in products.items()}, ROUNDS)
    seconds = {kernel: median(found) for kernel, found in times.items()}
    return Choice(min(seconds, key=seconds.__getitem__), {NAMES[kernel]: found for kernel, found in seconds.items()})
