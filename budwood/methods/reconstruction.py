"""Fits a whole block by gradients to the outputs of the dense model."""

from functools import partial
from typing import TYPE_CHECKING

from budwood.training.reconstruct import reconstruct

if TYPE_CHECKING:
    from budwood.stream.block import Block
    from budwood.stream.dense_stream import DenseStream


def reconstruct_block(block: "Block", dense: "DenseStream", steps: int, rate: float) -> None:
    """Moves the kept weights of a pruned block so that its outputs, for its own inputs, come near the dense model's.

    steps, rate: see `reconstruct`.
    """
    targets = dense.after(block.index)
    assert block.activations is not None
    inputs = block.activations.hidden
    spans = [targets.span(batch) for batch in targets.indices()]
    found = reconstruct(
        {name: linear.weight for name, linear in block.linears.items()},
        partial(dense.run, block),
        [inputs[span] for span in spans],
        [targets.hidden[span] for span in spans],
        steps,
        rate,
    )
    for name, weight in found.items():
        block.linears[name].weight = weight
