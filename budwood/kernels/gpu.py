"""Products of packed matrices on a GPU: every kernel that fits is checked and timed once, the fastest is used.

    matrix = gpu.gpu_matrix(weight, base)  # weight [out, in]; base: the 2:4 mask, None: chosen from the zeros
    y = matrix.linear(x, bias)             # x [..., in] -> [..., out]

The winner is kept for each shape, class of rows, dtype and device, for the life of the process, and logged.
Without triton or without CUDA the weight is unpacked and multiplied, and `why_not` gives the reason.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.kernels.autotune import AutotuneResult, autotune, graph_clock, wall_clock
from budwood.kernels.gpu_layouts import FEW, SOME, TwoFourLayout, fits, pack_two_four
from budwood.kernels.native_matrix import check_input

Product = Callable[[Tensor, Tensor | None], Tensor]  # x [tokens, in], bias [out] -> [tokens, out]
Key = tuple[tuple[int, int], int, torch.dtype, str]
log = logging.getLogger(__name__)

MANY = 1024  # the largest class of rows; larger numbers of rows behave the same
results: dict[Key, AutotuneResult] = {}


@cache
def why_not() -> str | None:
    """One sentence with the reason why the Triton kernels cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "the GPU kernels need a CUDA device and torch finds none"
    if find_spec("triton") is None:
        return "the GPU kernels need triton, which is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU kernels need a device of compute capability 8.0 or newer"
    try:
        import budwood.kernels.gpu_products  # noqa: F401
    except Exception as error:  # a triton that does not fit this driver or Python
        return f"the GPU kernels could not be imported: {error}"
    return None


def takes(x: Tensor) -> bool:
    """Whether products with `x [..., in]` can use a `GpuMatrix`."""
    return usable(x) and x.dtype in (torch.bfloat16, torch.float16) and fits(x.shape[-1])


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can read this tensor."""
    return tensor.is_cuda and why_not() is None


def gpu_matrix(weight: Tensor, base: Tensor | None = None) -> "GpuMatrix":
    """A pruned `weight [out, in]`, bf16 or fp16, packed on its device for products.

    `base`, bool `[out, in]`, marks two of every four columns and all others count as recovered; without it two are
    chosen, for any mask. Raises `UsageError` where the layout cannot store the matrix: see `gpu_layouts.fits`.
    """
    return GpuMatrix(pack_two_four(weight, base))


class GpuMatrix:
    """A packed matrix and the kernels to multiply with it."""

    def __init__(self, layout: TwoFourLayout) -> None:
        self.layout = layout
        self._semi: tuple[Tensor, Tensor] | None = None  # a second copy, only while it is the fastest

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [..., in] -> [..., out]`, in the dtype of x, sums in float32 where the device does so."""
        check_input(x, self.layout.shape[1])
        flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
        with torch.cuda.device_of(x):  # Triton launches on the current device; no effect for a CPU tensor
            return self._fastest(flat, bias)(flat, bias).view(*x.shape[:-1], self.layout.shape[0])

    def candidates(self, rows: int) -> dict[str, Product]:
        """The kernels for this number of rows, by name; unpacking is always one."""
        kernels: dict[str, Product] = {"unpack": self._unpacked}
        if not usable(self.layout.values):
            return kernels
        from budwood.kernels import gpu_products

        layout = self.layout
        if rows <= FEW:
            kernels["triton"] = lambda x, bias: gpu_products.two_four_linear(layout, x, bias)
        if 2 <= rows <= SOME:
            kernels["triton dot"] = lambda x, bias: gpu_products.two_four_some(layout, x, bias)
        if rows >= SOME and semi_structured_fits(layout.shape, layout.dtype):
            kernels["semi-structured"] = self._semi_structured
        return kernels

    def _fastest(self, x: Tensor, bias: Tensor | None) -> Product:
        """The fastest kernel for these rows; the first call of a key times them all."""
        rows = row_class(x.shape[0])
        kernels = self.candidates(rows)
        if len(kernels) == 1 or x.dtype != self.layout.dtype or not x.shape[0]:
            return self._unpacked
        key = (self.layout.shape, rows, x.dtype, str(x.device))
        if key not in results:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._unpacked  # nothing can be timed during capture; run once before
            results[key] = self._autotune(kernels, rows, bias, x)
            if results[key].winner != "semi-structured":
                self._semi = None
        return kernels[results[key].winner]

    def _autotune(self, kernels: dict[str, Product], rows: int, bias: Tensor | None, like: Tensor) -> AutotuneResult:
        """All kernels on a product of `rows` rows, checked against the dense weight."""
        generator = torch.Generator(like.device).manual_seed(0)
        x = torch.randn(rows, like.shape[1], dtype=like.dtype, device=like.device, generator=generator)
        dense = self.layout.unpack()
        runners = {name: (lambda kernel=kernel: kernel(x, bias)) for name, kernel in kernels.items()}
        result = autotune(
            runners,
            expected=F.linear(x, dense, bias),
            clock=graph_clock() if x.is_cuda else wall_clock,
            baselines={"dense": lambda: F.linear(x, dense, bias)},
        )
        times = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in result.seconds.items())
        out, width = self.layout.shape
        log.info("%d x %d, %d rows, %s on %s: %s (%s)", out, width, rows, x.dtype, x.device, result.winner, times)
        for name, fault in result.dropped.items():
            log.warning("%d x %d, %d rows: %s is not used: %s", out, width, rows, name, fault)
        return result

    def dense(self) -> Tensor:
        """The dense matrix `[out, in]`."""
        if not usable(self.layout.values):
            return self.layout.unpack()
        from budwood.kernels import gpu_products

        return gpu_products.two_four_unpacked(self.layout)

    def _unpacked(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), bias)

    def _semi_structured(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """torch's 2:4 product, plus a sparse product of the recovered weights."""
        if self._semi is None:
            skeleton = self.layout.skeleton()
            recovered = self.layout.unpack() - skeleton  # disjoint positions: exact
            self._semi = (torch.sparse.to_sparse_semi_structured(skeleton), recovered.to_sparse_csr())
        skeleton, recovered = self._semi
        y = F.linear(x, skeleton, bias)
        return y + (recovered @ x.T).T if recovered.values().numel() else y


def row_class(rows: int) -> int:
    """The class of a number of rows: the next power of two, up to 1024."""
    return min(1 << max(rows - 1, 0).bit_length(), MANY)


def semi_structured_fits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch's 2:4 tensors support the matrix: multiples of 32 rows and 64 columns, 16-bit dtypes."""
    return shape[0] % 32 == 0 and shape[1] % 64 == 0 and dtype in (torch.float16, torch.bfloat16)
