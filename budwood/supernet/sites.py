"""Where a model can be made narrower, and the levels that each place has in a round of the search."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from budwood.models.units import Units

SIDE = 4  # levels on each side of the centre
FIRST = 8  # the spacing of the first round is this part of the units
LEAST = 32  # neurons: the smallest spacing, for an MLP of 1,024 neurons or more


@dataclass(frozen=True)
class Site:
    """Linears of one block that are pruned to the same level: an attention, an MLP, or all experts of one size."""

    block: int
    kind: str
    consumers: tuple[str, ...]  # names inside the block
    units: int  # of each consumer
    width: int  # columns of a unit
    cost: int  # weights and bias entries that leave with one unit of every consumer
    grain: int = 1  # units are removed in multiples of this

    @property
    def group(self) -> Hashable:
        """Sites of a group have units of the same cost: moving removals between them keeps the size of the model."""
        return self.kind, self.cost, self.grain

    @property
    def most(self) -> int:
        """Units that can be removed: one is always kept, or one multiple of the grain."""
        return self.units - self.grain


def sites_of(units: Mapping[str, Mapping[str, "Units"]], align: int = 1) -> list[Site]:
    """The sites of a model, in order. units: by full name of the block, by consumer.

    align: the grain of MLPs whose number of neurons is a multiple of it.
    """
    sites = []
    for index, found in enumerate(units.values()):
        same: dict[Hashable, list[str]] = {}
        for consumer, each in found.items():
            same.setdefault((each.kind, len(each), each.columns.shape[1], each.cost), []).append(consumer)
        for consumers in same.values():
            first = found[consumers[0]]
            cost = first.cost * len(consumers)
            grain = align if first.kind == "mlp" and len(first) % align == 0 else 1
            sites.append(Site(index, first.kind, tuple(consumers), len(first), first.columns.shape[1], cost, grain))
    return sites


def even_counts(sites: Sequence[Site], drop: float) -> list[int]:
    """Units to remove at each site for the same share everywhere.

    Where a share is no whole number of grains, the total of a group is the nearest one, and sites differ by one grain.
    """
    missing: dict[Hashable, float] = {}
    counts = []
    for site in sites:
        wanted = drop * site.units + missing.get(site.group, 0.0)
        counts.append(min(int(wanted / site.grain + 0.5) * site.grain, site.most))
        missing[site.group] = wanted - counts[-1]
    return counts


def spacings(sites: Sequence[Site], turn: int) -> list[int]:
    """Units between two levels of each site in round `turn`, from 0; it halves from round to round.

    Sites of a group have the same spacing: an eighth of the units of its largest site in the first round.
    """
    largest: dict[Hashable, int] = {}
    for site in sites:
        largest[site.group] = max(site.units, largest.get(site.group, 0))
    return [max(1, round(_spacing(s.kind, largest[s.group], turn) / s.grain)) * s.grain for s in sites]


def _spacing(kind: str, units: int, turn: int) -> int:
    least = 1 if kind == "attention" else max(1, min(LEAST, units // LEAST))
    return max(least, round(units / (FIRST * 2**turn)))


def levels_of(site: Site, centre: int, spacing: int, side: int = SIDE) -> dict[int, int]:
    """Units removed at each level of a site: `centre` at level 0. Levels that would remove too many do not exist."""
    counts = {level: centre + level * spacing for level in range(-side, side + 1)}
    return {level: count for level, count in counts.items() if 0 <= count <= site.most}
