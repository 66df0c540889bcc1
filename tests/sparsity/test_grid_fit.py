"""The fit to a grid of 4-bit codes: against brute force, and properties for any second moments."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity.codes import HIGHEST, LOWEST, dequantise4, quantise4
from budwood.sparsity.grid_fit import Objective, descended, fit_to_grid, fitted_scales, passed_on, spread
from budwood.sparsity.refit import refit
from budwood.sparsity.second_order import factorise

GROUP = 8


def problem(seed, out=6, width=20, tokens=120, density=0.6):
    """Dense weights, a mask, the weights fitted under it [out, in], and second moments [in, in]."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=random)
    inputs = inputs @ (torch.randn(width, width, generator=random) / 2 + torch.eye(width))
    dense = torch.randn(out, width, generator=random)
    keep = torch.rand(out, width, generator=random) < density
    moments = inputs.T @ inputs
    start = refit(dense * keep, keep, dense, moments, iterations=30).weight
    return dense, keep, start, moments


def errors(weight, dense, moments):
    difference = (weight - dense).double()
    return ((difference @ moments.double()) * difference).sum(1)


def plain(start, keep, dtype=None):
    return dequantise4(*quantise4(start, keep, GROUP, dtype), torch.float32, GROUP)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 80),
    density=st.floats(0, 1),
    pull=st.sampled_from([0.0, 0.01, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_on_the_grid_under_the_mask_and_not_above_plain_rounding(seed, tokens, density, pull, dtype):
    """With few tokens the moments do not have full rank; some features and a row are dead."""
    dense, keep, start, moments = problem(seed, tokens=tokens, density=density)
    moments[:3], moments[:, :3] = 0, 0
    keep[2] = False
    found = fit_to_grid(start, keep, dense, moments, pull=pull, dtype=dtype, group=GROUP)
    assert torch.isfinite(found).all()
    assert not found[~keep].any()
    assert not found.view(torch.int32)[found == 0].any()  # a negative zero would take a place
    assert torch.equal(found.to(dtype).float(), found)  # exact in the dtype that it is stored in
    assert torch.equal(plain(found.to(dtype), found != 0), found)  # storing it changes nothing
    ridge = pull * moments.diagonal().mean() * torch.eye(len(moments))
    fitted, nearest = (
        errors(w, dense, moments) + errors(w, start * keep, ridge) for w in (found, plain(start, keep, dtype))
    )
    assert (fitted <= nearest * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("seed", range(4))
def test_correlated_inputs_lose_less_than_by_plain_rounding(seed):
    dense, keep, start, moments = problem(seed, out=32)
    found = fit_to_grid(start, keep, dense, moments, pull=0.01, group=GROUP)
    fitted, rounded, floor = (float(errors(w, dense, moments).sum()) for w in (found, plain(start, keep), start))
    assert floor < fitted < rounded
    assert fitted - floor < 0.9 * (rounded - floor)


def test_independent_inputs_give_the_nearest_codes():
    """With H = I each code alone decides; only scales may differ from those of plain rounding, for a lower error."""
    dense, keep, _, _ = problem(1)
    start = dense * keep
    found, nearest = fit_to_grid(start, keep, dense, torch.eye(dense.shape[1]), group=GROUP), plain(start, keep)
    assert (errors(found, start, torch.eye(20)) <= errors(nearest, start, torch.eye(20)) + 1e-6).all()
    codes, scales = quantise4(found, keep, GROUP)
    steps = spread(scales, GROUP, dense.shape[1])
    assert torch.equal(codes * steps, found)
    assert torch.equal(torch.where(keep, (start / steps).round().clamp(LOWEST, HIGHEST), 0), codes.float())


def test_a_row_on_the_grid_stays():
    """The start has no error beyond that of the mask, so nothing can be gained."""
    dense, keep, _, moments = problem(2)
    start = plain(dense, keep)
    assert torch.equal(fit_to_grid(start, keep, start, moments, group=GROUP), start)


def test_by_brute_force():
    """Three kept weights of a row, all codes tried for the scale of plain rounding: descent ends in the best."""
    moments = torch.tensor([[4.0, 1.0, 0.5, 0.2], [1.0, 3.0, 0.8, 0.1], [0.5, 0.8, 2.0, 0.3], [0.2, 0.1, 0.3, 1.0]])
    dense = torch.tensor([[0.83, -0.37, 0.29, 0.55]])
    keep = torch.tensor([[True, True, True, False]])
    start = refit(dense * keep, keep, dense, moments, damp=0, iterations=30, tolerance=1e-6).weight
    scales = quantise4(start, keep, 4)[1]
    objective = Objective.of(start, dense, moments, 0.0)
    weight = passed_on(start, keep, scales, factorise(moments, 0.0), 4)
    weight = descended(weight, keep, scales, objective, 4, 4)
    tried = torch.tensor([[*codes, 0] for codes in product(range(LOWEST, HIGHEST + 1), repeat=3)]).float()
    best = float(errors(tried * scales[0, 0], dense, moments).min())
    assert float(errors(weight, dense, moments)) == pytest.approx(best, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_no_pass_of_the_descent_raises_the_error(seed):
    dense, keep, start, moments = problem(seed)
    objective = Objective.of(start, dense, moments, 0.05)
    codes, scales = quantise4(start, keep, GROUP)
    weight = dequantise4(codes, scales, torch.float32, GROUP)
    for _ in range(3):
        after = descended(weight, keep, scales, objective, 1, GROUP)
        assert (objective.change(after, weight) <= 1e-4).all()
        weight = after


def test_scales_solve_the_small_systems():
    dense, keep, start, moments = problem(5)
    objective = Objective.of(start, dense, moments, 0.05)
    codes, scales = quantise4(start, keep, GROUP)
    found = fitted_scales(codes.float(), scales, objective, torch.float32, GROUP)
    exact = torch.empty_like(scales)
    for row in range(len(dense)):
        blocks = torch.zeros(scales.shape[1], dense.shape[1])
        for column in range(dense.shape[1]):
            blocks[column // GROUP, column] = codes[row, column]
        exact[row] = torch.linalg.solve(blocks @ objective.matrix @ blocks.T, blocks @ objective.aim[row])
    ratio = exact / scales
    exact = torch.where((ratio > 0.5) & (ratio < 2), exact, scales)
    assert torch.allclose(found, exact, rtol=2**-5)  # a scale has 5 bits
    weight = codes * spread(found, GROUP, dense.shape[1])
    before = codes * spread(scales, GROUP, dense.shape[1])
    assert float(objective.change(weight, before).sum()) < 0
