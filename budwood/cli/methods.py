"""`budwood methods`: the registered methods, and the options of each."""

import dataclasses
import difflib
import inspect
import json as json_text
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from budwood.cli import options
from budwood.cli.terminal import console, name_value_table, print_result, stdout_to_stderr, table
from budwood.errors import UsageError


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show the options of this method.")] = None,
    json: options.Json = False,
) -> None:
    """List the pruning methods, or show the options of one.

    \b
    Examples:
      budwood methods
      budwood methods wrp
    """
    with stdout_to_stderr():
        from budwood.methods import METHODS

        if name is None:
            result = {key: summary(method) for key, method in METHODS.items()}
        elif name in METHODS:
            result = describe_method(name, METHODS[name])
        else:
            nearest = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UsageError(f"there is no method {name}; there are {', '.join(METHODS)}{hint}")
    print_result(result, json, show if name is None else show_one)


def summary(method: type) -> str:
    """The first paragraph of the docstring, in one line."""
    return (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")


def describe_method(name: str, method: type) -> dict[str, Any]:
    """A method as data: its docstring, and its options with type, default and help."""
    return {
        "name": name,
        "calibrated": getattr(method, "calibrated", True),
        "text": inspect.getdoc(method) or "",
        "options": [
            {
                "name": field.name,
                "type": type_text(field),
                "default": default_text(field),
                "help": field.metadata.get("help", ""),
            }
            for field in dataclasses.fields(method)
            if field.init
        ],
    }


def type_text(field: dataclasses.Field) -> str:
    """The type of a field; for a Literal, its choices."""
    if get_origin(field.type) is Literal:
        return " | ".join(literal(choice) for choice in get_args(field.type))
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def default_text(field: dataclasses.Field) -> str | None:
    """The default of a field as a method expression spells it; None where the field has no default."""
    if field.default_factory is not dataclasses.MISSING:
        return literal(field.default_factory())
    return None if field.default is dataclasses.MISSING else literal(field.default)


def literal(value: object) -> str:
    """A value as a method expression spells it: text in double quotes, a method as its own expression."""
    return json_text.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def show(result: Mapping[str, Any]) -> None:
    out = console()
    out.print(name_value_table(list(result.items())))
    out.print("budwood methods NAME shows the options of one.")


def show_one(method: Mapping[str, Any]) -> None:
    out = console()
    out.print(method["text"])
    if method["options"]:
        out.print(
            table(
                ("option", "type", "default", "meaning"),
                [
                    (
                        option["name"],
                        option["type"],
                        "required" if option["default"] is None else option["default"],
                        option["help"],
                    )
                    for option in method["options"]
                ],
                text_columns=("type", "default", "meaning"),
            )
        )
    out.print("needs calibration data" if method["calibrated"] else "needs no calibration data")
