"""Statistics of the inputs of a block's linears, in one pass that stops where nothing more can be learnt."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from budwood.errors import RunError


class Statistic(Protocol):
    """A sum over tokens, so that merging batches, ranks or runs is adding."""

    count: int

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in], as the linear is called."""


S = TypeVar("S", bound=Statistic)


class StopForward(Exception):
    """Every linear of the block has been heard in this batch; the rest of its forward pass is not needed."""


class Collector:
    """Hooks on linears, between `with` and its end.

    Linears that are handed the very same tensor (q, k, v; gate, up) share one statistic, which is added to once. The
    last linear of a block need not multiply: from the second batch on its input ends the pass. That holds only where
    every linear is called once a batch, so not with experts, who are called as the router likes.
    """

    def __init__(self, linears: Mapping[str, nn.Module], widths: Mapping[str, int], statistic: Callable[[int], Any]):
        self.linears, self.widths, self.statistic = linears, widths, statistic
        self.found: dict[str, Any] = {}
        self.calls: list[str] = []
        self.last: str | None = None
        self._inputs: dict[int, tuple[Tensor, int, str]] = {}

    def __enter__(self) -> "Collector":
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self.linears.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._inputs.clear()

    def next_batch(self) -> None:
        """Forgets the inputs of the batch before, and learns from the first batch which call is the last."""
        if self.calls and sorted(self.calls) == sorted(self.linears):
            self.last = self.calls[-1]
        self.calls = []
        self._inputs.clear()

    def statistics(self) -> dict[str, Any]:
        """By name, also of those that were never called: their count is 0."""
        return {name: self.found.get(name) or self.statistic(self.widths[name]) for name in self.linears}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._hear(name, x)
            if name == self.last:
                raise StopForward

        return hear

    def _hear(self, name: str, x: Tensor) -> None:
        self.calls.append(name)
        known = self._inputs.get(id(x))
        if known is not None and known[1] == x._version:
            shared = self.found[known[2]]
            if self.found.setdefault(name, shared) is not shared:
                raise RunError(f"{name} shares its input with {known[2]} in one batch and not in another")
            return
        self._inputs[id(x)] = (x, x._version, name)  # holding x keeps its id from being given to another
        if name not in self.found:
            self.found[name] = self.statistic(self.widths[name])
        self.found[name].add(x)
