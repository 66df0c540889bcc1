"""How much the loss depends on every output of every linear: mean squares of the gradients of the outputs."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from budwood.models.linears import read
from budwood.stream.model import Model
from budwood.training.gradients import gradients


def row_sensitivities(model: Model, windows: Tensor, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Mean over tokens of the squared gradient of the loss by each output, float32 [out], by full name of the linear.

    windows: token ids [windows, tokens]; a forward and a backward pass over them. The loss is that of each window. The
    unit is arbitrary, as float16 scales the loss. Zeros where no token reached a linear.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            squares = gradient.float().square().flatten(0, -2).sum(dim=0)
            sums[name] = sums[name] + squares if name in sums else squares

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return after

    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.callback(module.register_forward_hook(hook(name)).remove)
        gradients(model, windows, linears, lambda name, gradient: None, held=0)
    tokens = windows.numel()
    return {
        name: (sums[name] / tokens if name in sums else torch.zeros(read(module).shape[0])).cpu()
        for name, module in linears.items()
    }
