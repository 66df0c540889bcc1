"""Fit what pruning left of one block, all its matrices together, to the outputs of the dense model."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # weights by name, inputs -> outputs


def reconstruct(
    weights: Mapping[str, Tensor],
    forward: Forward,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: int,
    rate: float,
) -> dict[str, Tensor]:
    """The weights [out, in] by name after `steps` steps of Adam towards the targets; zeros stay zero.

    inputs, targets: as many batches [batch, tokens, hidden], taken in turn. Every token counts alike, by its squared
    error over the mean square of its target, for a few tokens are a thousand times as loud as others. rate: of the
    first step, as a share of the root mean square of a matrix's kept weights; it falls to 0 along a line.
    """
    kept = {name: weight != 0 for name, weight in weights.items()}
    moving = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    adam = torch.optim.Adam(
        [{"params": [weight], "first": rate * typical(weights[name])} for name, weight in moving.items()],
        betas=(0.9, 0.99),
    )
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = group["first"] * (1 - step / steps)
        batch = step % len(inputs)
        outputs = forward({name: moving[name] * kept[name] for name in moving}, inputs[batch]).float()
        target = targets[batch].float()
        scale = target.square().mean(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        loss = ((outputs - target).square() / scale).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: torch.where(kept[name], moving[name].detach(), 0) for name in moving}


def typical(weight: Tensor) -> float:
    """Root mean square of what is not zero; 0 where all is."""
    kept = weight[weight != 0]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0
