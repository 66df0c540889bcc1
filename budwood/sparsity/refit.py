"""Least squares on a given support: what the kept weights of each row should be once the others are gone.

For a row with support S the best weights are w_S = H_SS⁻¹ (H w₀)_S (Frantar, Alistarh, 2301.00774, section 3.1). No row
is inverted here: conjugate gradients solve all rows at once, each with step sizes of its own (ALPS, 2406.07831, section
3.3). Inputs are scaled so that the diagonal of H is 1, which is the same as preconditioning with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1 << 23  # weights solved at once: bounds the temporaries on wide matrices


@dataclass(frozen=True)
class Refitted:
    """New weights [out, in], zero off the support, and how much the squared output error of every row changed."""

    weight: Tensor
    change: Tensor  # [out], never above 0, in units of the second moments given
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

    dense: W₀ [out, in]. moments: XᵀX [in, in], whose type is the one all is computed in. cross: X₀ᵀX [in, in] where the
    target is X₀ w₀ with other inputs X₀. damp: pulls towards W₀, as a share of the mean of the diagonal; it bears
    matrices without full rank and inputs that were never heard. A row is done when its gradient has shrunk to
    `tolerance` of what it is where the kept weights are still W₀'s, or after `iterations` steps; rows that gained
    nothing keep their start.
    """
    start, dense = start.to(moments), dense.to(moments)
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
    gradient = aim - weight @ system  # half of it, downhill
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
        going = (length > enough) & (curvature > 0)
        step = torch.where(going, length / curvature, 0)
        weight.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        shorter = residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(going, shorter / length, 0)).add_(residual)
        length = torch.where(going, shorter, 0)
        steps += 1
    # The difference of two quadratics without cancellation: f(w) - f(s) = -(w - s) · (∇s + ∇w) / 2, here undamped.
    pull = ridge * scale.square() * (wanted.mul(2) - weight - first)
    moved = weight - first
    change = -(moved * (before + (aim - weight @ system) - pull)).sum(dim=1)
    better = change < 0
    weight = torch.where(better[:, None], weight * scale, start)
    return torch.where(keep, weight, 0), change.clamp(max=0), steps
