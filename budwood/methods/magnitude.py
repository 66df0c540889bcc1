"""Magnitude pruning, the baseline that needs no data."""

from dataclasses import dataclass, replace
from typing import ClassVar

from budwood.errors import UsageError
from budwood.methods import metrics
from budwood.methods.method import Block, Method, prune
from budwood.methods.validation import one_of, truth
from budwood.sparsity.patterns import NM, Pattern, Scope, Shape, parse_pattern
from budwood.sparsity.published import PublishedShare


@dataclass(frozen=True)
class Magnitude(Method):
    """Drop the smallest weights. Needs no calibration text.

    pattern: "2:4" (N kept of M) or "50%" (dropped). scope: among which weights a share ranks, the whole
    "matrix" as in the published baselines, or every "row". parity: ties and counts as in the published programs.
    """

    pattern: str = "50%"
    scope: Scope = "matrix"
    parity: bool = False

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        truth("parity", self.parity)
        parse_pattern(self.pattern)
        if self.parity and self.scope != "matrix":
            raise UsageError("parity=True ranks a share over the whole matrix, as published; leave scope out")

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, self.scope)
        if not self.parity:
            return pattern
        return replace(pattern, published=True) if isinstance(pattern, NM) else PublishedShare(pattern.drop)

    def __call__(self, block: Block) -> None:
        for linear, scores in metrics.magnitude(block):
            prune(linear, scores, self.pattern_for(linear.shape, linear.name))
