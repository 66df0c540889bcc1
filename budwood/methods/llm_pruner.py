"""LLM-Pruner: heads and neurons by a Taylor expansion of the loss (Ma, Fang, Wang, NeurIPS 2023, arXiv 2305.11627)."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.structured import Slices, Structured, forecast_counts
from budwood.methods.unit_pools import Sets, blocks_in, check_layers, chosen, pools_of, sets_of, units_left
from budwood.methods.validation import number, one_of, truth
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.selection import highest
from budwood.sparsity.taylor import GRADIENT, SQUARE, Order, Reduction, salience, slice_scores, unit_scores
from budwood.sparsity.unit_shares import (
    UnitPool,
    even_counts,
    program_count,
    program_ranked_counts,
    ranked_counts,
)
from budwood.sparsity.units import Units

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.model import Model

log = logging.getLogger(__name__)

PROBE = 16  # tokens on which the units of every block are verified


@dataclass(frozen=True)
class LLMPruner(Structured):
    """Remove the KV groups and neurons whose removal changes the loss least, by its gradients. Kept weights stay."""

    name: ClassVar[str] = "llm_pruner"

    drop: float = option(0.2, "share of the weights of all heads and neurons that is removed")
    taylor: Order = option(
        "first",
        'of weights W, gradients G and mean squared gradients A of single windows: "first" |W G|, "second" W² A, '
        '"mixed" |W G - W² A / 2|, "vector" |Σ W G| over a row or column',
    )
    reduction: Reduction = option(
        "sum",
        'how the linears of a unit are combined: "sum", "mean", "max", "product", or one alone: "first" (query, gate), '
        '"second" (attention output, up), "last" (attention output, down)',
    )
    layers: str | None = option(None, 'only these blocks are pruned, such as "4:30": from 4, up to and without 30')
    scope: Literal["local", "global"] = option(
        "local", "every block loses the same share, or all units are ranked together, per weight that leaves with one"
    )
    published: bool = option(
        False,
        "counts of the published program: drop is the share of the heads and of the neurons of the pruned blocks, "
        "rounded down; global ranks heads and neurons as they are, whatever their sizes",
    )

    def __post_init__(self) -> None:
        number("drop", self.drop, 0, 1)
        one_of("taylor", self.taylor, ("first", "second", "mixed", "vector"))
        one_of("reduction", self.reduction, ("sum", "mean", "max", "product", "first", "second", "last"))
        one_of("scope", self.scope, ("local", "global"))
        truth("published", self.published)
        check_layers(self.layers)

    def blocks_of(self, count: int) -> range:
        """The blocks to prune of a model with `count` of them. Raises UsageError where there are none."""
        return blocks_in(self.layers, count)

    def check_structure(self, structure: "ModelStructure") -> None:
        super().check_structure(structure)
        pruned = self.blocks_of(len(structure.modules))
        sets = sets_of(structure)
        whole, inside = (sum(pool.weights for pool in pools_of(part)) for part in (sets, chosen(sets, pruned)))
        if not self.published and self.drop * whole > inside:
            raise UsageError(
                f'drop={self.drop:g} is more than all heads and neurons of layers="{self.layers}", which hold '
                f"{100 * inside / whole:.3g} % of the weights; lower drop or prune more blocks"
            )

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        """Exact with scope="local", where all units are removable; as if local with scope="global"."""
        sets = sets_of(structure)
        pruned = chosen(sets, self.blocks_of(len(structure.modules)))
        removed = self.local_counts(pools_of(pruned), self.drop * sum(pool.weights for pool in pools_of(sets)))
        return forecast_counts(structure, units_left(structure.path, pruned, removed))

    def local_counts(self, pools: list[UnitPool], weights: float) -> list[int]:
        """Units to remove of every pool of the pruned blocks; weights: to remove, except with published=True."""
        if self.published:
            return [min(program_count(pool, self.drop), pool.count - 1) for pool in pools]
        return even_counts(pools, weights)

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        from budwood.training.gradients import block_of

        assert windows is not None
        name = f"{self.name}-{hashlib.sha256(str(self).encode()).hexdigest()[:8]}"
        found = work.tensors(name, lambda: self.kept_units(model, windows))
        kept: dict[str, dict[str, Tensor]] = {}
        for full, units in found.items():
            block = f"{model.path}.{block_of(model, full)}"
            kept.setdefault(block, {})[full.removeprefix(f"{block}.")] = units
        return Slices(kept)

    def kept_units(self, model: "Model", windows: Tensor) -> dict[str, Tensor]:
        """The units that stay, int64 ascending, by full name of their consumer, of all pruned blocks."""
        blocks = model.survey(windows[:1, :PROBE], "verifying heads and neurons")
        sets = {block.index: dict(block.units) for block in blocks}
        pruned = chosen(sets, self.blocks_of(len(model)))
        scores = self.scores(model, windows, pruned)
        pools, weights = pools_of(pruned), self.drop * sum(pool.weights for pool in pools_of(sets))
        if self.scope == "local":
            removed = self.local_counts(pools, weights)
        elif self.published:
            removed = program_ranked_counts(pools, list(scores.values()), self.drop)
        else:
            removed = ranked_counts(pools, list(scores.values()), weights)
        return {
            name: highest(scores[name], pool.count - gone)
            for name, pool, gone in zip(scores, pools, removed, strict=True)
        }

    def scores(self, model: "Model", windows: Tensor, sets: Sets) -> dict[str, Tensor]:
        """The importance of every unit, float64 [units], by full name of the consumer; one backward pass per window."""
        from budwood.models.linears import read
        from budwood.training.gradients import Sums, gradients

        names = [
            f"{model.path}.{index}.{name}"
            for index, block in sets.items()
            for units in block.values()
            for name in units.linears
        ]
        linears = {name: model.linears[name] for name in names}
        kinds = [kind for kind, orders in (("gradient", GRADIENT), ("square", SQUARE)) if self.taylor in orders]
        sums = Sums(*kinds)
        found: dict[str, Tensor] = {}

        def finished(index: int) -> None:
            prefix = f"{model.path}.{index}."
            for consumer, units in sets.get(index, {}).items():
                slices = {}
                for name in units.linears:
                    weight = read(linears[prefix + name]).detach().float()
                    means = {kind: total / len(windows) for kind, total in sums.take(prefix + name, weight).items()}
                    values = salience(weight, self.taylor, means.get("gradient"), means.get("square"))
                    slices[name] = slice_scores(values, self.taylor, name == consumer).cpu()
                found[prefix + consumer] = scores = self.combined(units, slices)
                if not scores.any():
                    log.warning("%s: all its gradients are zero, so its first units are kept", prefix + consumer)

        gradients(model, windows, linears, sums, finished, held=4 * len(kinds))
        return {
            f"{model.path}.{index}.{name}": found[f"{model.path}.{index}.{name}"]
            for index in sets
            for name in sets[index]
        }

    def combined(self, units: Units, slices: Mapping[str, Tensor]) -> Tensor:
        """Scores of units from those of the rows of producers and the columns of the consumer."""
        members = [slices[name][rows] for name, rows in units.rows.items()]
        consumer = units.fold(slices[units.consumer])
        if units.kind == "attention" and self.reduction == "second":
            members = members[:1]  # the published program lists the attention output second
        return unit_scores([*members, consumer], self.reduction)
