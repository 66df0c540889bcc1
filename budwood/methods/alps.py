"""ALPS: a mask by alternating directions, then the best values on it (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from budwood.errors import UsageError
from budwood.methods.fitting import VALUES, check_fit, check_values, fit, inputs_of
from budwood.methods.method import PatternMethod, PatternOf, naming, prune
from budwood.methods.option import option
from budwood.methods.validation import number, one_of, whole
from budwood.sparsity import scores
from budwood.sparsity.admm import admm
from budwood.sparsity.patterns import NM, Pattern, Scope, Shape, Top, parse_pattern
from budwood.sparsity.recovery import Recovered

if TYPE_CHECKING:
    from budwood.stream.block import Block


@dataclass(frozen=True)
class Alps(PatternMethod):
    """Choose the mask for weights that will be fitted, then fit them: the error of the outputs decides both."""

    pattern: str = option("2:4", 'N:M such as "2:4" (N kept of M), or a share to drop such as "50%"')
    extra: float = option(
        0.0, "with N:M, the share of all weights kept in addition, wherever they reduce the error most"
    )
    scope: Scope = option("matrix", 'whether a share is of the whole "matrix" or of every "row"')
    rounds: int = option(300, "most rounds of the search for the mask")
    damp: float = option(0.01, "pull towards the dense weights, as a share of the mean second moment")
    iterations: int = option(100, "most steps of conjugate gradients of the fit")
    tolerance: float = option(1e-3, "a row is fitted when its gradient has shrunk to this share")
    values: str | None = option(None, VALUES)

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        whole("rounds", self.rounds, 1)
        check_fit(self.damp, self.iterations, self.tolerance)
        check_values(self.values)
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, NM):
            number("extra", self.extra, 0, 1 - pattern.density)
        elif self.extra:
            raise UsageError(
                f"extra is kept in addition to N:M, not to {self.pattern}; give a smaller share such as '45%'"
            )

    @property
    def fitted_values(self) -> str | None:
        return self.values

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, self.scope)
        if isinstance(pattern, NM) and self.extra:
            return Recovered(pattern, Top(self.extra, "matrix"))
        return pattern

    def prune_block(self, block: "Block", pattern_for: PatternOf) -> None:
        for linear, known in inputs_of(block, self.damp):
            pattern = pattern_for(linear.shape, linear.name)
            dense = linear.weight
            if known is not None:
                with naming(linear.name):
                    keep, start = admm(dense, known.system, pattern, self.rounds)
                fit(
                    linear,
                    start,
                    keep,
                    dense,
                    known.moments,
                    self.damp,
                    self.iterations,
                    self.tolerance,
                    values=self.values,
                    factor=known.factor_for(self.values),
                )
                kept = int(keep.sum())
            else:
                kept = prune(linear, scores.magnitude(dense), pattern)
            if isinstance(pattern, Recovered):
                linear.recovered = kept - dense.numel() * pattern.base.kept // pattern.base.group
