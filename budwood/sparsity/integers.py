"""Weights as int8 and a float32 scale for each row and segment of columns: symmetric, round to nearest.

A scale has 17 significant bits, so that its product with any int8 is exact in float32. The dequantised weight is
therefore rounded once, to its own dtype, and quantising it again gives the same int8 and scale.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SEGMENT = 256  # columns with one scale
LARGEST = 127
SMALLEST = torch.finfo(torch.float32).smallest_normal  # no scale is smaller, so that division by it is safe
LEADING = -1 << 7  # mask of the first 17 of the 24 significant bits of a float32


def quantise(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 [out, in] in [-127, 127] and the scales, float32 [out, ceil(in/256)], of the masked weights.

    weight: [out, in]; mask: bool [out, in], positions outside it become 0. A scale is the largest magnitude of its
    segment over 127; every masked weight is within half its scale of int8 * scale.
    """
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    for columns in segments(weight.shape[1]):
        piece = torch.where(mask[:, columns], weight[:, columns].float(), 0)  # [out, 256]
        scale = (piece.abs().amax(1, keepdim=True) / LARGEST).clamp_(min=SMALLEST)  # [out, 1]
        scale.view(torch.int32).bitwise_and_(LEADING)
        integers[:, columns] = (piece / scale).round_()
        scales.append(scale)
    return integers, torch.cat(scales, 1)


def dequantise(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 * scale [out, in], exact in float32 and rounded once to `dtype`."""
    weight = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    for number, columns in enumerate(segments(integers.shape[1])):
        weight[:, columns] = integers[:, columns] * scales[:, number : number + 1]
    return weight


def segments(width: int) -> Iterator[slice]:
    """The columns of each segment."""
    return (slice(first, min(first + SEGMENT, width)) for first in range(0, width, SEGMENT))
