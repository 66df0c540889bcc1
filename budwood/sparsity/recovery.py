"""N:M plus the crucial weights that it drops, recovered (Tan, Zhang, Wei, WRP, ACL 2024).

The weights that N:M keeps do not depend on how many are recovered, and recovered weights never overlap them.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.sparsity.blocks import TopBlocks
from budwood.sparsity.forecast import Forecast, expected_density
from budwood.sparsity.patterns import NM, Shape, Top
from budwood.sparsity.selection import portion


@dataclass(frozen=True)
class Either:
    """What `base` keeps or `extra` marks as crucial: recovery by elements (WRP, algorithm 1).

    With the common tie rule the recovered weights of a group are exactly its crucial weights that `base` drops.
    """

    base: NM
    extra: Top

    def keep(self, scores: Tensor) -> Tensor:
        return self.base.keep(scores).logical_or_(self.extra.keep(scores))

    def check(self, shape: Shape, name: str) -> None:
        self.base.check(shape, name)

    def forecast(self, shape: Shape) -> Forecast:
        size, width = shape[0] * shape[1], self.extra.ranked_among(shape)
        kept, group = self.base.kept, self.base.group
        density = expected_density(self.extra.share, width, kept, group)
        beyond_two = None
        if group == 4:  # a group ends with max(kept, crucial) weights
            beyond_two = size * (max(kept - 2, 0) / 4 + expected_density(self.extra.share, width, max(kept, 2), 4))
        return Forecast(size * (self.base.density + density), recovered=beyond_two)


@dataclass(frozen=True)
class Recovered:
    """What `base` keeps, and what `extra` chooses among the dropped weights.

    With `TopBlocks` recovery by blocks (WRP, algorithm 2); with `Top` a fixed number per row or matrix.
    """

    base: NM
    extra: Top | TopBlocks

    def keep(self, scores: Tensor) -> Tensor:
        kept = self.base.keep(scores)
        # Kept weights rank below a dropped one of score 0, without ties, which are slow.
        lost = torch.where(kept, -1 - scores, scores)
        return kept.logical_or_(self.extra.keep(lost))

    def check(self, shape: Shape, name: str) -> None:
        self.base.check(shape, name)
        self.extra.check(shape, name)

    def forecast(self, shape: Shape) -> Forecast:
        size = shape[0] * shape[1]
        dropped = size * (1 - self.base.density)
        block = None
        if isinstance(self.extra, TopBlocks):
            count = self.extra.count_for(shape[1])
            extra = dropped * min(1.0, count * self.extra.side / shape[1])
            if self.extra.fits(shape) and self.extra.side % 4 == 0:
                block = (self.extra.side, count)
        else:
            extra = min(dropped, float(self.extra.count(shape)))
        if self.base.group != 4 or self.base.kept < 2:
            return Forecast(size - dropped + extra)
        return Forecast(size - dropped + extra, size * (self.base.density - 0.5) + extra, block)


@dataclass(frozen=True)
class EitherToDensity:
    """`Either`, with the number of crucial weights per row whose recovered share is nearest `density`."""

    base: NM
    density: float  # recovered weights / all weights

    def keep(self, scores: Tensor) -> Tensor:
        kept = self.base.keep(scores)
        ordered = scores.sort(dim=1, descending=True).values  # [out, in]
        lost = scores.masked_fill(kept, -1)
        width = scores.shape[1]

        def recovered(crucial: int) -> int:
            return int((lost >= ordered[:, crucial - 1 : crucial]).sum()) if crucial else 0

        wanted = portion(self.density, scores.numel())
        crucial = bisect_left(range(width), wanted, key=recovered)  # recovered grows with crucial
        if crucial and wanted - recovered(crucial - 1) <= recovered(crucial) - wanted:
            crucial -= 1
        return kept.logical_or_(Top(crucial / width).keep(scores))

    def check(self, shape: Shape, name: str) -> None:
        self.base.check(shape, name)

    def forecast(self, shape: Shape) -> Forecast:
        size = shape[0] * shape[1]
        extra = min(self.density, 1 - self.base.density) * size
        if self.base.group != 4 or self.base.kept < 2:
            return Forecast(size * self.base.density + extra)
        return Forecast(size * self.base.density + extra, size * (self.base.density - 0.5) + extra)
