"""Wanda-sp: structured pruning by weights and activations, a baseline of FLAP (An et al., AAAI 2024, 2312.11983)."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.structured import Slices, Structured, forecast_counts
from budwood.methods.unit_survey import InOrder, choose, expected_counts, fluctuations, found_units, survey
from budwood.methods.validation import number, one_of, truth
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.unit_budget import Rules

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.model import Model


@dataclass(frozen=True)
class WandaSp(Structured):
    """Remove the KV groups and neurons whose weights times the norms of their inputs are smallest."""

    name: ClassVar[str] = "wanda_sp"

    drop: float = option(0.2, "share of the weights in attention and MLP to remove")
    allocation: Literal["uniform", "global"] = option(
        "uniform", 'the same share of every block, or "global": one list of all units of the dense model'
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
        assert windows is not None
        if self.allocation == "uniform":
            return InOrder(
                examine=lambda block: fluctuations(block, "wifn", block.collect), drop=self.drop, rules=self.rules
            )
        findings = survey(
            self,
            model.structure,
            work,
            partial(model.survey, windows, "survey of the dense model"),
            lambda block: fluctuations(block, "wifn", block.observe),
        )
        return Slices(choose(found_units(model.structure, findings), findings, self.drop, self.rules))
