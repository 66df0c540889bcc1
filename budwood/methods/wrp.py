"""WRP: 2:4, and the crucial weights it had to drop taken back (Tan, Zhang, Wei, ACL 2024, pp. 6433-6443)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from budwood.errors import UsageError
from budwood.methods.allocation import Allocate, kept_shares
from budwood.methods.method import Block, Method, prune
from budwood.methods.metrics import METRICS, wanda
from budwood.methods.validation import number, one_of, truth, whole
from budwood.sparsity.blocks import TopBlocks
from budwood.sparsity.forecast import expected_density
from budwood.sparsity.patterns import NM, Pattern, Scope, Shape, Top, parse_pattern
from budwood.sparsity.recovery import Either, EitherToDensity, Recovered

ALPHA = 0.25  # the paper's choice for all its headline figures


@dataclass(frozen=True)
class Wrp(Method):
    """Prune to 2:4 and take back the dropped weights that rank among the best `alpha` of their row.

    At alpha=0.25 about 1.4 to 1.6 % of all weights are taken back; no weight is changed.

    alpha: the share worth protecting, or a dict from regular expressions on linear names to such shares (the
    first that is found counts, 0.25 where none is). density: the recovered share of all weights instead; with
    block, the share of the width that blocks cover. block: recover whole blocks of this side; k of them per
    block row, or as many as density says; pad completes ragged edges. metric: "wanda", "magnitude" or "obs".
    pattern: any N:M. scope: ranks within the "row" or the "matrix". budget: "rank" recovers what ranks high
    enough, "row" the same number in every row. tie: which of equal scores N:M keeps, the lower index ("low-keeps") or
    as torch's unstable top-k has it in the "published" program. allocate: "global" gives matrices densities of their
    own around `density`, by what they save in the logits.
    """

    alpha: float | dict[str, float] = ALPHA
    density: float | None = None
    block: int | None = None
    k: int | None = None
    pad: bool = False
    metric: str = "wanda"
    pattern: str = "2:4"
    scope: Scope = "row"
    budget: Literal["rank", "row"] = "rank"
    tie: Literal["low-keeps", "published"] = "low-keeps"
    allocate: Allocate = "uniform"

    def __post_init__(self) -> None:
        one_of("metric", self.metric, METRICS)
        one_of("scope", self.scope, ("row", "matrix"))
        one_of("budget", self.budget, ("rank", "row"))
        one_of("tie", self.tie, ("low-keeps", "published"))
        one_of("allocate", self.allocate, ("uniform", "global"))
        truth("pad", self.pad)
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
            "allocate='global' divides what density brings; give density, leave block and metric out": (
                self.allocate == "global" and (blocks or self.density is None or self.metric != "wanda")
            ),
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
            try:
                re.compile(expression)
            except (re.error, TypeError) as error:
                raise UsageError(f"alpha: {expression!r} is not a regular expression: {error}") from error

    @property
    def base(self) -> NM:
        base = parse_pattern(self.pattern)
        if not isinstance(base, NM):
            raise UsageError(f"wrp recovers what N:M dropped, so its pattern must be like '2:4', got {self.pattern!r}")
        return replace(base, published=self.tie == "published")

    def check(self, linears: Mapping[str, Shape]) -> None:
        super().check(linears)
        for expression in self.alpha if isinstance(self.alpha, Mapping) else ():
            if not any(re.search(expression, name) for name in linears):
                raise UsageError(
                    f"alpha: {expression!r} is found in no linear's name, such as {next(iter(linears), '')}"
                )

    def alpha_for(self, name: str) -> float:
        if not isinstance(self.alpha, Mapping):
            return self.alpha
        return next((alpha for expression, alpha in self.alpha.items() if re.search(expression, name)), ALPHA)

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

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        if self.allocate == "uniform":
            return self
        kept = kept_shares(self, model, batches, self.base)
        return partial(self.step, densities={name: max(0.0, share - self.base.density) for name, share in kept.items()})

    def __call__(self, block: Block) -> None:
        self.step(block, {})

    def step(self, block: Block, densities: Mapping[str, float]) -> None:
        """Prunes one block. densities: recovered shares of linears, by full name, where they are not all alike."""
        metric = partial(wanda, published=self.published) if self.metric == "wanda" else METRICS[self.metric]
        for linear, scores in metric(block):
            own = replace(self, density=densities.get(linear.name, self.density))
            kept = prune(linear, scores, own.pattern_for(linear.shape, linear.name))
            linear.recovered = kept - scores.numel() * self.base.kept // self.base.group
            del scores  # as large as the matrix in float32, while the next one's are made
