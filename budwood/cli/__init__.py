"""The command line: a list of verbs, each a screenful that calls the library as a user would."""

import os
import sys
from typing import Annotated

import typer

from budwood.cli.bench import bench
from budwood.cli.convert import convert
from budwood.cli.env import env
from budwood.cli.errors import told_plainly
from budwood.cli.evaluate import evaluate
from budwood.cli.export import export
from budwood.cli.generate import generate
from budwood.cli.inspect import inspect
from budwood.cli.methods import methods
from budwood.cli.plan import plan
from budwood.cli.prune import prune

VERBS = (plan, prune, evaluate, inspect, bench, generate, export, convert, methods, env)

# Plain help texts: examples must survive being copied, so nothing may frame or re-wrap them.
app = typer.Typer(
    name="budwood",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in VERBS:
    app.command(verb.__name__)(told_plainly(verb))


def say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"budwood {version('budwood')}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=say_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """Prune large language models to files that are really smaller.

    \b
    A first look, from what it would give to what it gave:
      budwood plan MODEL --method "wrp(alpha=0.25)"
      budwood prune MODEL OUT --method "wrp(alpha=0.25)" --data calibration.txt
      budwood evaluate OUT --data test.txt
    """


def with_dashes(arguments: list[str]) -> list[str]:
    """Option names with `-` for `_`, so that both spellings work; values and what follows `--` stay."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    turned = []
    for argument in arguments[:end]:
        name, equals, value = argument.partition("=")
        turned.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return turned + arguments[end:]


def main() -> None:
    """The entry point of the command `budwood`."""
    # torch then takes large tensors in huge pages, a tenth of the time of pruning; read when the first one is made.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app(with_dashes(sys.argv[1:]), prog_name="budwood")
