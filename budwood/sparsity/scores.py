"""How precious each weight is: [out, in] scores in float32 or better, never negative, higher stays."""

from torch import Tensor

from budwood.sparsity.second_order import Factor


def magnitude(weight: Tensor) -> Tensor:
    """The size of the weight alone."""
    return weight.float().abs()  # [out, in]


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """Size of the weight times the norm of its input (arXiv 2306.11695, equation 1)."""
    return weight.float().abs().mul_(norms.float().to(weight.device))  # [out, in] * [in]


def obs(weight: Tensor, factor: Factor) -> Tensor:
    """Loss of removing one weight when the rest of its row adapts: W² / diag(H⁻¹), H damped.

    Optimal brain surgeon (Hassibi and Stork 1993, equation 5) without the factor 1/2. Weights of features
    that calibration never excited score 0.
    """
    spread = factor.upper.square().sum(dim=0)  # [in], the diagonal of the inverse
    scores = weight.to(spread).square() / spread  # [out, in]
    return scores.masked_fill(factor.dead, 0).to(weight.device)
