"""`budwood env`: the machine and the versions, to be quoted with every measurement."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.terminal import console, name_value_table, print_result, stdout_to_stderr


def env(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Time the kernels too, and show the fastest for each dtype and number of rows."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Show machine, versions, plug-in and kernels.

    \b
    Examples:
      budwood env --json
      budwood env --measure
    """
    with stdout_to_stderr():
        from budwood.environment import environment

        found = environment(measure)
    print_result(found, json, show)


def show(found: Mapping[str, Any]) -> None:
    sizes = {"memory", "disk_free"}
    rows = [
        (name.replace("_", " "), humanize.size(value) if name in sizes else value)
        for name, value in found.items()
        if not isinstance(value, Mapping)
    ]
    rows += [(name, version or "not installed") for name, version in found["versions"].items()]
    console().print(name_value_table(rows))
