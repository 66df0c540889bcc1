"""`budwood env`: the machine and the versions, for a report that others can compare with."""

from collections.abc import Mapping
from typing import Any

from budwood import humanize
from budwood.cli import options
from budwood.cli.terminal import answer, console, pairs, working


def env(json: options.Json = False) -> None:
    """Show machine, versions, plug-in and kernels.

    \b
    Examples:
      budwood env
      budwood env --json
    """
    with working():
        from budwood.environment import environment

        found = environment()
    answer(found, json, show)


def show(found: Mapping[str, Any]) -> None:
    sizes = {"memory", "disk_free"}
    rows = [
        (name.replace("_", " "), humanize.size(value) if name in sizes else value)
        for name, value in found.items()
        if not isinstance(value, Mapping)
    ]
    rows += [(name, version or "not installed") for name, version in found["versions"].items()]
    console().print(pairs(rows))
