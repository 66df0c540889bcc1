"""SparseGPT: mask and weight update in one sweep (Frantar, Alistarh, ICML 2023, arXiv 2301.00774)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Method, PatternMethod, PatternOf, Step, naming, prune
from budwood.methods.metrics import norm_statistic, reached
from budwood.methods.option import option
from budwood.methods.validation import number, truth, whole
from budwood.sparsity import scores
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import NM, Pattern, Shape, Share, Top, parse_pattern
from budwood.sparsity.published import PublishedShare
from budwood.sparsity.second_order import sparsegpt
from budwood.sparsity.statistics import Gram

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.block import Block
    from budwood.stream.linear import Linear
    from budwood.stream.model import Model

log = logging.getLogger(__name__)

TOGETHER = 1 << 23  # weights in one sweep where rows do not depend on one another: 64 MiB in float64
PATTERN = "50%"


@dataclass(frozen=True)
class SparseGPT(PatternMethod):
    """Drop weights from left to right; the kept weights of each row compensate for every loss."""

    fixed_shapes: ClassVar[bool] = True

    pattern: str = option(
        PATTERN, 'N:M such as "2:4", or a share such as "50%", dropped of every `block` columns, all rows together'
    )
    damp: float = option(0.01, "added to the second moments, as a share of their mean diagonal")
    block: int = option(128, "columns per decision of a share; N:M does not depend on it")
    published: bool = option(False, "count a share as the published program does: one more than it, and all ties")
    mask: Method | None = option(
        None, 'a method such as wanda("2:4") that chooses the mask; only the weights are updated'
    )

    def __post_init__(self) -> None:
        number("damp", self.damp, 0, float("inf"))
        whole("block", self.block, 1)
        truth("published", self.published)
        nm = isinstance(parse_pattern(self.pattern), NM)
        if self.mask is None:
            if self.published and nm:
                raise UsageError(f"published=True is about counting a share; {self.pattern} counts the same either way")
            return
        if not isinstance(self.mask, Method):
            raise UsageError(f'mask must be a method such as wanda("2:4"), got {self.mask!r}')
        if self.pattern != PATTERN or (self.published and not self.mask.published):
            raise UsageError("mask decides what is kept; leave pattern and published out")
        object.__setattr__(self, "published", self.mask.published)

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, per="matrix")
        return PublishedShare(pattern.drop) if self.published and isinstance(pattern, Share) else pattern

    def pattern_of(self, shape: Shape, name: str) -> Pattern | None:
        return self.pattern_for(shape, name) if self.mask is None else self.mask.pattern_of(shape, name)

    def check(self, linears: Mapping[str, Shape]) -> None:
        if self.mask is None:
            super().check(linears)
        else:
            self.mask.check(linears)

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        return super().forecast(structure) if self.mask is None else self.mask.forecast(structure)

    def forecast_for(self, shape: Shape, pattern: Pattern) -> Forecast:
        if isinstance(pattern, NM):
            return pattern.forecast(shape)
        widths = [min(self.block, shape[1] - first) for first in range(0, shape[1], self.block)]
        return Forecast(sum(pattern.forecast((shape[0], width)).nonzeros for width in widths))

    def kept_share(self) -> float:
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, Share):
            raise UsageError(f"allocate divides a share among matrices, and {pattern} is the same in all; give '50%'")
        if self.published or self.mask is not None:
            raise UsageError("allocate sets the shares of matrices itself; leave published and mask out")
        return 1 - pattern.drop

    def keeping(self, share: float) -> PatternOf:
        return lambda shape, name: Top(share, "matrix")

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        return self if self.mask is None else RepairStep(self, self.mask.prepare(model, windows, work))

    def prune_block(self, block: "Block", pattern_for: PatternOf) -> None:
        if self.mask is not None:
            RepairStep(self, self.mask)(block)
        else:
            self.repair(block, pattern_for, {})

    def repair(self, block: "Block", pattern_for: PatternOf, given: Mapping[str, Tensor]) -> None:
        """Prunes one block. given: masks, bool [out, in] by name inside the block, if chosen already."""
        grams = block.collect(Gram)
        for names in self.together(block, grams):
            linears = [block.linears[name] for name in names]
            gram = grams[names[0]]
            pattern = pattern_for(linears[0].shape, linears[0].name)
            known = [reached(linear, gram) for linear in linears]  # each is checked and named
            if all(known):
                keep = torch.cat([given[name] for name in names]) if given else pattern
                self.sweep(linears, gram, keep)
            else:
                for name, linear in zip(names, linears, strict=True):
                    if given:
                        linear.weight = torch.where(given[name], linear.weight, 0)
                    else:
                        prune(linear, scores.magnitude(linear.weight), pattern)
            for name in names:
                del grams[name]  # second moments are the largest thing here

    def together(self, block: "Block", grams: dict[str, Gram]) -> list[list[str]]:
        """Linears in one sweep: they share an input, and the choice in one row does not depend on other rows."""
        groups: list[list[str]] = []
        for name, linear in block.linears.items():
            rows = linear.shape[0]
            for group in groups:
                stacked = sum(block.linears[other].shape[0] for other in group)
                if grams[group[0]] is grams[name] and (stacked + rows) * linear.shape[1] <= TOGETHER and self.by_row:
                    group.append(name)
                    break
            else:
                groups.append([name])
        return groups

    @property
    def by_row(self) -> bool:
        return self.mask is not None or isinstance(parse_pattern(self.pattern), NM)

    def sweep(self, linears: list["Linear"], gram: Gram, choice: Pattern | Tensor) -> None:
        factor = gram.factor(self.damp)
        names = ", ".join(linear.name for linear in linears)
        if factor.damp is None:
            log.warning("%s: second moments could not be factored; only their diagonal is used", names)
        elif factor.damp != self.damp:
            log.warning("%s: damping %g was too small; %g was used", names, self.damp, factor.damp)
        with naming(names):
            swept = sparsegpt(torch.cat([linear.weight for linear in linears]), factor, choice, self.block)
        pieces = swept.weight.split([linear.shape[0] for linear in linears])
        for linear, weight in zip(linears, pieces, strict=True):
            linear.weight = weight.to(torch.float32, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class RepairStep(Step):
    """Masks by another method, weights updated by SparseGPT's sweep."""

    method: SparseGPT
    mask: Step

    def __call__(self, block: "Block") -> None:
        with block.sharing(norm_statistic(self.method.published), Gram):
            given = masks_by(self.mask, block)
            self.method.repair(block, self.method.pattern_for, given)


def masks_by(step: Step, block: "Block") -> dict[str, Tensor]:
    """The mask of `step` for each linear, bool [out, in]; the weights are restored.

    `recovered` stays: it counts positions of the mask, which is not changed further.
    """
    dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
    step(block)
    keep = {name: linear.weight != 0 for name, linear in block.linears.items()}
    for name, linear in block.linears.items():
        linear.weight = dense[name]
    return keep
