"""A timing ends as soon as it is clear which implementation is faster."""

import pytest

from budwood.stream.trial import HOPELESS, ROUNDS, SECONDS, speed_ratio


class Clock:
    """A clock that only the timed runs advance; counts the runs."""

    def __init__(self):
        self.now, self.runs = 0.0, {}

    def __call__(self):
        return self.now

    def timed(self, name, seconds):
        def run():
            self.runs[name] = self.runs.get(name, 0) + 1
            self.now += seconds

        return run

    def size(self, name, first, second):
        return lambda: (self.timed(f"{name} first", first), self.timed(f"{name} second", second))


@pytest.mark.parametrize("factor", [HOPELESS + 1, 100, 10_000])
def test_a_hopeless_run_is_timed_twice(factor):
    clock = Clock()
    sizes = [clock.size("small", 1e-3, factor * 1e-3), clock.size("large", 1.0, factor)]
    assert speed_ratio(sizes, clock=clock) == pytest.approx(1 / factor)
    assert clock.runs["small second"] <= 2
    assert "large second" not in clock.runs


@pytest.mark.parametrize("gain", [0.5, 1, 1.3, 20])
def test_the_largest_size_decides_between_close_times(gain):
    clock = Clock()
    sizes = [clock.size("small", 1e-4, 3e-4), clock.size("large", 1e-2, 1e-2 / gain)]
    assert speed_ratio(sizes, clock=clock) == pytest.approx(gain)
    assert 1 < clock.runs["large first"] == clock.runs["large second"] <= ROUNDS


def test_overhead_at_a_small_size_is_not_hopeless():
    clock = Clock()
    sizes = [clock.size("small", 1e-6, 1e-4), clock.size("large", 1e-2, 5e-3)]
    assert speed_ratio(sizes, clock=clock) == pytest.approx(2)


def test_on_a_slow_machine_one_round_decides():
    clock = Clock()
    assert speed_ratio([clock.size("small", SECONDS, 2 * SECONDS), clock.size("large", 1, 1)], clock=clock) == 0.5
    assert clock.runs == {"small first": 1, "small second": 1}


def test_a_single_outlier_does_not_decide():
    clock, times = Clock(), iter([1e-2, 5e-3, 1e-2, 5.0] + [1e-2, 5e-3] * 10)

    def run():
        clock.now += next(times)

    assert speed_ratio([lambda: (run, run)], clock=clock, seconds=60) == pytest.approx(2)
