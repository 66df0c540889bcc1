"""Finds the field of a table's rows that holds the text."""

from collections.abc import Iterable, Iterator
from typing import Any

from budwood.errors import UsageError


def texts_of(rows: Iterable[tuple[str, dict[str, Any]]], field: str | None = None) -> Iterator[str]:
    """The text of each row, given with a description of its position; the first row decides the field for all.

    Raises UsageError with the position of a row that has no text in that field.
    """
    for where, row in rows:
        if field is None:
            field = text_field((key for key, value in row.items() if isinstance(value, str)), where)
        if not isinstance(row.get(field), str):
            raise UsageError(f"{where}: no text in the field {field!r}; the fields are {', '.join(row) or 'none'}")
        yield row[field]


def text_field(strings: Iterable[str], where: str) -> str:
    """Of the fields that hold strings, `text` or the only one; raises UsageError when there is neither."""
    names = list(strings)
    if "text" in names:
        return "text"
    if len(names) == 1:
        return names[0]
    found = f"the string fields are {', '.join(names)}" if names else "no field holds a string"
    raise UsageError(f"{where}: no field `text`, and {found}; rename the one to use to `text`")
