"""The dense model's hidden states, block by block beside the stream of the pruned one."""

from torch import Tensor

from budwood.stream.activations import Activations, batch_size
from budwood.stream.block import Block
from budwood.stream.model import Model

TOKENS = 1024  # of a batch, which is also a step for whoever fits to these states


class DenseStream:
    """A second stream over the same windows [windows, tokens], in which nothing is changed.

    It follows the first one at its own pace, so a resumed run, whose finished blocks are not handed over, needs no
    more. batch: windows at a time, by default about TOKENS tokens.
    """

    def __init__(self, model: Model, windows: Tensor, batch: int | None = None):
        self.model = Model(
            model.source,
            storage=model.storage,
            arithmetic=model.arithmetic,
            device=model.device,
            activation_limit=model.activation_limit,
            scratch=model.scratch,
        )
        self._stream = self.model.blocks(windows, batch=batch or batch_size(len(windows), windows.shape[1], TOKENS))
        self._block: Block | None = next(self._stream, None)

    def at(self, index: int) -> Block:
        """Dense block `index`, with the inputs that reach it. Asked for in the order of the blocks."""
        while self._block is not None and self._block.index < index:
            self._block = next(self._stream, None)
        assert self._block is not None
        return self._block

    def after(self, index: int) -> Activations:
        """The outputs of dense block `index`. Asked for in the order of the blocks."""
        while self._block is not None and self._block.index <= index:
            self._block = next(self._stream, None)
        assert self.model.activations is not None
        return self.model.activations
