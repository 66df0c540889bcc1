"""Second-order pruning of one matrix: the damped inverse and the column sweep (SparseGPT, arXiv 2301.00774).

Everything runs in float64. The sweep works on the transposed matrix [in, out], so that one column of the
weight is one contiguous row here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from budwood.sparsity.patterns import NM, Pattern
from budwood.sparsity.selection import two_of_four

STEP = 4  # columns swept one by one before their errors are propagated in one matrix product


@dataclass(frozen=True)
class Factor:
    """U with H⁻¹ = Uᵀ U, for H damped. For the columns from i on, U[i, i] is the root of the first diagonal
    entry of the inverse of H restricted to them, and U[i, i] U[i, i:] is its first row.

    `damp` is the damping that worked, None where only the diagonal of H could be used.
    """

    upper: Tensor  # [in, in] float64, upper triangular
    dead: Tensor  # [in] bool, features that were 0 in every token
    damp: float | None


def factorise(hessian: Tensor, damp: float) -> Factor:
    """Factor the inverse of `hessian` [in, in] with damp * mean(diagonal) added to its diagonal.

    Only the upper triangle is read. Dead features count 1 on the diagonal. Where the factorisation fails the
    damping goes up to 0.1 and 1 of the mean, then interactions are ignored. The matrix must be finite. The result
    does not depend on the number of threads.
    """
    with one_thread():
        return _factorise(hessian, damp)


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's factorisation sums in an order that depends on the number of threads, which changes small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factorise(hessian: Tensor, damp: float) -> Factor:
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    diagonal = torch.where(dead, 1.0, diagonal)
    # With V upper triangular and H = V Vᵀ, U is V⁻¹. V is the ordinary factor of H with both axes reversed.
    reverse = hessian.double().flip(0, 1)
    for attempt in (damp, *(more for more in (0.1, 1.0) if more > damp)):
        reverse.diagonal().copy_((diagonal + attempt * diagonal.mean()).flip(0))
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed and lower.diagonal().isfinite().all():
            return Factor(_invert_lower(lower).flip(0, 1), dead, attempt)
    return Factor(torch.diag(diagonal.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()), dead, None)


def _invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix by halves: half the work of a solve for every column."""
    size = lower.shape[0]
    if size <= 64:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = _invert_lower(lower[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]))
    return inverse


@dataclass(frozen=True)
class Swept:
    """The result Ŵ = W - E U of a sweep, all [out, in]; weights and errors float64."""

    weight: Tensor
    keep: Tensor
    errors: Tensor

    @property
    def loss(self) -> float:
        """½ Σ e², equal to ½ trace((Ŵ-W) H (Ŵ-W)ᵀ) for the damped H."""
        return 0.5 * float(self.errors.square().sum())


def sparsegpt(weight: Tensor, factor: Factor, choice: Pattern | Tensor, block: int = 128) -> Swept:
    """Prune `weight` [out, in] from left to right; columns further right compensate the error.

    `choice` is a pattern or a given mask, bool [out, in]. N:M is decided group by group from the
    updated weights; any other pattern is applied to `block` columns at a time, all rows together.
    """
    upper, diagonal = factor.upper, factor.upper.diagonal()
    squares = diagonal.square()[:, None]
    columns = weight.T.to(upper, copy=True, memory_format=torch.contiguous_format)  # [in, out]
    columns[factor.dead] = 0
    errors = torch.zeros_like(columns)
    column, error = columns.unbind(0), errors.unbind(0)
    if isinstance(choice, Tensor):
        keep, span = choice.T.contiguous(), STEP
    else:
        keep, span = (
            torch.ones_like(columns, dtype=torch.bool),
            choice.group if isinstance(choice, NM) else block,
        )

    def decide(first: int, last: int) -> None:
        if not isinstance(choice, Tensor):
            saliency = columns[first:last].square() / squares[first:last]
            keep[first:last] = two_of_four(saliency) if choice == NM(2, 4) else choice.keep(saliency.T).T
        _in_order(first, last, STEP, sweep, propagate)

    def sweep(first: int, last: int) -> None:
        loss_of = (~keep[first:last] / diagonal[first:last, None]).unbind(0)  # each [out]
        for offset, i in enumerate(range(first, last)):
            torch.mul(column[i], loss_of[offset], out=error[i])
            if i + 1 < last:
                columns[i + 1 : last].addr_(upper[i, i + 1 : last], error[i], alpha=-1)

    def propagate(first: int, middle: int, last: int) -> None:
        columns[middle:last].addmm_(upper[first:middle, middle:last].T, errors[first:middle], alpha=-1)

    _in_order(0, len(columns), span, decide, propagate)
    columns.masked_fill_(~keep, 0)
    return Swept(columns.T, keep.T, errors.T)


def _in_order(
    first: int,
    last: int,
    unit: int,
    visit: Callable[[int, int], None],
    propagate: Callable[[int, int, int], None],
) -> None:
    """Visit spans of `unit` columns left to right, each after the errors of all earlier columns are propagated.

    Halving propagates errors in large products, so no block size has to be tuned for speed.
    """
    if last - first <= unit:
        visit(first, last)
        return
    middle = first + (-(-(last - first) // unit) // 2) * unit
    _in_order(first, middle, unit, visit, propagate)
    propagate(first, middle, last)
    _in_order(middle, last, unit, visit, propagate)
