"""The heads and neurons of a range of blocks, as pools of units that a budget is taken from."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from budwood.errors import UsageError
from budwood.sparsity.unit_shares import UnitPool
from budwood.sparsity.units import Units

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure

Sets = Mapping[int, Mapping[str, Units]]  # by index of the block, by consumer


def check_layers(layers: object) -> None:
    """Raises UsageError for what is no range of blocks; None stands for all."""
    if layers is not None and not (isinstance(layers, str) and re.fullmatch(r"\d*:\d*", layers)):
        raise UsageError(f'layers must be a range of blocks such as "4:30", got {layers!r}')


def blocks_in(layers: str | None, count: int) -> range:
    """The blocks that a range such as "4:30" names of `count` of them. Raises UsageError where there are none."""
    ends = [int(end) if end else None for end in (layers or ":").split(":")]
    if found := range(count)[slice(*ends)]:
        return found
    raise UsageError(f'layers="{layers}" names none of the {count} blocks, 0 to {count - 1}')


def sets_of(structure: "ModelStructure") -> Sets:
    return {index: structure.units[f"{structure.path}.{index}"] for index in range(len(structure.modules))}


def chosen(sets: Sets, blocks: range) -> Sets:
    return {index: block for index, block in sets.items() if index in blocks}


def pools_of(sets: Sets) -> list[UnitPool]:
    """One pool for every set of units, in order. width: channels that all its linears have, the size of a head."""
    return [
        UnitPool(index, units.kind, len(units), units.cost, width_of(units))
        for index, block in sets.items()
        for units in block.values()
    ]


def width_of(units: Units) -> int:
    return math.gcd(units.columns.shape[1], *(rows.shape[1] for rows in units.rows.values()))


def units_left(path: str, sets: Sets, removed: Sequence[int]) -> dict[str, dict[str, int]]:
    """How many units stay, by full name of the block and by consumer. removed: of every pool, in order."""
    gone = iter(removed)
    return {
        f"{path}.{index}": {name: len(units) - next(gone) for name, units in block.items()}
        for index, block in sets.items()
    }
