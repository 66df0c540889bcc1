"""Figures of papers, in YAML files beside the recipes: a table with named columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.comparison.document import read_document
from budwood.reports.comparison import FIGURES, PublishedFigure, Row

FIXED = ("table", "paper", "conditions", "columns", "rows")
KEYS = ("model", "method")  # the first two columns


@dataclass(frozen=True)
class Published:
    """One published table. figures: without the rows and sources of a recipe that they belong to."""

    table: str  # such as "WRP, Table 2"
    paper: str
    conditions: str
    columns: tuple[str, ...]
    figures: tuple[PublishedFigure, ...]


def read_published(file: Path) -> Published:
    """The published table in a file: `columns` begin with model and method; the others are settings or figures.

    A column is a figure where its name is a key of `FIGURES` (NAME standing for a text or task), else a setting. An
    empty place (null) is a figure that was not published. Raises UsageError with the line.
    """
    document = read_document(file)
    content = document.content
    unknown = next((name for name in content if name not in FIXED), None)
    if unknown is not None:
        raise document.error((unknown,), f"there is no field {unknown}; there are {', '.join(FIXED)}")
    missing = next((name for name in FIXED if name not in content), None)
    if missing is not None:
        raise document.error((), f"the field {missing} is missing")
    columns, rows = content["columns"], content["rows"]
    if not isinstance(columns, list) or tuple(columns[:2]) != KEYS or len(set(map(str, columns))) < len(columns):
        raise document.error(("columns",), "columns is a list of different names that begins with model, method")
    if not any(is_figure(str(column)) for column in columns):
        raise document.error(("columns",), f"no column is a figure; figures are {', '.join(FIGURES)}")
    if not isinstance(rows, list):
        raise document.error(("rows",), "rows is a list of lists")
    figures: list[PublishedFigure] = []
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(columns):
            raise document.error(("rows", index), f"a row has {len(columns)} values, as columns has")
        figures += _figures(content, dict(zip(map(str, columns), row, strict=True)), ("rows", index), document.error)
    table, paper, conditions = (str(content[name]) for name in ("table", "paper", "conditions"))
    return Published(table, paper, conditions, tuple(map(str, columns)), tuple(figures))


def _figures(content: Any, row: dict[str, Any], place: Any, error: Any) -> list[PublishedFigure]:
    if not all(isinstance(row[key], str) for key in KEYS):
        raise error(place, "model and method are texts")
    settings = {k: v for k, v in row.items() if k not in KEYS and not is_figure(k) and v is not None}
    found: list[PublishedFigure] = []
    for name, value in row.items():
        if not is_figure(name) or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise error(place, f"{name} is a number, got {value!r}")
        found.append(
            {
                "table": str(content["table"]),
                "model": row["model"],
                "method": row["method"],
                "settings": settings,
                "figure": name,
                "value": float(value),
                "conditions": str(content["conditions"]),
            }
        )
    return found


def is_figure(name: str) -> bool:
    """Whether a column is one of FIGURES, whose NAME stands for any text or task."""
    return any(name == key or (key.endswith(" NAME") and name.startswith(key[:-4])) for key in FIGURES)


def matched(tables: Sequence[Published], rows: Sequence[Row]) -> list[PublishedFigure]:
    """The figures, each with the recipe's row and source where it has them: names and settings are equal."""
    found: list[PublishedFigure] = []
    for table in tables:
        for figure in table.figures:
            row = next((row for row in rows if belongs(figure, row)), None)
            same_model = any(row["source"] == figure["model"] for row in rows)
            found.append(
                {
                    **figure,
                    "row": row["row"] if row else None,
                    "source": figure["model"] if same_model else None,
                }
            )
    return found


def belongs(figure: PublishedFigure, row: Row) -> bool:
    """Whether a figure is of the method and settings of a row, whatever the model."""
    settings = figure.get("settings") or {}
    return row["row"] == figure["method"] and all(row["settings"].get(k) == v for k, v in settings.items())
