"""refit: after any method, the best values for the weights that it kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Block, Linear, Method
from budwood.methods.metrics import heard
from budwood.methods.once import Once
from budwood.methods.settings import number, whole
from budwood.methods.wrp import Wrp
from budwood.sparsity.outlook import Outlook
from budwood.sparsity.patterns import Pattern, Shape
from budwood.sparsity.refit import refit
from budwood.sparsity.statistics import Gram


@dataclass(frozen=True)
class Refit(Method):
    """Let another method choose, then fit all weights that it kept to the outputs of the dense matrix.

    inner: the method, such as wrp(alpha=0.25); its mask stays exactly as it is. damp: pull towards the dense weights,
    as a share of the mean second moment. iterations: most steps of conjugate gradients. tolerance: a row is done when
    its gradient has shrunk to this share.
    """

    inner: Method = field(default_factory=Wrp)
    damp: float = 0.01
    iterations: int = 100
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method):
            raise UsageError(f"refit needs a method that chooses, such as refit(wrp(alpha=0.25)), got {self.inner!r}")
        check_fit(self.damp, self.iterations, self.tolerance)

    def check(self, linears: Mapping[str, Shape]) -> None:
        self.inner.check(linears)

    def outlook(self, shape: Shape, name: str = "") -> Outlook:
        return self.inner.outlook(shape, name)

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        return self.inner.pattern_for(shape, name)

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        return partial(self.improve, choose=self.inner.prepare(model, batches))

    def __call__(self, block: Block) -> None:
        self.improve(block, self.inner)

    def improve(self, block: Block, choose: Callable[[Any], None]) -> None:
        once = Once(block)
        grams = once.collect(Gram)
        dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
        choose(once)
        for name, linear in block.linears.items():
            start = linear.weight
            if heard(linear, grams[name]):
                fit(linear, start, start != 0, dense[name], grams[name], self.damp, self.iterations, self.tolerance)


def fit(
    linear: Linear,
    start: Tensor,
    keep: Tensor,
    dense: Tensor,
    gram: Gram,
    damp: float,
    iterations: int,
    tolerance: float,
) -> None:
    """Gives `linear` the weights on `keep` that come nearest to the outputs of `dense`, from `start`; all [out, in]."""
    moments = gram.matrix().float()
    found = refit(start, keep, dense, moments, damp=damp, iterations=iterations, tolerance=tolerance)
    linear.weight = found.weight


def check_fit(damp: float, iterations: int, tolerance: float) -> None:
    """The settings of a fit, which several methods share; UsageError for what cannot be."""
    number("damp", damp, 0, float("inf"))
    whole("iterations", iterations, 1)
    number("tolerance", tolerance, 0, 1)
