"""The fit of a whole block by gradients: what graft's `steps` and `matched` share."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.methods.validation import number, one_of, whole
from budwood.stream.activations import Activations, batch_size
from budwood.stream.dense_stream import DenseStream
from budwood.training.move import norms, parse_fit, vectors
from budwood.training.reconstruct import LOSSES, reconstruct, typical

if TYPE_CHECKING:
    from budwood.stream.block import Block
    from budwood.stream.model import Model


log = logging.getLogger(__name__)

TARGETS = {"pruned": 0.0, "dense": 1.0}  # as shares of the dense model's outputs
RATE = "of the first of these steps, relative to the typical size of a parameter's values; it falls to 0"
TARGET = (
    '"pruned": the outputs of the dense block for the pruned model\'s inputs, "dense": those of the dense model; a '
    "number between 0 and 1 mixes both"
)
MOVE = "what moves in these steps: weights (the kept ones), biases (those of norms too), norms, joined by +"
LOSS = '"relative": squared error over the mean square of each token\'s target, or "plain" squared error'
TOKENS = "of a step, about: whole windows, one at least"


def check_block_fit(
    steps: int, least: int, rate: float, target: float | str, move: str, loss: str, tokens: int
) -> None:
    """Checks the options of a fit of whole blocks; raises UsageError. least: number of steps."""
    whole("steps", steps, least)
    number("rate", rate, 0, 1)
    if isinstance(target, str):
        one_of("target", target, TARGETS)
    else:
        number("target", target, 0, 1)
    parse_fit(move)
    one_of("loss", loss, LOSSES)
    whole("tokens", tokens, 1)


class BlockFit:
    """Fits one block after the other: `before` while a block is dense, `fit` once it is pruned or sliced.

    steps, rate, loss: see `reconstruct`. target, move, tokens: see the constants above.
    """

    def __init__(
        self,
        model: "Model",
        windows: Tensor,
        steps: int,
        rate: float,
        target: float | str,
        move: str,
        loss: str,
        tokens: int,
    ):
        self.steps, self.rate, self.loss, self.tokens = steps, rate, LOSSES[loss], tokens
        self.share = TARGETS[target] if isinstance(target, str) else target
        self.move, self.kinds = parse_fit(move), move.split("+")
        self.dense = DenseStream(model, windows) if self.share > 0 else None
        self.model = model
        self.outputs: Activations | None = None  # of the dense block for the pruned model's inputs

    def before(self, block: "Block") -> None:
        """Keeps the outputs of the dense block, where they are a part of the target."""
        inputs = block.activations
        assert inputs is not None
        if self.share == 1:
            return
        if self.outputs is None:
            limit = self.model.activation_limit // 2
            self.outputs = Activations(inputs.shape, inputs.hidden.dtype, inputs.batch, limit, self.model.scratch)
        block.write_outputs(self.outputs)

    def fit(self, block: "Block") -> None:
        """Moves what may move so that the outputs of the block come near the target; zeros of matrices stay zero."""
        inputs, targets = block.activations, self._targets(block)
        assert inputs is not None
        weights = {name: linear.weight for name, linear in block.linears.items()} if self.move.adapter else {}
        others = self._others(block)
        if not weights and not others:
            log.warning("%s has no %s, so nothing of it moves", block.name, " and no ".join(self.kinds))
            return
        parameters = {name: value.to(block.device) for name, value in {**weights, **others}.items()}

        def forward(values: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            return block.forward(
                hidden,
                {name: value for name, value in values.items() if name in weights},
                others={name: value for name, value in values.items() if name in others},
            )

        batches = inputs.part(slice(None), batch_size(inputs.shape[0], inputs.shape[1], self.tokens))
        spans = [batches.span(index) for index in batches.indices()]
        found = reconstruct(
            parameters,
            forward,
            [inputs.hidden[span] for span in spans],
            [targets[span] for span in spans],
            self.steps,
            self.rate,
            sparse=weights,
            sizes=self._sizes(block, others),
            loss=self.loss,
        )
        for name, value in found.items():
            if name in weights:
                block.linears[name].weight = value
            else:
                block.set_parameter(name, value)

    def _targets(self, block: "Block") -> Tensor:
        """[windows, tokens, hidden]"""
        if self.dense is None:
            assert self.outputs is not None
            return self.outputs.hidden
        dense = self.dense.after(block.index).hidden
        if self.outputs is None:
            return dense
        for index in self.outputs.indices():
            span = self.outputs.span(index)
            self.outputs.hidden[span] = torch.lerp(self.outputs.hidden[span], dense[span], self.share)
        return self.outputs.hidden

    def _others(self, block: "Block") -> dict[str, Tensor]:
        """Norms, and biases of them and of the linears in scope, that move: float32 by name inside the block."""
        of_norms = norms(block.module)
        return {
            name: parameter.detach().float()
            for name, parameter in vectors(block.module, self.move).items()
            if name in of_norms or name.removesuffix(".bias") in block.linears
        }

    def _sizes(self, block: "Block", others: Mapping[str, Tensor]) -> dict[str, float]:
        """The typical size of a bias that is zero: that of the weights beside it."""
        zero = [name for name, value in others.items() if not value.any()]
        linears = {name: block.linears.get(name.removesuffix(".bias")) for name in zero}
        return {name: typical(linear.weight) for name, linear in linears.items() if linear is not None}
