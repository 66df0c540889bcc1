"""Second moments between the inputs of a dense block and those of the same block in the pruned model."""

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.stream.collector import Collector, StopForward

if TYPE_CHECKING:
    from budwood.stream.block import Block


class LatestInput:
    """The last input of a linear, until it is used; shared by linears that share an input."""

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.x: Tensor | None = None

    def add(self, x: Tensor) -> None:  # [..., tokens, in]
        self.x = x.reshape(-1, x.shape[-1])
        self.count += len(self.x)


def cross_moments(dense: "Block", block: "Block") -> dict[str, Tensor]:
    """X₀ᵀ X over all tokens, float64 [in, in], by name inside the block: X₀ the inputs in `dense`, X those in `block`.

    Linears that share their input share a matrix. One pass over the batches of both. Raises RunError where a linear is
    not called with the same tokens in both, as experts are not.
    """
    assert block.activations is not None
    sums: dict[tuple[int, int], Tensor] = {}
    with _collector(dense) as first, _collector(block) as second, torch.no_grad():
        for batch in block.activations.indices():
            for collector, which in ((first, dense), (second, block)):
                collector.next_batch()
                with suppress(StopForward):
                    which.run(batch)
            pairs = {}
            for name, linear in block.linears.items():
                one, other = first.found.get(name), second.found.get(name)
                if one is None or other is None or one.x is None or other.x is None or len(one.x) != len(other.x):
                    raise RunError(
                        f"{linear.name} is called with different tokens in the dense and the pruned model, so "
                        "their inputs cannot be compared; leave target at 0"
                    )
                pairs[id(one), id(other)] = one, other
            for key, (one, other) in pairs.items():
                product = (one.x.float().T @ other.x.float()).double()
                sums[key] = sums[key].add_(product) if key in sums else product
                one.x = other.x = None
        return {name: sums[id(first.found[name]), id(second.found[name])] for name in block.linears}


def _collector(block: "Block") -> Collector:
    modules = {name: linear.module for name, linear in block.linears.items()}
    return Collector(modules, {name: linear.shape[1] for name, linear in block.linears.items()}, LatestInput)
