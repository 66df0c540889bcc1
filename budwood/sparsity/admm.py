"""Which weights to keep when all that stay will be fitted anew: a mask found by alternating directions (ALPS,
Meng et al., 2406.07831, sections 3.1 and 3.2).

Minimises tr((W - W₀) H (W - W₀)ᵀ) over the weights that a pattern allows. W may be dense and has to agree with D, which
keeps to the pattern; the price ρ of disagreeing rises until the support of D stands still.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.sparsity.patterns import Pattern

EVERY = 3  # iterations between looks at the support
FIRST_PRICE, LOWEST_PRICE = 0.3, 1e-6  # the paper begins at 0.1, which ends a hair lower after thrice the rounds


@dataclass(frozen=True)
class Spectrum:
    """Damped second moments with their inputs scaled to a diagonal of 1, and their eigen-decomposition.

    One serves all prices, and all matrices that share their input.
    """

    scale: Tensor  # [in], what the inputs were divided by
    system: Tensor  # [in, in]
    values: Tensor  # [in]
    vectors: Tensor  # [in, in]

    @classmethod
    def of(cls, moments: Tensor, damp: float = 0.01) -> "Spectrum":
        """From XᵀX [in, in], whose type is computed in. damp: as a share of the mean diagonal."""
        diagonal = moments.diagonal() + damp * moments.diagonal().mean()
        scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
        system = moments / scale[:, None] / scale
        system.diagonal().copy_(torch.where(diagonal > 0, 1, 0))
        return cls(scale, system, *torch.linalg.eigh(system))

    def inverted(self, price: float) -> Tensor:
        """(system + price)⁻¹."""
        return (self.vectors / (self.values.clamp(min=0) + price)) @ self.vectors.T


def admm(weight: Tensor, spectrum: Spectrum, pattern: Pattern, iterations: int = 300) -> tuple[Tensor, Tensor]:
    """The mask, bool [out, in], for `weight` [out, in] and the second moments of its inputs, and the matrix on it where
    the search ended: a good start for a fit.

    The pattern must take the largest of what it may, so that its choice by size is the nearest allowed matrix: N:M, a
    share of rows or matrix, N:M and the best of the rest.
    """
    wanted = weight.to(spectrum.system) * spectrum.scale
    pull = wanted @ spectrum.system  # W₀ H

    def nearest(point: Tensor) -> tuple[Tensor, Tensor]:
        keep = pattern.keep(point.abs())
        return torch.where(keep, point, 0), keep

    price, settled = FIRST_PRICE, False
    near, keep = nearest(wanted)
    blame = torch.zeros_like(wanted)
    seen = keep
    inverse = spectrum.inverted(price)
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
        inverse = spectrum.inverted(price)
    return keep, near / spectrum.scale
