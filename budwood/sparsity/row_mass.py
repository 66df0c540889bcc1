"""Wanda's variant: every row drops the same part of its sum of scores, so that rows keep different shares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import Shape
from budwood.sparsity.selection import portion, refuse_not_finite

CLOSE = 0.001  # of the wanted share, or of the bracket, at which the search ends


@dataclass(frozen=True)
class RowMass:
    """Drop of every row the smallest scores that sum to at most a fixed part of the row's sum.

    The part is found by bisection so that the whole matrix loses the share `drop`, within 0.001 where the
    bracket [0, 0.8] contains it. Ties with the last dropped score are dropped too.
    """

    drop: float

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise UsageError(f"the share to drop must be between 0% and 100%, got {100 * self.drop:g}%")

    def __str__(self) -> str:
        return f"{round(100 * self.drop, 10):.12g}%"

    def keep(self, scores: Tensor) -> Tensor:
        refuse_not_finite(scores)
        ordered = scores.sort(dim=1).values  # [out, in]
        mass = ordered.cumsum(dim=1, dtype=torch.float64)
        low, high, part = 0.0, 0.8, 0.4
        while True:
            keep = self._keep(scores, ordered, mass, part)
            dropped = 1 - int(keep.sum()) / keep.numel()
            if abs(dropped - self.drop) <= CLOSE or high - low < CLOSE:
                return keep
            low, high = (low, part) if dropped > self.drop else (part, high)
            part = (low + high) / 2

    @staticmethod
    def _keep(scores: Tensor, ordered: Tensor, mass: Tensor, part: float) -> Tensor:
        count = (mass <= part * mass[:, -1:]).sum(dim=1, keepdim=True)  # [out, 1]
        threshold = ordered.gather(1, (count - 1).clamp(min=0))
        return (scores > threshold) | (count == 0)  # a row whose smallest score exceeds the part drops nothing

    def check(self, shape: Shape, name: str) -> None: ...

    def forecast(self, shape: Shape) -> Forecast:
        size = shape[0] * shape[1]
        return Forecast(size - portion(self.drop, size))
