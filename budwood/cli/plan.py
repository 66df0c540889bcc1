"""`budwood plan`: what a method would do to a model, from its config and headers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_format, check_method, check_model
from budwood.cli.terminal import console, print_notes, print_result, stdout_to_stderr, table

KINDS = {"attention": "KV groups", "mlp": "neurons"}


def plan(
    source: options.Source,
    method: Annotated[str, options.METHOD],
    format: options.FormatName = "auto",
    values: options.Values = None,
    dtype: options.StoredDtype = None,
    skip: options.Skip = None,
    num_samples: options.NumSamples = 128,
    seq_length: options.SeqLength = 2048,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
) -> None:
    """Predict the result of pruning SOURCE.

    Matrices in scope, bytes in every format, memory and time, from config and headers: no weights are read. SOURCE
    may also be a single config.json.

    \b
    Examples:
      budwood plan ./SmolLM2-135M --method "wrp(alpha=0.25)"
      budwood plan ./config.json --method 'sparsegpt("4:8")' --dtype bfloat16 --json
    """
    with stdout_to_stderr():
        check_method(method)
        check_format(format, values)
        if not is_config(source):
            check_model(source)
        import budwood

        prediction = budwood.plan(
            source,
            method,
            format=format,
            values=values,
            dtype=dtype,
            skip=tuple(skip or ()),
            num_samples=num_samples,
            seq_length=seq_length,
            trust_remote_code=trust_remote_code,
        )
    print_result(prediction, json, show)


def is_config(source: str) -> bool:
    """Whether `source` is a single configuration file, which has no folder of weights."""
    path = Path(source).expanduser()
    return path.suffix == ".json" and path.is_file()


def show(prediction: Mapping[str, Any]) -> None:
    out = console()
    out.print(f"{prediction['source']}, {prediction['method']}, {prediction['dtype']}")
    out.print(
        f"{prediction['parameters']:,} weights, {prediction['in_scope']:,} of them in scope "
        f"({humanize.share(prediction['coverage'], 1)})"
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
                for row in prediction["linears"]
            ],
            text_columns=("pruned",),
        )
    )
    if prediction["blocks"]:
        out.print(table(("block", *KINDS.values()), unit_rows(prediction["blocks"])))
    after = prediction["parameters_after"]
    if after != prediction["parameters"]:
        times = prediction["speed_up"]
        fewer = "as many" if times is None else f"{times:.2f} times fewer"
        share = humanize.share(after / prediction["parameters"], 1)
        out.print(f"{after:,} weights are left ({share}); a token reads {fewer}")
    out.print(
        table(
            ("format", "bytes", "of dense", "bits per weight"),
            [
                (f"{name} (chosen)" if name == prediction["chosen"] else name, *sizes_row(sizes))
                for name, sizes in prediction["formats"].items()
            ],
        )
    )
    out.print(
        f"whole model: {humanize.size(prediction['bytes_dense'])} before, "
        f"{humanize.size(prediction['bytes_after'])} after "
        f"({humanize.share(prediction['bytes_after'] / prediction['bytes_dense'], 1)})"
    )
    out.print(
        f"estimate: {humanize.size(prediction['memory_peak'])} of memory, {humanize.seconds(prediction['seconds'])}"
    )
    if prediction["work_bytes"]:
        out.print(f"intermediate results: {humanize.size(prediction['work_bytes'])} on disk until the run is finished")
    print_notes(out, prediction["notes"])


def unit_rows(blocks: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Name and units of every block; successive blocks with the same numbers are one row."""
    rows: list[tuple[str, ...]] = []
    for block in blocks:
        counts = tuple("{:,} of {:,}".format(*block.get(kind, (0, 0))) for kind in KINDS)
        if rows and rows[-1][1:] == counts:
            rows[-1] = (f"{rows[-1][0].partition(' to ')[0]} to {block['name'].rpartition('.')[2]}", *counts)
        else:
            rows.append((block["name"], *counts))
    return rows


def sizes_row(sizes: Mapping[str, Any] | None) -> tuple[str | None, str | None, str | None]:
    if sizes is None:
        return "cannot hold it", None, None
    return (
        humanize.size(sizes["bytes"]),
        humanize.share(sizes["share_of_dense"], 1),
        humanize.figure(sizes["bits_per_weight"]),
    )
