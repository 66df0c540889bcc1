"""Removal of whole units (attention heads, neurons) from the linear that reads them, with least-squares repair.

A unit is a set of columns of a weight W [out, in]. Units are removed one after the other by a second-order price plus a
first-order term, and the kept columns are fitted to the dense outputs (Týr-the-Pruner, arXiv 2503.09657, section 3).
Everything runs in float64.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from budwood.sparsity.second_order import one_thread

FirstOrder = Literal["signed", "abs", "none"]
BYTES = 1 << 28  # of the temporaries of one batch of prices
SPARSE = 0.75  # share of columns left from which the matrices of a sweep are made smaller
HARDER = 10.0  # factor on the damping where a matrix cannot be factorised


@dataclass(frozen=True)
class Problem:
    """A damped least-squares problem: minimise ½‖X(W - W₀)‖² + ½ ridge ‖W - W₀‖² over W [out, in]."""

    dense: Tensor  # W₀ [out, in] float64, 0 in columns whose input is always 0
    moments: Tensor  # H = XᵀX + ridge I, [in, in] float64
    target: Tensor  # G = W₀ H [out, in]
    ridge: float

    @property
    def energy(self) -> float:
        """½⟨W₀, G⟩, the loss of removing every column."""
        return 0.5 * float((self.dense * self.target).sum())

    def repair(self, columns: Tensor) -> Tensor:
        """The best weights on these columns with all others 0: G_K H_KK⁻¹, [out, columns] float64."""
        factor = _cholesky(self.moments[columns][:, columns])
        with one_thread():
            return torch.cholesky_solve(self.target[:, columns].T, factor).T

    def loss(self, columns: Tensor, weight: Tensor) -> float:
        """½‖X(W - W₀)‖² + ½ ridge ‖W - W₀‖² where W is `weight` [out, columns] on `columns` and 0 elsewhere."""
        difference = self.dense.clone()
        difference[:, columns] -= weight.double()
        return 0.5 * float(((difference @ self.moments) * difference).sum())


@dataclass(frozen=True)
class Removed:
    """What is left after a number of removals: `kept` units, ascending, and their repaired columns."""

    kept: Tensor  # int64 [units kept]
    columns: Tensor  # int64 [in kept], ascending
    weight: Tensor  # [out, in kept] float64


def problem_of(weight: Tensor, moments: Tensor, damp: float = 0.01) -> Problem:
    """The problem of a weight [out, in] with the second moments [in, in] of its inputs, sum of x xᵀ over tokens.

    damp: ridge as a share of the mean of the diagonal. Columns whose input is always 0 count as 0.
    """
    moments = moments.double().clone()
    dense = weight.to(moments, copy=True)
    diagonal = moments.diagonal()
    dense[:, diagonal == 0] = 0
    ridge = damp * float(diagonal.mean())
    diagonal.add_(ridge)
    return Problem(dense, moments, dense @ moments, ridge)


def remove_units(
    problem: Problem,
    units: Tensor,
    counts: Iterable[int],
    *,
    step: int = 1,
    rounds: int | None = None,
    first_order: FirstOrder = "signed",
) -> dict[int, Removed]:
    """`kept_units` and `repaired`: what is left at each of `counts`, by count, ascending."""
    found = kept_units(problem, units, counts, step=step, rounds=rounds, first_order=first_order)
    return {count: repaired(problem, units, kept) for count, kept in found.items()}


def kept_units(
    problem: Problem,
    units: Tensor,
    counts: Iterable[int],
    *,
    step: int = 1,
    rounds: int | None = None,
    first_order: FirstOrder = "signed",
) -> dict[int, Tensor]:
    """The units kept, int64 ascending, once each of `counts` of them are removed, by count.

    units: columns of each, [units, width]. One sweep serves all counts: removals are nested, and a step is cut short
    where it would pass a count. step: units per step. rounds: a number of steps for each count instead, as equal as
    possible, the first ones larger (the published program; its sweep is repeated for each count). Of equal scores the
    lower index is removed first.
    Raises ValueError for a count below 0 or above the number of units, and where a column belongs to no unit.
    """
    if units.numel() != problem.dense.shape[1]:
        raise ValueError(f"units of {units.numel()} columns do not cover the {problem.dense.shape[1]} of the weight")
    wanted = sorted(set(counts))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= len(units):
        raise ValueError(f"between 0 and {len(units)} units can be removed, not {wanted[0]} to {wanted[-1]}")
    every = torch.arange(len(units), device=units.device)
    found = {0: every, len(units): every[:0]}
    between = [count for count in wanted if count not in found]
    if rounds is None:
        last = between[-1] if between else 0
        sweeps = [sorted({*range(step, last, step), *between})]
    else:
        sweeps = [equal_rounds(count, rounds) for count in between]
    for stops in sweeps:
        for count, kept in _sweep(problem, units, stops, first_order):
            if rounds is None or count == stops[-1]:
                found[count] = kept
    return {count: found[count] for count in wanted}


def repaired(problem: Problem, units: Tensor, kept: Tensor) -> Removed:
    """The best weights with these units alone; the dense ones where none is removed."""
    columns = units[kept].flatten().sort().values
    if len(kept) in (0, len(units)):
        return Removed(kept, columns, problem.dense[:, columns])
    return Removed(kept, columns, problem.repair(columns))


def equal_rounds(count: int, rounds: int) -> list[int]:
    """The numbers removed after each of `rounds` steps, as equal as possible, the first steps larger."""
    least, more = divmod(count, rounds)
    stops, total = [], 0
    for index in range(rounds):
        total += least + (index < more)
        stops.append(total)
    return sorted({stop for stop in stops if stop})


def prices(weight: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """q_g, the least increase of the loss when a unit is removed and the rest is fitted again: float64 [units].

    weight: W [out, in], optimal for its columns. inverse: of the damped H on them, [in, in]. units: [units, width].
    q_g = ½ trace(W_g (H⁻¹_gg)⁻¹ W_gᵀ).
    """
    count, width = units.shape
    if width == 1:
        single = units[:, 0]
        return 0.5 * weight.square().sum(0)[single] / inverse.diagonal()[single]
    found = weight.new_empty(count)
    batch = max(1, BYTES // (8 * weight.shape[0] * width))
    for start in range(0, count, batch):
        some = units[start : start + batch]
        blocks = inverse[some[:, :, None], some[:, None, :]]  # [some, width, width]
        parts = weight[:, some].permute(1, 2, 0)  # [some, width, out]
        found[start : start + batch] = 0.5 * (torch.linalg.solve(blocks, parts) * parts).sum((1, 2))
    return found


def first_order_terms(weight: Tensor, target: Tensor, units: Tensor) -> Tensor:
    """f_g = ⟨W_g, G_g⟩, float64 [units]; at W₀ without damping they add up to ‖XW₀‖²."""
    return (weight * target).sum(0)[units].sum(1)


@dataclass(frozen=True)
class Outputs:
    """The dense outputs on some inputs, by the second moments of these, against which pruned weights are measured."""

    moments: Tensor  # XᵀX [in, in] float64
    target: Tensor  # W₀ XᵀX [out, in]
    energy: float  # ‖XW₀‖²

    def error(self, columns: Tensor, weight: Tensor) -> float:
        """‖X(W - W₀)‖² / ‖XW₀‖², where W is `weight` [out, columns] on `columns` and 0 elsewhere; 0 without inputs."""
        if self.energy <= 0:
            return 0.0
        weight = weight.to(self.moments)
        own = weight @ self.moments[columns][:, columns]
        moved = float(((own - 2 * self.target[:, columns]) * weight).sum())
        return max(0.0, 1 + moved / self.energy)


def outputs_of(weight: Tensor, moments: Tensor) -> Outputs:
    """The outputs of a dense weight [out, in] on inputs with these second moments [in, in]."""
    moments = moments.double()
    dense = weight.to(moments)
    target = dense @ moments
    return Outputs(moments, target, float((dense * target).sum()))


def expectation(dense: Tensor, copies: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> Tensor:
    """The mean of pruned copies (columns, weight [out, columns]), weighted by `shares`, in the shape of `dense`.

    The shares are normalised; where all are 0 the dense weight is returned.
    """
    total = sum(shares)
    if total <= 0:
        return dense
    mean = torch.zeros_like(dense, dtype=torch.float64)
    for (columns, weight), share in zip(copies, shares, strict=True):
        mean[:, columns] += share / total * weight.double()
    return mean.to(dense.dtype)


def _sweep(
    problem: Problem, units: Tensor, stops: Sequence[int], first_order: FirstOrder
) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of units removed and the kept ones, ascending, at each of `stops`.

    The inverse of H on the kept columns follows from the former one by a Schur complement, and the weights by the block
    step of optimal brain surgery, so both stay those of the present support.
    """
    width = units.shape[1]
    kept = torch.arange(len(units), device=units.device)
    columns = units.flatten()  # in the order of which the matrices below are; those of removed units are 0 in them
    places = torch.arange(len(columns), device=units.device).view(-1, width)  # of the kept units
    inverse = _inverse(problem.moments[columns][:, columns])
    weight, target = problem.dense[:, columns], problem.target[:, columns]
    for stop in stops:
        score = prices(weight, inverse, places)
        if first_order != "none":
            term = first_order_terms(weight, target, places)
            score = score + (term if first_order == "signed" else term.abs())
        gone = torch.zeros(len(kept), dtype=torch.bool, device=units.device)
        gone[score.sort(stable=True).indices[: len(kept) - (len(units) - stop)]] = True
        cut = places[gone].flatten()
        with one_thread():
            change = torch.linalg.solve(inverse[cut][:, cut], inverse[cut])
        weight.addmm_(weight[:, cut], change, alpha=-1)
        inverse.addmm_(inverse[:, cut], change, alpha=-1)
        weight[:, cut], inverse[:, cut], inverse[cut] = 0, 0, 0
        kept, places = kept[~gone], places[~gone]
        smallest = inverse.diagonal()[places].min() if len(kept) else inverse.new_ones(())
        sound = bool(smallest > 0 and smallest.isfinite())
        if places.numel() < SPARSE * len(columns) or not sound:
            rest = places.flatten()
            columns, weight, target = columns[rest], weight[:, rest], target[:, rest]
            inverse = inverse[rest][:, rest] if sound else _inverse(problem.moments[columns][:, columns])
            weight = weight if sound else target @ inverse
            places = torch.arange(len(columns), device=units.device).view(-1, width)
        yield stop, kept


def _inverse(moments: Tensor) -> Tensor:
    factor = _cholesky(moments)
    with one_thread():
        return torch.cholesky_inverse(factor)


def _cholesky(moments: Tensor) -> Tensor:
    """The lower factor; where rounding leaves the matrix indefinite, of one with as little damping as works."""
    with one_thread():
        extra = 1e-12 * float(moments.diagonal().mean()) or 1.0
        factor, failed = torch.linalg.cholesky_ex(moments)
        while failed:
            damped = moments.clone()
            damped.diagonal().add_(extra)
            factor, failed = torch.linalg.cholesky_ex(damped)
            extra *= HARDER
        return factor
