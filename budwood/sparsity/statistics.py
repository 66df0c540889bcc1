"""Sums over calibration tokens. Merging batches, runs or ranks is adding, so only sums are kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.sparsity.second_order import Factor, factorise

PIECE = 256  # tokens squared at once: the product stays in the processor's cache, so the input is read once
PANEL = 384  # columns of the second moments per product: about 0.55 of a full product at usual widths


class SquaredNorm:
    """Squared length of every input feature over all tokens; Wanda and WRP score with its root.

    Products are float32, summed in float32 over at most 256 tokens, accumulated in float64. A value that
    is not finite makes `total` not finite.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.total = torch.zeros(width, dtype=torch.float64)  # [in]

    def add(self, x: Tensor) -> None:  # [tokens, in]
        self.total = self.total.to(x.device)
        self.count += x.shape[0]
        for piece in x.split(PIECE):
            piece = piece.float()
            self.total += (piece * piece).sum(dim=0)

    def sums(self) -> list[Tensor]:
        return [self.total]

    def norms(self) -> Tensor:
        """Root of the mean square per token, float32 [in]. The constant in front changes no mask."""
        return (self.total / max(self.count, 1)).sqrt().float()

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        _check(self.total, name)


class Gram:
    """Second moments of the inputs, sum of x xᵀ over all tokens; SparseGPT's H up to a factor it ignores.

    Only the upper triangle is summed: float32 products of column panels without TF32, accumulated in
    float64. Memory is 8 in² bytes: 128 MiB at 4096, 0.9 GiB at 11008, 6.1 GiB at 28672. Linears that share
    an input share one object, hence one factor.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.total = torch.zeros(width, width, dtype=torch.float64)  # [in, in], valid on and above the diagonal
        self._factors: dict[float, Factor] = {}

    def add(self, x: Tensor) -> None:  # [tokens, in]
        self.total = self.total.to(x.device)
        self.count += x.shape[0]
        self._factors.clear()
        x = x.float()
        with _full_float32():
            for start in range(0, x.shape[1], PANEL):
                stop = min(start + PANEL, x.shape[1])
                self.total[:stop, start:stop] += x[:, :stop].T @ x[:, start:stop]

    def sums(self) -> list[Tensor]:
        self._factors.clear()  # whoever asks may add other ranks' sums in place
        return [self.total]

    def matrix(self) -> Tensor:
        """The whole symmetric matrix, float64 [in, in]."""
        return self.total.triu() + self.total.triu(1).T

    def factor(self, damp: float) -> Factor:
        """The damped inverse factor, computed once per damping, on the CPU as are the sweeps that use it."""
        if damp not in self._factors:
            self._factors[damp] = factorise(self.total.cpu(), damp)
        return self._factors[damp]

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        _check(self.total.diagonal(), name)  # no product exceeds the larger of its two squares


def _check(total: Tensor, name: str) -> None:
    broken = int((~total.isfinite()).sum())
    if broken:
        raise RunError(
            f"{name}: {broken} of {len(total)} input features were NaN or infinite during calibration; "
            f"check that the dense model gives a finite loss on these texts in this dtype"
        )


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products: a Cholesky factor follows."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
