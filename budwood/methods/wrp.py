"""WRP: 2:4 with the crucial dropped weights recovered (Tan, Zhang, Wei, ACL 2024, pp. 6433-6443)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from budwood.errors import UsageError
from budwood.methods.method import PatternMethod, PatternOf, prune
from budwood.methods.metrics import METRICS, wanda
from budwood.methods.option import option
from budwood.methods.validation import number, one_of, truth, whole
from budwood.models.expressions import Expression, Expressions, together
from budwood.sparsity.blocks import TopBlocks
from budwood.sparsity.forecast import expected_density
from budwood.sparsity.patterns import NM, Pattern, Scope, Shape, Top, parse_pattern
from budwood.sparsity.recovery import Either, EitherToDensity, Recovered

if TYPE_CHECKING:
    from budwood.stream.block import Block

ALPHA = 0.25  # the paper's choice for all its headline figures


@dataclass(frozen=True)
class Wrp(PatternMethod):
    """Prune to 2:4 and recover the dropped weights that rank among the best `alpha` of their row.

    At alpha=0.25 about 1.4 to 1.6 % of all weights are recovered; no weight is changed.
    """

    alpha: float | dict[str, float] = option(
        ALPHA,
        "the share to protect, or a dict from regular expressions on linear names to shares: the first that "
        "matches counts, 0.25 where none does",
    )
    density: float | None = option(
        None,
        "instead of alpha: the recovered share of all weights, met within one rank per row; with block, the share of "
        "the width that blocks cover",
    )
    block: int | None = option(None, "recover whole squares of this side, those whose dropped scores sum highest")
    k: int | None = option(None, "blocks per block row, the same for every width, as in the paper")
    pad: bool = option(False, "complete ragged edges with zeros instead of refusing sides that block does not divide")
    metric: str = option("wanda", '"wanda", "magnitude" (needs no text) or "obs" (W² / diag(H⁻¹))')
    pattern: str = option("2:4", "any N:M; recovered are the ranks beyond N of each group")
    scope: Scope = option("row", 'where alpha ranks: a "row", as in the reference program, or the whole "matrix"')
    budget: Literal["rank", "row"] = option(
        "rank", '"rank" recovers what ranks high enough, "row" the same number in every row'
    )
    published: bool = option(
        False, "sums, products and ties of the published program, where torch's unstable top-k decides N:M"
    )

    def __post_init__(self) -> None:
        one_of("metric", self.metric, METRICS)
        one_of("scope", self.scope, ("row", "matrix"))
        one_of("budget", self.budget, ("rank", "row"))
        truth("pad", self.pad)
        truth("published", self.published)
        self._check_alpha()
        base = self.base
        if self.block is not None:
            whole("block", self.block, 1)
        if self.k is not None:
            whole("k", self.k, 0)
        if self.density is not None:
            number("density", self.density, 0, 1 if self.block else 1 - base.density)
        self._refuse_contradictions()
        # Magnitudes need no data: the stream then runs nothing forward.
        object.__setattr__(self, "calibrated", self.metric != "magnitude")

    def _refuse_contradictions(self) -> None:
        blocks, by_rank = self.block is not None, self.alpha == ALPHA
        contradictions = {
            "k and pad are about blocks; give block, or leave them out": not blocks
            and (self.k is not None or self.pad),
            "block needs k, the blocks per block row, or density, and not both": blocks
            and (self.k is None) == (self.density is None),
            "blocks are ranked in every block row; leave scope and budget out": blocks
            and (self.scope, self.budget) != ("row", "rank"),
            "alpha says how much to recover, and so do density and block; give one of them": not by_rank
            and (blocks or self.density is not None),
            "scope='matrix' ranks over all rows, budget='row' treats rows alike; give one of them": (
                self.scope == "matrix" and self.budget == "row"
            ),
        }
        for message, found in contradictions.items():
            if found:
                raise UsageError(message)

    def _check_alpha(self) -> None:
        if not isinstance(self.alpha, Mapping):
            number("alpha", self.alpha, 0, 1)
            return
        for expression, alpha in self.alpha.items():
            number(f"alpha of {expression!r}", alpha, 0, 1)
            Expression(expression, "alpha:")

    @property
    def base(self) -> NM:
        base = parse_pattern(self.pattern)
        if not isinstance(base, NM):
            raise UsageError(f"wrp recovers what N:M dropped, so its pattern must be like '2:4', got {self.pattern!r}")
        return replace(base, published=self.published)

    def check(self, linears: Mapping[str, Shape]) -> None:
        super().check(linears)
        rules = Expressions(tuple(self.alpha) if isinstance(self.alpha, Mapping) else (), "alpha:")
        for rule in rules.rules:
            if not any(rules.search(rule, name) for name in linears):
                raise UsageError(
                    f"alpha: {rule.pattern!r} is found in no linear's name, such as {next(iter(linears), '')}"
                )

    def alpha_for(self, name: str) -> float:
        if not isinstance(self.alpha, Mapping):
            return self.alpha
        found = together(tuple(self.alpha), "alpha:").first(name)
        return ALPHA if found is None else self.alpha[found.pattern]

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        base, alpha = self.base, self.alpha_for(name)
        if self.block is not None:
            return Recovered(base, TopBlocks(self.block, self.k, self.density, self.pad))
        if self.budget == "row":
            density = self.density
            if density is None:
                density = expected_density(alpha, shape[1], base.kept, base.group)
            return Recovered(base, Top(density, "row"))
        if self.density is None:
            return Either(base, Top(alpha, self.scope))
        if self.scope == "row":
            return EitherToDensity(base, self.density)
        # Over the whole matrix one cut decides: the best dropped weights up to the wanted number.
        return Recovered(base, Top(self.density, "matrix"))

    def kept_share(self) -> float:
        if self.block is not None or self.density is None or self.metric != "wanda":
            raise UsageError("allocate divides what density recovers; give density, leave block and metric out")
        return self.base.density + self.density

    def keeping(self, share: float) -> PatternOf:
        return replace(self, density=max(0.0, share - self.base.density)).pattern_for

    def prune_block(self, block: "Block", pattern_for: PatternOf) -> None:
        metric = partial(wanda, published=self.published) if self.metric == "wanda" else METRICS[self.metric]
        for linear, scores in metric(block):
            kept = prune(linear, scores, pattern_for(linear.shape, linear.name))
            linear.recovered = kept - scores.numel() * self.base.kept // self.base.group
            del scores  # as large as the matrix in float32, while the next one's are made
