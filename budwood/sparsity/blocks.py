"""Square blocks with the largest scores: the block variant of WRP (algorithm 2)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad as extend

from budwood.errors import UsageError
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import Shape, leave_dense
from budwood.sparsity.selection import largest


@dataclass(frozen=True)
class TopBlocks:
    """In every block row the `side` x `side` blocks with the largest sum of scores; negative scores count 0.

    Either a fixed `count` per block row, as the paper has it, or `density`, the share of the width that the
    blocks cover: max(1, round(density * in / side)) of them. `pad` pads incomplete blocks with score 0.
    """

    side: int
    count: int | None = None
    density: float | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise UsageError(f"the side of a block must be at least 1, got {self.side}")
        if (self.count is None) == (self.density is None):
            raise UsageError("blocks need either a count per block row or a density, and not both")
        if self.count is not None and self.count < 0:
            raise UsageError(f"the number of blocks per block row cannot be negative, got {self.count}")
        if self.density is not None and not 0 <= self.density <= 1:
            raise UsageError(f"the density of the blocks must be between 0 and 1, got {self.density}")

    def keep(self, scores: Tensor) -> Tensor:
        out, width = scores.shape
        side = self.side
        padded = extend(scores.clamp(min=0), (0, -width % side, 0, -out % side))
        sums = padded.unflatten(1, (-1, side)).sum(dim=2)  # [out, blocks]
        sums = sums.unflatten(0, (-1, side)).sum(dim=1)  # [block rows, blocks]
        chosen = largest(sums, self.count_for(width))
        return chosen.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)[:out, :width]

    def count_for(self, width: int) -> int:
        """Blocks per block row of a matrix with `width` inputs."""
        blocks = -(-width // self.side)
        count = self.count if self.density is None else max(1, round(self.density * width / self.side))
        return min(count or 0, blocks)

    def fits(self, shape: Shape) -> bool:
        return shape[0] % self.side == 0 and shape[1] % self.side == 0

    def check(self, shape: Shape, name: str) -> None:
        if not self.fits(shape) and not self.pad:
            divisor = (shape[0] | shape[1]) & -(shape[0] | shape[1])  # lowest bit set in either
            raise UsageError(
                f"{name}: blocks of {self.side} need both sides to divide by {self.side}, got "
                f"{shape[0]} x {shape[1]}; use block={divisor}, pad=True, or {leave_dense(name)}"
            )
        blocks = -(-shape[1] // self.side)
        if self.count is not None and self.count > blocks:
            raise UsageError(
                f"{name}: {self.count} blocks per block row were asked for, but {shape[1]} inputs hold only "
                f"{blocks} of side {self.side}; ask for fewer or for a density"
            )

    def forecast(self, shape: Shape) -> Forecast:
        return Forecast(shape[0] * min(shape[1], self.count_for(shape[1]) * self.side))
