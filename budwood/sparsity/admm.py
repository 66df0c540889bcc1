"""A mask for weights that will be refitted, found by ADMM, the alternating direction method of multipliers (ALPS,
Meng et al., 2406.07831, sections 3.1 and 3.2).

Minimises tr((W - W₀) H (W - W₀)ᵀ) over the weights that a pattern allows. W may be dense and must equal D, which
satisfies the pattern; the penalty ρ on their difference rises until the support of D no longer changes.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from budwood.sparsity.patterns import Pattern

EVERY = 3  # iterations between checks of the support
FIRST_PENALTY, LOWEST_PENALTY = 0.3, 1e-6  # the paper's 0.1 ends slightly lower after three times the iterations


@dataclass(frozen=True)
class System:
    """Damped second moments with their inputs scaled to a diagonal of 1.

    One serves all penalties, and all matrices that share their input.
    """

    scale: Tensor  # [in], what the inputs were divided by
    matrix: Tensor  # [in, in]
    _inverses: dict[float, Tensor] = field(default_factory=dict)  # by penalty; matrices of one input often share them

    @classmethod
    def of(cls, moments: Tensor, damp: float = 0.01) -> "System":
        """From XᵀX [in, in], in its dtype. damp: as a share of the mean diagonal."""
        diagonal = moments.diagonal() + damp * moments.diagonal().mean()
        scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
        matrix = moments / scale[:, None] / scale
        matrix.diagonal().copy_(torch.where(diagonal > 0, 1, 0))
        return cls(scale, matrix)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [in] and eigenvectors [in, in]."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp(min=0), vectors

    def inverted(self, penalty: float) -> Tensor:
        """(matrix + penalty)⁻¹; by the slower eigen-decomposition where rounding makes the sum indefinite."""
        if penalty not in self._inverses:
            self._inverses[penalty] = self._inverted(penalty)
        return self._inverses[penalty]

    def _inverted(self, penalty: float) -> Tensor:
        raised = self.matrix.clone()
        raised.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            return torch.cholesky_inverse(factor)
        values, vectors = self.eigen
        return (vectors / (values + penalty)) @ vectors.T


def admm(weight: Tensor, system: System, pattern: Pattern, iterations: int = 300) -> tuple[Tensor, Tensor]:
    """The mask, bool [out, in], for `weight` [out, in] and the second moments of its inputs, and the last matrix of the
    search on this mask: a good start for `refit`.

    The pattern must keep the largest scores it may, so that its choice by magnitude is the nearest allowed matrix: N:M,
    a share of each row or of the matrix, N:M and the best of the rest.
    """
    wanted = weight.to(system.matrix) * system.scale
    pull = wanted @ system.matrix  # W₀ H

    def nearest(point: Tensor) -> tuple[Tensor, Tensor]:
        keep = pattern.keep(point.abs())
        return torch.where(keep, point, 0), keep

    penalty, stable = FIRST_PENALTY, False
    near, keep = nearest(wanted)
    dual = torch.zeros_like(wanted)
    previous = keep
    inverse = system.inverted(penalty)
    for iteration in range(1, iterations + 1):
        free = (pull + penalty * near - dual) @ inverse
        near, keep = nearest(free + dual / penalty)
        dual += penalty * (free - near)
        if iteration % EVERY or iteration == iterations:
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
        inverse = system.inverted(penalty)
    return keep, near / system.scale
