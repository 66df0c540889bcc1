"""`budwood prune`: prune a model into a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_format, check_method, check_model
from budwood.cli.errors import Interrupted
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, name_value_table, print_notes, print_result, stdout_to_stderr
from budwood.errors import UsageError


def prune(
    context: typer.Context,
    source: options.Source,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    method: Annotated[str | None, options.METHOD] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="Calibration text: a file (.txt .raw .jsonl .jsonl.gz .parquet), a folder of texts, "
            "token ids (.npy .safetensors), or sotu, wikitext2, c4, hf:REPO[:CONFIG]:SPLIT[:FIELD]; "
            "or a mix with shares of the windows: 'c4:3,[sotu:1950-]:1'.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Take every option that is not given here from this recipe.json, arithmetic included: makes a folder "
            "again.",
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
    dtype: options.StoredDtype = None,
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the forward passes; auto times a matmul and takes the faster."),
    ] = "auto",
    sparse_products: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            help="Multiply pruned matrices by the native sparse kernels when a block runs again; auto times them."
        ),
    ] = "auto",
    attention: Annotated[
        Literal["auto", "fused", "blocked"],
        typer.Option(help="Attention: torch's fused kernel, or by blocks of queries; auto takes the faster."),
    ] = "auto",
    device: options.Device = "auto",
    skip: options.Skip = None,
    overwrite: options.Overwrite = False,
    activation_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Activations beyond this many bytes are kept in a file.")
    ] = "4GB",
    trust_remote_code: options.Trust = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Prune SOURCE block by block into the model folder TARGET.

    An interrupted run continues when the same command is given again.

    \b
    Examples:
      budwood prune ./SmolLM2-135M ./SmolLM2-wrp --method "wrp(alpha=0.25)" --data sotu
      budwood prune ./SmolLM2-135M ./SmolLM2-again --recipe ./SmolLM2-wrp/recipe.json
    """
    settings: dict[str, Any] = {
        "method": method,
        "data": data,
        "num_samples": num_samples,
        "seq_length": seq_length,
        "sampling": sampling,
        "seed": seed,
        "bos": bos,
        "format": format,
        "values": values,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "sparse_products": sparse_products,
        "attention": attention,
        "device": device,
        "skip": tuple(skip or ()),
        "overwrite": overwrite,
        "activation_memory": activation_memory,
        "trust_remote_code": trust_remote_code,
    }
    if recipe is not None:
        explicit = {name: value for name, value in settings.items() if is_given(context, name)}
    try:
        with stdout_to_stderr():
            check(source, method, format, values, activation_memory, recipe)
            if recipe is not None:
                from budwood.runs.recipe import recipe_options

                settings = {**recipe_options(recipe), **explicit}
            import budwood

            report = budwood.prune(source, target, **settings, progress=progress_for(quiet))
    except KeyboardInterrupt:
        raise Interrupted("interrupted; give the same command again to continue") from None
    print_result(report, json, lambda report: show(report, target))


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave the option, so that it does not have its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def check(
    source: str, method: str | None, format: str, values: str | None, activation_memory: str, recipe: str | None
) -> None:
    """UsageError for what can be refused without a model."""
    if method is None and recipe is None:
        raise UsageError("prune needs a method: give --method EXPR, or --recipe FILE")
    if recipe is not None and not Path(recipe).expanduser().is_file():
        raise UsageError(f"there is no file {recipe}; --recipe takes the recipe.json of a pruned folder")
    humanize.parse_bytes(activation_memory)
    if method is not None:
        check_method(method)
    check_format(format, values)
    check_model(source)


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
    out.print(name_value_table(rows))
    print_notes(out, report["notes"])
    out.print(f"written: {target} (block by block in {target}/report.md)")
