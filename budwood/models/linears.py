"""The matrices of the decoder blocks that may be pruned, always as [out, in]."""

import warnings
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.models.blocks import find_blocks
from budwood.models.experts import ExpertLinears, is_fused
from budwood.models.expressions import Expressions
from budwood.models.reshape import replace

ROUTER = "router"
OUTSIDE = "outside the decoder blocks"
FUSED = "fused experts"
OTHER = "not a linear"


def prunable(model: PreTrainedModel, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The linears of the decoder blocks by full name, in order, without routers and what `skip` names.

    skip: regular expressions, searched for in the full name; one that matches nothing causes a warning.
    Experts are among them once they are unfused. Works on the meta device. Raises UsageError for a bad
    expression.
    """
    rules = Expressions(skip)
    path, blocks = find_blocks(model)
    found, routing = linears_in(blocks, path), routers(blocks, path)
    for message in _unmatched(rules, found):
        warnings.warn(message, stacklevel=2)
    return {name: module for name, module in found.items() if name not in routing and rules.first(name) is None}


def unmatched(model: PreTrainedModel, skip: Sequence[str]) -> list[str]:
    """A message for every expression of `skip` that matches no linear."""
    path, blocks = find_blocks(model)
    return _unmatched(Expressions(skip), linears_in(blocks, path))


def _unmatched(rules: Expressions, names: Collection[str]) -> list[str]:
    return [
        f"--skip {rule.pattern!r} matches no linear of the decoder blocks"
        for rule in rules.rules
        if not any(rules.search(rule, name) for name in names)
    ]


def skipped(model: PreTrainedModel, skip: Sequence[str] = ()) -> dict[str, str]:
    """Every module with a matrix of its own that is not in scope, by full name, and the reason."""
    rules = Expressions(skip)
    path, blocks = find_blocks(model)
    found, routing = linears_in(blocks, path), routers(blocks, path)
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if all(weight.dim() < 2 for weight in module.parameters(recurse=False)):
            continue
        if not name.startswith(f"{path}."):
            reasons[name] = OUTSIDE
        elif name in routing:
            reasons[name] = ROUTER
        elif name not in found:
            reasons[name] = FUSED if stacked(module) else OTHER
        elif rule := rules.first(name):
            reasons[name] = f"--skip {rule.pattern!r}"
    return reasons


def coverage(model: PreTrainedModel, skip: Sequence[str] = ()) -> float:
    """Share of all parameters of the model that `prunable` puts in scope."""
    scope = sum(read(module).numel() for module in prunable(model, skip).values())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())  # on meta these are parameters of their own
    return scope / sum(weight.numel() for name, weight in model.named_parameters() if name not in tied)


def read(module: nn.Module, stored: Tensor | None = None) -> Tensor:
    """The weight of a linear, or `stored` in its place, as [out, in]; reading twice transposes it back."""
    weight = module.get_parameter("weight") if stored is None else stored
    return weight.T if isinstance(module, Conv1D) else weight


def write(module: nn.Module, weight: Tensor) -> None:
    """Copies a weight [out, in] into a linear, in the linear's own dtype and memory.

    Raises ValueError where the shapes differ, since copying would broadcast silently.
    """
    current = read(module).detach()  # [out, in], shares the linear's memory
    if current.shape != weight.shape:
        raise ValueError(f"a weight of {tuple(weight.shape)} does not fit a linear of {tuple(current.shape)}")
    current.copy_(weight)


def resize(module: nn.Module, weight: Tensor) -> None:
    """Replaces the weight of a linear by `weight` [out, in] of any shape, in the linear's own dtype and on its device.

    The parameter is a new one, which shares no memory with `weight`; it requires a gradient where the old one did. The
    bias stays as it is.
    """
    old = module.get_parameter("weight")
    stored = read(module, weight.detach()).to(old.device, old.dtype).clone(memory_format=torch.contiguous_format)
    replace(module, "weight", stored, old.requires_grad)


def linears_in(blocks: nn.ModuleList, path: str) -> dict[str, nn.Module]:
    """The linears of the blocks by full name; path: full name of the blocks."""
    return {
        name: module for name, module in blocks.named_modules(prefix=path) if isinstance(module, nn.Linear | Conv1D)
    }


def routers(blocks: nn.ModuleList, path: str) -> set[str]:
    """Full names of the modules of the blocks that choose among experts; path: full name of the blocks.

    A router is a sibling of the experts with one output for each of them, or with a single output that gates an
    expert shared by all tokens. Where experts are held in a form that is not known, what is called a router is one.
    """
    found = {name for name in linears_in(blocks, path) if "router" in name.removeprefix(path)}
    for name, parent in blocks.named_modules(prefix=path):
        for experts, count in sizes_of_experts(parent):
            for inner, module in parent.named_modules(prefix=name):
                inside = f"{inner}.".startswith(f"{name}.{experts}.")
                if not inside and outputs(module) in (1, count):
                    found.add(inner)
    return found


def sizes_of_experts(parent: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the children that hold experts, and the number of experts in each."""
    for name, child in parent.named_children():
        if isinstance(child, ExpertLinears):
            yield name, child.num_experts
        elif counts := stacked(child):
            yield from ((name, count) for count in sorted(counts))
        elif isinstance(child, nn.ModuleList) and not isinstance(parent, ExpertLinears) and holds_linears(child):
            yield name, len(child)


def stacked(module: nn.Module) -> set[int]:
    """How many matrices the parameters of a module hold that are stacks of them; kernels of convolutions are none."""
    if isinstance(module, _ConvNd):
        return set()
    return {
        len(weight) for weight in module.parameters(recurse=False) if weight.dim() == 3 and min(weight.shape[1:]) > 1
    }


def unsplit(model: PreTrainedModel) -> str | None:
    """A sentence on experts that stay dense, as their module does not say how its matrices are used; None without."""
    path, blocks = find_blocks(model)
    found = [module for _, module in blocks.named_modules(prefix=path) if stacked(module) and not is_fused(module)]
    if not found:
        return None
    weights = sum(weight.numel() for module in found for weight in module.parameters(recurse=False))
    share = weights / sum(weight.numel() for weight in model.parameters())
    return f"{share:.0%} of all weights are experts that stay dense: {type(found[0]).__name__} cannot be split up"


def holds_linears(modules: nn.ModuleList) -> bool:
    """Whether every one of several modules contains linears, as experts in a list do."""
    return len(modules) > 1 and all(
        any(isinstance(inner, nn.Linear | Conv1D) for inner in module.modules()) for module in modules
    )


def outputs(module: nn.Module) -> int | None:
    """Rows of a module's own matrix; None where it has none."""
    if isinstance(module, nn.Linear | Conv1D):
        return read(module).shape[0]
    return next((len(weight) for weight in module.parameters(recurse=False) if weight.dim() == 2), None)
