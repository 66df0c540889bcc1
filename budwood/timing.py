"""Timings on a machine whose speed drifts: variants are interleaved, and ratios are taken within each round."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def interleaved(variants: Mapping[Name, Callable[[int], object]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of each round, by variant. Every variant runs once per round; the first round is a warm-up.

    The order changes from round to round: each variant leaves caches and memory in a state that affects the next one.
    """
    times: dict[Name, list[float]] = {name: [] for name in variants}
    names, shuffled = list(variants), random.Random(0)
    for turn in range(rounds + 1):
        shuffled.shuffle(names)
        for name in names:
            run = variants[name]
            start = time.perf_counter()
            run(turn)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median of the ratios within each round, so that what slows a whole round cancels."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, in seconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[round(0.1 * last)],
        "high": ordered[round(0.9 * last)],
    }
