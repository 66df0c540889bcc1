"""The progress interface of long operations. The command line prints it; the library is silent by default."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    def start(self, total: int, what: str) -> None:
        """`total` steps of `what` begin."""

    def block(
        self,
        index: int,
        name: str,
        seconds: float,
        relative_error: float | None = None,
        loss: float | None = None,
    ) -> None:
        """Step `index` is done. loss: of a step of training."""

    def note(self, sentence: str) -> None:
        """Information for the user."""

    def finish(self) -> None:
        """The steps ended, completed or not."""


class Silent:
    """Progress that prints nothing."""

    def start(self, total: int, what: str) -> None: ...

    def block(
        self,
        index: int,
        name: str,
        seconds: float,
        relative_error: float | None = None,
        loss: float | None = None,
    ) -> None: ...

    def note(self, sentence: str) -> None: ...

    def finish(self) -> None: ...


def tracked(
    progress: Progress, items: Iterable[T], total: int, what: str, name: Callable[[T], str] = str
) -> Iterator[T]:
    """Yields `items`, and reports each of them when the loop's body is done with it."""
    progress.start(total, what)
    try:
        begun = time.perf_counter()
        for index, item in enumerate(items):
            yield item
            now = time.perf_counter()
            progress.block(index, name(item), now - begun)
            begun = now
    finally:
        progress.finish()
