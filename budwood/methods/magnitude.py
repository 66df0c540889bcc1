"""Magnitude pruning, the baseline that needs no data."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budwood.errors import UsageError
from budwood.methods import metrics
from budwood.methods.method import PatternMethod, PatternOf, prune
from budwood.methods.option import option
from budwood.methods.validation import one_of, truth
from budwood.sparsity.patterns import NM, Pattern, Scope, Shape, parse_pattern
from budwood.sparsity.published import PublishedShare

if TYPE_CHECKING:
    from budwood.stream.block import Block


@dataclass(frozen=True)
class Magnitude(PatternMethod):
    """Drop the smallest weights. Needs no calibration text."""

    pattern: str = option("50%", 'N:M such as "2:4" (N kept of M), or a share to drop such as "50%"')
    scope: Scope = option(
        "matrix", 'where a share ranks: in every "row", or in the "matrix", as in the published baselines'
    )
    published: bool = option(False, "ties and counts as in the published programs")

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        truth("published", self.published)
        parse_pattern(self.pattern)
        if self.published and self.scope != "matrix":
            raise UsageError("published=True ranks a share over the whole matrix; leave scope out")

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, self.scope)
        if not self.published:
            return pattern
        return replace(pattern, published=True) if isinstance(pattern, NM) else PublishedShare(pattern.drop)

    def prune_block(self, block: "Block", pattern_for: PatternOf) -> None:
        for linear, scores in metrics.magnitude(block):
            prune(linear, scores, pattern_for(linear.shape, linear.name))
