"""The number of weights a method keeps in one matrix, predicted from its shape: the basis of size predictions."""

import math
from dataclasses import dataclass

from budwood.sparsity.selection import portion


@dataclass(frozen=True)
class Forecast:
    """Expected counts of kept positions in one matrix [out, in]; a kept weight that is 0 counts.

    `recovered` counts the weights beyond two of each aligned group of four; None where groups of four may hold
    any number. `block` is (side, blocks per block row) where recovered weights are in whole square blocks. `group` is
    the number of columns with one scale of 4-bit codes, where it is not the usual one.
    """

    nonzeros: float
    recovered: float | None = None
    block: tuple[int, int] | None = None
    shape: tuple[int, int] | None = None  # [out, in] afterwards, where the matrix becomes smaller
    group: int | None = None


def group_law(share: float, width: int, group: int) -> list[float]:
    """Probability that 0, 1, ..., `group` members of one group are among the best `share` of `width` scores.

    Hypergeometric; holds for scores of any continuous distribution whose scale is unrelated to position.
    """
    marked, draws = portion(share, width), math.comb(width, group)
    return [math.comb(marked, j) * math.comb(width - marked, group - j) / draws for j in range(group + 1)]


def expected_density(alpha: float, width: int, kept: int = 2, group: int = 4) -> float:
    """Share of all weights that rank in the best `alpha` of `width` and were dropped by kept:group.

    (1/M) Σ_{j>N} (j-N) P(j) with the exact `group_law`; for 2:4 and large widths about alpha³ - alpha⁴/2.
    Real layers are somewhat above it, since neighbouring channels have related scales.
    """
    law = group_law(alpha, width, group)
    return sum((j - kept) * law[j] for j in range(kept + 1, group + 1)) / group
