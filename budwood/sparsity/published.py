"""The share to drop as the published programs count it, for parity with their masks."""

from dataclasses import dataclass

from torch import Tensor

from budwood.errors import UsageError
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import Shape
from budwood.sparsity.selection import kth_largest, refuse_not_finite


@dataclass(frozen=True)
class PublishedShare:
    """Drop everything up to the value at index int(drop * n) of the ascending scores of the whole matrix.

    That is one more than floor(drop * n), and all ties with it. Dropping everything is allowed here.
    """

    drop: float

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise UsageError(f"the share to drop must be between 0% and 100%, got {100 * self.drop:g}%")

    def keep(self, scores: Tensor) -> Tensor:
        refuse_not_finite(scores)
        dropped = self._dropped(scores.numel())
        return scores > kth_largest(scores.reshape(-1), scores.numel() - dropped + 1)

    def _dropped(self, count: int) -> int:
        return min(int(count * self.drop) + 1, count)

    def check(self, shape: Shape, name: str) -> None: ...

    def forecast(self, shape: Shape) -> Forecast:
        size = shape[0] * shape[1]
        return Forecast(size - self._dropped(size))
