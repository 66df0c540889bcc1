"""The command line: one file per verb, each of which calls the library as a user would."""

import os
import sys
from typing import Annotated

import typer

from budwood.cli.bench import bench
from budwood.cli.compare import compare
from budwood.cli.convert import convert
from budwood.cli.env import env
from budwood.cli.errors import report_errors
from budwood.cli.evaluate import evaluate
from budwood.cli.export import export
from budwood.cli.generate import generate
from budwood.cli.inspect import inspect
from budwood.cli.methods import methods
from budwood.cli.plan import plan
from budwood.cli.prune import prune
from budwood.cli.report import report
from budwood.cli.retrain import retrain

VERBS = (plan, prune, retrain, evaluate, inspect, bench, compare, report, generate, export, convert, methods, env)

# Plain help texts: examples are copied, so nothing may frame or re-wrap them.
app = typer.Typer(
    name="budwood",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in VERBS:
    app.command(verb.__name__)(report_errors(verb))


def print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"budwood {version('budwood')}")
        raise typer.Exit()


@app.callback()
def options_of_all_verbs(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Prune large language models to smaller files.

    \b
    To begin with: predict, prune, measure.
      budwood plan MODEL --method "wrp(alpha=0.25)"
      budwood prune MODEL OUT --method "wrp(alpha=0.25)" --data calibration.txt
      budwood evaluate OUT --data test.txt
    """


def with_dashes(arguments: list[str]) -> list[str]:
    """Option names with `-` for `_`, so that both spellings work; values and what follows `--` are unchanged."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    changed = []
    for argument in arguments[:end]:
        name, equals, value = argument.partition("=")
        changed.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return changed + arguments[end:]


def main() -> None:
    """The entry point of the command `budwood`."""
    # torch then puts large tensors into huge pages, which saves a tenth of the time of pruning. torch reads the
    # variable when it allocates the first one.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app(with_dashes(sys.argv[1:]), prog_name="budwood")
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):  # before the verb began
            typer.echo("budwood: interrupted", err=True)
        raise
