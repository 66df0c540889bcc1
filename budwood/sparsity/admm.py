"""A mask for weights that will be refitted, found by ADMM, the alternating direction method of multipliers (ALPS,
Meng et al., 2406.07831, sections 3.1 and 3.2).

Minimises tr((W - W₀) H (W - W₀)ᵀ) over the weights that a pattern allows. W may be dense and must equal D, which
satisfies the pattern; the penalty ρ on their difference rises until the support of D no longer changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.sparsity.patterns import Pattern

EVERY = 3  # iterations between checks of the support
FIRST_PENALTY, LOWEST_PENALTY = 0.3, 1e-6  # the paper's 0.1 ends slightly lower after three times the iterations


@dataclass(frozen=True)
class Spectrum:
    """Damped second moments with their inputs scaled to a diagonal of 1, and their eigen-decomposition.

    One serves all penalties, and all matrices that share their input.
    """

    scale: Tensor  # [in], what the inputs were divided by
    system: Tensor  # [in, in]
    values: Tensor  # [in]
    vectors: Tensor  # [in, in]

    @classmethod
    def of(cls, moments: Tensor, damp: float = 0.01) -> "Spectrum":
        """From XᵀX [in, in], in its dtype. damp: as a share of the mean diagonal."""
        diagonal = moments.diagonal() + damp * moments.diagonal().mean()
        scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
        system = moments / scale[:, None] / scale
        system.diagonal().copy_(torch.where(diagonal > 0, 1, 0))
        return cls(scale, system, *torch.linalg.eigh(system))

    def inverted(self, penalty: float) -> Tensor:
        """(system + penalty)⁻¹."""
        return (self.vectors / (self.values.clamp(min=0) + penalty)) @ self.vectors.T


def admm(weight: Tensor, spectrum: Spectrum, pattern: Pattern, iterations: int = 300) -> tuple[Tensor, Tensor]:
    """The mask, bool [out, in], for `weight` [out, in] and the second moments of its inputs, and the last matrix of the
    search on this mask: a good start for `refit`.

    The pattern must keep the largest scores it may, so that its choice by magnitude is the nearest allowed matrix: N:M,
    a share of each row or of the matrix, N:M and the best of the rest.
    """
    wanted = weight.to(spectrum.system) * spectrum.scale
    pull = wanted @ spectrum.system  # W₀ H

    def nearest(point: Tensor) -> tuple[Tensor, Tensor]:
        keep = pattern.keep(point.abs())
        return torch.where(keep, point, 0), keep

    penalty, stable = FIRST_PENALTY, False
    near, keep = nearest(wanted)
    dual = torch.zeros_like(wanted)
    previous = keep
    inverse = spectrum.inverted(penalty)
    for iteration in range(1, iterations + 1):
        free = (pull + penalty * near - dual) @ inverse
        near, keep = nearest(free + dual / penalty)
        dual += penalty * (free - near)
        if iteration % EVERY:
            continue
        moved = int((keep ^ previous).sum()) / max(1, int(keep.sum()))
        previous = keep
        if not moved and stable:
            break
        if moved >= 0.005:
            stable = True
            penalty *= 1.3 if moved >= 0.1 else 1.2
        elif stable:
            penalty *= 1.1
        elif penalty < LOWEST_PENALTY:
            break  # nothing changes: all is kept, or inputs are independent
        else:  # the penalty was too high at the start
            penalty /= 5
            near, keep = nearest(wanted)
            dual.zero_()
            previous = keep
        inverse = spectrum.inverted(penalty)
    return keep, near / spectrum.scale
