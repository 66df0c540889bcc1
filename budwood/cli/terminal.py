"""What goes where: results to stdout, everything else to stderr; tables that fit the terminal at hand."""

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

FILE_WIDTH = 160  # columns when stdout is a file or a pipe, where nothing needs to fit a screen


def console() -> Console:
    """Where results are written."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(width=wide, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """While the library works, stdout belongs to the result: whatever a dependency prints goes to stderr.

    Hints and bars of the libraries below are kept still.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def answer(result: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Print `result`: as exactly one JSON object, or for people through `show`."""
    if as_json:
        print(json.dumps(finite(result), ensure_ascii=False, default=str))
    else:
        show(result)


def finite(value: Any) -> Any:
    """`value` with null for infinities and NaN, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], words: Sequence[str] = ()) -> Table:
    """Figures in columns, the first column and those named in `words` text; long names fold, none is cut."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 or column in words else "right", overflow="fold")
    return filled(made, rows)


def pairs(rows: Sequence[tuple[str, object]]) -> Table:
    """Names and their values in two columns of text."""
    made = Table.grid(padding=(0, 3))
    for _ in range(2):
        made.add_column(overflow="fold")
    return filled(made, rows)


def filled(made: Table, rows: Sequence[Sequence[object]]) -> Table:
    for row in rows:
        made.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))  # Text: names are not markup
    return made
