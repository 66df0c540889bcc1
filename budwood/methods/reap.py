"""REAP: whole experts of a mixture are removed (Lasby et al., ICLR 2026, arXiv 2510.13999)."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from budwood.checkpoints.reduction import Kept, with_experts
from budwood.checkpoints.structure import ModelStructure
from budwood.errors import UsageError
from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.reduction import ReducedStep, Reduction, structure_of
from budwood.methods.validation import one_of, truth
from budwood.models.routing import experts_per_token, groups_of, mixtures, observed
from budwood.sparsity.experts import SCORES, ExpertSums, choose, super_experts

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.stream.model import Model


@dataclass(frozen=True)
class Reap(Reduction):
    """Remove the experts that contribute least for the tokens routed to them; the result is an ordinary model."""

    keep: float | int = option(0.5, "the experts of every layer that stay: a share such as 0.5, or a number such as 64")
    score: Literal["reap", "ean", "frequency", "man", "msan"] = option(
        "reap",
        "mean of the gate times the norm of the output over the tokens routed to an expert; ean: sum of norms; "
        "frequency: number of tokens; man, msan: mean of norms, of squared norms",
    )
    keep_super: bool = option(False, "keep experts with outliers among the largest activations of all layers")

    def __post_init__(self) -> None:
        number = type(self.keep) is int and self.keep >= 1
        if not number and not (isinstance(self.keep, float) and 0 < self.keep <= 1):
            raise UsageError(f"keep must be a share such as 0.5 or a number of experts such as 64, got {self.keep!r}")
        one_of("score", self.score, SCORES)
        truth("keep_super", self.keep_super)

    def count(self, experts: int) -> int:
        """How many of a layer's experts stay."""
        return self.keep if isinstance(self.keep, int) else round(self.keep * experts)

    def check_structure(self, structure: ModelStructure) -> None:
        name = type(structure.module).__name__
        found = mixtures(structure.module)
        numbers = sorted({experts.num_experts for experts in found.values()})
        if not found:
            raise UsageError(f"{self} removes experts, and {name} has none; choose another method")
        if len(numbers) > 1:
            raise UsageError(f"{name} has layers of {numbers[0]} to {numbers[-1]} experts; reap needs the same in all")
        count, groups = self.count(numbers[0]), max(map(groups_of, parents(structure.module).values()))
        least = max(experts_per_token(parent, path) for path, parent in first(structure.module))
        if not least <= count <= numbers[0]:
            raise UsageError(
                f"{self} leaves {count} of {numbers[0]} experts, and {name} routes every token to {least}; "
                f"keep {least} to {numbers[0]}"
            )
        if count % groups:
            raise UsageError(
                f"{self} leaves {count} experts, which the router of {name} cannot divide into its {groups} groups; "
                f"keep a multiple of {groups}"
            )
        if count < numbers[0]:
            self._check_router(self.reduced(structure))

    def _check_router(self, reduced: ModelStructure) -> None:
        try:
            for path, parent in first(reduced.module):
                experts_per_token(parent, path)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self} leaves too few experts for the router ({reason}); keep more") from error

    def reduced(self, structure: ModelStructure) -> ModelStructure:
        return _reduced(self, structure)

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        """One survey pass over the windows, whose sums `work` keeps."""
        assert windows is not None
        sums = work.tensors("experts", lambda: survey(model, windows))
        holders = parents(model.module)
        names = [name for name in holders if name in sums]
        protected = super_experts(torch.stack([sums[name][-1] for name in names])) if self.keep_super else None
        kept = {}
        for layer, name in enumerate(names):
            scores = SCORES[self.score](sums[name])
            first = None if protected is None else protected[layer]
            kept[name] = choose(scores, self.count(len(scores)), groups_of(holders[name]), first).tolist()
        old = sums[names[0]].shape[1]
        new = self.count(old)
        trial = model.source.trial if new == old else with_experts(model.source.trial, old, new)
        assert trial is not None  # `check_structure` has found it
        unreached = sum(int((sums[name][0] == 0).sum()) for name in names)
        notes = [f"{new} of {old} experts stay in each of {len(names)} layers"]
        if unreached:
            notes.append(
                f"{unreached} of {old * len(names)} experts got no calibration token; they are the first to go"
            )
        return ReducedStep.of(model, Kept(range(len(model)), kept), trial, notes)


@lru_cache(maxsize=1)  # asked for once per format by `plan`
def _reduced(method: Reap, structure: ModelStructure) -> ModelStructure:
    experts = next(iter(mixtures(structure.module).values())).num_experts
    if method.count(experts) == experts:
        return structure
    trial = with_experts(structure.trial, experts, method.count(experts))
    if trial is None:
        raise UsageError(
            f"no number in the configuration of {type(structure.module).__name__} makes {experts} experts "
            f"{method.count(experts)}; choose another number, or another method"
        )
    return structure_of(trial, structure)


def parents(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold experts and their router, by the name of the experts."""
    return {name: module.get_submodule(name.rpartition(".")[0]) for name in mixtures(module)}


def first(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Of the first layer with experts: their name inside the module that holds them, and that module."""
    return [(name.rpartition(".")[2], parent) for name, parent in list(parents(module).items())[:1]]


def survey(model: "Model", windows: Tensor) -> dict[str, Tensor]:
    """The sums [5, experts] of `ExpertSums` by full name of the experts: one pass over windows [windows, tokens]."""
    found: dict[str, Tensor] = {}
    for block in model.survey(windows, "survey of the dense model"):
        with ExitStack() as observers:
            for name, experts in mixtures(block.module).items():
                sums = ExpertSums(experts.num_experts)
                observers.enter_context(observed(experts, sums.add))
                found[f"{block.name}.{name}"] = sums.sums
            block.advance()
    return found
