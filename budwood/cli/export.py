"""`budwood export`: a pruned model in a form that loads anywhere."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood.cli import options
from budwood.cli.terminal import answer, console, working


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned folder.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    format: Annotated[
        Literal["dense"], typer.Option("--format", help="dense: zeros in place, plain transformers loads it.")
    ] = "dense",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write the pruned MODEL as an ordinary dense folder.

    It needs no budwood to load, and is as large as before pruning.

    \b
    Examples:
      budwood export ./SmolLM2-wrp ./SmolLM2-wrp-dense
      budwood export ./SmolLM2-wrp ./SmolLM2-wrp-dense --format dense --overwrite
    """
    with working():
        from budwood.checkpoints.export import export_dense

        export_dense(model, target, overwrite=overwrite)
    answer({"source": model, "target": target, "format": format}, json, show)


def show(written: Mapping[str, Any]) -> None:
    console().print(f"written: {written['target']} ({written['format']})")
