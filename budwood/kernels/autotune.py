"""Chooses the fastest of several kernels for the same product: each is checked, then timed in turns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

Runner = Callable[[], Tensor]
Clock = Callable[[Runner], float]  # runs it once, returns the seconds
CAPTURED = 10  # runs in a graph
TOLERANCE = 2e-2  # of the largest result: 16-bit products with sums in another order


@dataclass(frozen=True)
class AutotuneResult:
    """The name of the `winner`, the median `seconds` of all that were timed, and why others were `dropped`."""

    winner: str
    seconds: dict[str, float]
    dropped: dict[str, str]


def autotune(
    runners: Mapping[str, Runner],
    expected: Tensor,
    clock: Clock,
    rounds: int = 7,
    baselines: Mapping[str, Runner] | None = None,
) -> AutotuneResult:
    """The fastest runner whose result equals `expected`; one that raises or is inaccurate is dropped.

    Every round runs each of them once, so that a change in the speed of the machine affects all. Baselines are timed
    with them and cannot win: the dense product, for which a packed layer has no weights.
    Raises `ValueError` where no runner is left.
    """
    passed: dict[str, Runner] = {}
    dropped: dict[str, str] = {}
    for name, runner in runners.items():
        fault = _fault(runner, expected)
        if fault is None:
            passed[name] = runner
        else:
            dropped[name] = fault
    if not passed:
        raise ValueError(
            "; ".join(f"{name}: {fault}" for name, fault in dropped.items()) or "there are no runners to choose from"
        )
    timed = passed | dict(baselines or {})
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, runner in timed.items():
            times[name].append(clock(runner))
    seconds = {name: median(taken) for name, taken in times.items()}
    return AutotuneResult(min(passed, key=lambda name: seconds[name]), seconds, dropped)


def _fault(runner: Runner, expected: Tensor) -> str | None:
    """Why a runner is dropped; None where it is not. This first run also compiles and warms up."""
    try:
        result = runner()
    except Exception as error:  # no compiler, an unsupported shape, no memory: another runner is used
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if result.shape != expected.shape:
        return f"returned shape {list(result.shape)} instead of {list(expected.shape)}"
    wide = expected.float()
    deviation = float((result.float() - wide).abs().max() / wide.abs().max().clamp(min=1e-30))
    return None if deviation <= TOLERANCE else f"had an error of {deviation:.1e} of the largest result"


def wall_clock(runner: Runner) -> float:
    """Seconds of one run on the CPU."""
    start = perf_counter()
    runner()
    return perf_counter() - start


def graph_clock() -> Clock:
    """Seconds of one run on the current CUDA device: of several captured in a graph, so that launch overhead, which
    differs between kernels and vanishes in a user's graph, is excluded. Without a graph, between two events."""
    graphs: dict[Runner, torch.cuda.CUDAGraph | None] = {}

    def clock(runner: Runner) -> float:
        if runner not in graphs:
            graphs[runner] = _captured(runner)
        graph = graphs[runner]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if graph is None:
            runner()
        else:
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / (1 if graph is None else CAPTURED)

    return clock


def _captured(runner: Runner) -> torch.cuda.CUDAGraph | None:
    """`CAPTURED` runs in a graph; None where the runner cannot be captured: for example, it copies to the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CAPTURED):
                runner()
    except RuntimeError:
        return None
    return graph
