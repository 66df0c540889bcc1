"""Sparse, dense, sparse (Li et al., COLING 2025, arXiv 2408.10473): the mathematics on one matrix.

Everything that the inputs x of a matrix contribute is the sum of x xᵀ over all tokens. A step of gradient descent on
the squared output error then costs out · in² multiplications, whatever the number of tokens. Steps and penalties are
relative, so that the same numbers suit every matrix: steps to the largest that is stable, penalties to the mean square
of the inputs and the mean magnitude of the dense weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 512  # inputs up to which the largest eigenvalue is computed exactly
POWER = 30  # iterations for more inputs
MARGIN = 1.02  # of their result, which is too small


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs over the mean of their diagonal, float32 [in, in], and the largest eigenvalue."""

    matrix: Tensor
    largest: float

    @classmethod
    def of(cls, sums: Tensor) -> "Moments":
        """sums: x xᵀ over all tokens, [in, in]; all zero where no token had an input."""
        mean = sums.diagonal().mean()
        matrix = (sums / torch.where(mean > 0, mean, 1)).float()
        return cls(matrix, largest_eigenvalue(matrix))

    def error(self, weight: Tensor, dense: Tensor) -> Tensor:
        """The squared output error of weights [out, in] against the dense ones, per row: [out]."""
        lost = (weight - dense).to(self.matrix)
        return ((lost @ self.matrix) * lost).sum(dim=1)


def largest_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric, positive matrix; by power iterations beyond EXACT rows, and then about 2 % too large."""
    if len(matrix) <= EXACT:
        return float(torch.linalg.eigvalsh(matrix.double())[-1])
    vector = matrix.diagonal() + matrix.diagonal().mean()  # has a part along every direction that matters
    length = vector.norm()
    for _ in range(POWER):
        if length == 0:
            return 0.0
        vector = matrix @ (vector / length)
        length = vector.norm()
    return MARGIN * float(length)


@dataclass(frozen=True)
class Regrowth:
    """How a sparse matrix grows dense again.

    steps: their number. rate: as a share of the largest stable step, at most 1. l1, l2: penalties on the magnitude and
    the square of the weights. accelerated: Nesterov's momentum.
    """

    steps: int
    rate: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    accelerated: bool = False


# The published rate 0.1 and 200 epochs, relative to the largest stable step.
GENTLE = Regrowth(20)
# For methods that do not change the weights they keep.
REGULARISED = Regrowth(80, l1=0.01, l2=0.01, accelerated=True)


def regrow(sparse: Tensor, dense: Tensor, moments: Moments, how: Regrowth) -> Tensor:
    """Proximal gradient steps from sparse weights towards the outputs of the dense ones; all float32 [out, in].

    Minimises, with H the moments, ½ tr((Z - W) H (Z - W)ᵀ) + ½ l2 |Z|² + l1 w Σ|Z|, w the mean magnitude of W, and
    stops early: without penalties the minimum is W itself, and what is left of the sparse start is the purpose.
    Columns whose inputs are always 0 stay as they are.
    """
    matrix = moments.matrix
    start, dense = sparse.to(matrix), dense.to(matrix)
    alive = matrix.diagonal() > 0  # [in]
    length = moments.largest + how.l2
    if length == 0:
        return start
    step = how.rate / length
    shrink = step * how.l1 * float(dense.abs().mean())

    def descend(weight: Tensor) -> Tensor:
        weight = weight - step * ((weight - dense) @ matrix + how.l2 * weight)
        if shrink:
            weight = weight.sign() * (weight.abs() - shrink).clamp(min=0)
        return weight

    grown = _repeated(descend, start, how.steps, how.accelerated)
    return torch.where(alive, grown, start) + 0.0  # no negative zeros


def adjust(
    sparse: Tensor, keep: Tensor, dense: Tensor, moments: Moments, steps: int, accelerated: bool = True
) -> Tensor:
    """Gradient steps on the kept weights towards the outputs of the dense ones; all [out, in], zero where not kept.

    Few steps act as damping. The error of no row rises: rows that gain nothing keep their start.
    """
    matrix = moments.matrix
    keep = keep.to(matrix.device)
    start, dense = torch.where(keep, sparse.to(matrix), 0), dense.to(matrix)
    if moments.largest == 0:
        return start

    def descend(weight: Tensor) -> Tensor:
        return torch.where(keep, weight - ((weight - dense) @ matrix) / moments.largest, 0)

    return _better(_repeated(descend, start, steps, accelerated), start, dense, moments)


def adjust_freely(
    sparse: Tensor, choose: Callable[[Tensor], Tensor], dense: Tensor, moments: Moments, steps: int
) -> Tensor:
    """As `adjust`, with the mask chosen anew after every step: `choose` the magnitudes [out, in] -> bool [out, in].

    Weights that are not chosen are set to zero, so that they come back by a gradient only. The error of the matrix
    never rises.
    """
    matrix = moments.matrix
    weight, dense = sparse.to(matrix), dense.to(matrix)
    for _ in range(steps if moments.largest else 0):
        weight = weight - ((weight - dense) @ matrix) / moments.largest
        weight = torch.where(choose(weight.abs()), weight, 0)
    return weight


def _repeated(descend: Callable[[Tensor], Tensor], start: Tensor, steps: int, accelerated: bool) -> Tensor:
    """Steps from `start`, with Nesterov's momentum where `accelerated` (Beck, Teboulle, 2009)."""
    weight = ahead = start
    momentum = 1.0
    for _ in range(steps):
        before, weight = weight, descend(ahead)
        if accelerated:
            further = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = weight + (momentum - 1) / further * (weight - before)
            momentum = further
        else:
            ahead = weight
    return weight


def _better(found: Tensor, start: Tensor, dense: Tensor, moments: Moments) -> Tensor:
    """Row by row what has the smaller error."""
    gains = moments.error(found, dense) < moments.error(start, dense)
    return torch.where(gains[:, None], found, start)
