"""The mask by ADMM: allowed, better than by score, and near the optimum where that is known."""

import pytest
import torch

from budwood.sparsity.admm import System, admm
from budwood.sparsity.patterns import NM, Share, Top
from budwood.sparsity.recovery import Recovered
from budwood.sparsity.refit import refit

PATTERNS = [NM(2, 4), NM(1, 4), Share(0.5), Share(0.5, "matrix"), Recovered(NM(2, 4), Top(0.05, "matrix"))]


def problem(seed, out=12, width=32, tokens=300):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    inputs = draw(tokens, width) @ (draw(width, width) / width**0.5 + 0.5 * torch.eye(width))
    return draw(out, width), inputs.T @ inputs


def left(weight, moments, keep):
    """The squared output error after the best fit on a mask."""
    fitted = refit(weight, keep, weight, moments.double(), damp=0, iterations=200, tolerance=1e-8).weight
    return float((((fitted - weight) @ moments.double()) * (fitted - weight)).sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_keeps_as_many_weights_as_by_score_with_a_smaller_error(pattern):
    ours = theirs = 0.0
    for seed in range(4):
        weight, moments = problem(seed)
        by_score = pattern.keep(weight.abs() * moments.diagonal().sqrt())
        keep, near = admm(weight, System.of(moments), pattern)
        assert keep.sum() == by_score.sum()
        assert torch.equal(pattern.keep(keep.float()), keep)  # the pattern allows it
        assert not near[~keep].any()
        ours += left(weight, moments, keep)
        theirs += left(weight, moments, by_score)
    assert ours < 0.95 * theirs


def test_it_ends_near_the_best_values():
    """Far nearer than the dense weights on the same mask: a refit from there needs few steps."""
    weight, moments = problem(0)
    keep, near = admm(weight, System.of(moments), NM(2, 4))
    error = lambda found: float(((found - weight).double() @ moments.double() * (found - weight)).sum())
    best = left(weight, moments, keep)
    assert error(near) - best < 0.1 * (error(weight * keep) - best)


def test_independent_inputs_lose_little_over_the_best_mask():
    """Without correlation the largest scores are optimal; the search ends near them."""
    weight, _ = problem(0)
    scale = torch.linspace(0.5, 2, weight.shape[1])
    lost = lambda keep: float((weight * ~keep * scale).square().sum())
    keep, _ = admm(weight, System.of(torch.diag(scale.square())), NM(2, 4))
    assert lost(keep) <= 1.05 * lost(NM(2, 4).keep(weight.abs() * scale))


@pytest.mark.parametrize("dead", [3, 32])
def test_dead_inputs_and_missing_rank(dead):
    weight, moments = problem(1, tokens=5)
    moments[:dead], moments[:, :dead] = 0, 0
    keep, _ = admm(weight, System.of(moments, damp=0), NM(2, 4))
    assert keep.sum() == weight.numel() / 2


def test_it_is_deterministic():
    weight, moments = problem(2)
    for one, other in zip(*(admm(weight, System.of(moments), Share(0.5)) for _ in range(2)), strict=True):
        assert torch.equal(one, other)
