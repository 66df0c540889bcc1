"""`budwood export`: a pruned model in another format."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_format, check_model
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, print_result, stdout_to_stderr


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned folder.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="dense: with explicit zeros, loads in plain transformers; or a format as for prune. By default dense, "
            "and auto with --values.",
        ),
    ] = None,
    values: options.Values = None,
    trust_remote_code: options.Trust = False,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write the pruned MODEL as an ordinary dense folder, or in another format.

    A dense folder loads without budwood and is as large as before pruning. --values int8 or int4 rounds the
    weights of MODEL without calibration.

    \b
    Examples:
      budwood export ./SmolLM2-wrp ./SmolLM2-wrp-dense
      budwood export ./SmolLM2-wrp ./SmolLM2-wrp-int8 --values int8
    """
    name = format or ("dense" if values is None else "auto")
    with stdout_to_stderr():
        check_model(model)
        check_format(name, values)
        from budwood.repacking import repack

        report = repack(
            model,
            target,
            name,
            values,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress_for(quiet),
        )
    result = {"source": model, "target": target, "format": report["format"], "totals": report["totals"]}
    print_result(result, json, show)


def show(result: Mapping[str, Any]) -> None:
    bits = humanize.figure(result["totals"]["bits_per_weight"])
    console().print(f"written: {result['target']} ({result['format']}, {bits} bits per pruned weight)")
