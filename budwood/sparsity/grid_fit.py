"""Weights under a mask on a grid of 4-bit codes, chosen for the least squared error of the layer's outputs.

Minimises Σ over rows of (w - w₀) H (w - w₀)ᵀ + ρ ‖w - v‖² over weights w = code * scale of the kept positions, with the
scales of `codes.py`. H are the second moments of the inputs, w₀ is the dense row and v the start: the row fitted under
the mask without a grid. The pull towards v and not w₀ keeps what that fit has gained in directions that the calibration
text says little about. Three steps, each of out * in² multiplications a pass:

1. Columns are rounded from left to right, and the error of each is passed on to the columns after it, by the inverse of
   H + ρ restricted to them: GPTQ (Frantar et al., arXiv 2210.17323, equation 2), joined with a mask as in SparseGPT
   (arXiv 2301.00774, section 3.5). It starts from weights that are fitted under the mask already, so that a dropped
   column passes on no more than what it has taken over.
2. Coordinate descent: every code in turn becomes the best one while the others stay. No pass raises the error.
3. Scales for these codes by least squares in the metric of H, a small system for each row; then 2 again.

A row whose result is not below plain rounding keeps plain rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.sparsity.codes import GROUP, dequantise4, grouped, nearest_codes, nearest_scale, quantise4
from budwood.sparsity.second_order import Factor, factorise

STEP = 32  # columns that are visited one by one before their changes are passed on in one product
ROUNDS, SWEEPS = 2, 2  # of steps 3 and 2, without step 3 at first; passes of coordinate descent in each
PULL = 0.2  # on six matrices of one small model the error on other text was flat from 0.1 to 0.3
NEAR = 2.0  # a scale moves by less than this factor: beyond it, its codes no longer fit


@dataclass(frozen=True)
class Objective:
    """The squared error of the outputs of some rows and the pull towards their start, as one quadratic form.

    Up to a constant it is w A wᵀ - 2 aim wᵀ with A = H + ρ and aim = H w₀ + ρ v.
    """

    matrix: Tensor  # A [in, in]
    aim: Tensor  # [out, in]

    @classmethod
    def of(cls, start: Tensor, dense: Tensor, moments: Tensor, pull: float, cross: Tensor | None = None) -> "Objective":
        """pull: ρ as a share of the mean of the diagonal of `moments`. cross: see `fit_to_grid`."""
        ridge = pull * moments.diagonal().mean()
        matrix = moments.clone()
        matrix.diagonal().add_(ridge)
        return cls(matrix, dense @ (moments if cross is None else cross) + ridge * start)

    def residual(self, weight: Tensor) -> Tensor:
        """Half the negative gradient [out, in]."""
        return self.aim - weight @ self.matrix

    def change(self, weight: Tensor, other: Tensor) -> Tensor:
        """How much higher each row of `weight` is than that of `other`: [out]. Without cancellation."""
        return -((weight - other) * (self.residual(weight) + self.residual(other))).sum(1)


def fit_to_grid(
    start: Tensor,
    keep: Tensor,
    dense: Tensor,
    moments: Tensor,
    *,
    pull: float = PULL,
    cross: Tensor | None = None,
    factor: Factor | None = None,
    dtype: torch.dtype = torch.float32,
    group: int = GROUP,
) -> Tensor:
    """Weights on the grid, float32 [out, in], zero where `keep` [out, in] is False.

    start: weights that are fitted under the mask [out, in]. dense: W₀ [out, in], whose outputs are the target. moments:
    XᵀX [in, in]; all is computed on their device. cross: X₀ᵀX [in, in] where the target is X₀ w₀. factor: that of
    `moments` damped by `pull`, where it is known. dtype: that the weights will be stored in.
    """
    moments, keep = moments.float(), keep.to(moments.device)
    start = torch.where(keep, start.to(moments), 0)
    objective = Objective.of(start, dense.to(moments), moments, pull, cross)
    codes, scales = quantise4(start, keep, group, dtype)
    plain = dequantise4(codes, scales, torch.float32, group)
    weight = passed_on(start, keep, scales, factor or factorise(moments.cpu(), pull), group)
    for turn in range(ROUNDS):
        if turn:
            chosen = (weight / spread(scales, group, weight.shape[1])).round_()
            scales = fitted_scales(chosen, scales, objective, dtype, group)
            weight = chosen * spread(scales, group, weight.shape[1])
        weight = descended(weight, keep, scales, objective, SWEEPS, group)
    better = objective.change(weight, plain) < 0
    return torch.where(better[:, None], weight, plain) + 0.0  # code 0 of a negative scale is a negative zero


def passed_on(weight: Tensor, keep: Tensor, scales: Tensor, factor: Factor, group: int = GROUP) -> Tensor:
    """Rounded column by column; later columns take over the error of earlier ones. All [out, in] but the scales.

    With U the factor of the inverse of H, rounding column i by e changes column j > i by -e U[i, j] / U[i, i].
    """
    upper = factor.upper.to(weight)
    columns, kept = weight.T.contiguous(), keep.T.contiguous()  # [in, out]
    result = torch.zeros_like(columns)
    steps = spread(scales, group, weight.shape[1]).T.contiguous()
    for first in range(0, len(columns), STEP):
        last = min(first + STEP, len(columns))
        missed = torch.empty_like(columns[first:last])
        for i in range(first, last):
            result[i] = rounded(columns[i], kept[i], steps[i])
            missed[i - first] = (columns[i] - result[i]) / upper[i, i]
            columns[i + 1 : last].addr_(upper[i, i + 1 : last], missed[i - first], alpha=-1)
        columns[last:].addmm_(upper[first:last, last:].T, missed, alpha=-1)
    return result.T.contiguous()


def descended(
    weight: Tensor, keep: Tensor, scales: Tensor, objective: Objective, sweeps: int, group: int = GROUP
) -> Tensor:
    """The best level for each weight in turn, the others held: [out, in] -> [out, in].

    With the residual R = aim - W A the best value of column j is w + R_j / A_jj, rounded.
    """
    matrix = objective.matrix
    diagonal = matrix.diagonal().clamp(min=torch.finfo(matrix.dtype).tiny)
    columns, kept = weight.T.contiguous(), keep.T.contiguous()  # [in, out]
    steps = spread(scales, group, weight.shape[1]).T.contiguous()
    for _ in range(sweeps):
        residual = objective.residual(columns.T).T.contiguous()  # [in, out]
        for first in range(0, len(columns), STEP):
            last = min(first + STEP, len(columns))
            before = columns[first:last].clone()
            for i in range(first, last):
                level = rounded(columns[i] + residual[i] / diagonal[i], kept[i], steps[i])
                residual[i + 1 : last].addr_(matrix[i + 1 : last, i], level - columns[i], alpha=-1)
                columns[i] = level
            residual[last:].addmm_(matrix[last:, first:last], columns[first:last] - before, alpha=-1)
    return columns.T.contiguous()


def fitted_scales(
    codes: Tensor, scales: Tensor, objective: Objective, dtype: torch.dtype, group: int = GROUP
) -> Tensor:
    """The scales [out, groups] with the least error for these codes [out, in], rounded to those that can be stored.

    With c_g the codes of group g of a row and zeros elsewhere, s solves Σ_h (c_g A c_hᵀ) s_h = aim c_gᵀ. A scale that
    would change its sign or move far stays.
    """
    spans = list(grouped(codes.shape[1], group))
    system = codes.new_zeros(len(codes), len(spans), len(spans))
    right = codes.new_zeros(len(codes), len(spans))
    for g, span in enumerate(spans):
        image = (codes[:, span] @ objective.matrix[span]) * codes  # [out, in]
        for h, other in enumerate(spans):
            system[:, g, h] = image[:, other].sum(1)
        right[:, g] = (objective.aim[:, span] * codes[:, span]).sum(1)
    diagonal = system.diagonal(dim1=1, dim2=2)  # [out, groups]
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    found, failed = torch.linalg.solve_ex(system, right)
    ratio = found / scales
    stays = (failed != 0)[:, None] | ~((ratio > 1 / NEAR) & (ratio < NEAR))
    return nearest_scale(torch.where(stays, scales, found), dtype)


def rounded(weights: Tensor, kept: Tensor, steps: Tensor) -> Tensor:
    """The nearest levels of weights [out] of one column; zero where they are not kept."""
    return torch.where(kept, nearest_codes(weights, steps) * steps, 0)


def spread(scales: Tensor, group: int, width: int) -> Tensor:
    """The scale of every weight: [out, groups] -> [out, in]."""
    return scales.repeat_interleave(group, 1)[:, :width]
