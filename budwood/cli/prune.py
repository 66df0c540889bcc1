"""`budwood prune`: the main job."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.errors import Interrupted
from budwood.cli.progress import telling
from budwood.cli.terminal import answer, console, pairs, working


def prune(
    source: options.Source,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    method: options.MethodText,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="Calibration text: a file (.txt .raw .jsonl .jsonl.gz .parquet), a folder of texts, "
            "token ids (.npy .safetensors), or sotu, wikitext2, c4, hf:REPO[:CONFIG]:SPLIT[:FIELD].",
        ),
    ] = None,
    num_samples: options.NumSamples = 128,
    seq_length: options.SeqLength = 2048,
    sampling: Annotated[
        Literal["random", "consecutive"], typer.Option(help="Where in the text the windows are cut.")
    ] = "random",
    seed: options.Seed = 0,
    bos: options.Bos = "auto",
    format: options.FormatName = "auto",
    values: options.Values = None,
    dtype: Annotated[
        options.DtypeName | None, typer.Option(help="Type of the written weights; the source's by default.")
    ] = None,
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the model's products; auto times one and takes the faster."),
    ] = "auto",
    device: options.Device = None,
    skip: options.Skip = None,
    overwrite: options.Overwrite = False,
    activation_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Activations beyond this many bytes live in a file.")
    ] = "4GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with SOURCE.")
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Prune SOURCE block by block into the model folder TARGET.

    A run that was cut off goes on where it stopped when the same command is given again.

    \b
    Examples:
      budwood prune ./SmolLM2-135M ./SmolLM2-wrp --method "wrp(alpha=0.25)" --data sotu
      budwood prune ./SmolLM2-135M ./SmolLM2-24 --method 'wanda("2:4")' --data c4.jsonl.gz --num-samples 64
    """
    try:
        with working():
            import budwood

            report = budwood.prune(
                source,
                target,
                method,
                data,
                num_samples=num_samples,
                seq_length=seq_length,
                sampling=sampling,
                seed=seed,
                bos=bos,
                format=format,
                values=values,
                dtype=dtype,
                compute_dtype=compute_dtype,
                device=device,
                skip=tuple(skip or ()),
                overwrite=overwrite,
                activation_memory=activation_memory,
                trust_remote_code=trust_remote_code,
                progress=telling(quiet),
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on where this one stopped") from None
    answer(report, json, lambda report: show(report, target))


def show(report: Mapping[str, Any], target: str) -> None:
    out = console()
    totals = report["totals"]
    errors = [block["relative_error"] for block in report["blocks"] if block["relative_error"] is not None]
    roundings = [matrix["rounding_error"] for matrix in report["linears"].values() if matrix.get("rounding_error")]
    rows: list[tuple[str, object]] = [
        ("method", report["method"]),
        ("density of the pruned matrices", humanize.share(totals["density"])),
        ("recovered beyond 2:4", humanize.share(totals["recovered"])),
        ("bits per pruned weight", humanize.figure(totals["bits_per_weight"])),
        ("weights on disk", humanize.size(totals["bytes"])),
        ("share of dense", humanize.share(totals["bytes"] / totals["bytes_dense"], 1)),
        ("matrices in scope", f"{humanize.share(totals['coverage'], 1)} of all weights"),
        ("peak memory", humanize.size(report["peak_memory"])),
        ("time", humanize.seconds(report["seconds"]["total"])),
    ]
    if errors:
        rows.insert(4, ("output error of a block", humanize.span(errors)))
    if roundings:
        rows.insert(4, ("rounding error of a matrix", humanize.span(roundings)))
    out.print(pairs(rows))
    for note in report["notes"]:
        out.print(f"note: {note}")
    out.print(f"written: {target} (block by block in {target}/report.md)")
