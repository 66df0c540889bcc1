"""`budwood plan`: what a method would do to a model, from its config and headers alone."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
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

        forecast = budwood.plan(
            source,
            method,
            format=format,
            values=values,
            dtype=dtype,
            skip=tuple(skip or ()),
            num_samples=num_samples,
            seq_length=seq_length,
        )
    answer(forecast, json, show)


def show(forecast: Mapping[str, Any]) -> None:
    out = console()
    out.print(f"{forecast['source']}, {forecast['method']}, {forecast['dtype']}")
    out.print(
        f"{forecast['parameters']:,} weights, {forecast['in_scope']:,} of them in scope "
        f"({humanize.share(forecast['coverage'], 1)})"
    )
    out.print(
        table(
            ("matrix", "shape", "count", "pruned"),
            [
                (
                    row["name"],
                    humanize.shape(row["shape"]),
                    row["count"],
                    "yes" if row["pruned"] else row["reason"],
                )
                for row in forecast["linears"]
            ],
            words=("pruned",),
        )
    )
    out.print(
        table(
            ("format", "bytes", "of dense", "bits per weight"),
            [
                (
                    f"{name} (chosen)" if name == forecast["chosen"] else name,
                    *(
                        ("cannot hold it", None, None)
                        if held is None
                        else (
                            humanize.size(held["bytes"]),
                            humanize.share(held["share_of_dense"], 1),
                            humanize.figure(held["bits_per_weight"]),
                        )
                    ),
                )
                for name, held in forecast["formats"].items()
            ],
        )
    )
    out.print(
        f"whole model: {humanize.size(forecast['bytes_dense'])} before, "
        f"{humanize.size(forecast['bytes_after'])} after "
        f"({humanize.share(forecast['bytes_after'] / forecast['bytes_dense'], 1)})"
    )
    out.print(f"to expect: {humanize.size(forecast['memory_peak'])} of memory, {humanize.seconds(forecast['seconds'])}")
    for note in forecast["notes"]:
        out.print(f"note: {note}")
