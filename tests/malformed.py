"""JSON with one value of a wrong type, at every place of it."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**30, float("nan"), "", "x", "../x", "a\x1b[2J\u202e", "\ud800"),
    *([], [None], ["x"], {}, {"a": None}, {"x": {"x": []}}),
)
GONE = object()  # in the place of a value: the field is missing
WHOLE: tuple[str, ...] = ("", "{", "[]", "3", "null", '"x"', "[" * 100_000, '{"a": ' * 100_000, "\ufeff{}", "NaN")


def places(content: Any, inside: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values; of a list or of an object with many names the first two."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    many = len(content) > 40 if isinstance(content, dict) else True
    for number, (name, value) in enumerate(entries):
        if not many or number < 2:
            yield (*inside, name)
            yield from places(value, (*inside, name))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at one place."""
    result = copy.deepcopy(content)
    target = result
    for name in place[:-1]:
        target = target[name]
    if value is GONE:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return result


def mutations(content: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Every place with every wrong value that differs from its own."""
    return [(place, value) for place in places(content) for value in (*WRONG, GONE)]


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), "utf-8")
