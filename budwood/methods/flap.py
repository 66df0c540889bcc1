"""FLAP: structured pruning by the fluctuation of inputs (An, Zhao, Yu, Tang, Wang, AAAI 2024, arXiv 2312.11983)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.structured import Slices, Structured, forecast_counts
from budwood.methods.unit_survey import (
    Findings,
    Sets,
    choose,
    enough,
    expected_counts,
    fluctuations,
    found_units,
    survey,
)
from budwood.methods.validation import number, one_of, truth, whole
from budwood.sparsity.fluctuation import Metric, Moments, PublishedMoments, compensation, mean_output
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.unit_budget import Rules, Search, Structure
from budwood.sparsity.units import Units, places

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.block import Block
    from budwood.stream.linear import Linear
    from budwood.stream.model import Model

Bias = Literal["plain", "none", "recentred"]
STRUCTURES = ("ul-um", "ul-mm", "al-mm", "al-am")


@dataclass(frozen=True)
class Flap(Structured):
    """Remove the KV groups and neurons whose outputs vary least, and return their mean by biases. No training."""

    drop: float = option(0.2, "share of the weights in attention and MLP to remove")
    metric: Metric = option(
        "wifv", '"wifv": variance times squared weights; "ifv": variance; "wifn": norm times weights, as in Wanda'
    )
    structure: Structure = option(
        "al-am",
        'budget: "al-am" one list of all units; "ul-um" the same share of every block; "al-mm" and "ul-mm" the '
        "same with a given number of groups",
    )
    remove_groups: int | None = option(None, 'KV groups to remove from the whole model; for "ul-mm" and "al-mm"')
    attn_power: float = option(2.0, "exponent of the scores of attention: 2 in the published program, 1 in the paper")
    bias: Bias = option(
        "plain", 'the mean of what was removed as "plain" bias, "recentred" on the pruned model\'s inputs, or "none"'
    )
    variance: Literal["exact", "reference"] = option(
        "exact", 'over all tokens, or "reference": the recursion of the published program'
    )
    search: Search = option(
        "nearest", 'nearest to the budget, or "reference": counts and ties of the published program'
    )
    units: Literal["all", "attention", "mlp"] = option("all", "which units may go; the others stay and count as kept")
    skip_layers: int = option(0, "first blocks that stay whole and count as kept")
    skip_last: int = option(0, "last blocks that stay whole and count as kept")
    min_groups: int = option(1, "KV groups that every block keeps")
    min_neurons: int = option(1, "neurons that every MLP keeps")
    align: int = option(1, "the neurons of an MLP are a multiple of it, or all")
    published: bool = option(False, 'variance and search as in the published program ("reference")')

    def __post_init__(self) -> None:
        number("drop", self.drop, 0, 1)
        one_of("metric", self.metric, ("wifv", "ifv", "wifn"))
        one_of("structure", self.structure, STRUCTURES)
        number("attn_power", self.attn_power, 0, 8)
        one_of("bias", self.bias, ("plain", "none", "recentred"))
        one_of("variance", self.variance, ("exact", "reference"))
        one_of("search", self.search, ("nearest", "reference"))
        one_of("units", self.units, ("all", "attention", "mlp"))
        for name, least in (("skip_layers", 0), ("skip_last", 0), ("min_groups", 1), ("min_neurons", 1), ("align", 1)):
            whole(name, getattr(self, name), least)
        truth("published", self.published)
        if (self.structure in ("ul-mm", "al-mm")) != (self.remove_groups is not None):
            raise UsageError(
                f'remove_groups is needed with structure="ul-mm" and "al-mm" and only there; structure is '
                f'"{self.structure}"'
            )
        if self.remove_groups is not None:
            whole("remove_groups", self.remove_groups, 0)
            if self.units != "all":
                raise UsageError(f'remove_groups needs units="all", got "{self.units}"')

    @property
    def rules(self) -> Rules:
        """How the budget is spent."""
        return Rules(
            self.structure,
            self.remove_groups,
            self.min_groups,
            self.min_neurons,
            self.align,
            "reference" if self.published else self.search,
        )

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        findings = survey(
            self, model.structure, work, partial(model.survey, windows, "survey of the dense model"), self._examine
        )
        found = found_units(model.structure, findings)
        listed = self.listed(found)
        kept = choose(listed, findings, self.share_of(found, listed), self.rules, self.attn_power)
        whole = all(len(stays) == len(listed[block][name]) for block in kept for name, stays in kept[block].items())
        return FlapStep(kept, bias="none" if whole else self.bias, findings=findings)

    def check_structure(self, structure: "ModelStructure") -> None:
        super().check_structure(structure)
        self._expected(structure)

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        return forecast_counts(structure, self._expected(structure))

    def _expected(self, structure: "ModelStructure") -> dict[str, dict[str, int]]:
        listed = self.listed(structure.units)
        return expected_counts(listed, self.share_of(structure.units, listed), self.rules)

    def _examine(self, block: "Block") -> Findings:
        exact = self.variance == "exact" and not self.published
        return fluctuations(block, self.metric, block.observe, Moments if exact else PublishedMoments)

    def listed(self, units: Sets) -> dict[str, dict[str, Units]]:
        """Of the units of a model those that may go; blocks without any are left out."""
        blocks = list(units)[self.skip_layers : len(units) - self.skip_last]
        listed = {
            block: {name: each for name, each in units[block].items() if self.units in ("all", each.kind)}
            for block in blocks
        }
        return {block: of_block for block, of_block in listed.items() if of_block}

    def share_of(self, units: Sets, listed: Sets) -> float:
        """The share of their weights that the listed units lose, so that all units lose `drop`."""
        share = self.drop * (_weights(units) / max(1, _weights(listed)))
        if share >= 1 and self.drop:
            raise UsageError(
                f"drop={self.drop:g} cannot be reached: the units that may go hold "
                f"{_weights(listed) / max(1, _weights(units)):.1%} of the weights; lower drop, or skip less"
            )
        return share


def _weights(units: Sets) -> int:
    return sum(len(each) * each.cost for of_block in units.values() for each in of_block.values())


@dataclass(frozen=True)
class FlapStep(Slices):
    """findings: those of the survey; what has a "mean" gets a bias of this kind."""

    bias: Bias = field(kw_only=True)
    findings: Mapping[str, Findings] = field(kw_only=True)

    def __call__(self, block: "Block") -> None:
        kept = self.kept.get(block.name, {})
        means = {name: self.findings[block.name][name].get("mean") for name in kept}
        known = {name: mean for name, mean in means.items() if mean is not None and self.bias != "none"}
        biases, dense = {}, {}
        for name, mean in known.items():
            units, weight = block.units[name], block.linears[name].weight
            if len(kept[name]) < len(units):
                biases[name] = compensation(weight, mean, places(units.columns, kept[name]))
            if self.bias == "recentred":
                dense[name] = mean_output(weight, mean)
        attention = [name for name in dense if block.units[name].kind == "attention"]
        super().__call__(block)
        for names in (attention, dense.keys() - set(attention)):  # the bias of attention changes the inputs of an MLP
            moments = block.collect(Moments, names) if names else {}
            for name in sorted(names):
                linear = block.linears[name]
                if enough(linear, moments[name]):
                    biases[name] = (dense[name] - mean_output(linear.weight, moments[name].mean)).float()
                if name in biases:
                    add_bias(linear, biases.pop(name))
        for name, bias in biases.items():
            add_bias(block.linears[name], bias)


def add_bias(linear: "Linear", bias: Tensor) -> None:
    """Adds a vector [out] to the bias of a linear, or makes it its bias."""
    old = linear.bias
    linear.bias = bias if old is None else old + bias.to(old.device)
