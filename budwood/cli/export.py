"""`budwood export`: a pruned model in another form."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.progress import telling
from budwood.cli.terminal import answer, console, working


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned folder.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="dense: zeros in place, plain transformers loads it; or a format as for prune. By default dense, "
            "and auto with int8 values.",
        ),
    ] = None,
    values: options.Values = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write the pruned MODEL as an ordinary dense folder, or in another format.

    A dense folder needs no budwood to load, and is as large as before pruning. --values int8 rounds the weights that
    are there, without any text.

    \b
    Examples:
      budwood export ./SmolLM2-wrp ./SmolLM2-wrp-dense
      budwood export ./SmolLM2-wrp ./SmolLM2-wrp-int8 --values int8
    """
    layout = format or ("dense" if values is None else "auto")
    with working():
        from budwood.repacking import repack

        report = repack(model, target, layout, values, overwrite=overwrite, progress=telling(quiet))
        written: dict[str, Any] = {"format": report["format"], "totals": report["totals"]}
    answer({"source": model, "target": target, **written}, json, show)


def show(written: Mapping[str, Any]) -> None:
    totals = written.get("totals")
    bits = f", {humanize.figure(totals['bits_per_weight'])} bits per pruned weight" if totals else ""
    console().print(f"written: {written['target']} ({written['format']}{bits})")
