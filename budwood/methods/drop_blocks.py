"""Depth pruning: whole blocks are removed, those that turn the hidden states least (arXiv 2403.03853, 2403.17887)."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from budwood.checkpoints.reduction import Kept, with_blocks
from budwood.checkpoints.structure import ModelStructure
from budwood.errors import RunError, UsageError
from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.reduction import ReducedStep, Reduction, structure_of
from budwood.methods.validation import number, truth, whole
from budwood.sparsity.depth import lowest, lowest_run, turns

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.stream.model import Model

SAMPLED = 1024  # tokens whose hidden states are kept over a run of blocks


@dataclass(frozen=True)
class DropBlocks(Reduction):
    """Remove the decoder blocks that change the direction of the hidden states least; an ordinary model remains."""

    name: ClassVar[str] = "drop_blocks"
    drop: float = option(0.25, "share of the blocks that go")
    count: int | None = option(None, "number of blocks that go, in place of a share")
    consecutive: bool = option(
        False, "remove one run of blocks, the one whose outputs are nearest to its inputs, not the lowest scores"
    )
    protect: tuple[int, ...] = option((), "blocks that stay, such as (0, 1, -1); negative numbers count from the end")

    def __post_init__(self) -> None:
        number("drop", self.drop, 0, 1)
        truth("consecutive", self.consecutive)
        if self.count is not None:
            whole("count", self.count, 1)
        if not isinstance(self.protect, tuple) or any(type(index) is not int for index in self.protect):
            raise UsageError(f"protect must be numbers of blocks such as (0, -1), got {self.protect!r}")

    def number(self, blocks: int) -> int:
        """How many of a model's blocks go."""
        return round(self.drop * blocks) if self.count is None else self.count

    def protected(self, blocks: int) -> set[int]:
        return {index % blocks for index in self.protect}

    def check_structure(self, structure: ModelStructure) -> None:
        blocks, name = len(structure.modules), type(structure.module).__name__
        outside = [index for index in self.protect if not -blocks <= index < blocks]
        if outside:
            raise UsageError(f"{self} protects block {outside[0]}, and {name} has {blocks}; give 0 to {blocks - 1}")
        if not 1 <= self.number(blocks) < blocks:
            raise UsageError(f"{self} removes {self.number(blocks)} of {blocks} blocks; remove 1 to {blocks - 1}")
        if len(self.removed([0.0] * blocks, blocks)) < self.number(blocks):
            which = "are in one run and" if self.consecutive else "are"
            raise UsageError(f"{self}: no {self.number(blocks)} blocks of {blocks} {which} not protected; protect less")
        self.reduced(structure)

    def removed(self, scores: list[float], blocks: int) -> list[int]:
        """The blocks that go. scores: of each block, or of the run that begins there."""
        count, protected = self.number(blocks), self.protected(blocks)
        if self.consecutive:
            return lowest_run(scores[: blocks - count + 1], count, protected)
        return lowest(scores, count, protected)

    def reduced(self, structure: ModelStructure) -> ModelStructure:
        """Without the last blocks that are not protected: which ones will go is known after the survey only."""
        return _reduced(self, structure)

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        """One survey pass over the windows, whose scores `work` keeps."""
        assert windows is not None
        blocks = len(model)
        span = self.number(blocks) if self.consecutive else 1
        scores = work.record(f"turns-{span}", lambda: survey(model, windows, span))
        gone = self.removed(scores, blocks)
        kept = [index for index in range(blocks) if index not in gone]
        trial = with_blocks(model.source.trial, model.path, blocks, kept)
        if trial is None:
            raise RunError(
                f"no configuration describes {model.source.name} without its blocks {listed(gone)}; protect those that "
                "have other shapes"
            )
        turned = scores[gone[0]] if self.consecutive else max(scores[index] for index in gone)
        what = "together they turn" if self.consecutive else "each turns"
        note = f"removed of {blocks} blocks: {listed(gone)}; {what} the hidden states by {turned:.3g} (1 - cosine)"
        return ReducedStep.of(model, Kept(kept, {}), trial, [note if self.consecutive else f"{note} at most"])


@lru_cache(maxsize=1)  # asked for once per format by `plan`
def _reduced(method: DropBlocks, structure: ModelStructure) -> ModelStructure:
    blocks = len(structure.modules)
    gone = method.removed([0.0] * blocks, blocks)
    kept = [index for index in range(blocks) if index not in gone]
    trial = with_blocks(structure.trial, structure.path, blocks, kept)
    if trial is None:
        raise UsageError(
            f"no configuration describes {type(structure.module).__name__} with {len(kept)} of its {blocks} blocks; "
            "choose another method"
        )
    return structure_of(trial, structure)


def listed(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))


def survey(model: "Model", windows: Tensor, span: int) -> list[float]:
    """How much every run of `span` blocks turns the hidden states, by its first block: one pass over the windows.

    windows: [windows, tokens]. A single block's score is a mean over all tokens, that of a run over SAMPLED tokens that
    are evenly spaced.
    """
    scores: list[float] = []
    if span == 1:
        for block in model.survey(windows, "survey of the dense model"):
            turned: list[Tensor] = []  # by batch
            block.advance(partial(_note_turns, turned))
            scores.append(float(torch.cat(turned).mean()))
        return scores
    stride = max(1, windows.numel() // SAMPLED)
    entered: list[Tensor] = []  # hidden states that entered the last blocks
    for block in model.survey(windows, "survey of the dense model"):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        block.advance(partial(_note_states, inputs, outputs, stride))
        entered = [*entered, torch.cat(inputs)][-span:]
        if len(entered) == span:
            scores.append(float(turns(entered[0], torch.cat(outputs)).mean()))
    return scores


def _note_turns(turned: list[Tensor], inputs: Tensor, outputs: Tensor) -> None:
    turned.append(turns(inputs, outputs).flatten())


def _note_states(before: list[Tensor], after: list[Tensor], stride: int, inputs: Tensor, outputs: Tensor) -> None:
    """Every `stride`-th token of a batch."""
    before.append(inputs.flatten(0, -2)[::stride].clone())
    after.append(outputs.flatten(0, -2)[::stride].clone())
