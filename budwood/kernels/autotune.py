"""Which of several ways to the same product is the fastest here: tried, checked, timed in turns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

Runner = Callable[[], Tensor]
Clock = Callable[[Runner], float]  # runs it once, gives the seconds
CAPTURED = 10  # runs in a graph
TOLERANCE = 2e-2  # of the largest result: 16-bit products that sum in another order


@dataclass(frozen=True)
class Outcome:
    """`winner` by name, median `seconds` of everyone who finished, and why others did not (`dropped`)."""

    winner: str
    seconds: dict[str, float]
    dropped: dict[str, str]


def autotune(
    runners: Mapping[str, Runner],
    expected: Tensor,
    clock: Clock,
    rounds: int = 7,
    spectators: Mapping[str, Runner] | None = None,
) -> Outcome:
    """The fastest runner whose result equals `expected`; one that raises or errs is dropped.

    Every round runs each of them once, so that a machine that slows down slows all. Spectators are timed with
    them and cannot win: the dense product, which a packed layer has no weights for.
    Raises `ValueError` where no runner is left.
    """
    fit: dict[str, Runner] = {}
    dropped: dict[str, str] = {}
    for name, runner in runners.items():
        fault = _fault(runner, expected)
        if fault is None:
            fit[name] = runner
        else:
            dropped[name] = fault
    if not fit:
        raise ValueError("; ".join(f"{name}: {fault}" for name, fault in dropped.items()) or "nothing to choose from")
    everyone = fit | dict(spectators or {})
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(rounds):
        for name, runner in everyone.items():
            times[name].append(clock(runner))
    seconds = {name: median(taken) for name, taken in times.items()}
    return Outcome(min(fit, key=lambda name: seconds[name]), seconds, dropped)


def _fault(runner: Runner, expected: Tensor) -> str | None:
    """Why a runner may not compete; None where it may. This first run also compiles and warms up."""
    try:
        result = runner()
    except Exception as error:  # a missing compiler, a shape rule, no memory: all mean that another way is taken
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if result.shape != expected.shape:
        return f"gave {list(result.shape)} instead of {list(expected.shape)}"
    wide = expected.float()
    off = float((result.float() - wide).abs().max() / wide.abs().max().clamp(min=1e-30))
    return None if off <= TOLERANCE else f"was off by {off:.1e} of the largest result"


def wall_clock(runner: Runner) -> float:
    """Seconds of one run on the CPU."""
    start = perf_counter()
    runner()
    return perf_counter() - start


def graph_clock() -> Clock:
    """Seconds of one run on the current CUDA device: of several captured in a graph, so that what launching costs,
    which differs from way to way and vanishes in a user's graph, stays out. Without a graph, between two events."""
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
    """`CAPTURED` runs in a graph; None where the runner cannot be captured: it copies to the host, say."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CAPTURED):
                runner()
    except RuntimeError:
        return None
    return graph
