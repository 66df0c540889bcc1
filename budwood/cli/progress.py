"""Progress of a long run: a bar on a terminal, a line every few seconds elsewhere, nothing with --quiet."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from budwood import humanize
from budwood.cli.printable import Escaping, one_line, unwrapped
from budwood.progress import Progress, Silent

INTERVAL = 5.0  # seconds between two lines where there is no terminal


class LineProgress:
    """Plain lines on stderr, for logs: at most one every few seconds, and always the last."""

    def __init__(self) -> None:
        self.total, self.what = 0, ""
        self.started = self.last_printed = time.monotonic()

    def start(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.started = self.last_printed = time.monotonic()

    def block(
        self,
        index: int,
        name: str,
        seconds: float,
        relative_error: float | None = None,
        loss: float | None = None,
    ) -> None:
        done, now = index + 1, time.monotonic()
        if now - self.last_printed < INTERVAL and done < self.total:
            return
        self.last_printed = now
        elapsed = now - self.started
        remaining = elapsed / done * (self.total - done)
        duration = (
            f", {humanize.seconds(remaining)} left" if done < self.total else f", {humanize.seconds(elapsed)} in all"
        )
        self.note(f"{self.what}: {done} of {self.total}{measured(relative_error, loss)}{duration}")

    def note(self, sentence: str) -> None:
        print(one_line(sentence), file=sys.stderr, flush=True)

    def finish(self) -> None: ...


class BarProgress:
    """One bar with the time left; notes scroll above it."""

    def __init__(self) -> None:
        self.progress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            console=Console(file=unwrapped(sys.stderr), highlight=False),
            redirect_stdout=False,
        )

    def start(self, total: int, what: str) -> None:
        self.task = self.progress.add_task(one_line(what), total=total, last="")
        before = sys.stderr
        self.progress.start()
        if sys.stderr is not before:  # from here on rich shows above the bar what others print
            sys.stderr = Escaping(sys.stderr)  # type: ignore[assignment]

    def block(
        self,
        index: int,
        name: str,
        seconds: float,
        relative_error: float | None = None,
        loss: float | None = None,
    ) -> None:
        self.progress.update(self.task, completed=index + 1, last=measured(relative_error, loss).lstrip(", "))

    def note(self, sentence: str) -> None:
        self.progress.console.print(Text(one_line(sentence)))

    def finish(self) -> None:
        self.progress.stop()


def measured(relative_error: float | None, loss: float | None) -> str:
    """What is known of a step, with a comma in front."""
    error = "" if relative_error is None else f", output error {humanize.share(relative_error, 1)}"
    return error if loss is None else f"{error}, loss {loss:.4g}"


def progress_for(quiet: bool) -> Progress:
    """The progress to pass to the library: a bar where stderr is a terminal, lines elsewhere, none if `quiet`."""
    if quiet:
        return Silent()
    return BarProgress() if sys.stderr.isatty() else LineProgress()
