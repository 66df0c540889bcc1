"""Which way a product goes: the kernel for few rows, sparse or in panels for many, or unpack and multiply.

Measured once a process on one matrix, for few numbers of rows, and kept. Without a measurement the numbers of rows
decide alone.
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
from budwood.kernels.native import AS_FEW, AS_PANELS, AS_SPARSE, BY_ROWS, FEW
from budwood.kernels.native_matrix import Packed
from budwood.timing import interleaved

UNPACK = -1
NAMES = {BY_ROWS: "by rows", AS_FEW: "few", AS_SPARSE: "sparse", AS_PANELS: "panels", UNPACK: "unpack"}
ROWS = (4, 8, 16, 64, 512)  # tried; a product goes the way of the nearest number not below its own
ALWAYS_FEW = 2
NEVER_FEW = 64  # beyond so many rows the kernel for few is not tried
ROUNDS = 7

Kind = tuple[torch.dtype, int]  # of the activations; of the values, as the library counts types


@dataclass(frozen=True)
class Choice:
    """The way that won, and the seconds of all that were tried, by name."""

    way: int
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
    """Whether products are to be torch's own."""
    return _exact.get()


measured: dict[Kind, dict[int, Choice]] = {}


def way(packed: Packed, rows: int, dtype: torch.dtype) -> int:
    """How to multiply `rows` rows of activations of this type."""
    if rows <= ALWAYS_FEW:
        return AS_FEW
    found = measured.get((dtype, packed.matrix.type))
    if found:
        return next((choice.way for limit, choice in found.items() if rows <= limit), found[ROWS[-1]].way)
    if rows <= FEW:
        return AS_FEW
    return BY_ROWS if native.has(AS_SPARSE) else UNPACK


def linear(packed: Packed, input: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product by the native library; None where unpacking is the better way."""
    if is_exact():
        return None
    rows = input.numel() // packed.shape[1]
    chosen = AS_FEW if rows <= ALWAYS_FEW else way(packed, rows, input.dtype)
    return None if chosen == UNPACK else packed.linear(input, bias, chosen)


def measure(packed: Packed, unpacked: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Try the ways on this matrix and keep the fastest; does nothing where this kind was measured before.

    unpacked: the product by unpacking the same matrix.
    """
    kind = (dtype, packed.matrix.type)
    if kind in measured:
        return
    found = {}
    for rows in ROWS:
        input = torch.ones(rows, packed.shape[1], dtype=dtype)
        tried = (AS_FEW, AS_SPARSE, AS_PANELS) if rows <= NEVER_FEW else (AS_SPARSE, AS_PANELS)
        can = [way for way in tried if packed.linear(input, None, way) is not None]
        products: dict[int, Callable[[], object]] = {way: partial(packed.linear, input, None, way) for way in can}
        if rows > NEVER_FEW or len(can) < 2:  # before that, another way for many rows is always faster
            products[UNPACK] = partial(unpacked, input)
        found[rows] = fastest(products)
    measured[kind] = found


def fastest(products: Mapping[int, Callable[[], object]]) -> Choice:
    """The way that usually takes the fewest seconds, tried in turns.

    The median and not the best call: what shares a core with a virtual machine slows one way more than another.
    """

    def run(product: Callable[[], object], turn: int) -> None:
        product()

    times = interleaved({way: partial(run, product) for way, product in products.items()}, ROUNDS)
    seconds = {way: median(found) for way, found in times.items()}
    return Choice(min(seconds, key=seconds.__getitem__), {NAMES[way]: found for way, found in seconds.items()})
