"""One budget over many matrices: where does the next weight, or the next byte, save most?

Pure functions of curves. What cost and loss are counted in, the caller decides.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """What one matrix loses at each of several costs, which grow from level to level."""

    cost: Sequence[float]
    loss: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.cost) != len(self.loss) or not self.cost:
            raise ValueError("a curve needs as many losses as costs, and at least one level")
        if any(later <= earlier for earlier, later in zip(self.cost, self.cost[1:], strict=False)):
            raise ValueError("the costs of a curve must grow from level to level")

    def hull(self) -> list[int]:
        """The levels of the lower convex hull, from the first on; gains for the cost shrink along it."""
        hull = [0]
        for level in range(1, len(self.cost)):
            if self.loss[level] >= self.loss[hull[-1]]:
                continue  # costs more and saves nothing
            while len(hull) > 1 and self.gain(hull[-2], hull[-1]) <= self.gain(hull[-1], level):
                hull.pop()
            hull.append(level)
        return hull

    def gain(self, low: int, high: int) -> float:
        """Loss saved by each unit of cost between two levels."""
        return (self.loss[low] - self.loss[high]) / (self.cost[high] - self.cost[low])


def curve_of(losses: Tensor, first: int = 0, levels: int = 100) -> Curve:
    """The curve of values any number of which can be saved, the largest first: [n] -> costs `first` to `first` + n.

    losses: what each one costs when it is lost, never negative. About `levels` points, evenly spaced.
    """
    ordered = torch.from_numpy(np.sort(losses.flatten().cpu().numpy())).flip(0)  # numpy's sort is several times as fast
    saved = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0, dtype=torch.float64)])
    places = torch.linspace(0, len(ordered), min(levels, len(ordered)) + 1).round().long().unique()
    return Curve((places + first).tolist(), (saved[-1] - saved[places]).clamp(min=0).tolist())


def divide(curves: Mapping[str, Curve], budget: float) -> dict[str, float]:
    """What each curve may cost so that all together cost `budget`, or less if that buys all, and lose least.

    All begin at their first level; then the step of the hulls that gains most for its cost is taken, the last one in
    part: the same as one threshold for the gain in all matrices. Of equal steps the earlier curve's is taken. Whole
    costs and a whole budget give whole answers. Raises ValueError where the first levels cost too much.
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
