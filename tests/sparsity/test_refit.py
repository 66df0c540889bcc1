"""Refit on a given support: against the direct solution, and properties for any second moments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity.refit import refit


def problem(seed, out=7, width=24, tokens=200, density=0.5):
    """Weights [out, in], a mask, inputs [tokens, in] with correlated features; float64."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    inputs = draw(tokens, width) @ (draw(width, width) / width**0.5 + torch.eye(width))
    return draw(out, width), torch.rand(out, width, generator=random) < density, inputs


def directly(dense, keep, moments, damp, right=None):
    """H_SS⁻¹ (H w₀)_S row by row; `right` [out, in] in place of H W₀."""
    damped = moments + damp * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    right = dense @ damped if right is None else right
    found = torch.zeros_like(dense)
    for row, kept, aim in zip(found, keep, right, strict=True):
        if kept.any():
            row[kept] = torch.linalg.solve(damped[kept][:, kept], aim[kept])
    return found


def error(weight, dense, moments):
    return (((weight - dense) @ moments) * (weight - dense)).sum(dim=1)


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_direct_solution(seed, damp):
    dense, keep, inputs = problem(seed)
    moments = inputs.T @ inputs
    found = refit(dense * keep, keep, dense, moments, damp=damp, iterations=200, tolerance=1e-9)
    assert torch.allclose(found.weight, directly(dense, keep, moments, damp), rtol=1e-5, atol=1e-5)
    change = error(found.weight, dense, moments) - error(dense * keep, dense, moments)
    assert torch.allclose(found.change, change, rtol=1e-6)


def test_equals_the_direct_solution_for_other_inputs():
    dense, keep, inputs = problem(3)
    moments, cross = inputs.T @ inputs, (inputs + 0.3 * inputs.flip(0)).T @ inputs
    found = refit(dense * keep, keep, dense, moments, cross, damp=0.01, iterations=200, tolerance=1e-9)
    ridge = 0.01 * moments.diagonal().mean()
    assert torch.allclose(
        found.weight, directly(dense, keep, moments, 0.01, dense @ cross + ridge * dense), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 60),
    density=st.floats(0, 1),
    steps=st.integers(1, 6),
    damp=st.sampled_from([0.0, 0.01]),
    double=st.booleans(),
)
def test_no_row_gets_worse_and_zeros_stay(seed, tokens, density, steps, damp, double):
    """With fewer tokens than inputs the moments do not have full rank; some features and some rows are dead."""
    dense, keep, inputs = problem(seed, tokens=tokens, density=density)
    inputs[:, :3] = 0
    keep[2] = False
    moments = (inputs.T @ inputs).to(torch.float64 if double else torch.float32)
    found = refit(dense * keep, keep, dense, moments, damp=damp, iterations=steps)
    weight = found.weight.double()
    assert torch.isfinite(weight).all()
    assert torch.equal(weight * ~keep, torch.zeros_like(weight))
    assert (found.change <= 0).all()
    before, after = (error(w, dense, inputs.T @ inputs) for w in (dense * keep, weight))
    assert (after <= before * (1 + (1e-9 if double else 1e-4)) + 1e-9).all()


def test_with_everything_kept_nothing_changes():
    dense, _, inputs = problem(0)
    for moments in (inputs.T @ inputs, (inputs.T @ inputs).float()):
        found = refit(dense, torch.ones_like(dense, dtype=torch.bool), dense, moments)
        assert torch.equal(found.weight, dense.to(moments))
        assert found.steps == 0


def test_dead_inputs_keep_their_weights_and_empty_rows_stay_empty():
    dense, keep, inputs = problem(1)
    inputs[:, 5] = 0
    keep[:, 5], keep[4] = True, False
    found = refit(dense * keep, keep, dense, inputs.T @ inputs)
    assert torch.equal(found.weight[:4, 5], dense[:4, 5])
    assert not found.weight[4].any()
    nothing = torch.zeros_like(inputs.T @ inputs)
    assert torch.equal(refit(dense * keep, keep, dense, nothing).weight, dense * keep)


def test_it_is_deterministic_whatever_the_pieces(monkeypatch):
    dense, keep, inputs = problem(2)
    moments = (inputs.T @ inputs).float()
    whole = refit(dense * keep, keep, dense, moments, iterations=200, tolerance=1e-6)
    again = refit(dense * keep, keep, dense, moments, iterations=200, tolerance=1e-6)
    assert torch.equal(whole.weight, again.weight)
    monkeypatch.setattr("budwood.sparsity.refit.ROWS", 2 * dense.shape[1])
    pieces = refit(dense * keep, keep, dense, moments, iterations=200, tolerance=1e-6)
    assert torch.allclose(whole.weight, pieces.weight, atol=1e-4)


def test_a_start_that_is_already_better_is_kept():
    """From the solution there is no gain, and rounding must not increase the error."""
    dense, keep, inputs = problem(6)
    moments = inputs.T @ inputs
    best = directly(dense, keep, moments, 0.0)
    found = refit(best, keep, dense, moments, damp=1.0, iterations=50)
    assert (error(found.weight, dense, moments) <= error(best, dense, moments) * (1 + 1e-12)).all()
