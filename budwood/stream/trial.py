"""Timing two ways to compute the same thing, first at small sizes: the trial ends as soon as the result is clear."""

import time
from collections.abc import Callable, Sequence

Run = Callable[[], object]

HOPELESS = 4  # times slower, from which on further rounds cannot change the decision
COUNTABLE = 1e-3  # seconds: shorter differences are overhead
SECONDS = 0.25  # of one trial
ROUNDS = 6  # at the largest size


def speed_ratio(
    sizes: Sequence[Callable[[], tuple[Run, Run]]],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How many times as fast the second way is as the first: the ratio of their shortest times, which other processes
    disturb least.

    sizes: from small to large; each prepares its operands and returns both ways. A second way that is HOPELESS times
    slower at some size runs there at most twice, and the trial ends, as it does where a further round would end after
    `seconds`.
    """
    begun = clock()
    for prepare in sizes:
        ways, best = prepare(), [float("inf")] * 2
        for turn in range(ROUNDS if prepare is sizes[-1] else 2):
            for way, run in enumerate(ways):
                start = clock()
                run()
                best[way] = min(best[way], max(clock() - start, 1e-9))
            hopeless = turn and best[1] > HOPELESS * best[0] and best[1] - best[0] > COUNTABLE
            if hopeless or clock() - begun + sum(best) > seconds:
                return best[0] / best[1]
    return best[0] / best[1]
