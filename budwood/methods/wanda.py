"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter, ICLR 2024, arXiv 2306.11695)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from budwood.errors import UsageError
from budwood.methods import metrics
from budwood.methods.allocation import Allocate, check_allocate, kept_shares
from budwood.methods.method import Block, Method, prune
from budwood.methods.validation import one_of, truth
from budwood.sparsity.patterns import NM, LowPrunes, Pattern, Scope, Shape, Share, Top, parse_pattern
from budwood.sparsity.row_mass import RowMass


@dataclass(frozen=True)
class Wanda(Method):
    """Drop the weights whose size times the norm of their input is smallest. No weight is changed.

    pattern: "2:4" (N kept of M) or "50%" (dropped). scope: a share ranks within every "row", or in the whole
    "matrix". tie: of equal scores the lower index stays ("low-keeps") or goes ("low-prunes"); "published" does as
    the published program, where the lower index goes from a share and torch's unstable top-k decides N:M.
    variant: rows keep shares of their own, set by their score mass (shares only). allocate: "global" gives matrices
    shares of their own, by what they save in the logits (shares only).
    """

    pattern: str = "50%"
    scope: Scope = "row"
    tie: Literal["low-keeps", "low-prunes", "published"] = "low-keeps"
    variant: bool = False
    allocate: Allocate = "uniform"

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        one_of("tie", self.tie, ("low-keeps", "low-prunes", "published"))
        truth("variant", self.variant)
        if isinstance(parse_pattern(self.pattern), NM) and self.variant:
            raise UsageError(
                f"variant=True lets rows differ, which {self.pattern} does not allow; give a share like '50%'"
            )
        if self.variant and (self.scope, self.tie) != ("row", "low-keeps"):
            raise UsageError("variant=True has its own scope and drops ties together; leave scope and tie out")
        check_allocate(self.allocate, self.pattern)
        if self.allocate == "global" and (self.variant or self.tie != "low-keeps"):
            raise UsageError(
                "allocate='global' sets the shares itself and keeps the lower of ties; leave variant and tie out"
            )

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, self.scope)
        if self.allocate == "global" and isinstance(pattern, Share):
            return Top(1 - pattern.drop, self.scope)
        if self.variant and not isinstance(pattern, NM):
            return RowMass(pattern.drop)
        if self.tie == "published" and isinstance(pattern, NM):
            return replace(pattern, published=True)
        return pattern if self.tie == "low-keeps" else LowPrunes(pattern)

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        if self.allocate == "uniform":
            return self
        return partial(self.step, shares=kept_shares(self, model, batches))

    def __call__(self, block: Block) -> None:
        self.step(block, {})

    def step(self, block: Block, shares: Mapping[str, float]) -> None:
        """Prunes one block. shares: what linears keep, by full name, where they are not all alike."""
        for linear, scores in metrics.wanda(block, self.published):
            pattern = self.pattern_for(linear.shape, linear.name)
            prune(linear, scores, Top(shares[linear.name], self.scope) if linear.name in shares else pattern)
            del scores  # as large as the matrix in float32, while the next one's are made
