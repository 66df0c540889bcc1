"""`budwood report`: one HTML file about pruned models."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.terminal import console, print_result, stdout_to_stderr


def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="Folders that budwood prune, retrain or compare wrote."),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE.html", help="By default report.html in the first folder."),
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="The heading of the page.")] = None,
    json: options.Json = False,
) -> None:
    """Write one self-contained HTML file about FOLDER...: headline, tables, pictures, conditions of each figure.

    It shows what the folders hold: `evaluate` and `bench` add perplexity and speed to them. The pictures need
    matplotlib (pip install 'budwood[report]').

    \b
    Examples:
      budwood report ./SmolLM2-wrp
      budwood report ./SmolLM2-wrp ./SmolLM2-wanda -o compared.html
    """
    with stdout_to_stderr():
        import budwood

        result = budwood.report(folders, output, title=title)
    print_result(result, json, show)


def show(result: Mapping[str, Any]) -> None:
    out = console()
    out.print(
        f"written: {result['file']} ({humanize.size(result['bytes'])}; models: {len(result['models'])}, "
        f"pictures: {len(result['pictures'])})"
    )
