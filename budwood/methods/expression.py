"""A method from its expression, such as `wrp(alpha=0.25)`: parsed with `ast`, never evaluated."""

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from budwood.errors import UsageError
from budwood.methods.method import Method, default_of
from budwood.methods.registry import METHODS


def parse_method(text: str, known: Mapping[str, type[Method]] = METHODS) -> Method:
    """The method that `text` describes, in known names, calls, keywords, literals and nested methods.

    Raises UsageError for anything else; for an unknown name with the known names and the nearest one.
    """
    if len(text) > LONGEST:
        raise UsageError(f"{text[:80]!r}... is no method: it has {len(text)} characters, and {LONGEST} are allowed")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{text!r} is no method; write one like {EXAMPLE}") from error
    method = _value(tree.body, text, known)
    if not isinstance(method, Method):
        raise UsageError(f"{text!r} is no method; write one like {EXAMPLE}")
    return method


LONGEST = 100_000  # characters; a share for every matrix of a large model has some 20,000
EXAMPLE = "'wrp(alpha=0.25)' or 'sparsegpt(\"2:4\")'"


def _value(node: ast.expr, text: str, known: Mapping[str, type[Method]]) -> Any:
    if isinstance(node, ast.Name):  # a bare name has all defaults
        return _make(node.id, [], {}, text, known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        positional = [_value(argument, text, known) for argument in node.args]
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise UsageError(f"in {text!r}: '**' cannot be used; write the options out")
            if keyword.arg in keywords:
                raise UsageError(f"in {text!r}: {keyword.arg} is given twice")
            keywords[keyword.arg] = _value(keyword.value, text, known)
        return _make(node.func.id, positional, keywords, text, known)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"in {text!r}: {ast.unparse(node)!r} is neither a number, a text in quotes, nor a method"
        ) from error


def _make(
    name: str, positional: list[Any], keywords: dict[str, Any], text: str, known: Mapping[str, type[Method]]
) -> Method:
    if name not in known:
        raise UsageError(f"in {text!r}: {_unknown('method', name, list(known))}")
    fields = [field for field in dataclasses.fields(known[name]) if field.init]  # type: ignore[arg-type]
    names = [field.name for field in fields]
    if len(positional) > len(names):
        raise UsageError(f"in {text!r}: {name} takes at most {len(names)} options: {', '.join(names)}")
    keywords, divided = _current(name, keywords)
    given = dict(zip(names, positional, strict=False))
    for key, value in keywords.items():
        if key not in names:
            raise UsageError(f"in {text!r}: {name}: {_unknown('option', key, names)}")
        if key in given:
            raise UsageError(f"in {text!r}: {key} is given twice")
        given[key] = value
    for field in fields:
        if field.name not in given and default_of(field) is dataclasses.MISSING:
            raise UsageError(f"in {text!r}: {name} needs {field.name}")
    method = known[name](**given)
    return METHODS["allocate"](method) if divided else method  # type: ignore[call-arg]


def _current(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Options of earlier versions in the present spelling; whether the weights were divided among the matrices."""
    given = dict(given)
    if given.get("tie") == "published":
        del given["tie"]
        given["published"] = True
    if isinstance(given.get("parity"), bool):
        given["published"] = given.pop("parity")
    divided = name != "graft" and given.get("allocate") in ("global", "uniform")
    return given, divided and given.pop("allocate") == "global"


def _unknown(kind: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"there is no {kind} {name}; there are {', '.join(known)}{hint}"
