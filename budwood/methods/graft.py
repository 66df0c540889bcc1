"""graft: the smallest output error within a number of bits per weight, with 2:4 as the base or without."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.formats import predict
from budwood.methods.allocation import kept_counts
from budwood.methods.fitting import VALUES, Inputs, check_fit, check_values, fit, inputs_of
from budwood.methods.method import PatternMethod, PatternOf, Step, naming
from budwood.methods.option import option
from budwood.methods.reconstruction import LOSS, MOVE, RATE, TARGET, TOKENS, BlockFit, check_block_fit
from budwood.methods.validation import number, one_of, truth, whole
from budwood.sparsity import scores
from budwood.sparsity.admm import admm
from budwood.sparsity.codes import FINE, GROUP
from budwood.sparsity.differences import MixedGram, row_factors
from budwood.sparsity.fluctuation import mean_output
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import NM, Pattern, Shape, Top
from budwood.sparsity.recovery import Recovered
from budwood.sparsity.statistics import Gram

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.stream.block import Block
    from budwood.stream.model import Model

WINDOWS, TOKENS_EACH = 8, 256  # of the calibration windows: for the sensitivities of rows
ITEMSIZE = 2  # bytes of a value that is no code: bits are counted as the 16-bit types store them


@dataclass(frozen=True)
class Graft(PatternMethod):
    """Spend a budget of bits on 2:4 and the weights that reduce the error most; fit all to the dense outputs."""

    bits: float = option(
        9.75, "stored bits per weight of the pruned matrices: index, values of 16 bits, or codes and scales of `values`"
    )
    pattern: Literal["2:4", "free"] = option(
        "2:4", '"2:4" with recovered weights in addition, or "free": any positions'
    )
    select: Literal["alps", "wanda"] = option(
        "alps", 'the mask by alternating directions as in "alps", or by the score of "wanda"'
    )
    allocate: Literal["global", "uniform"] = option(
        "global", "divide the weights among all matrices by their effect on the logits, or give each the same share"
    )
    fit: bool = option(True, "fit the kept weights to compensate for the dropped ones")
    rounds: int = option(12, "most rounds of the search for the mask, as in alps")
    damp: float = option(0.01, "pull towards the dense weights, as in alps")
    iterations: int = option(8, "most steps of the fit, which starts near the solution")
    tolerance: float = option(3e-3, "a row is fitted when its gradient has shrunk to this share")
    steps: int = option(0, "steps of gradient descent of each block as a whole, as in matched")
    rate: float = option(0.002, RATE)
    target: float | str = option("pruned", TARGET)
    move: str = option("weights+biases+norms", MOVE)
    loss: str = option("relative", LOSS)
    tokens: int = option(1024, TOKENS)
    differences: float = option(
        0.0, "share of the second moments of differences between tokens in those that masks and fit use"
    )
    pairs: Literal["neighbours", "all"] = option("neighbours", "tokens whose differences are taken, in every sequence")
    sensitivities: bool = option(
        False, "the error of a row counts by how much the loss depends on its output, when masks are chosen"
    )
    values: str | None = option(None, VALUES)

    def __post_init__(self) -> None:
        one_of("pattern", self.pattern, ("2:4", "free"))
        one_of("select", self.select, ("alps", "wanda"))
        one_of("allocate", self.allocate, ("global", "uniform"))
        number("bits", self.bits, 0, 16)
        one_of("pairs", self.pairs, ("neighbours", "all"))
        number("differences", self.differences, 0, 1)
        truth("fit", self.fit)
        truth("sensitivities", self.sensitivities)
        whole("rounds", self.rounds, 1)
        check_block_fit(self.steps, 0, self.rate, self.target, self.move, self.loss, self.tokens)
        check_fit(self.damp, self.iterations, self.tolerance)
        check_values(self.values)
        if self.values is not None and (not self.fit or self.steps):
            reason = (
                "needs fit=True" if not self.fit else "cannot be kept by steps, which move the weights off their grid"
            )
            raise UsageError(f"graft: values={self.values!r} {reason}; leave one of them out")

    @property
    def fitted_values(self) -> str | None:
        return self.values

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
        return self.keeping_count(shape, self.count_for(shape))

    def keeping_count(self, shape: Shape, count: int) -> Pattern:
        """The pattern of a matrix [out, in] that keeps `count` weights."""
        share = max(0, count - self._least(shape)) / (shape[0] * shape[1])
        return Recovered(self.base, Top(share, "matrix")) if self.base else Top(share, "matrix")

    def count_for(self, shape: Shape) -> int:
        """The most weights that a matrix [out, in] may keep within its bits; -1 where the fewest exceed them."""
        if self.group_for(shape) is not None:
            return shape[0] * shape[1]
        least, budget = self._least(shape), self.bits * shape[0] * shape[1] / 8
        levels = range(least, shape[0] * shape[1] + 1)
        found = bisect_right(levels, budget, key=partial(self._bytes, shape))
        return levels[found - 1] if found else -1

    def group_for(self, shape: Shape) -> int | None:
        """Columns with one scale, where a matrix [out, in] of codes keeps all its weights within its bits; else None.

        Codes of all weights take fewer bits than a mask and the codes of three quarters of them.
        """
        if self.values is None or self.base:
            return None
        budget, count = self.bits * shape[0] * shape[1] / 8, shape[0] * shape[1]
        for group in (FINE, GROUP):
            if predict(shape, Forecast(count, group=group), ITEMSIZE, f"dense_{self.values}")[1] <= budget:
                return group
        return None

    def _least(self, shape: Shape) -> int:
        return shape[0] * (shape[1] // 4) * 2 if self.base else 0

    def _bytes(self, shape: Shape, count: int) -> int:
        layout = "auto" if self.values is None else f"bitmask_{self.values}"
        return predict(shape, self._forecast(shape, count), ITEMSIZE, layout)[1]

    def _forecast(self, shape: Shape, count: int) -> Forecast:
        return Forecast(count, count - self._least(shape) if self.base else None)

    def forecast_matrix(self, shape: Shape, name: str = "") -> Forecast:
        return replace(self._forecast(shape, self.count_for(shape)), group=self.group_for(shape))

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        counts: dict[str, int] = {}
        if self.allocate == "global" and any(self.group_for(s) is None for s in model.structure.shapes.values()):
            total = sum(self.count_for(shape) for shape in model.structure.shapes.values())
            counts = kept_counts(model, windows, work, self, self.pattern_for, self.base, total)
        options = (self.steps, self.rate, self.target, self.move, self.loss, self.tokens)
        rows = self.row_factors(model, windows, work) if self.sensitivities else {}
        return GraftStep(self, counts, BlockFit(model, windows, *options) if self.steps else None, rows)

    def row_factors(self, model: "Model", windows: Tensor, work: "Work") -> dict[str, Tensor]:
        """What the rows of every linear are multiplied by when masks are chosen [out], by full name."""
        from budwood.training.sensitivities import row_sensitivities

        few = windows[:WINDOWS, :TOKENS_EACH]
        found = work.tensors("row-sensitivities", lambda: row_sensitivities(model, few, model.linears))
        return {name: row_factors(values) for name, values in found.items()}

    @property
    def statistic(self) -> Callable[[int], Gram]:
        """Of the inputs."""
        return partial(MixedGram, share=self.differences, pairs=self.pairs) if self.differences else Gram

    def prune_block(
        self, block: "Block", pattern_for: PatternOf, rows: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """rows: see `row_factors`."""
        for linear, known in inputs_of(block, self.damp, self.statistic):
            pattern = pattern_for(linear.shape, linear.name)
            weight = linear.weight.clone()
            with naming(linear.name):
                keep, start = self.choose(weight, known, pattern, rows.get(linear.name))
            if self.fit and known is not None:
                options = (self.damp, self.iterations, self.tolerance)
                values, factor = self.values, known.factor_for(self.values)
                group = self.group_for(linear.shape) or GROUP
                fit(linear, start, keep, weight, known.moments, *options, values=values, factor=factor, group=group)
            else:
                linear.weight = torch.where(keep.to(weight.device), weight, 0)
            if self.base:
                linear.recovered = int(keep.sum()) - self._least(linear.shape)
            if known is not None and isinstance(known.gram, MixedGram) and linear.bias is not None:
                lost = mean_output(weight - linear.weight, known.gram.mean)
                linear.bias = linear.bias + lost.float().to(linear.bias.device)

    def choose(
        self, weight: Tensor, known: Inputs | None, pattern: Pattern, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mask of a matrix, bool [out, in], and weights to start a fit from [out, in].

        Where no token reached it, the largest weights are kept. rows: factors [out] of the rows in this choice.
        """
        if known is None:
            return pattern.keep(scores.magnitude(weight)), weight
        if self.group_for((weight.shape[0], weight.shape[1])) is not None:
            return torch.ones_like(weight, dtype=torch.bool), weight
        factors = 1 if rows is None else rows.to(weight.device)[:, None]
        if self.select == "wanda":
            return pattern.keep(scores.wanda(weight * factors, known.gram.norms())), weight
        keep, start = admm(weight * factors, known.system, pattern, self.rounds)
        return keep, start if rows is None else start / rows.to(start.device)[:, None]


@dataclass(frozen=True)
class GraftStep(Step):
    """counts: weights that a linear keeps, by full name; for others the method's own count.

    block_fit: of the whole block at the end, where `steps` is above 0. rows: see `Graft.row_factors`.
    """

    method: Graft
    counts: Mapping[str, int]
    block_fit: BlockFit | None
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, block: "Block") -> None:
        method = self.method

        def pattern_for(shape: Shape, name: str) -> Pattern:
            return method.keeping_count(shape, self.counts.get(name, method.count_for(shape)))

        if self.block_fit is not None:
            self.block_fit.before(block)
        method.prune_block(block, pattern_for, self.rows)
        if self.block_fit is not None:
            self.block_fit.fit(block)
