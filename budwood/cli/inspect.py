"""`budwood inspect`: what a folder of weights holds, read from its files."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_model
from budwood.cli.terminal import console, print_notes, print_result, stdout_to_stderr, table


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of safetensors, dense or pruned.")],
    x4: Annotated[
        bool,
        typer.Option(
            "--x4",
            help="Of every four adjacent weights, how many pruning half of each row by magnitude keeps, in per cent.",
        ),
    ] = False,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
) -> None:
    """Show what a folder of weights holds, matrix by matrix.

    Shape, format, density, recovered share, bytes and pattern, read from the files; checksums are compared. Exits
    with status 1 when a matrix violates the pattern of its method.

    \b
    Examples:
      budwood inspect ./SmolLM2-wrp
      budwood inspect ./SmolLM2-135M --x4 --json
    """
    with stdout_to_stderr():
        check_model(model)
        from budwood import inspection

        result = inspection.inspect(model, x4=x4, trust_remote_code=trust_remote_code)
    print_result(result, json, show_x4 if x4 else show)
    if result["totals"]["broken"]:
        raise typer.Exit(1)


def show(result: Mapping[str, Any]) -> None:
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
                for name, matrix in result["linears"].items()
            ],
            text_columns=("format", "pattern"),
        )
    )
    totals = result["totals"]
    out.print(
        f"{totals['matrices']} matrices, {totals['in_scope']:,} weights, "
        f"density {humanize.share(totals['density'])}, recovered {humanize.share(totals['recovered'])}, "
        f"{humanize.figure(totals['bits_per_weight'])} bits per weight"
    )
    out.print(
        f"all weights: {humanize.size(totals['bytes'])} on disk, "
        f"{humanize.share(totals['bytes'] / totals['bytes_dense'], 1)} of dense; {result['checksums']}"
    )
    print_notes(out, result["notes"])


def show_x4(result: Mapping[str, Any]) -> None:
    out = console()
    out.print(
        table(
            ("matrix, weights kept of four (%)", *(f"{kept}:4" for kept in range(5))),
            [
                (name, *(f"{100 * share:.2f}" for share in matrix["x4"]))
                for name, matrix in result["linears"].items()
                if matrix["x4"] is not None
            ],
        )
    )
