"""Which units of which layers stay: heads or KV groups, and MLP neurons, under one budget of weights.

A pool is the units of one matrix, which have one cost. Within a pool always the units of the highest scores stay, so
all of it is about how many each pool keeps. Structures are named as in FLAP (An et al., AAAI 2024, arXiv 2312.11983):
uniform or adaptive over layers (UL, AL), then uniform, manually divided or adaptive over modules (UM, MM, AM).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.sparsity.selection import highest, refuse_not_finite

Structure = Literal["ul-um", "ul-mm", "al-mm", "al-am"]
Search = Literal["nearest", "reference"]


@dataclass(frozen=True)
class Pool:
    """The units that one matrix reads. layer: of the model. cost: weights that leave with one unit."""

    layer: int
    kind: Literal["attention", "mlp"]
    cost: float
    scores: Tensor  # [units]; the highest stay

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def weights(self) -> float:
        return self.cost * len(self)


@dataclass(frozen=True)
class Rules:
    """How a budget is spent.

    remove_groups: how many groups the whole model loses; for "ul-mm" and "al-mm". min_groups, min_neurons: what every
    pool keeps in any case. align: the neurons of a pool are a multiple of it, or all. search: "nearest" comes as near
    to the budget as units allow, "reference" counts and breaks ties like the published program.
    """

    structure: Structure = "al-am"
    remove_groups: int | None = None
    min_groups: int = 1
    min_neurons: int = 1
    align: int = 1
    search: Search = "nearest"

    def least(self, pool: Pool) -> int:
        """Units that the pool keeps in any case."""
        return min(len(pool), self.min_groups if pool.kind == "attention" else self.min_neurons)


def kept_units(pools: Sequence[Pool], drop: float, rules: Rules) -> list[Tensor]:
    """The units that stay of each pool, int64 in ascending order, so that the pools lose the share `drop` of weights.

    pools: in the order of the model, attention before MLP. Of equal scores the one earlier in this order stays. With
    "al-am" and a larger share every pool keeps a subset, unless neurons are aligned. Raises UsageError where the number
    of groups to remove does not fit, NotFinite for scores that cannot be ranked.
    """
    for pool in pools:
        refuse_not_finite(pool.scores)
    counts = kept_counts(pools, drop, rules)
    return [highest(pool.scores, count) for pool, count in zip(pools, counts, strict=True)]


def kept_counts(pools: Sequence[Pool], drop: float, rules: Rules) -> list[int]:
    """How many units stay of each pool; see `kept_units`."""
    if (rules.structure in ("ul-mm", "al-mm")) != (rules.remove_groups is not None):
        raise UsageError(
            f"remove_groups is for the structures ul-mm and al-mm, which need it; the structure is {rules.structure}"
        )
    if rules.structure in ("ul-um", "ul-mm"):
        return _uniform(pools, drop, rules)
    keep = (1 - drop) * sum(pool.weights for pool in pools)
    counts = (_separate if rules.structure == "al-mm" else _ranked)(pools, keep, rules)
    return _aligned(pools, counts, keep, rules) if rules.align > 1 else counts


def kept_weights(pools: Sequence[Pool], counts: Sequence[int]) -> float:
    """Weights that stay with these counts."""
    return sum(pool.cost * count for pool, count in zip(pools, counts, strict=True))


def _ranked(pools: Sequence[Pool], keep: float, rules: Rules) -> list[int]:
    """One list of all units by score: the prefix whose cost is nearest to `keep`, of two equally near the shorter."""
    if not pools:
        return []
    if rules.search == "reference":
        return _published_ranked(pools, keep, rules)
    owner, forced, order = _order(pools, rules)
    costs = torch.tensor([pool.cost for pool in pools], dtype=torch.float64)
    distance = (torch.cat([costs.new_zeros(1), costs[owner[order]].cumsum(0)]) - keep).abs()[forced:]
    count = forced + int((distance == distance.min()).nonzero()[0])
    return torch.bincount(owner[order[:count]], minlength=len(pools)).tolist()


def _separate(pools: Sequence[Pool], keep: float, rules: Rules) -> list[int]:
    """The lowest groups of the whole model, as many as asked; then the lowest neurons, as many as the budget leaves."""
    assert rules.remove_groups is not None
    groups = [pool for pool in pools if pool.kind == "attention"]
    neurons = [pool for pool in pools if pool.kind == "mlp"]
    left = sum(len(pool) for pool in groups) - rules.remove_groups
    if not groups or not neurons:
        raise UsageError("al-mm divides the budget between attention and MLP, and needs units of both; use al-am")
    if left < sum(rules.least(pool) for pool in groups):
        raise UsageError(
            f"remove_groups={rules.remove_groups} cannot be removed: the blocks have {rules.remove_groups + left} "
            f"groups and keep at least {rules.min_groups} each; remove fewer"
        )
    if rules.search == "reference":
        of_groups = _above(groups, rules.remove_groups, rules)
    else:
        owner, _, order = _order(groups, rules)
        of_groups = torch.bincount(owner[order[:left]], minlength=len(groups)).tolist()
    rest = keep - kept_weights(groups, of_groups)
    _check_rest(rest, neurons, rules)
    if rules.search == "reference":
        removed = int((sum(pool.weights for pool in neurons) - rest) / neurons[0].cost)
        of_neurons = _above(neurons, removed, rules)
    else:
        of_neurons = _ranked(neurons, rest, rules)
    parts = {"attention": iter(of_groups), "mlp": iter(of_neurons)}
    return [next(parts[pool.kind]) for pool in pools]


def _order(pools: Sequence[Pool], rules: Rules) -> tuple[Tensor, int, Tensor]:
    """The pool of every unit; how many units stay in any case; the order of units: these first, then by score."""
    scores = torch.cat([pool.scores.double() for pool in pools])
    owner = torch.repeat_interleave(torch.arange(len(pools)), torch.tensor([len(pool) for pool in pools]))
    always = torch.zeros(len(scores), dtype=torch.bool)
    start = 0
    for pool in pools:
        always[start + highest(pool.scores, rules.least(pool))] = True
        start += len(pool)
    order = scores.sort(descending=True, stable=True).indices
    order = torch.cat([order[always[order]], order[~always[order]]])
    return owner, int(always.sum()), order


def _uniform(pools: Sequence[Pool], drop: float, rules: Rules) -> list[int]:
    """Every layer loses the share `drop`: whole groups first, then the neurons that bring it nearest to its budget.

    Groups: the rounded share, or the given number over all layers. The neurons of a layer with several MLPs (experts)
    are divided in proportion, and what rounding leaves is carried to the next.
    """
    counts = [len(pool) for pool in pools]
    layers = sorted({pool.layer for pool in pools})
    given = None if rules.remove_groups is None else rules.remove_groups // len(layers)
    for layer in layers:
        members = [index for index, pool in enumerate(pools) if pool.layer == layer]
        rest = drop * sum(pools[index].weights for index in members)  # to remove
        for index in members:
            pool = pools[index]
            if pool.kind == "attention":
                counts[index] = len(pool) - _removed_groups(pool, drop, given, rules)
                rest -= pool.cost * (len(pool) - counts[index])
        mlps = [index for index in members if pools[index].kind == "mlp"]
        whole = sum(pools[index].weights for index in mlps)
        if given is not None:
            _check_rest(whole - rest, [pools[index] for index in mlps], rules)
        carried = 0.0
        for index in mlps:
            pool = pools[index]
            carried += rest * pool.weights / whole
            if rules.search == "reference":
                removed = int(drop * len(pool)) if given is None else int(carried / pool.cost)
                counts[index] = max(_at_least_ranked(pool, removed), rules.least(pool))
                carried = 0.0
            else:
                counts[index] = _nearest_level(pool, len(pool) - carried / pool.cost, rules)
                carried -= pool.cost * (len(pool) - counts[index])
    return counts


def _removed_groups(pool: Pool, drop: float, given: int | None, rules: Rules) -> int:
    most = len(pool) - rules.least(pool)
    if given is not None:
        if given > most:
            raise UsageError(
                f"remove_groups={rules.remove_groups} takes {given} of {len(pool)} groups of a block, which keeps at "
                f"least {rules.min_groups}; remove fewer"
            )
        return given if rules.search == "nearest" else len(pool) - _at_least_ranked(pool, given)
    if rules.search == "nearest":
        return min(most, math.floor(drop * len(pool) + 0.5))
    return min(most, len(pool) - _at_least_ranked(pool, int(drop * len(pool))))


def _check_rest(keep: float, neurons: Sequence[Pool], rules: Rules) -> None:
    """Raises UsageError where the groups to remove leave no possible number of neurons."""
    whole = sum(pool.weights for pool in neurons)
    unit = max((pool.cost for pool in neurons), default=0)
    if keep > whole + unit / 2:
        raise UsageError(
            f"remove_groups={rules.remove_groups} removes more weights than the budget; remove fewer groups, or "
            "raise drop"
        )
    if keep < sum(rules.least(pool) * pool.cost for pool in neurons) - unit / 2:
        raise UsageError(
            f"with remove_groups={rules.remove_groups} the budget needs more neurons removed than there are; remove "
            "more groups, or lower drop"
        )


def _levels(pool: Pool, rules: Rules) -> list[int]:
    """The numbers of units that a pool may keep, ascending."""
    if pool.kind == "attention" or rules.align == 1:
        return list(range(rules.least(pool), len(pool) + 1))
    first = -(-rules.least(pool) // rules.align) * rules.align
    return [*range(first, len(pool), rules.align), len(pool)]


def _nearest_level(pool: Pool, wanted: float, rules: Rules) -> int:
    """The allowed number of neurons nearest to `wanted`, of two equally near the lower."""
    if rules.align > 1:
        return min(_levels(pool, rules), key=lambda level: (abs(level - wanted), level))
    return max(rules.least(pool), min(len(pool), math.ceil(wanted - 0.5)))


def _aligned(pools: Sequence[Pool], counts: Sequence[int], keep: float, rules: Rules) -> list[int]:
    """Neuron counts down to an allowed number, then up again where most was lost, while the total comes nearer."""
    levels = [_levels(pool, rules) for pool in pools]
    places = [
        max((place for place, level in enumerate(allowed) if level <= count), default=0)
        for allowed, count in zip(levels, counts, strict=True)
    ]
    lost = [count - allowed[place] for count, allowed, place in zip(counts, levels, places, strict=True)]
    total = kept_weights(pools, [allowed[place] for allowed, place in zip(levels, places, strict=True)])
    raisable = (index for index, pool in enumerate(pools) if pool.kind == "mlp" and lost[index] > 0)
    for index in sorted(raisable, key=lambda index: -lost[index]):
        step = (levels[index][places[index] + 1] - levels[index][places[index]]) * pools[index].cost
        if abs(total + step - keep) >= abs(total - keep):
            break
        places[index] += 1
        total += step
    return [allowed[place] for allowed, place in zip(levels, places, strict=True)]


# The published program finds a threshold among the scores, and all units with that score stay or go together.


def _published_ranked(pools: Sequence[Pool], keep: float, rules: Rules) -> list[int]:
    """The unit nearest to the budget is the threshold, and only higher scores stay: one unit less than `nearest`.

    A group counts as a whole number of neurons, truncated.
    """
    scores = torch.cat([pool.scores.double() for pool in pools])
    unit = next((pool.cost for pool in pools if pool.kind == "mlp"), 1)
    costs = torch.cat([torch.full((len(pool),), int(pool.cost / unit)) for pool in pools])
    share = keep / sum(pool.weights for pool in pools)
    order = scores.sort(descending=True, stable=True).indices
    distance = (costs[order].cumsum(0) - float(costs.sum()) * share).abs()
    threshold = scores[order[int((distance == distance.min()).nonzero()[0])]]
    return [max(int((pool.scores > threshold).sum()), rules.least(pool)) for pool in pools]


def _above(pools: Sequence[Pool], removed: int, rules: Rules) -> list[int]:
    """Counts of scores above the `removed`-th lowest of all pools."""
    if not removed:
        return [len(pool) for pool in pools]
    threshold = torch.cat([pool.scores.double() for pool in pools]).sort().values[removed - 1]
    return [max(int((pool.scores > threshold).sum()), rules.least(pool)) for pool in pools]


def _at_least_ranked(pool: Pool, removed: int) -> int:
    """Count of scores that are at least the lowest after `removed` of them."""
    return int((pool.scores >= pool.scores.sort().values[removed]).sum()) if removed < len(pool) else 0
