"""What long work tells while it runs; the command line shows it, the library is silent by default."""

from typing import Protocol


class Progress(Protocol):
    def start(self, total: int, what: str) -> None:
        """`total` steps of `what` begin."""

    def block(self, index: int, name: str, seconds: float, relative_error: float | None = None) -> None:
        """Step `index` is done."""

    def note(self, sentence: str) -> None:
        """Something the user should know."""

    def finish(self) -> None:
        """The steps are over, done or not."""


class Silent:
    """Says nothing."""

    def start(self, total: int, what: str) -> None: ...

    def block(self, index: int, name: str, seconds: float, relative_error: float | None = None) -> None: ...

    def note(self, sentence: str) -> None: ...

    def finish(self) -> None: ...
