"""Magnitude-sp: structured pruning by weights alone, a baseline of FLAP (An et al., AAAI 2024, arXiv 2312.11983)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.structured import Slices, Structured, forecast_counts
from budwood.methods.unit_survey import Findings, InOrder, choose, expected_counts, found_units, survey
from budwood.methods.validation import number, one_of, truth
from budwood.sparsity.fluctuation import column_norms
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.unit_budget import Rules

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.block import Block
    from budwood.stream.model import Model


@dataclass(frozen=True)
class MagnitudeSp(Structured):
    """Remove the KV groups and neurons whose output weights are smallest. Needs no calibration text."""

    name: ClassVar[str] = "magnitude_sp"
    calibrated: ClassVar[bool] = False

    drop: float = option(0.2, "share of the weights in attention and MLP to remove")
    allocation: Literal["uniform", "global"] = option(
        "uniform", 'the same share of every block, or "global": one list of all units'
    )
    published: bool = option(False, "counts and ties of the published program, which truncates both counts of a block")

    def __post_init__(self) -> None:
        number("drop", self.drop, 0, 1)
        one_of("allocation", self.allocation, ("uniform", "global"))
        truth("published", self.published)

    @property
    def rules(self) -> Rules:
        """How the budget is spent."""
        return Rules(
            "ul-um" if self.allocation == "uniform" else "al-am", search="reference" if self.published else "nearest"
        )

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        return forecast_counts(structure, expected_counts(structure.units, self.drop, self.rules))

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        if self.allocation == "uniform":
            return InOrder(examine=norms, drop=self.drop, rules=self.rules)
        findings = survey(self, model.structure, work, model.blocks, norms)
        return Slices(choose(found_units(model.structure, findings), findings, self.drop, self.rules))


def norms(block: "Block") -> Findings:
    """Of every set of units the 2-norms of the columns that read it."""
    return {
        name: {"channels": units.fold(column_norms(block.linears[name].weight).cpu()).contiguous()}
        for name, units in block.units.items()
    }
