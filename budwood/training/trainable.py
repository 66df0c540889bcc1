"""The trained tensors of a model or a block: float32 copies, put into effect in a context."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from zlib import crc32

import torch
from torch import Tensor, nn

from budwood.models.linears import read
from budwood.training.adapters import Adapter, stored
from budwood.training.product import adapted


class Trainable:
    """masters: the trained tensors in float32, by key: the full name of a parameter, or that of a matrix's weight and
    the parameter of its adapter after a colon, such as "model.layers.0.mlp.up_proj.weight:A".
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        linears: Mapping[str, nn.Module],
        adapter: Adapter | None,
        seed: int,
        dense: Mapping[str, nn.Module] | None = None,
        dense_adapter: Adapter | None = None,
    ):
        """parameters: moved as they are, by full name. linears: pruned matrices that move by `adapter`, by full name.

        dense: matrices without a mask, which move by `dense_adapter`. seed: of the adapters' starts, each of which
        depends on the name of its matrix as well.
        """
        self.parameters = dict(parameters)
        self.adapters: dict[str, tuple[nn.Module, Adapter, bool]] = {}
        if adapter is not None:
            self.adapters |= {name: (linear, adapter, False) for name, linear in linears.items()}
        if dense_adapter is not None:
            self.adapters |= {name: (linear, dense_adapter, True) for name, linear in (dense or {}).items()}
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            self.masters[name] = nn.Parameter(parameter.detach().float().clone())
        for name, (linear, rule, _) in self.adapters.items():
            random = torch.Generator().manual_seed(seed * 2**32 + crc32(name.encode()))
            weight = read(linear).detach()
            for key, value in zip(keys(name, rule), rule.start(weight, random), strict=True):
                self.masters[key] = nn.Parameter(value.to(weight.device))
        self.final = False  # whether the forward pass multiplies by the weights that stay

    @property
    def count(self) -> int:
        return sum(master.numel() for master in self.masters.values())

    @property
    def nbytes(self) -> int:
        """Of the trained tensors, their gradients, two moments and the best state."""
        return 5 * 4 * self.count

    @contextmanager
    def attached(self) -> Iterator[None]:
        """In this context the modules compute with the trained tensors, and a backward pass leaves gradients there.

        After it the parameters keep their last values; the matrices are the pruned ones again.
        """
        required = {name: parameter.requires_grad for name, parameter in self.parameters.items()}
        handles = []
        try:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(self._hook(self.masters[name])))
            for name, (linear, rule, dense) in self.adapters.items():
                masters = [self.masters[key] for key in keys(name, rule)]
                linear.__dict__["forward"] = partial(self._forward, linear, rule, dense, masters)
            self.push()
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(required[name])
            for linear, _, _ in self.adapters.values():
                linear.__dict__.pop("forward", None)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """In this context the forward pass is that of the model that stays, without gradients."""
        self.final = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.final = False

    def push(self) -> None:
        """The values of the trained tensors into the parameters that move as they are."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.masters[name])

    def values(self) -> dict[str, Tensor]:
        """Copies of the trained tensors."""
        return {key: master.detach().clone() for key, master in self.masters.items()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, master in self.masters.items():
                master.copy_(values[key])
        self.push()

    def _forward(self, linear: nn.Module, rule: Adapter, dense: bool, masters: list[nn.Parameter], x: Tensor) -> Tensor:
        weight, bias = read(linear), linear._parameters.get("bias")
        if self.final:
            keep = torch.ones_like(weight, dtype=torch.bool) if dense else weight != 0
            product = x @ rule.merged(weight.to(masters[0].dtype), keep, masters).to(x.dtype).T
        else:
            product = adapted(x, weight, rule, masters, dense)
        return product if bias is None else product + bias

    @staticmethod
    def _hook(master: nn.Parameter) -> Callable[[Tensor], None]:
        def folded(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            gradient = gradient.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

        return folded


def keys(linear: str, adapter: Adapter) -> list[str]:
    """Of an adapter's parameters for the matrix of this full name."""
    return [f"{linear}.weight:{name}" for name in adapter.names]


def merge(weight: Tensor, linear: str, adapter: Adapter, values: Mapping[str, Tensor], dense: bool = False) -> Tensor:
    """The weight [out, in] that stays, computed in float32 and rounded once to the dtype of the pruned one."""
    held = weight.float()
    keep = torch.ones_like(weight, dtype=torch.bool) if dense else weight != 0
    merged = adapter.merged(held, keep, [values[key].to(weight.device) for key in keys(linear, adapter)])
    return merged.to(weight.dtype) if dense else stored(merged, weight)


def trained(names: Collection[str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the trained tensors those that are parameters of these full names."""
    return {name: values[name] for name in names if name in values}
