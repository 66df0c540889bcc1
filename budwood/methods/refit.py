"""refit: after any method, the best values for the weights that it kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Block, Linear, Method
from budwood.methods.metrics import heard
from budwood.methods.shared_pass import Once
from budwood.methods.validation import number, whole
from budwood.methods.wrp import Wrp
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import Pattern, Shape
from budwood.sparsity.refit import refit
from budwood.sparsity.statistics import Gram
from budwood.stream.cross_moments import cross_moments
from budwood.stream.dense_stream import DenseStream


@dataclass(frozen=True)
class Refit(Method):
    """Let another method choose, then fit all weights that it kept to the outputs of the dense matrix.

    inner: the method, such as wrp(alpha=0.25); its mask stays exactly as it is. damp: pull towards the dense weights,
    as a share of the mean second moment. iterations: most steps of conjugate gradients. tolerance: a row is done when
    its gradient has shrunk to this share. target: 0 fits to what the dense weights make of the inputs that the pruned
    model has, 1 to the outputs that the dense model has, and between both.
    """

    inner: Method = field(default_factory=Wrp)
    damp: float = 0.01
    iterations: int = 100
    tolerance: float = 1e-3
    target: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method):
            raise UsageError(f"refit needs a method that chooses, such as refit(wrp(alpha=0.25)), got {self.inner!r}")
        check_fit(self.damp, self.iterations, self.tolerance)
        number("target", self.target, 0, 1)

    def check(self, linears: Mapping[str, Shape]) -> None:
        self.inner.check(linears)

    def forecast(self, shape: Shape, name: str = "") -> Forecast:
        return self.inner.forecast(shape, name)

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        return self.inner.pattern_for(shape, name)

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        beside = DenseStream(model, batches, model.batch_for(batches)) if self.target else None
        return partial(self.improve, choose=self.inner.prepare(model, batches), beside=beside)

    def __call__(self, block: Block) -> None:
        self.improve(block, self.inner, None)

    def improve(self, block: Any, choose: Callable[[Any], None], beside: DenseStream | None) -> None:
        """Prunes one block by `choose`, then fits. beside: the dense model's stream, where the target asks for it."""
        once = Once(block)
        grams = once.collect(Gram)
        crosses = cross_moments(beside.at(block.index), block) if beside else {}
        dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
        choose(once)
        for name, linear in block.linears.items():
            start, gram = linear.weight, grams[name]
            if heard(linear, gram):
                moments = gram.matrix()
                cross = torch.lerp(moments, crosses[name], self.target).float() if crosses else None
                keep = start != 0
                fit(
                    linear, start, keep, dense[name], moments.float(), self.damp, self.iterations, self.tolerance, cross
                )


def fit(
    linear: Linear,
    start: Tensor,
    keep: Tensor,
    dense: Tensor,
    moments: Tensor,
    damp: float,
    iterations: int,
    tolerance: float,
    cross: Tensor | None = None,
) -> None:
    """Gives `linear` the weights on `keep` that come nearest to the outputs of `dense`, from `start`; all [out, in].

    moments: XᵀX [in, in]. cross: X₀ᵀ X [in, in] where those are outputs for other inputs X₀.
    """
    found = refit(start, keep, dense, moments, cross, damp=damp, iterations=iterations, tolerance=tolerance)
    linear.weight = found.weight


def check_fit(damp: float, iterations: int, tolerance: float) -> None:
    """The settings of a fit, which several methods share; UsageError for what cannot be."""
    number("damp", damp, 0, float("inf"))
    whole("iterations", iterations, 1)
    number("tolerance", tolerance, 0, 1)
