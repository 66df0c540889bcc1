"""Results as plain JSON and back. What is read is checked: files of results come from other machines and people."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from budwood.checkpoints.schema import COUNT, NUMBER
from budwood.errors import RunError
from budwood.reports.results import KINDS, Perplexity, Result


def to_json(result: Result) -> dict[str, Any]:
    """`result` as plain JSON: its `kind`, its fields, and what follows from them, for readers without budwood."""
    return {"kind": result.kind, **{name: getattr(result, name) for name in result.derived}, **plain(result)}


def plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def from_json(content: Any, where: str = "the result") -> Result:
    """The result that `content` describes; fields that this version does not know are ignored.

    where: the place that an error names. Raises RunError where a field is missing or of another type, or nothing
    follows from the fields, as from a mean over no windows.
    """
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise RunError(f"{where} is no result: its kind is {kind!r}, and known are {', '.join(KINDS)}")
    result: Result = build(KINDS[kind], content, where)
    if isinstance(result, Perplexity) and len(result.losses) != result.text.windows:
        raise RunError(f"{where} is damaged: it has {len(result.losses)} losses of {result.text.windows} windows")
    try:
        for name in result.derived:
            getattr(result, name)
    except (ArithmeticError, ValueError, StopIteration) as error:
        raise RunError(f"{where} is damaged: its {name} cannot be computed from its fields") from error
    return result


def build(record: type, content: Any, where: str) -> Any:
    """An instance of the dataclass `record` from a mapping."""
    if not isinstance(content, Mapping):
        raise RunError(f"{where} is damaged: {content!r} stands where a {record.__name__} should")
    hints = hints_of(record)
    values = {}
    for field in fields(record):
        if field.name in content:
            values[field.name] = converted(content[field.name], hints[field.name], f"{where}, {field.name}")
        elif field.default is MISSING:
            raise RunError(f"{where} is damaged: the field {field.name} is missing")
    return record(**values)


@cache
def hints_of(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def converted(value: Any, hint: Any, where: str) -> Any:
    """`value` of JSON as the type `hint`: lists become tuples, whole numbers fractions where those are expected."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return converted(value, next(part for part in inner if part is not type(None)), where)
    if hint is Any:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(converted(part, inner[0], where) for part in value)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): converted(part, inner[1], where) for key, part in value.items()}
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and NUMBER.holds(value):
        return float(value)
    if isinstance(hint, type) and type(value) is hint and (hint is not int or COUNT.holds(value)):
        return value
    raise RunError(f"{where} is damaged: {str(value)[:40]!r} is no {getattr(hint, '__name__', hint)}")
