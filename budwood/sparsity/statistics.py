"""Sums over calibration tokens. Merging batches, runs or ranks is adding, so only sums are kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.sparsity.second_order import Factor, factorise

TOKENS = 256  # per product in float32: of longer ones the library splits the sum by the number of threads
PANEL = 384  # columns of the second moments per product: about 0.55 of a full product at usual widths


class SquaredNorm:
    """Squared length of every input feature, the mean over sequences; Wanda and WRP score with its root.

    Summed sequence by sequence in float32, so that batches make no difference. A value that is not finite makes `mean`
    not finite.
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
            self.mean += self.squares(sequence) / self.sequences

    @staticmethod
    def squares(sequence: Tensor) -> Tensor:
        """Sum of the squares of every feature over the tokens of [tokens, in], float32 [in]."""
        if sequence.dtype == torch.float32:
            return torch.linalg.vecdot(sequence, sequence, dim=0)
        return sequence.float().square_().sum(0)

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


class PublishedNorm(SquaredNorm):
    """The same to the last bit of the published programs' float32 sums, at several times the price.

    Weights that were once quantised have many equal sizes, so features of nearly equal norm meet in near-ties, a few of
    which fall the other way with any other rounding; the blocks after them differ more and more (on a small model, 20
    of 106 million positions changed in block 4 move the perplexity by 1.6 %). Who compares figures wants the same sums.
    """

    @staticmethod
    def squares(sequence: Tensor) -> Tensor:
        return torch.linalg.vector_norm(sequence.float(), dim=0) ** 2


class Gram:
    """Second moments of the inputs, sum of x xᵀ over all tokens; SparseGPT's H up to a factor it ignores.

    Only the upper triangle is summed: products of column panels in full float32, accumulated in float64. Inputs in
    bfloat16 may be multiplied by its instructions: their products are exact and summed in float32 all the same.
    Memory is 8 in² bytes: 128 MiB at 4096, 0.9 GiB at 11008, 6.1 GiB at 28672. Linears that share an input share one
    object, hence one factor.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.total = torch.zeros(width, width, dtype=torch.float64)  # [in, in], valid on and above the diagonal
        self._factors: dict[float, Factor] = {}

    def add(self, x: Tensor) -> None:  # [..., tokens, in]
        self.total = self.total.to(x.device)
        exact = x.dtype == torch.bfloat16
        x = x.reshape(-1, x.shape[-1]).float()
        self.count += x.shape[0]
        self._factors.clear()
        with _products_in("medium" if exact else "highest"):
            for start in range(0, x.shape[1], PANEL):
                stop = min(start + PANEL, x.shape[1])
                products = x.new_zeros(stop, stop - start)
                for rows in x.split(len(x) or 1 if exact else TOKENS):
                    products.addmm_(rows[:, :stop].T, rows[:, start:stop])
                self.total[:stop, start:stop] += products

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
def _products_in(precision: str) -> Iterator[None]:
    """How float32 products round their factors: "highest" not at all, "medium" to bfloat16 where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
