"""Statistics of the inputs of a block's linears, in one forward pass that stops after the last linear."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from budwood.errors import RunError


class Statistic(Protocol):
    """Sums over tokens, so that batches, ranks and runs can be merged by adding."""

    count: int  # tokens

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in], as the linear is called."""


S = TypeVar("S", bound=Statistic)


class Several:
    """Several statistics of the same inputs, collected in one pass."""

    def __init__(self, width: int, kinds: Sequence[Callable[[int], Any]]):
        self.count = 0
        self.parts = {kind: kind(width) for kind in kinds}

    def add(self, x: Tensor) -> None:  # [..., tokens, in]
        self.count += x.numel() // x.shape[-1]
        for part in self.parts.values():
            part.add(x)


class StopForward(Exception):
    """Every linear of the block has been called in this batch; the rest of its forward pass is not needed."""


class Collector:
    """Forward hooks on linears, inside a `with` block.

    Linears that are called with the same tensor object (q, k, v; gate, up) share one statistic, updated once.
    The last linear of a block need not multiply: from the second batch on the pass ends at its input, unless it is to
    be `whole`. This requires that every linear is called once per batch, so it does not apply to experts.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        widths: Mapping[str, int],
        statistic: Callable[[int], Any],
        whole: bool = False,
    ):
        self.linears, self.widths, self.statistic, self.whole = linears, widths, statistic, whole
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
        """Drops the inputs of the previous batch; after the first batch the last call is known."""
        if not self.whole and self.calls and sorted(self.calls) == sorted(self.linears):
            self.last = self.calls[-1]
        self.calls = []
        self._inputs.clear()

    def statistics(self) -> dict[str, Any]:
        """By name; linears that were never called have a statistic with count 0."""
        return {name: self.found.get(name) or self.statistic(self.widths[name]) for name in self.linears}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(name, args[0] if args else next(iter(kwargs.values())))
            if name == self.last:
                raise StopForward

        return before_forward

    def _add(self, name: str, x: Tensor) -> None:
        self.calls.append(name)
        known = self._inputs.get(id(x))
        if known is not None and known[1] == x._version:
            shared = self.found[known[2]]
            if self.found.setdefault(name, shared) is not shared:
                raise RunError(f"{name} shares its input with {known[2]} in one batch and not in another")
            return
        self._inputs[id(x)] = (x, x._version, name)  # holding x keeps its id from being reused
        if name not in self.found:
            self.found[name] = self.statistic(self.widths[name])
        self.found[name].add(x)
