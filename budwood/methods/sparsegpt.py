"""SparseGPT: choose and repair together (Frantar, Alistarh, ICML 2023, arXiv 2301.00774)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.allocation import Allocate, check_allocate, kept_shares
from budwood.methods.method import Block, Linear, Method, naming, prune
from budwood.methods.metrics import heard
from budwood.methods.validation import number, truth, whole
from budwood.sparsity import scores
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import NM, Pattern, Shape, Top, parse_pattern
from budwood.sparsity.published import PublishedShare
from budwood.sparsity.second_order import sparsegpt
from budwood.sparsity.statistics import Gram

log = logging.getLogger(__name__)

TOGETHER = 1 << 23  # weights swept at once where rows do not depend on one another: 64 MiB in float64
PATTERN = "50%"
NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class SparseGPT(Method):
    """Drop weights from left to right; what stays of each row makes up for every loss.

    pattern: "2:4" (N kept of M) or "50%" (dropped of every `block` columns, all rows together). damp: added
    to the second moments, as a share of their mean diagonal. block: columns per decision of a share; N:M does
    not depend on it. parity: count as the published program does, one more than the share and all ties. mask:
    a method such as wanda("2:4") or wrp() that chooses what stays, so that only the repair is done here. allocate:
    "global" gives matrices shares of their own, by what they save in the logits (shares only).
    """

    pattern: str = PATTERN
    damp: float = 0.01
    block: int = 128
    parity: bool = False
    mask: Method | None = None
    allocate: Allocate = "uniform"

    def __post_init__(self) -> None:
        number("damp", self.damp, 0, float("inf"))
        whole("block", self.block, 1)
        truth("parity", self.parity)
        nm = isinstance(parse_pattern(self.pattern), NM)
        if self.mask is not None and not isinstance(self.mask, Method):
            raise UsageError(f'mask must be a method such as wanda("2:4"), got {self.mask!r}')
        if self.mask is not None and (self.pattern, self.parity) != (PATTERN, False):
            raise UsageError("mask already says what stays; leave pattern and parity out")
        check_allocate(self.allocate, self.pattern)
        if self.allocate == "global" and (self.parity or self.mask is not None):
            raise UsageError("allocate='global' sets the shares of matrices itself; leave parity and mask out")
        if self.parity and nm:
            raise UsageError(f"parity=True is about counting a share; {self.pattern} counts the same either way")

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, per="matrix")
        if self.allocate == "global" and not isinstance(pattern, NM):
            return Top(1 - pattern.drop, "matrix")
        return PublishedShare(pattern.drop) if self.parity and not isinstance(pattern, NM) else pattern

    def check(self, linears: Mapping[str, Shape]) -> None:
        if self.mask is None:
            super().check(linears)
        else:
            self.mask.check(linears)

    def forecast(self, shape: Shape, name: str = "") -> Forecast:
        if self.mask is not None:
            return self.mask.forecast(shape, name)
        pattern = self.pattern_for(shape, name)
        if isinstance(pattern, NM):
            return pattern.forecast(shape)
        widths = [min(self.block, shape[1] - first) for first in range(0, shape[1], self.block)]
        return Forecast(sum(pattern.forecast((shape[0], width)).nonzeros for width in widths))

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        if self.allocate == "global":
            return partial(self.repair, mask=None, shares=kept_shares(self, model, batches))
        return self if self.mask is None else partial(self.repair, mask=self.mask.prepare(model, batches))

    def __call__(self, block: Block) -> None:
        self.repair(block, self.mask)

    def repair(self, block: Block, mask: Callable[[Any], None] | None, shares: Mapping[str, float] = NONE) -> None:
        """Prunes one block. shares: what linears keep, by full name, where they are not all alike."""
        grams = block.collect(Gram)
        given = {} if mask is None else chosen_by(mask, block)
        for names in self.together(block, grams):
            linears = [block.linears[name] for name in names]
            gram = grams[names[0]]
            pattern = self.pattern_for(linears[0].shape, linears[0].name)
            if linears[0].name in shares:
                pattern = Top(shares[linears[0].name], "matrix")
            reached = [heard(linear, gram) for linear in linears]  # each is checked and named
            if all(reached):
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

    def together(self, block: Block, grams: dict[str, Gram]) -> list[list[str]]:
        """Linears swept in one go: they share an input, and the choice in one row leaves others alone."""
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

    def sweep(self, linears: list[Linear], gram: Gram, choice: Pattern | Tensor) -> None:
        factor = gram.factor(self.damp)
        names = ", ".join(linear.name for linear in linears)
        if factor.damp is None:
            log.warning("%s: second moments could not be factored; only their diagonal is used", names)
        elif factor.damp != self.damp:
            log.warning("%s: damping %g was too little, %g was taken", names, self.damp, factor.damp)
        with naming(names):
            swept = sparsegpt(torch.cat([linear.weight for linear in linears]), factor, choice, self.block)
        pieces = swept.weight.split([linear.shape[0] for linear in linears])
        for linear, weight in zip(linears, pieces, strict=True):
            linear.weight = weight.to(torch.float32, memory_format=torch.contiguous_format)


def chosen_by(mask: Callable[[Any], None], block: Block) -> dict[str, Tensor]:
    """What `mask` keeps of each linear, bool [out, in]; the weights are put back."""
    dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
    mask(block)
    keep = {name: linear.weight != 0 for name, linear in block.linears.items()}
    for name, linear in block.linears.items():
        linear.weight = dense[name]
    return keep
