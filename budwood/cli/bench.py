"""`budwood bench`: how fast a pruned model runs on this machine."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_model
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, name_value_table, print_notes, print_result, stdout_to_stderr, table
from budwood.errors import UsageError


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that budwood prune wrote.")],
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The dense model, to compare whole models with.")
    ] = None,
    rows: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Numbers of activation rows (tokens at once) to time each matrix with."),
    ] = "1,8,64,512",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default torch's number.")] = None,
    dtype: options.ComputeDtype = "auto",
    trust_remote_code: options.Trust = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Time MODEL matrix by matrix and as a whole; the figures are added to its report and model card.

    \b
    Examples:
      budwood bench ./SmolLM2-wrp --against ./SmolLM2-135M
      budwood bench ./SmolLM2-wrp --rows 1,4 --threads 2 --json
    """
    with stdout_to_stderr():
        numbers = parse_rows(rows)
        check_model(model)
        if against is not None:
            check_model(against)
        import budwood

        result = budwood.bench(
            model,
            against,
            rows=numbers,
            threads=threads,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress_for(quiet),
        )
    print_result(result, json, show)


def parse_rows(text: str) -> list[int]:
    """The numbers of "1,8,64"; UsageError unless all are positive."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"--rows takes positive numbers such as 1,8,64,512; got '{text}'")
    return numbers


def show(result: Mapping[str, Any]) -> None:
    out = console()
    machine, models = result["machine"], result["model"]
    out.print(
        name_value_table(
            [
                ("machine", f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"),
                ("kernels", result["kernels"]),
                ("dtype", result["dtype"]),
                ("loaded in", f"{result['seconds_to_load']:.1f} s"),
                ("peak memory", humanize.size(result["peak_memory"])),
            ]
        )
    )
    if result["matrices"]:
        out.print(
            table(
                ("matrix", "rows", "kernel", "pruned, us", "dense, us", "times dense", "share of read"),
                [
                    (
                        humanize.shape(matrix["shape"]),
                        matrix["rows"],
                        matrix["kernel"],
                        microseconds(matrix["seconds"]["pruned"]),
                        microseconds(matrix["seconds"]["dense"]),
                        f"{matrix['times_dense']:.2f}",
                        f"{matrix['share_of_read']:.2f}" if "share_of_read" in matrix else None,
                    )
                    for matrix in result["matrices"]
                ],
                text_columns=("kernel",),
            )
        )
    out.print(
        table(
            (
                f"whole model, {models['prompt']} + {models['new_tokens']} tokens",
                "prefill, tokens/s",
                "decode, tokens/s",
                "bytes",
            ),
            [
                (
                    name,
                    f"{models[name]['prefill_tokens_per_second']:.0f}",
                    f"{models[name]['decode_tokens_per_second']:.1f}",
                    humanize.size(models[name]["bytes"]),
                )
                for name in ("pruned", "dense")
                if name in models
            ],
        )
    )
    if "decode_times_dense" in models:
        out.print(
            f"against dense: decode {models['decode_times_dense']:.2f} times as fast, "
            f"prefill {models['prefill_times_dense']:.2f}; a token reads {models['fewer_bytes_read']:.2f} times "
            "fewer bytes"
        )
    print_notes(out, result["warnings"])


def microseconds(seconds: Mapping[str, float]) -> str:
    """Median, and the tenth and ninetieth percentile, in microseconds."""
    low, median, high = (seconds[key] * 1e6 for key in ("low", "median", "high"))
    return f"{median:.0f} ({low:.0f}-{high:.0f})"
