"""Layers that are given the same input (query, key and value; gate and up), multiplied in one call.

The first of them that is called computes for all; the others, called with the very same tensor, find their product
waiting. A call costs more than a small product does.
"""

import re
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.kernels import dispatch
from budwood.kernels.native import AS_FEW, FEW
from budwood.kernels.native_matrix import linears

if TYPE_CHECKING:
    from budwood.kernels.linear import SparseLinear

# The parts that are given one input, by the names that models use.
TOGETHER = (re.compile(r"(q|k|v)_proj|query|key|value|(q|k|v)_lin"), re.compile(r"gate_proj|up_proj|w1|w3"))


class SharedInput:
    """Layers that share an input; holds what the first has computed for the others until they ask."""

    def __init__(self, layers: Iterable["SparseLinear"]):
        self.layers = list(layers)
        self.waiting: tuple[weakref.ref[Tensor], int, dict[SparseLinear, Tensor]] | None = None

    def product(self, layer: "SparseLinear", input: Tensor) -> Tensor | None:
        """The product of one of the layers; None where it should go its own way."""
        if dispatch.is_exact() or input.is_inference():  # has no version: a change in between would go unseen
            return None
        waiting = self.waiting
        if waiting is not None and waiting[0]() is input and waiting[1] == input._version:
            found = waiting[2].pop(layer, None)
            if not waiting[2]:
                self.waiting = None
            if found is not None:
                return found
        if layer is not self.layers[0] or input.numel() > FEW * layer.shape[1]:
            return None
        if (torch.is_grad_enabled() and input.requires_grad) or torch.is_autocast_enabled(input.device.type):
            return None
        kernels = [sibling.kernel() for sibling in self.layers]
        ready = [kernel for kernel in kernels if kernel is not None]
        if len(ready) < len(kernels):
            return None
        products = linears(ready, input, [sibling.bias for sibling in self.layers], AS_FEW)
        first, *rest = products
        if first is None:
            return None
        others = {sibling: found for sibling, found in zip(self.layers[1:], rest, strict=True) if found is not None}
        self.waiting = (weakref.ref(input), input._version, others)
        return first


def link_shared_inputs(layers: Iterable[tuple[str, "SparseLinear"]]) -> None:
    """Tell layers of each other where their names (full, in order) say that they are given the same input."""
    groups: defaultdict[tuple[str, int, int], list[SparseLinear]] = defaultdict(list)
    for name, layer in layers:
        parent, _, part = name.rpartition(".")
        for kind, names in enumerate(TOGETHER):
            if names.fullmatch(part):
                groups[parent, kind, layer.shape[1]].append(layer)
    for group in groups.values():
        if len(group) > 1:
            siblings = SharedInput(group)
            for layer in group:
                layer.siblings = siblings
