"""A block whose calibration windows run once for all that is asked: norms and second moments in the same pass."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from budwood.methods.method import Block
from budwood.sparsity.statistics import Gram, SquaredNorm

S = TypeVar("S")


class Both:
    """Squared norms and second moments of the same inputs.

    The diagonal of the moments would do for norms but is summed in another order, and near-ties of scores would fall
    the other way than without a re-fit.
    """

    def __init__(self, width: int) -> None:
        self.statistics: dict[type, Any] = {SquaredNorm: SquaredNorm(width), Gram: Gram(width)}

    @property
    def count(self) -> int:
        return int(self.statistics[Gram].count)

    def add(self, x: Tensor) -> None:  # [..., tokens, in]
        for statistic in self.statistics.values():
            statistic.add(x)


class Once:
    """The block, for methods that work on one another's results: the first to ask for a statistic runs the pass."""

    def __init__(self, block: Block):
        self.block = block
        self._found: dict[str, Both] = {}

    @property
    def linears(self) -> Mapping[str, Any]:
        return self.block.linears

    def collect(self, statistic: Callable[[int], S]) -> dict[str, S]:
        """By name inside the block; linears that share an input share an object, as ever."""
        if statistic not in (SquaredNorm, Gram):
            return self.block.collect(statistic)
        self._found = self._found or self.block.collect(Both)
        return {name: both.statistics[statistic] for name, both in self._found.items()}  # type: ignore[index, misc]
