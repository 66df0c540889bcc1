"""The progress interface of long operations. The command line prints it; the library is silent by default."""

from typing import Protocol


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
