"""Weights as 4-bit codes and a scale for each row and group of columns: round to the nearest level of the best scale.

A code is an integer from -8 to 7. A scale has 5 significant bits and either sign: the largest weight of a group is on
the side of -8, so that a group uses all 16 levels, which saves a fifth of the squared error of -7 to 7. A product of
code and scale has at most 8 significant bits. So it is exact in bfloat16, float16 and float32, no rounding follows,
and quantising it again gives the same weights. 5 bits instead of 11 add one or two hundredths to the squared error.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

GROUP, FINE = 128, 64  # columns with one scale; the other number of them that formats store
LOWEST, HIGHEST = -8, 7  # codes
LEADING = -1 << 19  # mask of the first 5 of the 24 significant bits of a float32
RANGE = (2.0**-120, 2.0**120)  # the magnitudes of scales in bfloat16 and float32
NARROW = (2.0**-20, 2.0**12)  # in float16, where 8 times a scale is finite and its last bit not lost

SMALL = (6, 5, 4)  # largest codes of groups that scales near the largest magnitude over 8 may not hold without error
SMALLER = (3, 2, 1)  # the same where the scale of twice the code, 6 at most, is too small to be stored
WORK = 1 << 17  # weights that are processed at a time, so that temporaries stay in the cache


def quantise4(
    weight: Tensor, held: Tensor, group: int = GROUP, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, ceil(in/group)] with the least squared error of the held weights.

    weight: [out, in], finite; held: bool [out, in], positions outside it become 0; dtype: that the codes times scales
    shall be exact in, by default that of the weight. Of a group that is zero the scale is the smallest one. Weights
    that are codes times scales already are kept exactly.
    """
    out, width = weight.shape
    groups = -(-width // group)
    codes = torch.empty(out, width, dtype=torch.int8, device=weight.device)
    scales = torch.empty(out, groups, device=weight.device)
    rows = max(1, WORK // max(1, width))
    for first in range(0, out, rows):
        part = slice(first, first + rows)
        piece = torch.where(held[part], weight[part].float(), 0)
        piece = torch.nn.functional.pad(piece, (0, groups * group - width)).view(-1, group)  # [rows * groups, group]
        scale = best_scale(piece, dtype or weight.dtype)
        codes[part] = nearest_codes(piece, scale).view(-1, groups * group)[:, :width]
        scales[part] = scale.view(-1, groups)
    return codes, scales


def dequantise4(codes: Tensor, scales: Tensor, dtype: torch.dtype, group: int = GROUP) -> Tensor:
    """code * scale [out, in], exact in `dtype`. codes: [out, in]; scales: float32 [out, ceil(in/group)]."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for number, columns in enumerate(grouped(codes.shape[1], group)):
        weight[:, columns] = codes[:, columns] * scales[:, number : number + 1] + 0.0  # no -0.0, which would be stored
    return weight


def nearest_codes(groups: Tensor, scales: Tensor) -> Tensor:
    """The codes, as floats, of the levels nearest to the weights: [n, group], [n, 1] -> [n, group]."""
    return (groups / scales).round_().clamp_(LOWEST, HIGHEST)


def nearest_scale(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scales that can be stored with weights of this dtype: float32, signs kept, 0 becomes the smallest."""
    rounded = to_five_bits(scales.float())
    magnitude = rounded.abs().clamp_(*limits(dtype))
    return torch.where(rounded < 0, -magnitude, magnitude)


def best_scale(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [n, 1] of each group of weights, float32 [n, group], with the least squared error; 0 is always held.

    The largest magnitude over 7 and all scales of 5 bits down to half of it are tried, and those that may hold a group
    without error whose codes are small. The side of -8 is that of the largest weight.
    """
    most, where = groups.abs().max(1, keepdim=True)  # [n, 1]
    sign = torch.where(groups.gather(1, where) > 0, -1.0, 1.0)
    # Scaled by a power of two, so that squares neither underflow nor overflow.
    unit = torch.exp2(-torch.frexp(most)[1].clamp(-120, 120).float())
    smallest, largest = (unit * limit for limit in limits(dtype))
    groups, most = groups * unit, most * unit
    mantissa, exponent = torch.frexp(most / HIGHEST)
    steps = torch.floor(mantissa * 32)  # 16 to 31: one of the 16 scales of an octave
    octave = torch.exp2(exponent.float())
    best = torch.full_like(most, torch.inf, dtype=torch.float64)
    chosen = smallest.clone()
    small = SMALL + (SMALLER if bool(((most > 0) & (most < SMALL[0] * smallest)).any()) else ())
    for index in range(16 + len(small)):
        if index < 16:
            step = steps - index
            scale = octave * torch.where(step < 16, (step + 16) / 64, step / 32)
        else:
            scale = to_five_bits(most / small[index - 16])
        scale = sign * torch.minimum(torch.maximum(scale, smallest), largest)
        left = nearest_codes(groups, scale).mul_(scale).sub_(groups)
        error = left.square_().sum(1, keepdim=True, dtype=torch.float64)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return torch.where(most > 0, chosen / unit, limits(dtype)[0])


def to_five_bits(scales: Tensor) -> Tensor:
    """float32, rounded to 5 significant bits by magnitude."""
    return (scales.contiguous().view(torch.int32) + (1 << 18)).bitwise_and_(LEADING).view(torch.float32)


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and largest magnitude of a scale of weights of this dtype."""
    return NARROW if dtype == torch.float16 else RANGE


def grouped(width: int, group: int) -> Iterator[slice]:
    """The columns of each group."""
    return (slice(first, min(first + group, width)) for first in range(0, width, group))
