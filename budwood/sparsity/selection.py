"""The k largest scores, exactly k, with one tie rule for the whole project: the lower index wins.

The order of ties in `topk` is undefined and a stable sort is slow, so long rows are compared with the k-th value and
short groups are ranked by comparing every pair. Both equal the result of a stable descending sort.
"""

import math

import numpy as np
import torch
from torch import Tensor

SHORT = 8  # longest group ranked by comparing pairs
CHUNK = 1 << 18  # scores processed at once: temporaries fit the cache whatever the size of the matrix


class NotFinite(ValueError):
    """Scores with NaN or infinite values, which cannot be ranked."""


def refuse_not_finite(scores: Tensor) -> None:
    if scores.numel() and not all(end.isfinite() for end in scores.aminmax()):  # both ends are NaN if any score is
        raise NotFinite("scores hold NaN or infinite values")


def portion(share: float, count: int) -> int:
    """floor(share * count), but 0.3 of 10 is 3 although 0.3 * 10 may be 2.9999999."""
    return math.floor(share * count * (1 + 1e-12) + 1e-9)


def largest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest along the last dimension: [..., n] -> bool [..., n]. Raises NotFinite."""
    refuse_not_finite(scores)
    keep = torch.empty_like(scores, dtype=torch.bool)
    if count <= 0 or count >= scores.shape[-1] or not scores.numel():
        return keep.fill_(count > 0)
    mark = _by_pairs if scores.shape[-1] <= SHORT else _by_threshold
    if scores.dim() == 1:
        mark(scores, count, keep)
        return keep
    rows = max(1, CHUNK // (scores.numel() // scores.shape[0]))
    for piece, marked in zip(scores.split(rows), keep.split(rows), strict=True):
        mark(piece, count, marked)
    return keep


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `scores` [n], int64 ascending. Raises NotFinite."""
    return largest(scores, count).nonzero().flatten()


def _by_pairs(scores: Tensor, count: int, keep: Tensor) -> None:
    members = scores.unbind(-1)
    # Rank: the number of members above this one. Of a pair the lower index wins unless it is smaller.
    ranks = [torch.full_like(member, len(members) - 1 - i, dtype=torch.int8) for i, member in enumerate(members)]
    for low in range(len(members)):
        for high in range(low + 1, len(members)):
            wins = members[low] >= members[high]
            ranks[low] -= wins.view(torch.int8)
            ranks[high] += wins.view(torch.int8)
    for rank, marked in zip(ranks, keep.unbind(-1), strict=True):
        torch.lt(rank, count, out=marked)


def two_of_four(scores: Tensor) -> Tensor:
    """`largest(scores.T, 2).T` of [4, n], in a fifth of the time where there are no ties: for sweeps."""
    larger, smaller = torch.maximum(scores[:2], scores[2:]), torch.minimum(scores[:2], scores[2:])
    second = torch.maximum(torch.minimum(larger[0], larger[1]), torch.maximum(smaller[0], smaller[1]))
    keep = scores >= second
    return keep if int(keep.sum()) == 2 * scores.shape[1] else largest(scores.T, 2).T


def _by_threshold(scores: Tensor, count: int, keep: Tensor) -> None:
    threshold = kth_largest(scores, count)  # [..., 1]
    torch.gt(scores, threshold, out=keep)
    equal = scores == threshold
    room = count - keep.sum(dim=-1, keepdim=True)  # positions left for scores equal to the threshold
    if not torch.equal(room, equal.sum(dim=-1, keepdim=True)):
        equal &= equal.cumsum(dim=-1, dtype=torch.int32) <= room  # the first ones are kept
    keep |= equal


def kth_largest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th largest value along the last dimension, [..., n] -> [..., 1]."""
    # numpy's selection keeps no indices: a third of torch's time on long rows and a ninth of its memory.
    place = scores.shape[-1] - count
    exact = scores if scores.dtype == torch.float64 else scores.float()
    if exact.device.type != "cpu":
        return exact.sort(dim=-1).values[..., place : place + 1].to(scores)
    found = np.partition(exact.numpy(), place, axis=-1)[..., place : place + 1]
    return torch.from_numpy(found.copy()).to(scores)


def published_largest(scores: Tensor, count: int) -> Tensor:
    """`largest` along the last axis with the ties of the published programs: they drop what torch's unstable top-k
    returns as the smallest. Weights that were once quantised have many ties, and the rule changes results.
    """
    refuse_not_finite(scores)
    dropped = scores.topk(scores.shape[-1] - count, dim=-1, largest=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, dropped, False)
