"""How many weights the groups of a mask keep: the X:4 analysis of the WRP paper (table 1)."""

import torch
from torch import Tensor


def x4_histogram(mask: Tensor, group: int = 4) -> Tensor:
    """Count the groups that keep 0, 1, ..., `group` weights: bool [out, in] -> int64 [group + 1].

    Groups are aligned along the inputs; raises ValueError where the width does not divide by `group`.
    """
    if mask.shape[1] % group:
        raise ValueError(f"groups of {group} do not divide a width of {mask.shape[1]}")
    kept = mask.unflatten(1, (-1, group)).sum(dim=-1)  # [out, groups]
    return torch.bincount(kept.flatten(), minlength=group + 1)
