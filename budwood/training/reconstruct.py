"""Fits the kept weights of one block, all matrices together, to the outputs of the dense model."""

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
    """The weights [out, in] by name after `steps` steps of Adam (Kingma, Ba, ICLR 2015); zeros stay zero.

    inputs, targets: equally many batches [batch, tokens, hidden], taken in turn. The loss of a token is its squared
    error over the mean square of its target, since a few tokens have a thousand times the norm of others. rate: of
    the first step, as a share of the root mean square of a matrix's kept weights; it decays linearly to 0.
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
    """Root mean square of the non-zero weights; 0 where there are none."""
    kept = weight[weight != 0]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0
