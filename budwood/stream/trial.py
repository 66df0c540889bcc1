"""Timing of two implementations of one operation, small sizes first; it ends as soon as the result is clear."""

import time
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from budwood.kernels import native

Run = Callable[[], object]
Options = ParamSpec("Options")
Result = TypeVar("Result")

HOPELESS = 4  # times slower, from which on further rounds cannot change the decision
COUNTABLE = 1e-3  # seconds: shorter differences are overhead
SECONDS = 0.25  # of one timing
ROUNDS = 6  # at the largest size


def tried_once(trial: Callable[Options, Result]) -> Callable[Options, Result]:
    """The trial, run once in a process for its arguments, the number of threads and the kernels in use.

    So all runs of a comparison compute in the same way.
    """

    @cache
    def kept(threads: int, kernels: str, *args: Any, **kwargs: Any) -> Result:
        return trial(*args, **kwargs)

    @wraps(trial)
    def tried(*args: Options.args, **kwargs: Options.kwargs) -> Result:
        return kept(torch.get_num_threads(), native.active(), *args, **kwargs)  # type: ignore[arg-type]

    return tried


def speed_ratio(
    sizes: Sequence[Callable[[], tuple[Run, Run]]],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How many times as fast the second implementation is as the first: the ratio of their shortest times, which other
    processes disturb least.

    sizes: from small to large; each prepares its operands and returns both. A second one HOPELESS times slower at
    some size runs there at most twice, and the timing ends. It also ends where another round would exceed `seconds`.
    """
    begun = clock()
    for prepare in sizes:
        runs, best = prepare(), [float("inf")] * 2
        for turn in range(ROUNDS if prepare is sizes[-1] else 2):
            for index, run in enumerate(runs):
                start = clock()
                run()
                best[index] = min(best[index], max(clock() - start, 1e-9))
            hopeless = turn and best[1] > HOPELESS * best[0] and best[1] - best[0] > COUNTABLE
            if hopeless or clock() - begun + sum(best) > seconds:
                return best[0] / best[1]
    return best[0] / best[1]
