"""Pruned matrices of odd shapes, for the tests of layouts and kernels."""

import torch
from torch import Tensor

# out, in, share of the dropped weights that is recovered
SHAPES = [(32, 64, 0.02), (33, 100, 0.05), (5, 4, 0.0), (1, 36, 0.5), (48, 1056, 0.015), (70, 256, 0.0)]


def pruned(out: int, width: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A 2:4 matrix with recovered weights, and its 2:4 mask; row 0 is kept whole if any is recovered."""
    generator = torch.Generator().manual_seed(out * width)
    weight = torch.randn(out, width, generator=generator)
    largest = weight.abs().view(-1, 4).topk(2, dim=1).indices
    base = torch.zeros(out * width // 4, 4, dtype=torch.bool).scatter_(1, largest, True).view(out, width)
    keep = base | (torch.rand(out, width, generator=generator) < share)
    keep[0] |= share > 0
    return weight.masked_fill(~keep, 0.0).to(dtype), base  # a product would leave negative zeros


def relative(result: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest expected value."""
    return float((result.double() - expected).abs().max() / expected.abs().max())
