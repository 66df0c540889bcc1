"""How the tokens of a mixture of experts are routed, found by running the module that holds router and experts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from budwood.models.experts import ExpertLinears
from budwood.models.linears import outputs, read

PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm")  # torch functions that a router computes logits by

Observer = Callable[[list[int], Tensor, Tensor], None]


def mixtures(module: nn.Module) -> dict[str, ExpertLinears]:
    """The experts inside a module by name, as plain linears."""
    return {name: child for name, child in module.named_modules() if isinstance(child, ExpertLinears)}


@contextmanager
def observed(experts: ExpertLinears, observer: Observer) -> Iterator[None]:
    """In this context `observer` gets the tokens per expert, the experts' outputs and their weights, at every call."""
    experts.observer = observer
    try:
        yield
    finally:
        experts.observer = None


def experts_per_token(parent: nn.Module, name: str) -> int:
    """How many experts a token gets from the module `parent` whose experts are its child `name`; runs on meta.

    Raises RuntimeError where the router cannot choose among so few.
    """
    experts = parent.get_submodule(name)
    assert isinstance(experts, ExpertLinears)
    hidden = read(experts.down[0]).shape[0]
    shell = nn.Module()
    trial = _with_child(parent, name, shell)
    chosen: list[int] = []

    def forward(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        chosen.append(experts.shape[-1])
        return hidden

    trial.get_submodule(name).forward = forward
    with torch.no_grad():
        trial(torch.empty(1, 1, hidden, device="meta", dtype=read(experts.down[0]).dtype))
    return chosen[0]


def _with_child(parent: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A copy of `parent` on meta with another child."""
    before = parent.get_submodule(name)
    parent.set_submodule(name, child)
    try:
        return deepcopy(parent).to("meta")
    finally:
        parent.set_submodule(name, before)


def groups_of(parent: nn.Module) -> int:
    """Into how many groups the router of the module `parent` divides its experts; 1 where it has none.

    Of the numbers that the modules call groups it is the largest: others say how many of them a token may use.
    """
    modules = [parent, *(child for child in parent.children() if not isinstance(child, ExpertLinears))]
    return max(
        (v for module in modules for key, v in vars(module).items() if "group" in key and type(v) is int), default=1
    )


@contextmanager
def unrouted(parent: nn.Module, experts: ExpertLinears, removed: Tensor) -> Iterator[None]:
    """In this context the router in `parent` gives the experts `removed` logits of minus infinity.

    So it does to a correction that is added to scores, where there is one.
    """
    count, before = experts.num_experts, []
    routers = [module for module in parent.children() if module is not experts and outputs(module) == count]
    try:
        for owner in (parent, *routers):
            for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
                if tuple(tensor.shape) == (count,) and tensor.is_floating_point():
                    before.append((tensor.detach(), tensor.detach().clone()))
                    tensor.detach()[removed] = -torch.inf
        for router in routers:
            router.forward = _masked(router.forward, count, removed)
        yield
    finally:
        for router in routers:
            router.__dict__.pop("forward", None)
        for tensor, values in before:
            tensor.copy_(values)


def _masked(forward: Callable[..., Any], count: int, removed: Tensor) -> Callable[..., Any]:
    def masked(*args: Any, **kwargs: Any) -> Any:
        with _Logits(count, removed):
            return forward(*args, **kwargs)

    return masked


class _Logits(TorchFunctionMode):
    """Products with one column per expert have minus infinity in those of the removed ones."""

    def __init__(self, count: int, removed: Tensor):
        super().__init__()
        self.count, self.removed = count, removed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in PRODUCTS and result.shape[-1] == self.count:
            return result.index_fill(-1, self.removed.to(result.device), -torch.inf)
        return result
