"""`budwood methods`: what there is to choose from, and the options of each."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from budwood.cli import options
from budwood.cli.terminal import answer, console, pairs, table, working
from budwood.errors import UsageError


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this method's options and text.")] = None,
    json: options.Json = False,
) -> None:
    """List the pruning methods, or show the options of one.

    \b
    Examples:
      budwood methods
      budwood methods wrp
    """
    with working():
        from budwood.methods import METHODS

        if name is None:
            listed = {key: first_line(method) for key, method in METHODS.items()}
        elif name in METHODS:
            listed = described(name, METHODS[name])
        else:
            nearest = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UsageError(f"there is no method {name}; there are {', '.join(METHODS)}{hint}")
    answer(listed, json, show if name is None else show_one)


def first_line(method: type) -> str:
    return (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")


def described(name: str, method: type) -> dict[str, Any]:
    """A method as data: its text, and its fields with type and default as an expression writes them."""
    return {
        "name": name,
        "calibrated": getattr(method, "calibrated", True),
        "text": inspect.getdoc(method) or "",
        "options": [
            {
                "name": field.name,
                "type": type_of(field),
                "default": written(field),
            }
            for field in dataclasses.fields(method)
            if field.init
        ],
    }


def type_of(field: dataclasses.Field) -> str:
    """The type of a field as one would write it, its choices where there are some."""
    if get_origin(field.type) is Literal:
        return " | ".join(repr(choice) for choice in get_args(field.type))
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def written(field: dataclasses.Field) -> str | None:
    """The default of a field as one would write it; None where it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        default = field.default
    else:
        return None
    plain = default is None or isinstance(default, bool | int | float | str)
    return repr(default) if plain else f'"{default}"'  # a pattern says itself as text


def show(listed: Mapping[str, Any]) -> None:
    out = console()
    out.print(pairs(list(listed.items())))
    out.print("budwood methods NAME shows the options of one.")


def show_one(method: Mapping[str, Any]) -> None:
    out = console()
    out.print(method["text"])
    if method["options"]:
        out.print(
            table(
                ("option", "type", "default"),
                [
                    (
                        option["name"],
                        option["type"],
                        "must be given" if option["default"] is None else option["default"],
                    )
                    for option in method["options"]
                ],
                words=("type", "default"),
            )
        )
    out.print("needs calibration text" if method["calibrated"] else "needs no calibration text")
