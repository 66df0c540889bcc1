"""`budwood bench`: how fast a pruned model is on the machine at hand."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.progress import telling
from budwood.cli.terminal import answer, console, pairs, table, working


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that budwood prune wrote.")],
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The dense model, to compare whole models with.")
    ] = None,
    rows: Annotated[
        str, typer.Option(metavar="N,N,...", help="How many tokens at once to time each matrix with.")
    ] = "1,8,64,512",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; torch's own number where not given.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")
    ] = "auto",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Time MODEL matrix by matrix and as a whole; the figures are kept in its report and model card.

    \b
    Examples:
      budwood bench ./SmolLM2-wrp --against ./SmolLM2-135M
      budwood bench ./SmolLM2-wrp --rows 1,4 --threads 2 --json
    """
    with working():
        import budwood
        from budwood.errors import UsageError

        try:
            numbers = [int(number) for number in rows.split(",")]
        except ValueError as error:
            raise UsageError(f"--rows takes numbers such as 1,8,64,512; got '{rows}'") from error
        found = budwood.bench(model, against, rows=numbers, threads=threads, dtype=dtype, progress=telling(quiet))
    answer(found, json, show)


def show(found: Mapping[str, Any]) -> None:
    out = console()
    machine, whole = found["machine"], found["model"]
    out.print(
        pairs(
            [
                ("machine", f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"),
                ("kernels", found["kernels"]),
                ("type", found["dtype"]),
                ("loaded in", f"{found['seconds_to_load']:.1f} s"),
                ("peak memory", humanize.size(found["peak_memory"])),
            ]
        )
    )
    out.print(
        table(
            ("matrix", "rows", "kernel", "pruned, us", "dense, us", "times dense", "share of read"),
            [
                (
                    humanize.shape(one["shape"]),
                    one["rows"],
                    one["kernel"],
                    micro(one["seconds"]["pruned"]),
                    micro(one["seconds"]["dense"]),
                    f"{one['times_dense']:.2f}",
                    f"{one['share_of_read']:.2f}" if "share_of_read" in one else None,
                )
                for one in found["matrices"]
            ],
            words=("kernel",),
        )
    )
    out.print(
        table(
            (
                f"whole model, {whole['prompt']} + {whole['new_tokens']} tokens",
                "read, tokens/s",
                "written, tokens/s",
                "bytes",
            ),
            [
                (
                    name,
                    f"{whole[name]['prefill_tokens_per_second']:.0f}",
                    f"{whole[name]['decode_tokens_per_second']:.1f}",
                    humanize.size(whole[name]["bytes"]),
                )
                for name in ("pruned", "dense")
                if name in whole
            ],
        )
    )
    if "decode_times_dense" in whole:
        out.print(
            f"against dense: {whole['decode_times_dense']:.2f} times as fast at writing, "
            f"{whole['prefill_times_dense']:.2f} at reading"
        )
    for sentence in found["warnings"]:
        out.print(f"note: {sentence}")


def micro(seconds: Mapping[str, float]) -> str:
    """Median and spread in microseconds."""
    low, middle, high = (seconds[key] * 1e6 for key in ("low", "median", "high"))
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"
