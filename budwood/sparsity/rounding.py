"""Weights rounded to the nearest of a few levels for each group of columns of a row: the usual baseline "RTN".

Asymmetric: the levels of a group reach from its smallest weight (or 0) to its largest (or 0), so that 0 is a level. A
group costs its codes, a 16-bit scale and a zero point of as many bits as a code.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

SCALE_BITS = 16


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """The dequantised weight [out, in], float32: (code - zero) * scale, codes from 0 to 2^bits - 1.

    weight: [out, in]. group: columns with one scale; the last group of a row may have fewer. The scale is rounded to
    float16, or to bfloat16 where the weights are bfloat16, before the codes are chosen, as it would be stored.
    """
    stored = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for columns in groups(weight.shape[1], group):
        result[:, columns] = _rounded(weight[:, columns].float(), 2**bits - 1, stored)
    return result


def _rounded(piece: Tensor, highest: int, stored: torch.dtype) -> Tensor:
    low = piece.amin(1, keepdim=True).clamp_(max=0)  # [out, 1]
    high = piece.amax(1, keepdim=True).clamp_(min=0)
    scale = ((high - low) / highest).to(stored).float()
    scale = torch.where(scale > 0, scale, 1)  # a group of zeros, or of weights too small for the scale
    zero = (-low / scale).round_().clamp_(0, highest)
    return ((piece / scale).round_() + zero).clamp_(0, highest).sub_(zero).mul_(scale)


def rounded_bytes(shape: tuple[int, int], bits: int, group: int) -> int:
    """Bytes of codes, scales and zero points of a matrix [out, in]."""
    out, width = shape
    return ceil((out * width * bits + out * ceil(width / group) * (SCALE_BITS + bits)) / 8)


def groups(width: int, group: int) -> Iterator[slice]:
    """The columns of each group."""
    return (slice(first, min(first + group, width)) for first in range(0, width, group))
