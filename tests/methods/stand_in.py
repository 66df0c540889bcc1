"""A decoder block made of tensors: linears by name, and the inputs that reach each of them."""

import torch
from torch import nn

from budwood.stream import block
from budwood.stream.linear import Linear


class Block(block.Block):
    """Weights [out, in] by name, and as many lists of batches [tokens, in]; names may share a list."""

    def __init__(self, weights, inputs, name="model.layers.7"):
        self.index, self.name, self.inputs, self.passes, self._shared = 7, name, inputs, 0, {}
        self.linears = {key: linear(f"{name}.{key}", weight.clone()) for key, weight in weights.items()}

    def _pass(self, statistic, only=None):
        self.passes += 1
        shared = {}
        for key, linear in self.linears.items():
            batches = self.inputs[key]
            if id(batches) not in shared:
                shared[id(batches)] = statistic(linear.shape[1])
                for batch in batches:
                    shared[id(batches)].add(batch)
        return {key: shared[id(self.inputs[key])] for key in self.linears}


def linear(name, weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.requires_grad_(False)
    module.weight.copy_(weight)
    return Linear(name, module, weight)


def random_block(dtype=torch.float32, hidden=32, mlp=64, seed=0):
    """q, k, v on one input, o on another, and a down projection."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    mix = draw(hidden, hidden)
    first, second = [draw(100, hidden) @ mix for _ in range(3)], [draw(100, hidden) for _ in range(3)]
    third = [draw(100, mlp).relu() for _ in range(3)]
    shapes = {
        "q": (hidden, hidden),
        "k": (8, hidden),
        "v": (8, hidden),
        "o": (hidden, hidden),
        "down": (hidden, mlp),
    }
    weights = {key: draw(*shape).to(dtype) for key, shape in shapes.items()}
    return Block(weights, {"q": first, "k": first, "v": first, "o": second, "down": third})
