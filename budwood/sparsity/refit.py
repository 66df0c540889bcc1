"""Least squares on a given support: the best kept weights of each row once the others are removed.

For a row with support S the best weights are w_S = H_SS⁻¹ (H w₀)_S (Frantar, Alistarh, 2301.00774, section 3.1). No
matrix is inverted: conjugate gradients solve all rows at once, each with its own step sizes (ALPS, 2406.07831, section
3.3). Inputs are scaled so that the diagonal of H is 1, which equals preconditioning with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1 << 23  # weights solved at once: bounds the temporaries on wide matrices


@dataclass(frozen=True)
class Refitted:
    """New weights [out, in], zero off the support, and the change of the squared output error of every row."""

    weight: Tensor
    change: Tensor  # [out], at most 0, in the units of the second moments
    steps: int  # the most that any row needed


def refit(
    start: Tensor,
    keep: Tensor,
    dense: Tensor,
    moments: Tensor,
    cross: Tensor | None = None,
    *,
    damp: float = 0.01,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Refitted:
    """Minimise ‖X w - X w₀‖² of every row w over the weights that `keep` [out, in] marks, from `start` [out, in].

    dense: W₀ [out, in]. moments: XᵀX [in, in]; all is computed in its dtype, on its device. cross: X₀ᵀX [in, in] where
    the target is X₀ w₀ with other inputs X₀. damp: weight of a pull towards W₀, as a share of the mean of the diagonal;
    it allows matrices without full rank and inputs that are always 0. A row is finished when the norm of its gradient
    is `tolerance` of that at the kept weights of W₀, or after `iterations` steps; rows without a gain keep their start.
    """
    start, dense, keep = start.to(moments), dense.to(moments), keep.to(moments.device)
    diagonal = moments.diagonal()
    ridge = damp * diagonal.mean()
    scale = torch.where(diagonal + ridge > 0, diagonal + ridge, 1).rsqrt()  # [in]
    system = moments * scale[:, None] * scale  # diagonal 1 once damped
    system.diagonal().add_(ridge * scale.square())
    rows = max(1, ROWS // start.shape[1])
    pieces = [
        _solve(
            start[i : i + rows],
            keep[i : i + rows],
            dense[i : i + rows],
            system,
            scale,
            ridge,
            cross,
            iterations,
            tolerance,
        )
        for i in range(0, len(start), rows)
    ]
    return Refitted(
        torch.cat([weight for weight, _, _ in pieces]),
        torch.cat([change for _, change, _ in pieces]),
        max(steps for _, _, steps in pieces),
    )


def _solve(
    start: Tensor,
    keep: Tensor,
    dense: Tensor,
    system: Tensor,
    scale: Tensor,
    ridge: Tensor,
    cross: Tensor | None,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, int]:
    """Some rows, in scaled weights w / scale: weights, change of the undamped error, steps."""
    first = torch.where(keep, start, 0) / scale
    wanted = dense / scale
    aim = wanted @ system if cross is None else (dense @ cross + ridge * dense) * scale
    weight = first.clone()
    gradient = aim - weight @ system  # half the negative gradient
    before = gradient
    residual = gradient.masked_fill(~keep, 0)
    direction = residual.clone()
    length = residual.square().sum(dim=1, keepdim=True)  # [out, 1]
    plain = (aim - torch.where(keep, wanted, 0) @ system).masked_fill_(~keep, 0)
    enough = tolerance**2 * plain.square().sum(dim=1, keepdim=True)
    steps = 0
    while steps < iterations and bool((length > enough).any()):
        image = (direction @ system).masked_fill_(~keep, 0)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        active = (length > enough) & (curvature > 0)
        step = torch.where(active, length / curvature, 0)
        weight.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        shorter = residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(active, shorter / length, 0)).add_(residual)
        length = torch.where(active, shorter, 0)
        steps += 1
    # The difference of two quadratics without cancellation: f(w) - f(s) = -(w - s) · (∇s + ∇w) / 2, here undamped.
    pull = ridge * scale.square() * (wanted.mul(2) - weight - first)
    moved = weight - first
    change = -(moved * (before + (aim - weight @ system) - pull)).sum(dim=1)
    better = change < 0
    weight = torch.where(better[:, None], weight * scale, start)
    return torch.where(keep, weight, 0), change.clamp(max=0), steps
