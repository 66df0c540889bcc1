"""The product with an adapted weight, which exists only while it is multiplied by."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.training.adapters import Adapter


class AdaptedProduct(torch.autograd.Function):
    """x [..., in] -> x W*ᵀ [..., out]. For the backward pass W* is rebuilt, so the memory that training adds is two
    matrices of the largest layer, however many there are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dense: bool, adapter: Adapter, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *parameters)
        ctx.dense, ctx.adapter = dense, adapter
        return x @ _effective(weight, dense, adapter, parameters).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, *parameters = ctx.saved_tensors
        to_x = upstream @ _effective(weight, ctx.dense, ctx.adapter, parameters).to(x.dtype)
        gradient = (upstream.flatten(0, -2).T @ x.flatten(0, -2)).to(parameters[0].dtype)  # of W*, this layer's only
        own = weight.to(parameters[0].dtype)
        found = ctx.adapter.gradients(gradient, own, _keep(weight, ctx.dense), parameters)
        return (to_x, None, None, None, *found)


def adapted(x: Tensor, weight: Tensor, adapter: Adapter, parameters: Sequence[Tensor], dense: bool = False) -> Tensor:
    """x [..., in] times the weight [out, in] as the adapter changes it; gradients flow to x and the parameters.

    The mask is where the weight is not zero; everywhere with `dense`. Under autocast the product has its dtype.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        product: Tensor = AdaptedProduct.apply(x, weight, dense, adapter, *parameters)
    return product


def _keep(weight: Tensor, dense: bool) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool) if dense else weight != 0


def _effective(weight: Tensor, dense: bool, adapter: Adapter, parameters: Sequence[Tensor]) -> Tensor:
    return adapter.weight(weight.to(parameters[0].dtype), _keep(weight, dense), parameters)
