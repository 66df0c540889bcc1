"""One budget divided among many matrices, so that the total loss is least.

Pure functions of curves. The caller chooses the units of cost and loss.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """The loss of one matrix at each of several costs, which grow from level to level."""

    cost: Sequence[float]
    loss: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.cost) != len(self.loss) or not self.cost:
            raise ValueError("a curve needs as many losses as costs, and at least one level")
        if any(later <= earlier for earlier, later in zip(self.cost, self.cost[1:], strict=False)):
            raise ValueError("the costs of a curve must grow from level to level")

    def hull(self) -> list[int]:
        """The levels of the lower convex hull, from the first on; the gain per cost falls along it."""
        hull = [0]
        for level in range(1, len(self.cost)):
            if self.loss[level] >= self.loss[hull[-1]]:
                continue  # costs more and does not reduce the loss
            while len(hull) > 1 and self.gain(hull[-2], hull[-1]) <= self.gain(hull[-1], level):
                hull.pop()
            hull.append(level)
        return hull

    def gain(self, low: int, high: int) -> float:
        """Loss saved per unit of cost between two levels."""
        return (self.loss[low] - self.loss[high]) / (self.cost[high] - self.cost[low])


def curve_of(losses: Tensor, first: int = 0, levels: int = 100) -> Curve:
    """The curve of keeping any number of weights, the largest losses first: [n] -> costs `first` to `first` + n.

    losses: the loss of removing each weight, never negative. About `levels` points, evenly spaced.
    """
    ordered = torch.from_numpy(np.sort(losses.flatten().cpu().numpy())).flip(0)  # numpy's sort is several times faster
    kept = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0, dtype=torch.float64)])
    counts = torch.linspace(0, len(ordered), min(levels, len(ordered)) + 1).round().long().unique()
    return Curve((counts + first).tolist(), (kept[-1] - kept[counts]).clamp(min=0).tolist())


def divide(curves: Mapping[str, Curve], budget: float) -> dict[str, float]:
    """The cost for each curve with the least total loss, `budget` in all, or less if every last level is reached.

    All begin at their first level; then the step of the hulls with the highest gain per cost is taken, the last one in
    part: the same as one threshold on the gain for all matrices. Of equal steps the earlier curve's is taken. Integer
    costs and an integer budget give integer results. Raises ValueError where the first levels cost more than `budget`.
    """
    spent = {name: curve.cost[0] for name, curve in curves.items()}
    left = budget - sum(spent.values())
    if left < 0:
        raise ValueError(f"the first levels cost {budget - left}, more than the budget of {budget}")
    hulls = {name: curve.hull() for name, curve in curves.items()}
    order = {name: index for index, name in enumerate(curves)}
    waiting: list[tuple[float, int, int, str]] = []  # by gain, then by order

    def offer(name: str, place: int) -> None:
        if place + 1 < len(hulls[name]):
            gain = curves[name].gain(hulls[name][place], hulls[name][place + 1])
            heapq.heappush(waiting, (-gain, order[name], place, name))

    for name in curves:
        offer(name, 0)
    while waiting and left > 0:
        _, _, place, name = heapq.heappop(waiting)
        step = min(left, curves[name].cost[hulls[name][place + 1]] - spent[name])
        spent[name] += step
        left -= step
        offer(name, place + 1)
    return spent
