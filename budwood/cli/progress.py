"""How far a long run is: a bar on a terminal, a line every few seconds elsewhere, nothing when asked."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from budwood import humanize
from budwood.progress import Progress as Telling
from budwood.progress import Silent

EVERY = 5.0  # seconds between two lines where there is no terminal


class Lines:
    """Plain lines on stderr, for logs: at most one every few seconds, and always the last."""

    def __init__(self) -> None:
        self.total, self.what = 0, ""
        self.began = self.said = time.monotonic()

    def start(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.began = self.said = time.monotonic()

    def block(self, index: int, name: str, seconds: float, relative_error: float | None = None) -> None:
        done, now = index + 1, time.monotonic()
        if now - self.said < EVERY and done < self.total:
            return
        self.said = now
        left = (now - self.began) / done * (self.total - done)
        rest = (
            f", {humanize.seconds(left)} left"
            if done < self.total
            else f", {humanize.seconds(now - self.began)} in all"
        )
        self.note(f"{self.what}: {done} of {self.total}{erred(relative_error)}{rest}")

    def note(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    def finish(self) -> None: ...


class Bar:
    """One bar with the time left; notes scroll above it."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            console=Console(stderr=True, highlight=False),
            redirect_stdout=False,
        )

    def start(self, total: int, what: str) -> None:
        self.task = self.progress.add_task(what, total=total, last="")
        self.progress.start()

    def block(self, index: int, name: str, seconds: float, relative_error: float | None = None) -> None:
        self.progress.update(self.task, completed=index + 1, last=erred(relative_error).lstrip(", "))

    def note(self, sentence: str) -> None:
        self.progress.console.print(Text(sentence))

    def finish(self) -> None:
        self.progress.stop()


def erred(relative_error: float | None) -> str:
    return "" if relative_error is None else f", output error {humanize.share(relative_error, 1)}"


def telling(quiet: bool) -> Telling:
    """The progress to hand to the library: by what stderr is, or silent."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
