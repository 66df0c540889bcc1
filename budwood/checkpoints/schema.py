"""What JSON of a folder must look like, said in one place and compared before anything is used.

A schema is a type, a tuple of alternatives, a list of one schema (of every entry), a dict of schemas (of named
fields; a name that ends in "?" may be missing, others must be there, unknown ones are left alone), `Each` (of every
value of an object), or a `Rule`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHOWN = 80  # characters of a wrong value in a message


@dataclass(frozen=True)
class Rule:
    """A value for which `holds` is true. words: what it is, for the message."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """An object with any names; schema: of its values."""

    schema: Any


LONGEST = 255  # bytes of a file name, on most file systems


def _is_file_name(value: Any) -> bool:
    if type(value) is not str or value in ("", ".", "..") or set(value) & set("/\\\0"):
        return False
    try:
        return 0 < len(os.fsencode(value)) <= LONGEST
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


LARGEST = 2**63
NONE = type(None)
COUNT = Rule("a whole number from 0", lambda value: type(value) is int and 0 <= value < LARGEST)
POSITIVE = Rule("a whole number above 0", lambda value: type(value) is int and 0 < value < LARGEST)
# JSON of Python also has NaN and infinities, which are numbers that were measured.
NUMBER = Rule("a number", lambda value: _is_number(value) or (type(value) is float and not math.isfinite(value)))
SHAPE = Rule(
    "a list of whole numbers above 0",
    lambda value: type(value) is list and bool(value) and all(map(POSITIVE.holds, value)),
)
MATRIX = Rule("a shape [out, in]", lambda value: SHAPE.holds(value) and len(value) == 2)
PAIR = Rule("two counts", lambda value: type(value) is list and len(value) == 2 and all(map(COUNT.holds, value)))
FIVE = Rule("five counts", lambda value: type(value) is list and len(value) == 5 and all(map(COUNT.holds, value)))
FILE_NAME = Rule("the name of a file in the same folder", _is_file_name)
WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false", NONE: "null"}


def fault(value: Any, schema: Any, where: str = "") -> str | None:
    """The first place at which `value` is not as the schema says, as part of a sentence; None where there is none."""
    if _is(value, schema):
        inner = _inside(value, schema, where)
        return next(inner, None)
    return f"{where or 'its content'} is {shown(value)} where {words(schema)} should be"


def _is(value: Any, schema: Any) -> bool:
    """Whether the kind of the value itself fits, whatever is in it."""
    if isinstance(schema, tuple):
        return any(_is(value, each) for each in schema)
    if isinstance(schema, Rule):
        return schema.holds(value)
    return type(value) is _kind(schema)


def _kind(schema: Any) -> type:
    if isinstance(schema, Each | dict):
        return dict
    return list if isinstance(schema, list) else schema


def _inside(value: Any, schema: Any, where: str) -> Any:
    """The faults of what is inside a value whose kind fits."""
    if isinstance(schema, tuple):
        schema = next(each for each in schema if _is(value, each))
    inside = f"{where}." if where else ""
    if isinstance(schema, list):
        found = (fault(entry, schema[0], f"{inside}{place}") for place, entry in enumerate(value))
    elif isinstance(schema, Each):
        found = (fault(entry, schema.schema, inside + name) for name, entry in value.items())
    elif isinstance(schema, dict):
        found = (_field(value, name, each, inside) for name, each in schema.items())
    else:
        return
    yield from (each for each in found if each)


def _field(value: dict[str, Any], name: str, schema: Any, inside: str) -> str | None:
    plain = name.removesuffix("?")
    if plain in value:
        return fault(value[plain], schema, inside + plain)
    return None if name.endswith("?") else f"{inside}{plain} is missing"


def words(schema: Any) -> str:
    """What a schema asks for."""
    if isinstance(schema, tuple):
        return " or ".join(words(each) for each in schema)
    return schema.words if isinstance(schema, Rule) else WORDS[_kind(schema)]


def shown(value: Any) -> str:
    """The value in a message, cut where it is long."""
    text = repr(value) if type(value) is not int or abs(value) < LARGEST else "a very large number"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
