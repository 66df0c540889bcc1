"""Sparse, dense, sparse on one matrix: the worked examples, the closed form, and what holds for any matrix."""

from itertools import pairwise

import pytest
import torch

from budwood.sparsity.patterns import NM, Share
from budwood.sparsity.scores import wanda
from budwood.sparsity.sds import (
    EXACT,
    GENTLE,
    MARGIN,
    REGULARISED,
    Moments,
    Regrowth,
    adjust,
    adjust_freely,
    largest_eigenvalue,
    regrow,
)

TWO_FOUR = NM(2, 4)


def diagonal():
    dense = torch.tensor([[2.0, 1, -1, 0.5]])
    return torch.tensor([[2.0, 0, -1, 0]]), dense, Moments.of(torch.tensor([4.0, 1, 2, 1]).diag())


def correlated():
    sums = torch.tensor([[8.0, 6, 2, 4], [6, 8, 2, 4], [2, 2, 7, 4], [4, 4, 4, 7]])
    dense = torch.tensor([[1, 2, -1, 1.5], [0.5, -1, 2, 1]])
    return torch.tensor([[0, 2, 0, 1.5], [0, -1, 2, 0]]), dense, sums


def problem(seed=0, rows=12, columns=16, tokens=200, spread=1.0):
    """Sparse (Wanda 2:4) and dense weights, inputs [tokens, in]."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    inputs = draw(tokens, columns) @ (torch.eye(columns) + spread * draw(columns, columns) / columns**0.5)
    dense = draw(rows, columns)
    norms = inputs.square().sum(0).sqrt()
    return torch.where(TWO_FOUR.keep(wanda(dense, norms)), dense, 0), dense, inputs


def gram(inputs):
    return inputs.T @ inputs


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Regrowth(1), [2, 0.25, -1, 0.125]),
        (Regrowth(2), [2, 0.4375, -1, 0.21875]),
        (GENTLE, [2, 0.996829, -1, 0.498414]),
        (Regrowth(200, rate=0.1), [2, 0.993677, -1, 0.496839]),
        (Regrowth(1, l1=0.1), [1.94375, 0.19375, -0.94375, 0.06875]),
        (Regrowth(1, l1=0.1, l2=0.1), [1.851190, 0.184524, -0.898810, 0.065476]),
        (Regrowth(500, l1=0.1, l2=0.1), [1.851190, 0.645833, -0.806818, 0.229167]),
        (Regrowth(500, l1=0.1, l2=0.1, accelerated=True), [1.851190, 0.645833, -0.806818, 0.229167]),
    ],
)
def test_the_diagonal_example(how, expected):
    sparse, dense, moments = diagonal()
    assert moments.largest == pytest.approx(2)
    close(regrow(sparse, dense, moments, how)[0], torch.tensor(expected))


@pytest.mark.parametrize(
    ("steps", "expected", "error"),
    [
        (0, [[0, 2, 0, 1.5], [0, -1, 2, 0]], 24.0),
        (1, [[0.3184, 2.2123, -0.2654, 1.5], [0.4246, -0.6285, 2.2654, 0.4776]], 5.923886),
        (5, [[0.6971, 2.2677, -0.8056, 1.4001], [0.4279, -0.7868, 2.1792, 0.7132]], 0.901578),
        (
            20,
            [[0.950957, 2.056973, -0.98791, 1.482437], [0.481449, -0.965543, 2.023533, 0.965288]],
            0.01987,
        ),
        (80, [[1, 2, -1, 1.5], [0.5, -1, 2, 1]], 0),
    ],
)
def test_the_correlated_example(steps, expected, error):
    sparse, dense, sums = correlated()
    moments = Moments.of(sums)
    assert moments.largest == pytest.approx(2.512363, rel=1e-5)
    found = regrow(sparse, dense, moments, Regrowth(steps))
    close(found, torch.tensor(expected), 1e-4)
    lost = found - dense
    assert float(((lost @ sums) * lost).sum()) == pytest.approx(error, rel=1e-4, abs=1e-5)
    assert float(7.5 * moments.error(found, dense).sum()) == pytest.approx(error, rel=1e-4, abs=1e-5)


def test_the_masks_and_the_adjustment_of_the_example():
    sparse, dense, sums = correlated()
    moments, norms = Moments.of(sums), sums.diagonal().sqrt()
    assert torch.equal(TWO_FOUR.keep(wanda(dense, norms)), sparse != 0)
    grown = regrow(sparse, dense, moments, GENTLE)
    keep = TWO_FOUR.keep(wanda(grown, norms))
    assert torch.equal(keep, sparse != 0)
    second = torch.where(keep, grown, 0)
    assert 7.5 * float(moments.error(second, dense).sum()) == pytest.approx(22.863228, rel=1e-5)
    found = adjust(second, keep, dense, moments, 300)
    close(found, torch.tensor([[0, 2.7, 0, 1.1], [0, -0.25, 2.5, 0]]), 1e-4)
    assert 7.5 * float(moments.error(found, dense).sum()) == pytest.approx(13.45, rel=1e-5)


def test_the_free_mask_of_the_example():
    sparse, dense, sums = correlated()
    moments, weight = Moments.of(sums), sparse
    for expected in (16.79903, 14.82399, 14.16216, 13.87553, 13.72148):
        weight = adjust_freely(weight, TWO_FOUR.keep, dense, moments, 1)
        assert 7.5 * float(moments.error(weight, dense).sum()) == pytest.approx(expected, rel=1e-5)
    limit = adjust_freely(sparse, TWO_FOUR.keep, dense, moments, 300)
    assert 7.5 * float(moments.error(limit, dense).sum()) == pytest.approx(13.45, rel=1e-5)
    assert torch.equal(limit != 0, sparse != 0)


@pytest.mark.parametrize("steps", [1, 7, 20, 200])
def test_steps_are_the_closed_form(steps):
    """V = W + (S - W) Q diag((1 - h / L)^T) Qᵀ"""
    sparse, dense, inputs = problem()
    moments = Moments.of(gram(inputs))
    values, vectors = torch.linalg.eigh(moments.matrix.double())
    factor = (1 - values / moments.largest).clamp(min=0) ** steps
    expected = dense + (sparse - dense).double() @ vectors @ factor.diag() @ vectors.T
    close(regrow(sparse, dense, moments, Regrowth(steps)).double(), expected)


def test_moments_stand_for_the_tokens():
    """The same gradient descent over the list of tokens."""
    sparse, dense, inputs = problem(1)
    moments = Moments.of(gram(inputs))
    mean, weight = inputs.square().sum(0).mean(), sparse.clone()
    for _ in range(20):
        weight -= ((weight - dense) @ inputs.T) @ inputs / (mean * moments.largest)
    close(regrow(sparse, dense, moments, GENTLE), weight, 1e-4)


def test_errors_fall_with_every_step_of_the_regrowth():
    sparse, dense, inputs = problem(2, spread=0.3)
    moments = Moments.of(gram(inputs))
    errors = [float(moments.error(regrow(sparse, dense, moments, Regrowth(t)), dense).sum()) for t in range(12)]
    assert errors[0] == pytest.approx(float(moments.error(sparse, dense).sum()))
    assert all(later < earlier for earlier, later in pairwise(errors))
    close(regrow(sparse, dense, moments, Regrowth(5000)), dense, 1e-2)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 150])
def test_the_adjustment_raises_no_error_of_a_row(steps, accelerated):
    sparse, dense, inputs = problem(3)
    moments = Moments.of(gram(inputs))
    keep = sparse != 0
    found = adjust(sparse, keep, dense, moments, steps, accelerated)
    assert (moments.error(found, dense) <= moments.error(sparse, dense)).all()
    assert not found[~keep].any()
    assert not found[~keep].signbit().any()
    assert steps or torch.equal(found, sparse)


def test_the_adjustment_ends_at_least_squares():
    sparse, dense, inputs = problem(4, spread=0.3)
    moments, keep = Moments.of(gram(inputs)), sparse != 0
    exact = torch.zeros_like(dense)
    for row, kept in enumerate(keep):
        wanted = (dense[row] @ moments.matrix)[kept]
        exact[row, kept] = torch.linalg.solve(moments.matrix[kept][:, kept], wanted)
    best, found = (moments.error(each, dense).sum() for each in (exact, adjust(sparse, keep, dense, moments, 2000)))
    assert float(found) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Share(0.5), Share(0.7, "matrix")])
def test_a_free_mask_keeps_to_its_pattern_and_never_raises_the_error(pattern):
    _, dense, inputs = problem(5)
    moments = Moments.of(gram(inputs))
    weight = torch.where(pattern.keep(wanda(dense, inputs.norm(dim=0))), dense, 0)
    before, kept = float(moments.error(weight, dense).sum()), int((weight != 0).sum())
    for _ in range(8):
        weight = adjust_freely(weight, pattern.keep, dense, moments, 1)
        error = float(moments.error(weight, dense).sum())
        assert error <= before * (1 + 1e-6)
        assert int((weight != 0).sum()) == kept
        assert torch.equal(pattern.keep(weight.abs()), weight != 0)
        before = error


@pytest.mark.parametrize("how", [GENTLE, REGULARISED])
def test_units_of_inputs_and_weights_do_not_matter(how):
    sparse, dense, inputs = problem(6)
    one, other = Moments.of(gram(inputs)), Moments.of(1000 * gram(inputs))
    grown = regrow(sparse, dense, one, how)
    close(regrow(sparse, dense, other, how), grown)
    close(regrow(0.01 * sparse, 0.01 * dense, one, how), 0.01 * grown)
    found = adjust(sparse, sparse != 0, dense, one, 50)
    close(adjust(sparse, sparse != 0, dense, other, 50), found)
    close(adjust(0.01 * sparse, sparse != 0, 0.01 * dense, one, 50), 0.01 * found)


@pytest.mark.parametrize("how", [GENTLE, REGULARISED])
def test_permuted_rows_and_columns_give_permuted_results(how):
    sparse, dense, inputs = problem(7)
    random = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(len(dense), generator=random), torch.randperm(dense.shape[1], generator=random)
    moments, permuted = Moments.of(gram(inputs)), Moments.of(gram(inputs[:, columns]))
    turned = lambda weight: weight[rows][:, columns]
    close(regrow(turned(sparse), turned(dense), permuted, how), turned(regrow(sparse, dense, moments, how)), 1e-4)
    found = adjust(sparse, sparse != 0, dense, moments, 40)
    close(adjust(turned(sparse), turned(sparse != 0), turned(dense), permuted, 40), turned(found), 1e-4)


@pytest.mark.parametrize("how", [GENTLE, REGULARISED])
def test_inputs_that_are_always_zero_keep_their_weights(how):
    sparse, dense, inputs = problem(8)
    inputs[:, 3] = 0
    moments = Moments.of(gram(inputs))
    assert torch.equal(regrow(sparse, dense, moments, how)[:, 3], sparse[:, 3])
    assert torch.equal(adjust(sparse, sparse != 0, dense, moments, 50)[:, 3], sparse[:, 3])
    silent = Moments.of(torch.zeros(16, 16))
    assert torch.equal(regrow(sparse, dense, silent, how), sparse)
    assert torch.equal(adjust(sparse, sparse != 0, dense, silent, 9), sparse)
    assert torch.equal(adjust_freely(sparse, TWO_FOUR.keep, dense, silent, 9), sparse)


def test_fewer_tokens_than_inputs_are_enough():
    sparse, dense, inputs = problem(9, tokens=5)
    moments = Moments.of(gram(inputs))
    grown = regrow(sparse, dense, moments, GENTLE)
    assert moments.error(grown, dense).sum() < moments.error(sparse, dense).sum()
    assert torch.isfinite(adjust(sparse, sparse != 0, dense, moments, 150)).all()


def test_penalties_pull_towards_zero_and_leave_no_negative_zeros():
    sparse, dense, inputs = problem(10)
    moments = Moments.of(gram(inputs))
    sizes = [float(regrow(sparse, dense, moments, Regrowth(40, l1=l1)).abs().mean()) for l1 in (0, 0.1, 1.0)]
    assert sizes[0] > sizes[1] > sizes[2]
    found = regrow(sparse, dense, moments, Regrowth(40, l1=1.0))
    assert (found == 0).any()
    assert not found[found == 0].signbit().any()


def test_the_largest_eigenvalue_of_a_wide_matrix_is_close_and_safe():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, EXACT + 88, generator=random) * torch.rand(EXACT + 88, generator=random)
    inputs[:, :5] *= 3
    matrix = Moments.of(gram(inputs)).matrix
    exact = float(torch.linalg.eigvalsh(matrix.double())[-1])
    assert exact / MARGIN < largest_eigenvalue(matrix) < 1.001 * MARGIN * exact
    assert largest_eigenvalue(torch.zeros(EXACT + 1, EXACT + 1)) == 0
