"""Fitting kept weights to the outputs of the dense matrix, on a grid or not: what refit, alps and graft share."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from budwood.methods.metrics import reached
from budwood.methods.validation import number, one_of, whole
from budwood.sparsity.admm import System
from budwood.sparsity.codes import GROUP
from budwood.sparsity.grid_fit import PULL, fit_to_grid
from budwood.sparsity.refit import refit
from budwood.sparsity.second_order import Factor, factorise
from budwood.sparsity.statistics import Gram

if TYPE_CHECKING:
    from budwood.stream.block import Block
    from budwood.stream.linear import Linear

GRIDS = ("int4",)  # values that a fit can have
VALUES = '"int4": the fitted values are 4-bit codes with scales, chosen for the least error of the outputs'


class Inputs:
    """Second moments of a linear's inputs, and the system that ADMM solves, made on first use."""

    def __init__(self, gram: Gram, damp: float):
        self.gram, self.damp = gram, damp
        self.moments = gram.matrix().float()  # [in, in]

    @cached_property
    def factor(self) -> Factor:
        """Of the moments as a fit to a grid damps them."""
        return factorise(self.moments.cpu(), PULL)

    def factor_for(self, values: str | None) -> Factor | None:
        """The factor, where values of this kind need it."""
        return None if values is None else self.factor

    @cached_property
    def system(self) -> System:
        return System.of(self.moments, self.damp)


def inputs_of(
    block: "Block", damp: float, statistic: Callable[[int], Gram] = Gram
) -> Iterator[tuple["Linear", Inputs | None]]:
    """Every linear with its inputs; None where no token reached it. Linears that share an input share the object."""
    latest: Inputs | None = None
    grams = block.collect(statistic)
    for name, linear in block.linears.items():
        if not reached(linear, grams[name]):
            yield linear, None
            continue
        if latest is None or latest.gram is not grams[name]:  # linears that share an input are consecutive
            latest = Inputs(grams[name], damp)
        yield linear, latest


def fit(
    linear: "Linear",
    start: Tensor,
    keep: Tensor,
    dense: Tensor,
    moments: Tensor,
    damp: float,
    iterations: int,
    tolerance: float,
    cross: Tensor | None = None,
    values: str | None = None,
    factor: Factor | None = None,
    group: int = GROUP,
) -> None:
    """Gives `linear` the weights on `keep` whose outputs are nearest to those of `dense`, from `start`; all [out, in].

    moments: XᵀX [in, in]. cross: X₀ᵀ X [in, in] where those are outputs for other inputs X₀. values: "int4" for weights
    on the grid of 4-bit codes. factor: that of `moments` damped by PULL, where it is known. group: columns with one
    scale.
    """
    found = refit(start, keep, dense, moments, cross, damp=damp, iterations=iterations, tolerance=tolerance).weight
    if values is not None:
        dtype = linear.stored.dtype
        found = fit_to_grid(found, keep, dense, moments, factor=factor, dtype=dtype, cross=cross, group=group)
    linear.weight = found


def check_fit(damp: float, iterations: int, tolerance: float) -> None:
    """Checks the options of a fit; raises UsageError."""
    number("damp", damp, 0, float("inf"))
    whole("iterations", iterations, 1)
    number("tolerance", tolerance, 0, 1)


def check_values(values: str | None) -> None:
    """Checks the option of a fit that says what its values are; raises UsageError."""
    if values is not None:
        one_of("values", values, GRIDS)
