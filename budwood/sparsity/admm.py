"""Which weights to keep when all that stay will be fitted anew: a mask found by alternating directions (ALPS,
Meng et al., 2406.07831, sections 3.1 and 3.2).

Minimises tr((W - W₀) H (W - W₀)ᵀ) over the weights that a pattern allows. W may be dense and has to agree with D, which
keeps to the pattern; the price ρ of disagreeing rises until the support of D stands still.
"""

import torch
from torch import Tensor

from budwood.sparsity.patterns import Pattern

EVERY = 3  # iterations between looks at the support
FIRST_PRICE, LOWEST_PRICE = 0.3, 1e-6  # the paper begins at 0.1, which ends a hair lower after thrice the rounds


def admm(
    weight: Tensor, moments: Tensor, pattern: Pattern, damp: float = 0.01, iterations: int = 300
) -> tuple[Tensor, Tensor]:
    """The mask, bool [out, in], for `weight` [out, in] and second moments [in, in], whose type is computed in, and the
    matrix on it where the search ended: a good start for a fit.

    The pattern must take the largest of what it may, so that its choice by size is the nearest allowed matrix: N:M, a
    share of rows or matrix, N:M and the best of the rest. damp: as a share of the mean diagonal. One
    eigen-decomposition serves all prices.
    """
    diagonal = moments.diagonal() + damp * moments.diagonal().mean()
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()  # [in]
    system = moments / scale[:, None] / scale
    system.diagonal().copy_(torch.where(diagonal > 0, 1, 0))
    values, vectors = torch.linalg.eigh(system)
    wanted = weight.to(system) * scale
    pull = wanted @ system  # W₀ H

    def nearest(point: Tensor) -> tuple[Tensor, Tensor]:
        keep = pattern.keep(point.abs())
        return torch.where(keep, point, 0), keep

    def inverted(price: float) -> Tensor:
        return (vectors / (values.clamp(min=0) + price)) @ vectors.T

    price, settled = FIRST_PRICE, False
    near, keep = nearest(wanted)
    blame = torch.zeros_like(wanted)
    seen = keep
    inverse = inverted(price)
    for iteration in range(1, iterations + 1):
        free = (pull + price * near - blame) @ inverse
        near, keep = nearest(free + blame / price)
        blame += price * (free - near)
        if iteration % EVERY:
            continue
        moved = int((keep ^ seen).sum()) / max(1, int(keep.sum()))
        seen = keep
        if not moved and settled:
            break
        if moved >= 0.005:
            settled = True
            price *= 1.3 if moved >= 0.1 else 1.2
        elif settled:
            price *= 1.1
        elif price < LOWEST_PRICE:
            break  # nothing to move: all is kept, or inputs are independent
        else:  # the price was too high from the start
            price /= 5
            near, keep = nearest(wanted)
            blame.zero_()
            seen = keep
        inverse = inverted(price)
    return keep, near / scale
