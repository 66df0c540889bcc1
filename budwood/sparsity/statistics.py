"""Sums over calibration tokens. Merging batches, runs or ranks is adding, so only sums are kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.sparsity.second_order import Factor, factorise

PANEL = 384  # columns of the second moments per product: about 0.55 of a full product at usual widths


class SquaredNorm:
    """Squared length of every input feature, the mean over sequences; Wanda and WRP score with its root.

    Summed sequence by sequence in float32, in the order of the published programs, whatever the batches. Weights that
    were once quantised have many equal sizes, so features of nearly equal norm meet in near-ties, a few of which fall
    the other way with any other rounding; the blocks after them differ more and more (on a small model, 20 of
    106 million positions changed in block 4 move the perplexity by 1.6 %). So the same sums are worth having.
    A value that is not finite makes `mean` not finite.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.sequences = 0
        self.mean = torch.zeros(width)  # [in] float32

    def add(self, x: Tensor) -> None:  # [..., tokens, in]; two dimensions are one sequence
        self.mean = self.mean.to(x.device)
        for sequence in x[None] if x.dim() == 2 else x.flatten(0, -3):
            self.count += sequence.shape[0]
            self.mean *= self.sequences / (self.sequences + 1)
            self.sequences += 1
            self.mean += _squares(sequence) / self.sequences

    @property
    def total(self) -> Tensor:
        """Sum over all tokens, float64 [in]."""
        return self.mean.double() * self.sequences

    def sums(self) -> list[Tensor]:
        return [self.total]

    def norms(self) -> Tensor:
        """Root of the mean over sequences, float32 [in]. The constant in front changes no mask."""
        return self.mean.sqrt()

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        _check(self.mean, name)


def _squares(sequence: Tensor) -> Tensor:
    """Sum of the squares of every feature over the tokens of [tokens, in], float32."""
    if sequence.dtype == torch.float32:
        return torch.linalg.vector_norm(sequence, dim=0) ** 2  # as published, to the last bit
    return sequence.float().square_().sum(0)  # several times as fast


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

    def add(self, x: Tensor) -> None:  # [..., tokens, in]
        self.total = self.total.to(x.device)
        x = x.reshape(-1, x.shape[-1]).float()
        self.count += x.shape[0]
        self._factors.clear()
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

    def norms(self) -> Tensor:
        """Root of the mean square of every input, float32 [in]."""
        return (self.total.diagonal() / max(1, self.count)).sqrt().float()

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
