"""One budget over many curves: the worked example, and the optimum by brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity.allocation import Curve, curve_of, divide


def test_the_hull_leaves_out_points_above_it():
    curve = Curve([0, 1, 2, 3, 4, 6], [10, 9, 5, 5, 4, 3.9])
    assert curve.hull() == [0, 2, 4, 5]  # 1 is above the line from 0 to 2; 3 saves nothing over 2


def test_a_hull_of_one_level():
    assert Curve([5], [1]).hull() == [0]
    assert Curve([0, 1, 2], [1, 1, 3]).hull() == [0]


def test_the_next_unit_goes_where_it_saves_most():
    curves = {"steep": Curve([0, 2, 4], [10, 2, 1]), "flat": Curve([0, 4], [6, 0])}
    assert divide(curves, 0) == {"steep": 0, "flat": 0}
    assert divide(curves, 2) == {"steep": 2, "flat": 0}  # 4 a unit against 1.5
    assert divide(curves, 5) == {"steep": 2, "flat": 3}  # then 1.5 against 0.5
    assert divide(curves, 7) == {"steep": 3, "flat": 4}
    assert divide(curves, 100) == {"steep": 4, "flat": 4}


def test_of_equal_steps_the_earlier_is_taken():
    curves = {"b": Curve([0, 1], [1, 0]), "a": Curve([0, 1], [1, 0])}
    assert divide(curves, 1) == {"b": 1, "a": 0}


def test_a_budget_below_the_first_levels_is_refused():
    with pytest.raises(ValueError, match="first levels cost 3"):
        divide({"a": Curve([1, 2], [1, 0]), "b": Curve([2, 3], [1, 0])}, 2.5)


@pytest.mark.parametrize(("cost", "loss"), [([1, 1], [2, 1]), ([2, 1], [2, 1]), ([], []), ([1], [1, 2])])
def test_invalid_curves_are_refused(cost, loss):
    with pytest.raises(ValueError, match="curve"):
        Curve(cost, loss)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(0, 24))
def test_it_is_optimal_on_convex_curves(seed, budget):
    """Any number of weights can be kept, largest first: the optimum is one threshold over all."""
    random = torch.Generator().manual_seed(seed)
    losses = {name: torch.rand(8, generator=random, dtype=torch.float64) for name in "abc"}
    curves = {name: curve_of(values, levels=8) for name, values in losses.items()}
    spent = divide(curves, budget)
    assert sum(spent.values()) == budget
    lost = lambda counts: sum(
        float(losses[name].sort().values[: 8 - int(count)].sum()) for name, count in zip("abc", counts, strict=True)
    )
    tried = (counts for counts in itertools.product(range(9), repeat=3) if sum(counts) == budget)
    assert lost(spent.values()) == pytest.approx(min(map(lost, tried)))


def test_the_curve_of_losses():
    curve = curve_of(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), first=10)
    assert list(curve.cost) == [10, 11, 12, 13, 14]
    assert list(curve.loss) == [10, 6, 3, 1, 0]
    assert list(curve_of(torch.ones(1000), levels=10).cost) == list(range(0, 1001, 100))
    assert list(curve_of(torch.empty(0), first=3).cost) == [3]
