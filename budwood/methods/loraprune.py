"""LoRAPrune: heads and neurons go while low-rank terms are trained (Zhang et al., Findings of ACL 2024, 2305.18403)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Method, Step
from budwood.methods.option import option
from budwood.methods.structured import Slices, Structured, forecast_counts
from budwood.methods.unit_pools import Sets, blocks_in, check_layers, chosen, pools_of, sets_of, units_left
from budwood.methods.validation import number, truth, whole
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.lora_importance import dropped_of
from budwood.sparsity.patterns import Pattern, Shape, parse_pattern
from budwood.sparsity.unit_shares import even_counts

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model
    from budwood.training.descent import Curve
    from budwood.training.gradual import Gradual
    from budwood.training.growing_masks import UnitMasks, WeightMasks

PROBE = 16  # tokens on which the units of every block are verified
OPTIONS = ("drop", "pattern", "steps", "batch", "rate", "rank", "alpha", "every", "squared", "seed")  # for the report


@dataclass(frozen=True)
class LoRAPrune(Structured):
    """Train low-rank terms on the calibration windows, mask little by little the heads and neurons that their gradients
    show to matter least, and cut these out at the end.
    """

    name: ClassVar[str] = "loraprune"

    drop: float = option(0.5, "share of the weights of all heads and neurons that is removed")
    pattern: str | None = option(
        None, 'single weights are dropped in place of heads and neurons: N:M such as "2:4", or a share such as "50%"'
    )
    steps: int = option(1000, "of the optimiser")
    batch: int = option(8, "windows per step")
    rate: float = option(1e-4, "learning rate of the first step; it falls to 0")
    rank: int = option(8, "of the low-rank term of every matrix")
    alpha: float = option(16, "the low-rank term is multiplied by alpha / rank")
    every: int = option(10, "steps between two masks")
    layers: str | None = option(None, 'only these blocks are pruned, such as "4:30": from 4, up to and without 30')
    squared: bool = option(False, "importances as in the paper, squared; the published program takes magnitudes")
    seed: int = option(0, "of the order of the windows and of the start of the low-rank terms")
    published: bool = option(
        False,
        "counts of the published program: drop is the share of the heads and neurons of every pruned block, rounded "
        "down, and the last mask falls short of it; without layers the first tenth of the blocks and the last stay",
    )

    def __post_init__(self) -> None:
        number("drop", self.drop, 0, 1)
        if self.pattern is not None:
            parse_pattern(self.pattern)
        for name in ("steps", "batch", "rank", "every"):
            whole(name, getattr(self, name), 1)
        number("rate", self.rate, 0, 1)
        number("alpha", self.alpha, 0, 1e6)
        whole("seed", self.seed, 0)
        truth("squared", self.squared)
        truth("published", self.published)
        check_layers(self.layers)
        if self.pattern is not None and (self.layers is not None or self.published):
            raise UsageError("pattern drops single weights in every block; leave layers and published out")

    @property
    def gradual(self) -> "Gradual":
        from budwood.training.gradual import Gradual

        return Gradual(
            self.steps,
            self.batch,
            self.rate,
            self.rank,
            self.alpha,
            self.seed,
            self.every,
            self.squared,
            finished=not self.published,
        )

    def blocks_of(self, count: int) -> range:
        """The blocks to prune of a model with `count` of them. Raises UsageError where there are none."""
        if self.published and self.layers is None:
            return range(count // 10, max(1, count - 1))
        return blocks_in(self.layers, count)

    def check(self, linears: Mapping[str, Shape]) -> None:
        if self.pattern is not None:
            for name, shape in linears.items():
                parse_pattern(self.pattern).check(shape, name)

    def check_structure(self, structure: "ModelStructure") -> None:
        if self.pattern is not None:
            Method.check_structure(self, structure)
            return
        super().check_structure(structure)
        sets = sets_of(structure)
        inside = chosen(sets, self.blocks_of(len(structure.modules)))
        whole, most = (sum(pool.weights for pool in pools_of(part)) for part in (sets, inside))
        if not self.published and self.drop * whole > most:
            raise UsageError(
                f'drop={self.drop:g} is more than all heads and neurons of layers="{self.layers}", which hold '
                f"{100 * most / whole:.3g} % of the weights; lower drop or prune more blocks"
            )

    def pattern_of(self, shape: Shape, name: str) -> Pattern | None:
        return None if self.pattern is None else parse_pattern(self.pattern)

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        if self.pattern is not None:
            return {name: parse_pattern(self.pattern).forecast(shape) for name, shape in structure.shapes.items()}
        sets = sets_of(structure)
        pruned = chosen(sets, self.blocks_of(len(structure.modules)))
        return forecast_counts(structure, units_left(structure.path, pruned, self.counts(sets, pruned)))

    def counts(self, sets: Sets, pruned: Sets) -> list[int]:
        """Units to remove of every pool of the pruned blocks."""
        if self.published:
            share = self.gradual.last_share()
            return [dropped_of(self.drop * pool.count, share) for pool in pools_of(pruned)]
        return even_counts(pools_of(pruned), self.drop * sum(pool.weights for pool in pools_of(sets)))

    def work_bytes(self, structure: "ModelStructure", itemsize: int) -> int:
        """A checkpoint of the training with the importances, and its result."""
        shapes = structure.shapes.values()
        factors = sum(self.rank * sum(shape) for shape in shapes)
        weights = 0 if self.pattern is None else sum(out * width for out, width in shapes)
        return 5 * 4 * factors + 6 * weights

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        from budwood.training.descent import Checkpoints, curve_of, part_of
        from budwood.training.gradients import block_of

        assert windows is not None
        name = f"{self.name}-{hashlib.sha256(str(self).encode()).hexdigest()[:8]}"
        found = work.tensors(name, lambda: self.trained(model, windows, work, f"{name}-steps"))
        checkpoint = Checkpoints(work, f"{name}-steps", self.gradual.save_every).read()
        assert checkpoint is not None
        kept: dict[str, dict[str, Tensor]] = {}
        for full, units in part_of(found, "kept").items():
            block = f"{model.path}.{block_of(model, full)}"
            kept.setdefault(block, {})[full.removeprefix(f"{block}.")] = units
        values, masks = part_of(found, "value"), part_of(found, "keep")
        return LoRAPruneStep(kept, method=self, values=values, masks=masks, curve=curve_of(checkpoint))

    def trained(self, model: "Model", windows: Tensor, work: "Work", name: str) -> dict[str, Tensor]:
        """Trains: units that stay ("kept/" and the full name of their consumer) or masks of single weights ("keep/" and
        the full name of the linear), and the factors of the low-rank terms ("value/" and their key).
        """
        from budwood.training.gradual import prune_while_training

        masks = self.masks(model, windows)
        _, values = prune_while_training(model, windows, masks, self.gradual, work, name, model.progress)
        found = {f"value/{key}": value.cpu() for key, value in values.items()}
        if self.pattern is None:
            return found | {f"kept/{key}": units for key, units in masks.kept().items()}  # type: ignore[union-attr]
        return found | {f"keep/{key}": keep.cpu() for key, keep in masks.keep.items()}

    def masks(self, model: "Model", windows: Tensor) -> "UnitMasks | WeightMasks":
        """Before the first step. Units are verified by running every block."""
        from budwood.training.growing_masks import UnitMasks, WeightMasks

        if self.pattern is not None:
            return WeightMasks(model.linears, parse_pattern(self.pattern))
        blocks = model.survey(windows[:1, :PROBE], "verifying heads and neurons")
        sets: dict[int, Any] = {block.index: dict(block.units) for block in blocks}
        pruned = chosen(sets, self.blocks_of(len(model)))
        by_name = {
            f"{model.path}.{index}.{consumer}": units
            for index, block in pruned.items()
            for consumer, units in block.items()
        }
        if self.published:
            return UnitMasks(model.linears, by_name, {name: self.drop * len(units) for name, units in by_name.items()})
        return UnitMasks(model.linears, by_name, dict(zip(by_name, self.counts(sets, pruned), strict=True)))


@dataclass(frozen=True)
class LoRAPruneStep(Slices):
    """Merges the low-rank terms, then cuts. values: the factors by key. masks: of single weights, by full name."""

    method: LoRAPrune = field(kw_only=True)
    values: Mapping[str, Tensor] = field(kw_only=True)
    masks: Mapping[str, Tensor] = field(kw_only=True)
    curve: "Curve" = field(kw_only=True)

    def __call__(self, block: "Block") -> None:
        from budwood.training.trainable import merge

        for linear in block.linears.values():
            weight = linear.stored
            if linear.name in self.masks:
                weight = torch.where(self.masks[linear.name], weight, 0)
            linear.weight = merge(weight, linear.name, self.method.gradual.adapter, self.values)
        if self.method.pattern is None:
            super().__call__(block)

    def finish(self, run: "Run") -> None:
        from budwood.training.recovery import Recovered, record_of

        super().finish(run)
        options = {name: getattr(self.method, name) for name in OPTIONS}
        found = Recovered(dict(self.values), self.curve)
        run.sections.setdefault("training", []).append(record_of(found, run.dense, options))
