"""Importance scores of weights: [out, in] in float32 or better, never negative, higher is kept."""

from torch import Tensor

from budwood.sparsity.second_order import Factor


def magnitude(weight: Tensor) -> Tensor:
    """|W|."""
    return weight.float().abs()  # [out, in]


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|W| times the norm of its input (arXiv 2306.11695, equation 1)."""
    return weight.float().abs().mul_(norms.float().to(weight.device))  # [out, in] * [in]


def gblm(weight: Tensor, norms: Tensor, gradients: Tensor, alpha: float) -> Tensor:
    """|W| (X_j + alpha G): weights, norms X [in] of their inputs, norms G [out, in] of their gradients over samples.

    GBLM-Pruner (Das, Sun, Ma, Shen, arXiv 2311.04902, equation 5).
    """
    scores = gradients.float() * alpha  # [out, in]
    return scores.add_(norms.float().to(scores.device)).to(weight.device).mul_(weight.float().abs())


def obs(weight: Tensor, factor: Factor) -> Tensor:
    """Loss of removing one weight when the rest of its row is adjusted: W² / diag(H⁻¹), H damped.

    Optimal brain surgeon (Hassibi and Stork 1993, equation 5) without the factor 1/2. Weights of features
    that are 0 in all calibration tokens score 0.
    """
    spread = factor.upper.square().sum(dim=0)  # [in], the diagonal of the inverse
    scores = weight.to(spread).square() / spread  # [out, in]
    return scores.masked_fill(factor.dead, 0).to(weight.device)
