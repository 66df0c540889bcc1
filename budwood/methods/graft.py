"""graft: the best model that a number of bits per weight can buy, with 2:4 inside it or without."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.formats import predict
from budwood.methods.allocation import kept_counts
from budwood.methods.alps import Inputs, inputs
from budwood.methods.method import Block, Method, naming
from budwood.methods.reconstruction import reconstruct_block
from budwood.methods.refit import check_fit, fit
from budwood.methods.validation import number, one_of, truth, whole
from budwood.sparsity import scores
from budwood.sparsity.admm import admm
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import NM, Pattern, Shape, Top
from budwood.sparsity.recovery import Recovered
from budwood.stream.dense_stream import DenseStream

ITEMSIZE = 2  # bytes of a value: bits are counted as the 16-bit types store them


@dataclass(frozen=True)
class Graft(Method):
    """Spend a budget of bits on 2:4 and the weights worth most beside it, and fit all that stays to the dense outputs.

    bits: stored bits per weight of the pruned matrices, values of 16 bits and places together. pattern: "2:4" with
    recovered weights, or "free" (any places). select: the mask by alternating directions as in "alps", or by the score
    of "wanda". allocate: "global" divides the weights among all matrices by what they save in the logits, "uniform"
    gives each the same share. fit: let the kept weights make up for the others. rounds, damp, iterations, tolerance: as
    in alps; the search ends so near the best values that few iterations are left to do. steps, rate: of gradient
    descent of each block as a whole towards the outputs of the dense model.
    """

    bits: float = 9.75
    pattern: Literal["2:4", "free"] = "2:4"
    select: Literal["alps", "wanda"] = "alps"
    allocate: Literal["global", "uniform"] = "global"
    fit: bool = True
    rounds: int = 12
    damp: float = 0.01
    iterations: int = 8
    tolerance: float = 3e-3
    steps: int = 0
    rate: float = 0.002

    def __post_init__(self) -> None:
        one_of("pattern", self.pattern, ("2:4", "free"))
        one_of("select", self.select, ("alps", "wanda"))
        one_of("allocate", self.allocate, ("global", "uniform"))
        number("bits", self.bits, 0, 16)
        truth("fit", self.fit)
        whole("rounds", self.rounds, 1)
        whole("steps", self.steps, 0)
        number("rate", self.rate, 0, 1)
        check_fit(self.damp, self.iterations, self.tolerance)

    @property
    def base(self) -> NM | None:
        return NM(2, 4) if self.pattern == "2:4" else None

    def check(self, linears: Mapping[str, Shape]) -> None:
        super().check(linears)
        for name, shape in linears.items():
            if self.count_for(shape) < 0:
                least = 8 * self._bytes(shape, self._least(shape)) / (shape[0] * shape[1])
                raise UsageError(
                    f"{name}: {self.bits:g} bits per weight do not hold pattern={self.pattern!r}, which takes "
                    f"{least:.4g} bits at least; give more bits" + (", or pattern='free'" if self.base else "")
                )

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        return self.keeping(shape, self.count_for(shape))

    def keeping(self, shape: Shape, count: int) -> Pattern:
        """The pattern of a matrix [out, in] that keeps `count` weights."""
        share = max(0, count - self._least(shape)) / (shape[0] * shape[1])
        return Recovered(self.base, Top(share, "matrix")) if self.base else Top(share, "matrix")

    def count_for(self, shape: Shape) -> int:
        """The most weights that a matrix [out, in] may keep within its bits; -1 where even the fewest are too many."""
        least, room = self._least(shape), self.bits * shape[0] * shape[1] / 8
        levels = range(least, shape[0] * shape[1] + 1)
        found = bisect_right(levels, room, key=partial(self._bytes, shape))
        return levels[found - 1] if found else -1

    def _least(self, shape: Shape) -> int:
        return shape[0] * (shape[1] // 4) * 2 if self.base else 0

    def _bytes(self, shape: Shape, count: int) -> int:
        return predict(shape, self._outlook(shape, count), ITEMSIZE)[1]

    def _outlook(self, shape: Shape, count: int) -> Forecast:
        return Forecast(count, count - self._least(shape) if self.base else None)

    def forecast(self, shape: Shape, name: str = "") -> Forecast:
        return self._outlook(shape, self.count_for(shape))

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        counts = {}
        if self.allocate == "global":
            total = sum(self.count_for(shape) for shape in model.structure.shapes.values())
            counts = kept_counts(model, batches, self.pattern_for, self.base, total)
        return partial(self.step, counts=counts, dense=DenseStream(model, batches) if self.steps else None)

    def __call__(self, block: Block) -> None:
        self.step(block, {}, None)

    def step(self, block: Block, counts: Mapping[str, int], dense: DenseStream | None) -> None:
        """Prunes one block. counts: weights that a linear keeps, by full name; its own share where it is not there.

        dense: the stream whose outputs the whole block is fitted to at last, where steps are asked for.
        """
        for linear, known in inputs(block, self.damp):
            pattern = self.keeping(linear.shape, counts.get(linear.name, self.count_for(linear.shape)))
            weight = linear.weight
            with naming(linear.name):
                keep, start = self.choose(weight, known, pattern)
            if self.fit and known is not None:
                fit(linear, start, keep, weight, known.moments, self.damp, self.iterations, self.tolerance)
            else:
                linear.weight = torch.where(keep, weight, 0)
            if self.base:
                linear.recovered = int(keep.sum()) - self._least(linear.shape)
        if dense is not None:
            reconstruct_block(block, dense, self.steps, self.rate)

    def choose(self, weight: Tensor, known: Inputs | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """What stays of a matrix, bool [out, in], and weights to begin a fit with [out, in].

        Where no token reached it the largest weights stay.
        """
        if known is None:
            return pattern.keep(scores.magnitude(weight)), weight
        if self.select == "wanda":
            return pattern.keep(scores.wanda(weight, known.gram.norms())), weight
        return admm(weight, known.spectrum, pattern, self.rounds)
