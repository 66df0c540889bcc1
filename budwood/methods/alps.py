"""ALPS: a mask by alternating directions, then the best values on it (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from budwood.errors import UsageError
from budwood.methods.method import Block, Linear, Method, naming, prune
from budwood.methods.metrics import heard
from budwood.methods.refit import check_fit, fit
from budwood.methods.validation import number, one_of, whole
from budwood.sparsity import scores
from budwood.sparsity.admm import Spectrum, admm
from budwood.sparsity.patterns import NM, Pattern, Scope, Shape, Top, parse_pattern
from budwood.sparsity.recovery import Recovered
from budwood.sparsity.statistics import Gram


@dataclass(frozen=True)
class Alps(Method):
    """Choose what stays knowing that it will be fitted anew, then fit it: the error of the outputs decides both.

    pattern: "2:4" (N kept of M) or "50%" (dropped). extra: with N:M, the share of all weights kept beside it wherever
    they are worth most. scope: whether a share is of the whole "matrix" or of every "row". rounds: most rounds of the
    search for the mask. damp: pull towards the dense weights, as a share of the mean second moment. iterations,
    tolerance: of the fit, as in refit.
    """

    pattern: str = "2:4"
    extra: float = 0.0
    scope: Scope = "matrix"
    rounds: int = 300
    damp: float = 0.01
    iterations: int = 100
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("row", "matrix"))
        whole("rounds", self.rounds, 1)
        check_fit(self.damp, self.iterations, self.tolerance)
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, NM):
            number("extra", self.extra, 0, 1 - pattern.density)
        elif self.extra:
            raise UsageError(f"extra is kept beside N:M; {self.pattern} drops less by itself, such as '45%'")

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern, self.scope)
        if isinstance(pattern, NM) and self.extra:
            return Recovered(pattern, Top(self.extra, "matrix"))
        return pattern

    def __call__(self, block: Block) -> None:
        for linear, known in inputs(block, self.damp):
            pattern = self.pattern_for(linear.shape, linear.name)
            dense = linear.weight
            if known is not None:
                with naming(linear.name):
                    keep, start = admm(dense, known.spectrum, pattern, self.rounds)
                fit(linear, start, keep, dense, known.moments, self.damp, self.iterations, self.tolerance)
                kept = int(keep.sum())
            else:
                kept = prune(linear, scores.magnitude(dense), pattern)
            if isinstance(pattern, Recovered):
                linear.recovered = kept - dense.numel() * pattern.base.kept // pattern.base.group


class Inputs:
    """Second moments of what a linear hears, and their spectrum once it is asked for."""

    def __init__(self, gram: Gram, damp: float):
        self.gram, self.damp = gram, damp
        self.moments = gram.matrix().float()  # [in, in]

    @cached_property
    def spectrum(self) -> Spectrum:
        return Spectrum.of(self.moments, self.damp)


def inputs(block: Block, damp: float) -> Iterator[tuple[Linear, Inputs | None]]:
    """Every linear with its inputs; None where no token reached it. Linears that share an input share the object."""
    latest: Inputs | None = None
    grams = block.collect(Gram)
    for name, linear in block.linears.items():
        if not heard(linear, grams[name]):
            yield linear, None
            continue
        if latest is None or latest.gram is not grams[name]:  # those that share follow each other
            latest = Inputs(grams[name], damp)
        yield linear, latest
