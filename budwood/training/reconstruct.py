"""Fits parameters of one block, all together, to given outputs."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # parameters by name, inputs -> outputs
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs, targets [batch, tokens, hidden] float32 -> one number


def relative(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error of each token over the mean square of its target, averaged.

    A few tokens have a thousand times the norm of others, and would be all that a plain squared error sees.
    """
    scale = targets.square().mean(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((outputs - targets).square() / scale).mean()


def plain(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error."""
    return (outputs - targets).square().mean()


LOSSES: dict[str, Loss] = {"relative": relative, "plain": plain}


def reconstruct(
    parameters: Mapping[str, Tensor],
    forward: Forward,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: int,
    rate: float,
    *,
    sparse: Collection[str] | None = None,
    sizes: Mapping[str, float] | None = None,
    loss: Loss = relative,
) -> dict[str, Tensor]:
    """The parameters by name after `steps` steps of Adam (Kingma, Ba, ICLR 2015).

    inputs, targets: equally many batches [batch, tokens, hidden], taken in turn. rate: of the first step, as a share
    of the typical size of a parameter's values; it decays linearly to 0. sparse: names of the parameters whose zeros
    stay zero; None: all. sizes: the typical size of a parameter, by default the root mean square of its non-zero
    values.
    """
    sizes = sizes or {}
    kept = {name: value != 0 for name, value in parameters.items() if sparse is None or name in sparse}
    moving = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}

    def masked() -> dict[str, Tensor]:
        return {name: value * kept[name] if name in kept else value for name, value in moving.items()}

    adam = torch.optim.Adam(
        [
            {"params": [value], "first": rate * sizes.get(name, typical(parameters[name]))}
            for name, value in moving.items()
        ],
        betas=(0.9, 0.99),
    )
    with torch.enable_grad():
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = group["first"] * (1 - step / steps)
            batch = step % len(inputs)
            outputs = forward(masked(), inputs[batch]).float()
            error = loss(outputs, targets[batch].to(outputs.device).float())
            adam.zero_grad()
            error.backward()
            adam.step()
    return {
        name: torch.where(kept[name], value.detach(), 0) if name in kept else value.detach()
        for name, value in moving.items()
    }


def typical(values: Tensor) -> float:
    """Root mean square of the non-zero values; 0 where there are none."""
    kept = values[values != 0]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0
