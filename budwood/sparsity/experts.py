"""Which experts of a mixture matter: sums over the tokens routed to each, scores of them, the choice.

REAP (Lasby et al., ICLR 2026, arXiv 2510.13999); man and msan are gate-free means (Liu et al. 2026, arXiv 2606.15716).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SUMS = ("count", "gated", "norm", "square", "largest")
OUTLIER, SHARE = 0.995, 0.1  # of the largest activations of all experts: quantile, and share of the very largest


class ExpertSums:
    """Sums over the tokens routed to each of several experts, float64 [experts].

    With `g` the weight by which the layer multiplies an expert's output `f` for a token: count, gated Σ g ‖f‖, norm
    Σ ‖f‖, square Σ ‖f‖², largest max |f|.
    """

    def __init__(self, experts: int):
        self.sums = torch.zeros(len(SUMS), experts, dtype=torch.float64)

    def add(self, counts: Sequence[int], outputs: Tensor, weights: Tensor) -> None:
        """counts: tokens of each expert. outputs [tokens, hidden] and weights [tokens, 1] in the order of experts."""
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64).cpu()
        gates = weights.flatten().double().cpu()
        experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        terms = (torch.ones_like(norms), gates * norms, norms, norms.square())
        for row, term in zip(self.sums, terms, strict=False):
            row.index_add_(0, experts, term)
        peaks = outputs.abs().amax(dim=-1).double().cpu()
        self.sums[-1].scatter_reduce_(0, experts, peaks, "amax")


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # of the sums [5, experts] in the order of SUMS
    "reap": lambda sums: _mean(sums[1], sums[0]),
    "ean": lambda sums: sums[2],
    "frequency": lambda sums: sums[0],
    "man": lambda sums: _mean(sums[2], sums[0]),
    "msan": lambda sums: _mean(sums[3], sums[0]),
}


def choose(scores: Tensor, count: int, groups: int = 1, protected: Tensor | None = None) -> Tensor:
    """The `count` experts that stay, sorted: the highest scores [experts], of equal ones the lower index.

    groups: neighbouring experts form groups of equal size, and the same number of each stays. protected: bool
    [experts], experts that stay before all others.
    """
    first = torch.zeros(len(scores), dtype=torch.bool) if protected is None else protected
    kept = []
    for start, group in zip(range(0, len(scores), len(scores) // groups), scores.chunk(groups), strict=True):
        order = sorted(range(len(group)), key=lambda i: (not bool(first[start + i]), -float(group[i]), i))
        kept += [start + index for index in order[: count // groups]]
    return torch.tensor(sorted(kept))


def super_experts(largest: Tensor) -> Tensor:
    """Which experts have an outlier among the largest activations of all [layers, experts]: bool of that shape.

    Above the 99.5th percentile and above a tenth of the maximum.
    """
    return (largest > torch.quantile(largest.flatten(), OUTLIER)) & (largest > SHARE * largest.max())
