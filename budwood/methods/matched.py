"""matched: after another method, fit each whole block by gradients to the outputs of the dense one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from budwood.methods.method import Step, Wrapper
from budwood.methods.option import option
from budwood.methods.reconstruction import LOSS, MOVE, RATE, TARGET, TOKENS, BlockFit, check_block_fit

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model


@dataclass(frozen=True)
class Matched(Wrapper):
    """Let another method prune a block, then train the whole block, in a few steps, towards what it computed before.

    Weights that the inner method dropped stay zero, and units that it removed stay removed.
    """

    steps: int = option(64, "steps of gradient descent for every block")
    rate: float = option(0.002, RATE)
    target: float | str = option("pruned", TARGET)
    move: str = option("weights+biases+norms", MOVE)
    loss: str = option("relative", LOSS)
    tokens: int = option(1024, TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_fit(self.steps, 1, self.rate, self.target, self.move, self.loss, self.tokens)

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        inner = self.inner.prepare(model, windows, work)
        fit = BlockFit(model, windows, self.steps, self.rate, self.target, self.move, self.loss, self.tokens)
        return MatchedStep(inner, fit)


@dataclass(frozen=True)
class MatchedStep(Step):
    """inner: prunes the block."""

    inner: Step
    block_fit: BlockFit

    def __call__(self, block: "Block") -> None:
        self.block_fit.before(block)
        self.inner(block)
        self.block_fit.fit(block)

    def finish(self, run: "Run") -> None:
        self.inner.finish(run)
