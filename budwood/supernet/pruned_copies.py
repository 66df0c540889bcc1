"""Pruned copies of one linear at several levels: what is removed, how the rest is repaired, with how much damping."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.sparsity.statistics import Gram
from budwood.sparsity.unit_removal import (
    FirstOrder,
    Outputs,
    Problem,
    kept_units,
    outputs_of,
    problem_of,
    repaired,
)
from budwood.supernet.sites import Site

STEPS = {"attention": 1, "mlp": 16}  # units removed between two scorings
ROUNDS = {"attention": 1, "mlp": 16}  # scorings of the released program
HARDER = (1, 3, 10, 30)  # factors on the damping of the repair, of which the held-out inputs choose


@dataclass(frozen=True)
class Pruner:
    """How one linear is pruned to several levels."""

    first_order: FirstOrder = "signed"
    damp: float = 0.01
    published: bool = False

    def copies(
        self, weight: Tensor, statistic: "HeldOut", site: Site, columns: Tensor, levels: Mapping[int, int]
    ) -> dict[int, "Copy"]:
        """The pruned copies of a weight [out, in] by level. columns: of each unit [units, width].

        The repair is damped as much as serves the held-out inputs best at the level nearest the centre.
        """
        fit, held = statistic.moments(weight.shape[1])
        columns = columns.to(fit.device)
        problem = problem_of(weight, fit, self.damp)
        kept = kept_units(
            problem,
            columns,
            levels.values(),
            step=STEPS[site.kind],
            rounds=ROUNDS[site.kind] if self.published else None,
            first_order=self.first_order,
        )
        centre = min(levels, key=abs)
        fitted, unseen = outputs_of(weight, fit), outputs_of(weight, held)
        problem, factor = self._best(problem, weight, fit, unseen, columns, kept[levels[centre]])
        found = {}
        for level, count in levels.items():
            left = repaired(problem, columns, kept[count])
            found[level] = Copy(
                left.kept.cpu(),
                left.columns.cpu(),
                left.weight.cpu(),
                error=fitted.error(left.columns, left.weight),
                held_out=unseen.error(left.columns, left.weight),
                damp=self.damp * factor,
            )
        return found

    def _best(
        self, problem: Problem, weight: Tensor, fit: Tensor, unseen: Outputs, columns: Tensor, kept: Tensor
    ) -> tuple[Problem, float]:
        """The problem with the damping whose repair has the least error on the held-out inputs, and its factor."""
        if self.published or unseen.energy <= 0:
            return problem, 1.0
        best: tuple[float, Problem, float] | None = None
        for factor in HARDER:
            tried = problem if factor == 1 else problem_of(weight, fit, self.damp * factor)
            left = repaired(tried, columns, kept)
            error = unseen.error(left.columns, left.weight)
            if best is not None and error >= best[0]:
                break
            best = error, tried, factor
        assert best is not None
        return best[1], best[2]


@dataclass(frozen=True)
class Copy:
    """A pruned copy of a linear: units and columns kept, their weights, relative squared output errors, damping."""

    kept: Tensor  # int64 [units kept]
    columns: Tensor  # int64 [in kept]
    weight: Tensor  # [out, in kept]
    error: float  # on the calibration inputs
    held_out: float  # on inputs that were not fitted; 0 where there are none
    damp: float


class HeldOut:
    """Second moments of the inputs; those of one window in `period` are summed apart, to measure overfitting."""

    def __init__(self, width: int, period: int | None):
        self.count, self.period, self._windows = 0, period, 0
        self.fit, self.held = Gram(width), Gram(width) if period else None

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in]. Tokens routed to an expert come without their windows: of them the last ones count."""
        self.count += x.numel() // x.shape[-1]
        if self.held is None or self.period is None:
            self.fit.add(x)
        elif x.dim() > 2:
            x = x.flatten(0, -3)
            held = torch.arange(self._windows, self._windows + len(x)) % self.period == self.period - 1
            self._windows += len(x)
            for gram, some in ((self.fit, ~held), (self.held, held)):
                if some.any():
                    gram.add(x[some.to(x.device)])
        else:
            last = len(x) // self.period
            self.fit.add(x[: len(x) - last])
            self.held.add(x[len(x) - last :])

    def check(self, name: str) -> None:
        self.fit.check(name)

    def moments(self, width: int) -> tuple[Tensor, Tensor]:
        """Second moments [in, in] of the inputs to fit and of those held out, float64.

        Where no token arrived the first are the identity, so that units are removed by their magnitude.
        """
        fit = self.fit.matrix() if self.fit.count else torch.eye(width, dtype=torch.float64)
        return fit, self.held.matrix() if self.held is not None else torch.zeros_like(fit)
