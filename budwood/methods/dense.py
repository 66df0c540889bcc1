"""Nothing is pruned: for folders with rounded values of the whole model, the rivals of pruned ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from budwood.methods.method import Method
from budwood.sparsity.forecast import Forecast

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.stream.block import Block


@dataclass(frozen=True)
class Dense(Method):
    """Keep every weight; --values rounds them. Needs no calibration text."""

    calibrated: ClassVar[bool] = False

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        """Every position is kept."""
        return {name: Forecast(rows * columns) for name, (rows, columns) in structure.shapes.items()}

    def __call__(self, block: "Block") -> None:
        """Leaves the block as it is."""
