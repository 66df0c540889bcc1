"""`budwood plan`: what a method would do to a model, from its config and headers alone."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import amounts
from budwood.cli import options
from budwood.cli.terminal import answer, console, table, working


def plan(
    source: options.Source,
    method: options.MethodText,
    format: options.FormatName = "auto",
    values: options.Values = None,
    dtype: Annotated[
        options.DtypeName | None, typer.Option(help="Type of the written weights; the source's by default.")
    ] = None,
    skip: options.Skip = None,
    num_samples: options.NumSamples = 128,
    seq_length: options.SeqLength = 2048,
    json: options.Json = False,
) -> None:
    """Say beforehand what pruning SOURCE would give.

    Matrices in scope, bytes in every format, memory and time, from config and headers: no weights are read. SOURCE
    may also be a lone config.json.

    \b
    Examples:
      budwood plan ./SmolLM2-135M --method "wrp(alpha=0.25)"
      budwood plan ./config.json --method 'sparsegpt("4:8")' --dtype bfloat16 --json
    """
    with working():
        import budwood

        outlook = budwood.plan(
            source,
            method,
            format=format,
            values=values,
            dtype=dtype,
            skip=tuple(skip or ()),
            num_samples=num_samples,
            seq_length=seq_length,
        )
    answer(outlook, json, show)


def show(outlook: Mapping[str, Any]) -> None:
    out = console()
    out.print(f"{outlook['source']}, {outlook['method']}, {outlook['dtype']}")
    out.print(
        f"{outlook['parameters']:,} weights, {outlook['in_scope']:,} of them in scope "
        f"({amounts.share(outlook['coverage'], 1)})"
    )
    out.print(
        table(
            ("matrix", "shape", "count", "pruned"),
            [
                (
                    row["name"],
                    amounts.shape(row["shape"]),
                    row["count"],
                    "yes" if row["pruned"] else row["reason"],
                )
                for row in outlook["linears"]
            ],
            words=("pruned",),
        )
    )
    out.print(
        table(
            ("format", "bytes", "of dense", "bits per weight"),
            [
                (
                    f"{name} (chosen)" if name == outlook["chosen"] else name,
                    *(
                        ("cannot hold it", None, None)
                        if held is None
                        else (
                            amounts.size(held["bytes"]),
                            amounts.share(held["share_of_dense"], 1),
                            amounts.figure(held["bits_per_weight"]),
                        )
                    ),
                )
                for name, held in outlook["formats"].items()
            ],
        )
    )
    out.print(
        f"whole model: {amounts.size(outlook['bytes_dense'])} before, "
        f"{amounts.size(outlook['bytes_after'])} after "
        f"({amounts.share(outlook['bytes_after'] / outlook['bytes_dense'], 1)})"
    )
    out.print(f"to expect: {amounts.size(outlook['memory_peak'])} of memory, {amounts.seconds(outlook['seconds'])}")
    for note in outlook["notes"]:
        out.print(f"note: {note}")
