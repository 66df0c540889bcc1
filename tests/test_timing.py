"""Ratios of what met the same round."""

from budwood.timing import in_turns, ratio, spread


def test_what_slows_a_whole_round_cancels():
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_everything_runs_once_a_round_and_the_first_is_not_counted():
    calls = []
    times = in_turns({"a": lambda turn: calls.append(("a", turn)), "b": lambda turn: calls.append(("b", turn))}, 2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_the_spread_leaves_out_the_outermost():
    assert spread([float(i) for i in range(11)]) == {"median": 5.0, "low": 1.0, "high": 9.0}
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
