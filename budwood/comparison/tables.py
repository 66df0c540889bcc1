"""The results as flat tables with a line for each run, CSV and Parquet, and as Markdown."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budwood.checkpoints.files import write_text, written_whole
from budwood.comparison.markdown import figures_of, markdown
from budwood.reports.comparison import Results

FIXED = ("source", "label", "row", "kind", "method", "draw", "status", "error", "name")


def write_tables(folder: Path, results: Results) -> None:
    """`results.csv`, `results.parquet` and `results.md` in the folder."""
    columns, lines = flat(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if line[name] is None else line[name] for name in columns] for line in lines])
    write_text(folder / "results.csv", text.getvalue())
    write_parquet(folder / "results.parquet", columns, lines)
    write_text(folder / "results.md", markdown(results))


def write_parquet(file: Path, columns: Sequence[str], lines: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: column([line[name] for line in lines]) for name in columns})
    with written_whole(file) as temporary:
        parquet.write_table(table, temporary)


def column(values: list[Any]) -> list[Any]:
    """Values of one type: numbers, or text where some are text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int} or kinds == {bool} or kinds == {str}:
        return values
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else str(value) for value in values]


def flat(results: Results) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns, those that differ in settings first, and a line for each run."""
    rows = results["rows"]
    options = [name for name in results["columns"] if name not in FIXED]
    figures = figures_of(rows)
    rest = [name for name in FIXED if name not in results["columns"]]
    # An option has the name of a figure where both are called "density".
    titles = {name: f"option {name}" if name in (*figures, *rest) else name for name in options}
    columns = [*(titles.get(name, name) for name in results["columns"]), *figures, *rest]
    lines = []
    for row in rows:
        line: dict[str, Any] = {name: row[name] for name in FIXED}  # type: ignore[literal-required]
        line |= {titles[name]: plain(row["settings"].get(name)) for name in options}
        line |= {name: row["figures"].get(name) for name in figures}
        lines.append(line)
    return columns, lines


def plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)
