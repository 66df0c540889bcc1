"""Products of packed matrices on a GPU: every way that fits is tried once against dense, the fastest is kept.

    layer = gpu.prepare(weight, base)     # weight [out, in]; base names the 2:4 part, None: looked for
    y = layer.linear(x, bias)             # x [..., in] -> [..., out]

The winner is kept for each shape, class of rows, type and device, for the life of the process, and logged.
Without triton or without CUDA nothing breaks: the weight is unpacked and multiplied, and `why_not` says why.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.kernels.autotune import Outcome, autotune, graph_clock, wall_clock
from budwood.kernels.gpu_layouts import FEW, SOME, TwoFourLayout, fits, pack_two_four

Product = Callable[[Tensor, Tensor | None], Tensor]  # x [tokens, in], bias [out] -> [tokens, out]
Key = tuple[tuple[int, int], int, torch.dtype, str]
log = logging.getLogger(__name__)

MANY = 1024  # the largest class of rows; whatever is more behaves the same
outcomes: dict[Key, Outcome] = {}


@cache
def why_not() -> str | None:
    """One sentence that says why the Triton kernels cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "the GPU kernels need a CUDA device and torch finds none"
    if find_spec("triton") is None:
        return "the GPU kernels need triton, which is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU kernels need a device of compute capability 8.0 or newer"
    try:
        import budwood.kernels.gpu_products  # noqa: F401
    except Exception as error:  # a triton that does not fit the driver or the Python at hand
        return f"the GPU kernels could not be imported: {error}"
    return None


def takes(x: Tensor) -> bool:
    """Whether products with `x [..., in]` can go through a prepared matrix."""
    return usable(x) and x.dtype in (torch.bfloat16, torch.float16) and fits(x.shape[-1])


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can read this tensor."""
    return tensor.is_cuda and why_not() is None


def prepare(weight: Tensor, base: Tensor | None = None) -> "Prepared":
    """A pruned `weight [out, in]`, bf16 or fp16, packed on its device for products.

    `base`, bool `[out, in]`, names two of every four columns and the rest counts as recovered; without it two are
    looked for, in any mask. Raises `UsageError` where the layout cannot hold the matrix: see `gpu_layouts.fits`.
    """
    return Prepared(pack_two_four(weight, base))


class Prepared:
    """A packed matrix and the ways to multiply with it."""

    def __init__(self, layout: TwoFourLayout) -> None:
        self.layout = layout
        self._semi: tuple[Tensor, Tensor] | None = None  # a second copy, only where it won

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [..., in] -> [..., out]`, in the type of x, sums in float32 wherever the device does so."""
        flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
        with torch.cuda.device_of(x):  # Triton launches on the current device; for a CPU tensor this does nothing
            return self._way(flat, bias)(flat, bias).view(*x.shape[:-1], self.layout.shape[0])

    def candidates(self, rows: int) -> dict[str, Product]:
        """The ways there are for so many rows, by name; unpacking is always one."""
        ways: dict[str, Product] = {"unpack": self._unpacked}
        if not usable(self.layout.values):
            return ways
        from budwood.kernels import gpu_products

        layout = self.layout
        if rows <= FEW:
            ways["triton"] = lambda x, bias: gpu_products.two_four_linear(layout, x, bias)
        if 2 <= rows <= SOME:
            ways["triton dot"] = lambda x, bias: gpu_products.two_four_some(layout, x, bias)
        if rows >= SOME and semi_structured_fits(layout.shape, layout.dtype):
            ways["semi-structured"] = self._semi_structured
        return ways

    def _way(self, x: Tensor, bias: Tensor | None) -> Product:
        """The winner for these rows; the first call of a key holds the contest."""
        rows = row_class(x.shape[0])
        ways = self.candidates(rows)
        if len(ways) == 1 or x.dtype != self.layout.dtype or not x.shape[0]:
            return self._unpacked
        key = (self.layout.shape, rows, x.dtype, str(x.device))
        if key not in outcomes:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._unpacked  # nothing can be timed inside a graph; run once before capturing
            outcomes[key] = self._autotune(ways, rows, bias, x)
            if outcomes[key].winner != "semi-structured":
                self._semi = None
        return ways[outcomes[key].winner]

    def _autotune(self, ways: dict[str, Product], rows: int, bias: Tensor | None, like: Tensor) -> Outcome:
        """Everyone on a product of `rows` rows, against the dense weight."""
        generator = torch.Generator(like.device).manual_seed(0)
        x = torch.randn(rows, like.shape[1], dtype=like.dtype, device=like.device, generator=generator)
        dense = self.layout.unpack()
        runners = {name: (lambda way=way: way(x, bias)) for name, way in ways.items()}
        outcome = autotune(
            runners,
            expected=F.linear(x, dense, bias),
            clock=graph_clock() if x.is_cuda else wall_clock,
            spectators={"dense": lambda: F.linear(x, dense, bias)},
        )
        times = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in outcome.seconds.items())
        out, width = self.layout.shape
        log.info("%d x %d, %d rows, %s on %s: %s (%s)", out, width, rows, x.dtype, x.device, outcome.winner, times)
        for name, fault in outcome.dropped.items():
            log.warning("%d x %d, %d rows: %s is not used: %s", out, width, rows, name, fault)
        return outcome

    def dense(self) -> Tensor:
        """The dense matrix `[out, in]`."""
        if not usable(self.layout.values):
            return self.layout.unpack()
        from budwood.kernels import gpu_products

        return gpu_products.two_four_unpacked(self.layout)

    def _unpacked(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), bias)

    def _semi_structured(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """torch's 2:4 product, and the recovered weights as a sparse product beside it."""
        if self._semi is None:
            skeleton = self.layout.skeleton()
            beyond = self.layout.unpack() - skeleton  # disjoint places: exact
            self._semi = (torch.sparse.to_sparse_semi_structured(skeleton), beyond.to_sparse_csr())
        skeleton, beyond = self._semi
        y = F.linear(x, skeleton, bias)
        return y + (beyond @ x.T).T if beyond.values().numel() else y


def row_class(rows: int) -> int:
    """The class of a number of rows: the next power of two, up to 1024."""
    return min(1 << max(rows - 1, 0).bit_length(), MANY)


def semi_structured_fits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch's 2:4 tensors take such a matrix: multiples of 32 rows and 64 columns, 16-bit types."""
    return shape[0] % 32 == 0 and shape[1] % 64 == 0 and dtype in (torch.float16, torch.bfloat16)
