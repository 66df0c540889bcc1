"""Taylor importance of units (LLM-Pruner: Ma, Fang, Wang, NeurIPS 2023, arXiv 2305.11627, section 3.2).

Removing a weight w changes the loss by -g w + ½ h w² to second order, with g its gradient and h, on the diagonal, the
mean of the squared gradients of single windows. A *slice* is what one channel of a unit has in one linear: a row of a
linear that writes the channel, a column of one that reads it.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Order = Literal["first", "second", "mixed", "vector"]
Reduction = Literal["sum", "mean", "max", "product", "first", "second", "last"]
GRADIENT = ("first", "mixed", "vector")  # orders that need the gradient of the mean loss
SQUARE = ("second", "mixed")  # orders that need the mean squared gradient of single windows


def salience(weight: Tensor, order: Order, gradient: Tensor | None = None, square: Tensor | None = None) -> Tensor:
    """The signed importance of every weight, shaped as `weight`.

    first and vector W G; second W² A; mixed W G - ½ W² A. gradient: G, of the mean loss over all windows. square: A,
    the mean over windows of the squared gradient of one. Raises ValueError where one that is needed is missing.
    """
    if (order in GRADIENT and gradient is None) or (order in SQUARE and square is None):
        raise ValueError(f"order {order!r} needs {'gradient' if gradient is None else 'square'}")
    if gradient is None or order == "second":
        assert square is not None
        return weight.square() * square
    if square is None or order != "mixed":
        return weight * gradient
    return weight * gradient - 0.5 * weight.square() * square


def slice_scores(salience: Tensor, order: Order, columns: bool) -> Tensor:
    """The score of every row (or column) of a salience [out, in]: Σ|s|, for "vector" |Σ s|. Sums are in float64."""
    values = salience.T if columns else salience
    if order == "vector":
        return values.sum(dim=1, dtype=torch.float64).abs()
    return values.abs().sum(dim=1, dtype=torch.float64)


def combine(members: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """Slices of several linears, equally shaped, to one score per channel. first, second, last: that member alone.

    Raises ValueError where there is no such member.
    """
    if reduction in ("first", "second", "last"):
        place = {"first": 0, "second": 1, "last": len(members) - 1}[reduction]
        if place >= len(members):
            raise ValueError(f"reduction {reduction!r} of {len(members)} members")
        return members[place]
    stacked = torch.stack(list(members))  # [members, ...]
    if reduction == "max":
        return stacked.amax(dim=0)
    if reduction == "product":
        return stacked.prod(dim=0)
    return stacked.sum(dim=0) if reduction == "sum" else stacked.mean(dim=0)


def unit_scores(members: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """The score of every unit [units], from the slices [units, channels] of each linear that belongs to it.

    Linears are combined channel by channel, then the channels of a unit are summed. Where linears have different
    numbers of channels (query heads that share a key head), those of the same place in a head are added first.
    """
    channels = math.gcd(*(member.shape[1] for member in members))
    folded = [member.unflatten(1, (-1, channels)).sum(dim=1) for member in members]
    return combine(folded, reduction).sum(dim=1)
