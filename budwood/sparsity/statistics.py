"""Sums over calibration tokens, which batches, ranks and interrupted runs add up."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.sparsity.second_order import Factor, factorise

TOKENS = 256  # per product in float32: for longer ones BLAS splits the sum by the number of threads
BITS = 6  # significant bits of a norm: fewer agree more often between machines, see docs/results.md
PANEL = 384  # columns of the second moments per product: about 0.55 of a full product at usual widths


class SquaredNorm:
    """Sum of squares of every input feature over all tokens; Wanda and WRP score with its root.

    Equal inputs give equal norms, bit for bit, on every processor and with any number of threads and any batch size:
    a sequence is squared and summed in float32 by elementwise operations in a fixed order. Sequences are added in
    float64, which is exact in any order as long as a feature's sums differ between sequences by less than 2^20.
    Inputs that are not finite make the sum not finite.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.total = torch.zeros(width, dtype=torch.float64)  # [in]

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in]; two dimensions are one sequence."""
        x = x[None] if x.dim() == 2 else x.flatten(0, -3)
        self.count += x.shape[0] * x.shape[1]
        self.total = self.total.to(x.device)
        for sums in _sums_of_squares(x).double():
            self.total += sums

    def merge(self, other: Self) -> None:
        """Adds what `other` has summed over other tokens."""
        self.count += other.count
        self.total = self.total.to(other.total.device) + other.total

    def state(self) -> dict[str, Tensor]:
        """Everything summed so far, as tensors; see `load_state`."""
        return {"count": torch.tensor(self.count), "total": self.total}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the sums by those that `state` returned."""
        self.count, self.total = int(state["count"]), state["total"].clone()

    def norms(self) -> Tensor:
        """Root of the sum, rounded to BITS significant bits, float32 [in].

        The last bits of the inputs differ between processors. Over many tokens they move a norm by about 1e-8 of its
        size, which seldom changes its first bits. Scores of bfloat16 weights are then exact in float32.
        """
        mantissa, exponent = torch.frexp(self.total.sqrt())
        return torch.ldexp((mantissa * 2**BITS).round(), exponent - BITS).float()

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        refuse_broken_inputs(self.total, name)


class PublishedNorm:
    """The norm as the published programs compute it: a running mean over sequences in float32, equal to the last bit.

    Weights that were once quantised have many equal magnitudes, so features of nearly equal norm give near-ties, and a
    few of them are decided by the last bit of the norm. The blocks after them differ more and more: on a small model,
    20 of 106 million positions changed in block 4 move the perplexity by 1.6 %. Comparing figures needs the same sums.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.sequences = 0
        self.mean = torch.zeros(width)  # [in] float32

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in]; two dimensions are one sequence."""
        self.mean = self.mean.to(x.device)
        for sequence in x[None] if x.dim() == 2 else x.flatten(0, -3):
            self.count += sequence.shape[0]
            self.mean *= self.sequences / (self.sequences + 1)
            self.sequences += 1
            self.mean += torch.linalg.vector_norm(sequence.float(), dim=0) ** 2 / self.sequences

    def merge(self, other: Self) -> None:
        """Adds the mean of `other` over other sequences; the last bits may then differ from those of one pass."""
        self.count += other.count
        self.sequences += other.sequences
        share = other.sequences / max(1, self.sequences)
        mean = self.mean.double().to(other.mean.device) * (1 - share) + other.mean.double() * share
        self.mean = mean.float()

    def state(self) -> dict[str, Tensor]:
        """Everything summed so far, as tensors; see `load_state`."""
        return {"count": torch.tensor(self.count), "sequences": torch.tensor(self.sequences), "mean": self.mean}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the sums by those that `state` returned."""
        self.count, self.sequences = int(state["count"]), int(state["sequences"])
        self.mean = state["mean"].clone()

    def norms(self) -> Tensor:
        """Root of the mean over sequences, float32 [in]."""
        return self.mean.sqrt()

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        refuse_broken_inputs(self.mean, name)


class Gram:
    """Second moments of the inputs, sum of x xᵀ over all tokens; SparseGPT's Hessian up to a factor it ignores.

    Only the upper triangle is summed: products of column panels in full float32, accumulated in float64. Inputs in
    bfloat16 may be multiplied by bfloat16 instructions: their products are exact and summed in float32 as well.
    Memory is 8 in² bytes: 128 MiB at 4096, 0.9 GiB at 11008, 6.1 GiB at 28672. Linears that share an input share one
    object, hence one factor. The number of threads changes no bit; another BLAS or processor may change the last ones.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.total = torch.zeros(width, width, dtype=torch.float64)  # [in, in], valid on and above the diagonal
        self._factors: dict[float, Factor] = {}

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in]."""
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

    def merge(self, other: Self) -> None:
        """Adds what `other` has summed over other tokens."""
        self._factors.clear()
        self.count += other.count
        self.total = self.total.to(other.total.device) + other.total

    def state(self) -> dict[str, Tensor]:
        """Everything summed so far, as tensors; see `load_state`."""
        return {"count": torch.tensor(self.count), "total": self.total}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the sums by those that `state` returned."""
        self._factors.clear()
        self.count, self.total = int(state["count"]), state["total"].clone()

    def matrix(self) -> Tensor:
        """The whole symmetric matrix, float64 [in, in]."""
        return self.total.triu() + self.total.triu(1).T

    def norms(self) -> Tensor:
        """Root of the mean square of every input, float32 [in]."""
        return (self.total.diagonal() / max(1, self.count)).sqrt().float()

    def factor(self, damp: float) -> Factor:
        """The damped inverse factor, computed once per damping, on the CPU like the sweeps that use it."""
        if damp not in self._factors:
            self._factors[damp] = factorise(self.total.cpu(), damp)
        return self._factors[damp]

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        refuse_broken_inputs(self.total.diagonal(), name)  # |x y| never exceeds the larger of x² and y²


def _sums_of_squares(x: Tensor) -> Tensor:
    """[sequences, tokens, in] -> sum over tokens, float32 [sequences, in].

    The later half of the rows is added to the earlier one until one row is left. Elementwise additions round alike on
    every processor; a library's reduction chooses its order by vector width and number of threads. One sequence at a
    time: larger temporaries are new memory at every call.
    """
    sums = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
    for sequence, total in zip(x, sums, strict=True):
        rows = sequence.square() if sequence.dtype == torch.float32 else sequence.float().square_()
        left = len(rows)
        while left > 1:
            half = left // 2
            rows[:half] += rows[left - half : left]
            left -= half
        total += rows[:1].sum(0)  # no row, or the one that is left
    return sums


def refuse_broken_inputs(total: Tensor, name: str) -> None:
    """Raise RunError when sums over the inputs of the linear `name` are not finite."""
    broken = int((~total.isfinite()).sum())
    if broken:
        raise RunError(
            f"{name}: {broken} of {len(total)} input features were NaN or infinite during calibration; "
            f"check that the dense model gives a finite loss on these texts in this dtype"
        )


@contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Inside, float32 products round their factors: "highest" not at all, "medium" to bfloat16 where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
