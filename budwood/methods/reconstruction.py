"""A block fitted as a whole, by gradients, to the outputs that the dense model has there."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import functional_call

from budwood.models.linears import read
from budwood.stream.dense_stream import DenseStream
from budwood.training.reconstruct import reconstruct


def reconstruct_block(block: Any, dense: DenseStream, steps: int, rate: float) -> None:
    """Moves the kept weights of a pruned block so that its outputs, for the inputs it really gets, come near dense's.

    steps, rate: see `reconstruct`.
    """
    targets = dense.after(block.index)
    spans = [targets.span(batch) for batch in targets.indices()]
    modules = {name: linear.module for name, linear in block.linears.items()}
    block.module.requires_grad_(False)

    def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        own = {
            f"{name}.weight": read(modules[name], weight.to(block.model.compute)) for name, weight in weights.items()
        }
        calls = dense.model.calls(hidden.shape[0], hidden.shape[1])
        hidden = hidden.to(block.model.device, copy=True)
        return calls.run(block.index, lambda *args, **kwargs: functional_call(block.module, own, args, kwargs), hidden)

    found = reconstruct(
        {name: linear.weight for name, linear in block.linears.items()},
        forward,
        [block.activations.hidden[span] for span in spans],
        [targets.hidden[span] for span in spans],
        steps,
        rate,
    )
    for name, weight in found.items():
        block.linears[name].weight = weight
