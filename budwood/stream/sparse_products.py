"""The outputs of a pruned block by the native sparse kernels, where the arithmetic of a run says so."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from budwood.formats import pack_as
from budwood.kernels.native import SPARSE
from budwood.kernels.native_matrix import native_matrix
from budwood.stream.linear import Linear


@contextmanager
def sparse_products(linears: Iterable[Linear]) -> Iterator[None]:
    """In this context the native sparse kernels multiply the pruned matrices, where they can."""
    replaced: list[nn.Module] = []
    try:
        for linear in linears:
            weight = getattr(linear.module, "weight", None)
            if type(linear.module) is nn.Linear and isinstance(weight, Tensor):
                kernel = native_matrix("bitmask", linear.shape, pack_as("bitmask", weight.detach()))
                if kernel is not None:
                    product = partial(kernel.linear, bias=linear.module.bias, kernel=SPARSE)
                    linear.module.forward = product  # type: ignore[method-assign, assignment]
                    replaced.append(linear.module)
        yield
    finally:
        for module in replaced:
            del module.forward  # the class has its own
