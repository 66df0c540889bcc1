"""Results go to stdout, everything else to stderr; tables fit the width of the terminal."""

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from budwood.cli.printable import Escaping, one_line, printable, printable_json

FILE_WIDTH = 160  # columns when stdout is a file or a pipe, where nothing needs to fit a screen


class SafeConsole(Console):
    """A console that escapes every text that it prints."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def on_broken_pipe(self) -> None:
        """Left to `report_errors`, which ends with status 0; Console would end with 1."""
        raise


def console() -> SafeConsole:
    """A console on stdout, for results."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return SafeConsole(width=width, highlight=False, markup=False, emoji=False)


def print_notes(out: SafeConsole, notes: Sequence[object]) -> None:
    """One line for each note."""
    for note in notes:
        out.print(f"note: {one_line(note)}")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what the library and its dependencies print to stderr, escaped: stdout is for the result.

    Warnings and progress bars of the dependencies are turned off.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    safe: Any = Escaping(sys.stderr)
    with contextlib.redirect_stderr(safe), contextlib.redirect_stdout(safe), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def print_result(result: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Print `result`: as exactly one JSON object, or as text through `show`."""
    if as_json:
        print(printable_json(json.dumps(finite(result), ensure_ascii=False, default=str)))
    else:
        show(result)


def finite(value: Any) -> Any:
    """`value` with null for infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], text_columns: Sequence[str] = ()) -> Table:
    """A table; the first column and `text_columns` are aligned left. Long cells fold, none is cut."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        left = index == 0 or column in text_columns
        result.add_column(column, justify="left" if left else "right", overflow="fold")
    return _add_rows(result, rows)


def name_value_table(rows: Sequence[tuple[str, object]]) -> Table:
    """Two columns of text without a header: names and their values."""
    result = Table.grid(padding=(0, 3))
    for _ in range(2):
        result.add_column(overflow="fold")
    return _add_rows(result, rows)


def _add_rows(target: Table, rows: Sequence[Sequence[object]]) -> Table:
    for row in rows:
        cells = ("-" if cell is None else printable(cell, keep="") for cell in row)
        target.add_row(*(Text(cell) for cell in cells))  # Text: names are not markup
    return target
