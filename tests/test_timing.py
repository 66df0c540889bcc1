"""Interleaved timings, and ratios within each round."""

from budwood.timing import interleaved, ratio, spread


def test_a_slowdown_of_a_whole_round_cancels():
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_every_variant_runs_once_per_round_in_changing_order_after_a_warm_up():
    calls = []
    variants = {name: lambda turn, name=name: calls.append((turn, name)) for name in "abc"}
    times = interleaved(variants, 9)
    rounds = [calls[i : i + 3] for i in range(0, 30, 3)]
    assert [{turn for turn, _ in each} for each in rounds] == [{turn} for turn in range(10)]
    assert all(sorted(name for _, name in each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(name for _, name in each) for each in rounds}) > 3
    assert {name: len(found) for name, found in times.items()} == {"a": 9, "b": 9, "c": 9}


def test_the_spread_is_median_and_tenth_and_ninetieth_percentile():
    assert spread([float(i) for i in range(11)]) == {"median": 5.0, "low": 1.0, "high": 9.0}
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
