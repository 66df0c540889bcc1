"""`budwood inspect`: what a folder of weights really holds."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.terminal import answer, console, table, working


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of safetensors, dense or pruned.")],
    x4: Annotated[
        bool,
        typer.Option(
            "--x4", help="How many of four neighbours a row-wise 50 % choice by magnitude keeps, in per cent."
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Show what a folder of weights holds, matrix by matrix.

    Shape, format, density, recovered share, bytes and pattern, read from the files; checksums are compared. Ends
    with status 1 when a matrix breaks the pattern that it promises.

    \b
    Examples:
      budwood inspect ./SmolLM2-wrp
      budwood inspect ./SmolLM2-135M --x4 --json
    """
    with working():
        from budwood.inspection import inspect as look

        found = look(model, x4=x4)
    answer(found, json, show_x4 if x4 else show)
    if found["totals"]["broken"]:
        raise typer.Exit(1)


def show(found: Mapping[str, Any]) -> None:
    out = console()
    out.print(
        table(
            ("matrix", "shape", "format", "density", "recovered", "bytes", "pattern"),
            [
                (
                    name,
                    humanize.shape(matrix["shape"]),
                    matrix["format"],
                    humanize.share(matrix["density"]),
                    humanize.share(matrix["recovered"]),
                    humanize.size(matrix["bytes"]),
                    matrix["pattern"] if matrix["holds"] else f"{matrix['pattern']} BROKEN",
                )
                for name, matrix in found["linears"].items()
            ],
            words=("format", "pattern"),
        )
    )
    totals = found["totals"]
    out.print(
        f"{totals['matrices']} matrices, {totals['in_scope']:,} weights, "
        f"density {humanize.share(totals['density'])}, recovered {humanize.share(totals['recovered'])}, "
        f"{humanize.figure(totals['bits_per_weight'])} bits per weight"
    )
    out.print(
        f"all weights: {humanize.size(totals['bytes'])} on disk, "
        f"{humanize.share(totals['bytes'] / totals['bytes_dense'], 1)} of dense; {found['checksums']}"
    )


def show_x4(found: Mapping[str, Any]) -> None:
    out = console()
    out.print(
        table(
            ("matrix, weights kept of four (%)", *(f"{kept}:4" for kept in range(5))),
            [
                (name, *(f"{100 * part:.2f}" for part in matrix["x4"]))
                for name, matrix in found["linears"].items()
                if matrix["x4"] is not None
            ],
        )
    )
