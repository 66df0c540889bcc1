"""The fastest accurate runner wins; the others are dropped with a reason."""

import pytest
import torch
from torch.nn import functional as F

from budwood.kernels.autotune import autotune, wall_clock

X, W = torch.randn(4, 32), torch.randn(16, 32)
RIGHT = F.linear(X, W)


def clock_of(seconds):
    """A clock that runs the runner and returns the next of its times."""
    return lambda runner: (runner(), next(seconds[runner]))[1]


def test_the_median_decides_and_runners_take_turns():
    order = []
    first = lambda: order.append("first") or RIGHT
    second = lambda: order.append("second") or RIGHT
    clock = clock_of({first: iter([3.0, 3.0, 3.0]), second: iter([9.0, 2.0, 2.0])})
    result = autotune({"first": first, "second": second}, RIGHT, clock, rounds=3)
    assert result.winner == "second"
    assert result.seconds == {"first": 3.0, "second": 2.0}
    assert order == ["first", "second"] * 4  # once to be checked, three times to be timed


def test_real_products_on_the_cpu():
    slow = lambda: torch.stack([W.double() @ x.double() for x in X.repeat(50, 1)])[:4].float()
    result = autotune({"slow": slow, "plain": lambda: X @ W.T}, RIGHT, wall_clock)
    assert result.dropped == {}
    assert set(result.seconds) >= {"slow", "plain"}
    assert result.seconds[result.winner] == min(result.seconds[name] for name in ("slow", "plain"))


def test_a_runner_that_raises_or_is_inaccurate_is_dropped_with_the_reason():
    def broken():
        raise RuntimeError("no compiler\nand a long traceback")

    runners = {
        "broken": broken,
        "wrong": lambda: RIGHT + 1,
        "nan": lambda: RIGHT * float("nan"),
        "short": lambda: RIGHT[:2],
        "right": lambda: RIGHT,
    }
    result = autotune(runners, RIGHT, wall_clock)
    assert result.winner == "right"
    assert result.dropped["broken"] == "no compiler"
    assert set(result.dropped) == {"broken", "wrong", "nan", "short"}
    with pytest.raises(ValueError, match="no compiler"):
        autotune({"broken": broken}, RIGHT, wall_clock)


def test_a_baseline_is_timed_and_never_wins():
    packed, dense = (lambda: RIGHT), (lambda: RIGHT)
    clock = clock_of({packed: iter([5.0] * 7), dense: iter([1.0] * 7)})
    result = autotune({"packed": packed}, RIGHT, clock, baselines={"dense": dense})
    assert result.winner == "packed"
    assert result.seconds["dense"] == 1.0
