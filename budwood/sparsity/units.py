"""Which rows and columns of the matrices of a block are removed together, as indices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """The units of one set of linears. Names are those inside the block; indices are int64.

    kind: "attention" for KV groups, "mlp" for neurons, also those of one expert. columns: [units, width], of the
    consumer. rows: [units, n], by producer. entries: [units, n], of parameters with one entry per head. cost: weights
    and bias entries that leave with one unit.
    """

    kind: Literal["attention", "mlp"]
    consumer: str
    columns: Tensor
    rows: Mapping[str, Tensor]
    entries: Mapping[str, Tensor]
    cost: int

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def linears(self) -> list[str]:
        """Producers and consumer."""
        return [*self.rows, self.consumer]

    def fold(self, values: Tensor) -> Tensor:
        """Values per column of the consumer [..., in] -> [..., units, width]."""
        return values[..., self.columns]


def places(indices: Tensor, kept: Tensor) -> Tensor:
    """The rows, columns or entries [units, n] that belong to the units `kept`, in the order of the matrix."""
    return indices[kept].flatten().sort().values


def removed(count: int, kept: Tensor) -> Tensor:
    """The indices below `count` that are not in `kept`, sorted."""
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def close(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of their dtype, relative to the norm."""
    tolerance = 1e-4 if one.dtype == torch.float32 else 0.05
    difference = (one.float() - other.float()).norm()
    return bool(difference <= tolerance * other.float().norm() + 1e-12)
