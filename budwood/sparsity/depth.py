"""Which blocks of a model matter least, by how much they turn the hidden states.

Single blocks: the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853). A run of blocks: the distance
between its inputs and its outputs (Gromov et al., ICLR 2025, arXiv 2403.17887).
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def turns(inputs: Tensor, outputs: Tensor) -> Tensor:
    """1 - cosine of hidden states before and after [..., hidden], float64 [...]; 0 where one of them is zero."""
    before, after = inputs.double(), outputs.double()
    lengths = before.norm(dim=-1) * after.norm(dim=-1)
    cosine = (before * after).sum(dim=-1) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(lengths > 0, 1 - cosine, 0)


def lowest(scores: Sequence[float], count: int, protected: Collection[int]) -> list[int]:
    """The `count` blocks of the lowest scores, sorted, without protected ones; of equal scores the later block."""
    free = [index for index in range(len(scores)) if index not in protected]
    return sorted(sorted(free, key=lambda index: (scores[index], -index))[:count])


def lowest_run(scores: Sequence[float], count: int, protected: Collection[int]) -> list[int]:
    """The run of `count` blocks of the lowest score, without protected ones; of equal scores the later run.

    scores: of the run that begins at each block. Empty where every run has a protected block.
    """
    starts = [s for s in range(len(scores)) if not any(index in protected for index in range(s, s + count))]
    start = min(starts, key=lambda s: (scores[s], -s), default=None)
    return [] if start is None else list(range(start, start + count))
