"""LoRAPrune's criterion (Zhang et al., Findings of ACL 2024, arXiv 2305.18403): importance by low-rank gradients.

Where a weight W [out, in] is frozen and s B A is trained beside it, A [rank, in], B [out, rank], only the factors have
gradients. One plain step of size 1 changes B A by a known matrix, which stands for the gradient of W. It is a
heuristic: at the start, B = 0, it is the true gradient seen through the random projection Aᵀ A.
"""

import torch
from torch import Tensor

DECAY = 0.9  # of the running importance
FLOOR = 1e-8  # added to a norm, as in the published program


def low_rank_gradient(a: Tensor, b: Tensor, a_gradient: Tensor, b_gradient: Tensor) -> Tensor:
    """∂B A + B ∂A - ∂B ∂A, which is B A - (B - ∂B)(A - ∂A): [out, in]."""
    return b_gradient @ a + (b - b_gradient) @ a_gradient


def importance(weight: Tensor, a: Tensor, b: Tensor, gradient: Tensor, scale: float, squared: bool = False) -> Tensor:
    """|G (W + s B A)| of every weight, [out, in], as the published program has it; squared: as the paper has it.

    gradient: of W, or what stands for it.
    """
    product = gradient * (weight + scale * (b @ a))
    return product.square() if squared else product.abs()


def sensitivity(importances: Tensor, width: int = 1, columns: bool = False, normalised: bool = True) -> Tensor:
    """The sum over the weights of each group of `width` neighbouring rows, or `columns`: [groups].

    A group is a head, width its size, or a neuron, of width 1; matrices that read groups count by columns. normalised:
    divided by the Euclidean norm over the groups, so that matrices of different size add up.
    """
    sums = importances.sum(dim=0 if columns else 1).unflatten(0, (-1, width)).sum(dim=1)
    return normal(sums) if normalised else sums


def normal(sums: Tensor) -> Tensor:
    """Sums of groups [groups], divided by their Euclidean norm."""
    return sums / (sums.norm() + FLOOR)


def smoothed(before: Tensor | None, now: Tensor, decay: float = DECAY) -> Tensor | None:
    """The running importance of groups [groups] after a step, from 0 where there is none before.

    A step whose importance holds NaN is left out.
    """
    if torch.isnan(now).any():
        return before
    return decay * (torch.zeros_like(now) if before is None else before) + (1 - decay) * now


def keep_groups(scores: Tensor, ratio: float) -> Tensor:
    """Bool [groups]: all but the floor(groups · ratio) of smallest score; of ties the lower index is kept."""
    return keep_all_but(scores, int(len(scores) * ratio))


def keep_all_but(scores: Tensor, dropped: int) -> Tensor:
    """Bool [groups]: all but the `dropped` of smallest score; of ties the lower index is kept."""
    order = scores.flip(0).sort(stable=True).indices  # the higher index first among ties
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[len(scores) - 1 - order[:dropped]] = False
    return keep


def dropped_of(count: float, share: float) -> int:
    """How many are masked when a share of the `count` of the end is, rounded down."""
    return int(count * share + 1e-9)


def ratio_at(
    step: int, steps: int, final: float, first: float = 0.0, warm_up: float = 0.1, cool_down: float = 0.1
) -> float:
    """The share of groups to mask at a step: `first` during the warm-up, `final` in the end, a cubic in between.

    final + (first - final)(1 - τ)³ with τ the part of the time between that has passed (Zhu, Gupta, 2017).
    """
    begin, end = warm_up * steps, (1 - cool_down) * steps
    if step <= begin:
        return first
    if step >= end:
        return final
    return final + (first - final) * (1 - (step - begin) / (end - begin)) ** 3
