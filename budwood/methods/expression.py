"""A method as text, `wrp(alpha=0.25)`: read without ever evaluating anything, and written back the same."""

import ast
import dataclasses
import difflib
import json
from typing import Any

from budwood.errors import UsageError
from budwood.methods.method import Method


def parse_method(text: str) -> Method:
    """The method that `text` describes: registered names, calls, keywords, literals, methods inside methods.

    Raises UsageError for anything else, for unknown names with the list of known ones and the nearest.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{text!r} is no method; write one like {EXAMPLE}") from error
    method = _value(tree.body, text)
    if not isinstance(method, Method):
        raise UsageError(f"{text!r} is no method; write one like {EXAMPLE}")
    return method


def write_method(method: Method) -> str:
    """Canonical text: the fields that differ from their defaults, or the first one where none does.

    The first is written bare if it is text or a method.
    """
    from budwood.methods import METHODS

    name = next(name for name, kind in METHODS.items() if kind is type(method))
    fields = [field for field in dataclasses.fields(method) if field.init]  # type: ignore[arg-type]
    told = [field for field in fields if getattr(method, field.name) != _default(field)] or fields[:1]
    arguments = []
    for field in told:
        value = getattr(method, field.name)
        bare = field is fields[0] and isinstance(value, str | Method)
        arguments.append(_write(value) if bare else f"{field.name}={_write(value)}")
    return f"{name}({', '.join(arguments)})"


EXAMPLE = "'wrp(alpha=0.25)' or 'sparsegpt(\"2:4\")'"


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):  # a bare name has all defaults
        return _make(node.id, [], {}, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        positional = [_value(argument, text) for argument in node.args]
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise UsageError(f"in {text!r}: '**' cannot be used; write the options out")
            if keyword.arg in keywords:
                raise UsageError(f"in {text!r}: {keyword.arg} is given twice")
            keywords[keyword.arg] = _value(keyword.value, text)
        return _make(node.func.id, positional, keywords, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"in {text!r}: {ast.unparse(node)!r} is neither a number, a text in quotes, nor a method"
        ) from error


def _make(name: str, positional: list[Any], keywords: dict[str, Any], text: str) -> Method:
    from budwood.methods import METHODS

    if name not in METHODS:
        raise UsageError(f"in {text!r}: {_unknown('method', name, list(METHODS))}")
    fields = [field for field in dataclasses.fields(METHODS[name]) if field.init]  # type: ignore[arg-type]
    names = [field.name for field in fields]
    if len(positional) > len(names):
        raise UsageError(f"in {text!r}: {name} takes at most {len(names)} options: {', '.join(names)}")
    given = dict(zip(names, positional, strict=False))
    for key, value in keywords.items():
        if key not in names:
            raise UsageError(f"in {text!r}: {name}: {_unknown('option', key, names)}")
        if key in given:
            raise UsageError(f"in {text!r}: {key} is given twice")
        given[key] = value
    for field in fields:
        if field.name not in given and _default(field) is dataclasses.MISSING:
            raise UsageError(f"in {text!r}: {name} needs {field.name}")
    return METHODS[name](**given)


def _unknown(kind: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"there is no {kind} {name}; there are {', '.join(known)}{hint}"


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _write(value: Any) -> str:
    if isinstance(value, Method):
        return write_method(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
