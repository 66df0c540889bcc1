"""What methods that remove whole units share: the forecast, the refusal of models without units, the step that cuts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Method, Step
from budwood.models.units import Units
from budwood.sparsity.forecast import Forecast

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.runs.run import Run
    from budwood.stream.block import Block

Kept = Mapping[str, Mapping[str, Tensor]]  # by full name of the block, by consumer: units that stay, sorted, int64
ALIGNED = 16  # columns: narrower steps make matrix products slower than the number of weights promises


class Structured(Method):
    """A method that removes whole units; what is left of the matrices is dense. Subclasses have a field `drop`."""

    drop: float

    def check_structure(self, structure: "ModelStructure") -> None:
        if not any(units for units in structure.units.values()):
            raise UsageError(
                f"{self} removes heads and neurons, and found none whose matrices are all in scope in "
                f"{type(structure.module).__name__}; choose a method for single weights, or skip less"
            )

    def units_left(self, units: Units) -> int:
        """How many of these units are expected to stay: the share 1 - `drop`, and one at least."""
        return max(1, round((1 - self.drop) * len(units)))

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        return forecast(structure, self.units_left)


def forecast(structure: "ModelStructure", units_left: Callable[[Units], int]) -> dict[str, Forecast]:
    """Every matrix in scope, dense, in the shape that it has once `units_left` of its units stay."""
    counts = {
        block: {consumer: units_left(units) for consumer, units in sets.items()}
        for block, sets in structure.units.items()
    }
    return forecast_counts(structure, counts)


def forecast_counts(structure: "ModelStructure", counts: Mapping[str, Mapping[str, int]]) -> dict[str, Forecast]:
    """Every matrix in scope, dense, in the shape that it has once these numbers of units stay; others stay whole."""
    shapes = dict(structure.shapes)
    for block, sets in structure.units.items():
        for units in sets.values():
            count = counts.get(block, {}).get(units.consumer, len(units))
            for name, rows in units.rows.items():
                shapes[f"{block}.{name}"] = count * rows.shape[1], shapes[f"{block}.{name}"][1]
            consumer = f"{block}.{units.consumer}"
            shapes[consumer] = shapes[consumer][0], count * units.columns.shape[1]
    return {name: Forecast(prod(shape), shape=shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Slices(Step):
    """Cuts out all units but the given ones, and sets biases (full name of the linear: [out])."""

    kept: Kept
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # filled while blocks pass

    def __call__(self, block: "Block") -> None:
        self.refused.update({f"{block.name}.{name}": reason for name, reason in block.refused.items()})
        block.keep(self.kept.get(block.name, {}))
        for linear in block.linears.values():
            if linear.name in self.biases:
                linear.bias = self.biases[linear.name]

    def finish(self, run: "Run") -> None:
        run.note(refusals(self.refused))
        widths = [len(kept) for sets in self.kept.values() for kept in sets.values()]
        run.note(alignment(widths))


def refusals(refused: Mapping[str, str]) -> str | None:
    """A note about units that were left whole; None where there are none."""
    if not refused:
        return None
    name, reason = next(iter(refused.items()))
    return f"{len(refused)} sets of heads or neurons were left whole, such as those of {name}: {reason}"


def alignment(widths: Iterable[int]) -> str | None:
    """A note about numbers of neurons that slow products down; None where there are none."""
    odd = [width for width in widths if width > 4 * ALIGNED and width % ALIGNED]
    if not odd:
        return None
    return (
        f"{len(odd)} matrices have widths that are no multiple of {ALIGNED}, such as {odd[0]}, and multiply more "
        f"slowly for it; align={ALIGNED} avoids that where the method has this option"
    )
