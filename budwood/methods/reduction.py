"""What methods that remove whole blocks or experts share."""

from math import prod
from typing import TYPE_CHECKING

from budwood.methods.method import Method
from budwood.sparsity.forecast import Forecast

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure


class Reduction(Method):
    """A method that removes whole blocks or experts and changes no other weight. Subclasses give `reduced`."""

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        """Every matrix that is left, by its name in the reduced model."""
        return {name: Forecast(prod(shape), shape=shape) for name, shape in self.reduced(structure).shapes.items()}
