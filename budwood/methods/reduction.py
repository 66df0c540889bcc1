"""What methods that remove whole blocks or experts share: the step that streams the reduced model, and its proof."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.checkpoints.reduction import Kept, Reduced
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.trial import Trial
from budwood.errors import RunError
from budwood.methods.method import Method, Step
from budwood.models.routing import mixtures, unrouted
from budwood.models.slicing import close, removed
from budwood.sparsity.forecast import Forecast
from budwood.stream.arithmetic import FLOAT32

if TYPE_CHECKING:
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model


class Reduction(Method):
    """A method that removes whole blocks or experts and changes no other weight. Subclasses give `reduced`."""

    def forecast(self, structure: ModelStructure) -> dict[str, Forecast]:
        """Every matrix that is left, by its name in the reduced model."""
        return {name: Forecast(prod(shape)) for name, shape in self.reduced(structure).shapes.items()}


def structure_of(trial: Trial, whole: ModelStructure) -> ModelStructure:
    """The structure of a reduced model. whole: the structure before."""
    return ModelStructure(
        trial.config, compute=whole.compute, skip=whole.skip, trust_remote_code=trial.trust_remote_code
    )


@dataclass(frozen=True)
class ReducedStep(Step):
    """Writes the blocks of the reduced model; each is compared with the block of the whole model that it was.

    whole: the model before, in float32. trial: the configuration of the reduced model. notes: for the report.
    """

    whole: "Model"
    kept: Kept
    trial: Trial
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: "Model", kept: Kept, trial: Trial, notes: list[str]) -> "ReducedStep":
        return cls(model.copy(arithmetic=FLOAT32), kept, trial, notes)

    def model(self, model: "Model") -> "Model":
        """In float32: in 16 bits a router ties experts, and which of them it then takes depends on their number."""
        return model.copy(Reduced.of(model.source, self.kept, self.trial), FLOAT32)

    def inputs(self, windows: Tensor | None) -> None:
        """No block changes what it computes, so nothing need be run."""

    def __call__(self, block: "Block") -> None:
        """Compares the outputs for a few random hidden states; experts that are removed get no token in the former."""
        hidden, calls = block.probe()
        with torch.no_grad(), self.whole.block(self.kept.blocks[block.index]) as before:
            found = block.forward(hidden, calls=calls)
            expected = self._without_experts(before, hidden)
        if not close(found, expected):
            raise RunError(
                f"{before.name} computes something else as {block.name} of the reduced model, whose configuration "
                "does not describe it in full; keep it, or choose a method for single weights"
            )

    def _without_experts(self, block: "Block", hidden: Tensor) -> Tensor:
        with ExitStack() as masks:
            for name, experts in mixtures(block.module).items():
                kept = self.kept.experts.get(f"{block.name}.{name}")
                if kept is not None:
                    gone = removed(experts.num_experts, torch.tensor(kept))
                    parent = block.module.get_submodule(name.rpartition(".")[0])
                    masks.enter_context(unrouted(parent, experts, gone))
            return block.forward(hidden, calls=block.probe()[1])

    def finish(self, run: "Run") -> None:
        for sentence in self.notes:
            run.note(sentence)
