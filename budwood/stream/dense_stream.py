"""The hidden states of the dense model, block by block, in parallel to the stream of the pruned one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from budwood.stream.activations import Activations, batch_size

if TYPE_CHECKING:
    from budwood.stream.block import Block
    from budwood.stream.model import Model

TOKENS = 1024  # of a batch, which is also one step of a method that fits to these hidden states


class DenseStream:
    """A second stream over the same windows [windows, tokens], in which nothing is pruned.

    It advances to the block that is requested, so a resumed run, whose finished blocks are not yielded, needs no
    special case. batch: windows at a time, by default about TOKENS tokens.
    """

    def __init__(self, model: "Model", windows: Tensor, batch: int | None = None):
        self.model = model.copy()
        self._stream = self.model.blocks(windows, batch=batch or batch_size(len(windows), windows.shape[1], TOKENS))
        self._block: Block | None = next(self._stream, None)

    def at(self, index: int) -> "Block":
        """Dense block `index`, with its inputs. Call in the order of the blocks."""
        while self._block is not None and self._block.index < index:
            self._block = next(self._stream, None)
        assert self._block is not None
        return self._block

    def after(self, index: int) -> Activations:
        """The outputs of dense block `index`. Call in the order of the blocks."""
        while self._block is not None and self._block.index <= index:
            self._block = next(self._stream, None)
        assert self.model.activations is not None
        return self.model.activations

    def run(self, block: "Block", weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Outputs of `block` of the pruned stream with other weights, for a dense batch [batch, tokens, hidden].

        weights: [out, in] by name inside the block.
        """
        return block.forward(hidden, weights, self.model.calls(hidden.shape[0], hidden.shape[1]))
