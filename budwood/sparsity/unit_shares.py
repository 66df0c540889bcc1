"""How many units every matrix loses, where all layers lose the same share or all units are ranked together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from budwood.sparsity.selection import refuse_not_finite


@dataclass(frozen=True)
class UnitPool:
    """The units that one matrix reads. cost: weights that leave with one unit. width: channels of one unit."""

    layer: int
    kind: Literal["attention", "mlp"]
    count: int
    cost: int
    width: int = 1

    @property
    def weights(self) -> int:
        return self.cost * self.count


def program_count(pool: UnitPool, share: float) -> int:
    """Units to remove as LLM-Pruner's program counts: of C channels C - int(C (1 - share)), as whole units."""
    channels = pool.count * pool.width
    return (channels - int(channels * (1 - share))) // pool.width


def even_counts(pools: Sequence[UnitPool], weights: float) -> list[int]:
    """Units to remove of every pool, so that every layer loses the same share of its weights, `weights` in all.

    KV groups are counted as in the program; a number that rounds to 0 removes none. Neurons take what is left of the
    budget of a layer, and rounding is carried to the next: the total is exact to one unit, as far as every pool keeps
    one. More groups go, one of every layer from the first on, only where the neurons are not enough.
    """
    whole = sum(pool.weights for pool in pools)
    share = weights / whole if whole else 0.0
    fill = "mlp" if any(pool.kind == "mlp" for pool in pools) else "attention"
    removed = [0 if pool.kind == fill else min(program_count(pool, share), pool.count - 1) for pool in pools]
    carried = 0.0
    for layer in sorted({pool.layer for pool in pools}):
        members = [index for index, pool in enumerate(pools) if pool.layer == layer]
        filled = [index for index in members if pools[index].kind == fill]
        rest = sum(share * pools[index].weights - removed[index] * pools[index].cost for index in members)
        filling = sum(pools[index].weights for index in filled)
        carried += 0.0 if filled else rest
        for index in filled:
            carried = _take(pools[index], removed, index, carried + rest * pools[index].weights / filling)
    fills = [index for index, pool in enumerate(pools) if pool.kind == fill]
    others = [index for index, pool in enumerate(pools) if pool.kind != fill]
    for index in fills:  # what full pools could not take
        carried = _take(pools[index], removed, index, carried)
    for index in others:  # nor all neurons together
        if fills and carried > pools[fills[-1]].cost and removed[index] < pools[index].count - 1:
            removed[index] += 1
            carried -= pools[index].cost
    for index in fills:
        carried = _take(pools[index], removed, index, carried)
    return removed


def _take(pool: UnitPool, removed: list[int], index: int, carried: float) -> float:
    """Moves units of one pool, at least one stays, towards `carried` weights; what is left of it."""
    more = round(carried / pool.cost)
    more = max(-removed[index], min(more, pool.count - 1 - removed[index]))
    removed[index] += more
    return carried - more * pool.cost


def ranked_counts(pools: Sequence[UnitPool], scores: Sequence[Tensor], weights: float, costs: bool = True) -> list[int]:
    """Units to remove of every pool, lowest first in one list of all, `weights` in all to the nearest unit.

    scores: [count] of every pool. They are compared per weight that leaves with the unit, or as they are without
    `costs`. Every pool keeps one unit. Of equal scores the later one goes first. Raises NotFinite.
    """
    for score in scores:
        refuse_not_finite(score)
    owner = torch.cat([torch.full((pool.count,), index) for index, pool in enumerate(pools)])
    cost = torch.cat([torch.full((pool.count,), pool.cost, dtype=torch.float64) for pool in pools])
    price = torch.cat([score.double() for score in scores]) / (cost if costs else 1)
    stays = torch.zeros(len(price), dtype=torch.bool)
    for index in range(len(pools)):
        members = (owner == index).nonzero().flatten()
        stays[members[price[members].argmax()]] = True
    order = len(price) - 1 - price.flip(0).sort(stable=True).indices
    order = order[~stays[order]]
    distance = (torch.cat([cost.new_zeros(1), cost[order].cumsum(0)]) - weights).abs()
    gone = owner[order[: int(distance.argmin())]]
    return torch.bincount(gone, minlength=len(pools)).tolist()


def program_ranked_counts(pools: Sequence[UnitPool], scores: Sequence[Tensor], share: float) -> list[int]:
    """Units to remove as LLM-Pruner's program ranks: in one list without costs, all up to a threshold.

    Of U units the threshold is the (U - int(U (1 - share)))-th lowest score. Every pool keeps one unit.
    """
    every = torch.cat([score.double() for score in scores]).sort().values
    number = len(every) - int(len(every) * (1 - share))
    if not number:
        return [0 for _ in pools]
    counts = [int((score.double() <= every[number - 1]).sum()) for score in scores]
    return [min(count, pool.count - 1) for count, pool in zip(counts, pools, strict=True)]
