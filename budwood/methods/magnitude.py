"""Magnitude pruning, the baseline that needs no data."""

from dataclasses import dataclass
from typing import ClassVar

from budwood.methods import metrics
from budwood.methods.method import Block, Method, prune
from budwood.methods.settings import one_of
from budwood.sparsity.patterns import Pattern, Scope, Shape, parse_pattern


@dataclass(frozen=True)
class Magnitude(Method):
    """Drop the smallest weights. Needs no calibration text.

    pattern: "2:4" (N kept of M) or "50%" (dropped). scope: among which weights a share ranks, the whole
    "matrix" as in the published baselines, or every "row".
    """

    pattern: str = "50%"
    scope: Scope = "matrix"

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        parse_pattern(self.pattern)

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        return parse_pattern(self.pattern, self.scope)

    def __call__(self, block: Block) -> None:
        for linear, scores in metrics.magnitude(block):
            prune(linear, scores, self.pattern_for(linear.shape, linear.name))
