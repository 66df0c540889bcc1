"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter, ICLR 2024, arXiv 2306.11695)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from budwood.errors import UsageError
from budwood.methods import metrics
from budwood.methods.method import PatternMethod, PatternOf, prune
from budwood.methods.option import option
from budwood.methods.validation import one_of, truth
from budwood.sparsity.patterns import NM, LowPrunes, Pattern, Scope, Shape, Share, Top, parse_pattern
from budwood.sparsity.row_mass import RowMass

if TYPE_CHECKING:
    from budwood.stream.block import Block


@dataclass(frozen=True)
class Wanda(PatternMethod):
    """Drop the weights whose magnitude times the norm of their input is smallest. No weight is changed."""

    pattern: str = option("50%", 'N:M such as "2:4" (N kept of M), or a share to drop such as "50%"')
    scope: Scope = option("row", 'where a share ranks: within every "row", or in the whole "matrix"')
    tie: Literal["low-keeps", "low-prunes"] = option(
        "low-keeps", "of equal scores the lower index stays, or is dropped"
    )
    variant: bool = option(False, "rows keep shares of their own, set by their score mass (shares only)")
    published: bool = option(
        False,
        "sums, products and ties of the published program: a share drops the lower index, and torch's unstable top-k "
        "decides N:M",
    )

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        one_of("tie", self.tie, ("low-keeps", "low-prunes"))
        truth("variant", self.variant)
        truth("published", self.published)
        if isinstance(parse_pattern(self.pattern), NM) and self.variant:
            raise UsageError(
                f"variant=True lets rows differ, which {self.pattern} does not allow; give a share like '50%'"
            )
        if self.variant and (self.scope, self.tie, self.published) != ("row", "low-keeps", False):
            raise UsageError(
                "variant=True has its own scope and drops ties together; leave scope, tie and published out"
            )
        if self.published and self.tie != "low-keeps":
            raise UsageError("published=True has its own rule for ties; leave tie out")

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, self.scope)
        if self.variant and not isinstance(pattern, NM):
            return RowMass(pattern.drop)
        if self.published and isinstance(pattern, NM):
            return replace(pattern, published=True)
        return LowPrunes(pattern) if self.published or self.tie == "low-prunes" else pattern

    def kept_share(self) -> float:
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, Share):
            raise UsageError(f"allocate divides a share among matrices, and {pattern} is the same in all; give '50%'")
        if self.variant or self.published or self.tie != "low-keeps":
            raise UsageError("allocate sets the shares itself; leave variant, tie and published out")
        return 1 - pattern.drop

    def keeping(self, share: float) -> PatternOf:
        return lambda shape, name: Top(share, self.scope)

    def prune_block(self, block: "Block", pattern_for: PatternOf) -> None:
        for linear, scores in metrics.wanda(block, self.published):
            prune(linear, scores, pattern_for(linear.shape, linear.name))
            del scores  # as large as the matrix in float32, while the next one's are made
