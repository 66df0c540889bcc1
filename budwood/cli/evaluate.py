"""`budwood evaluate`: perplexity of a dense or a pruned model."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.progress import telling
from budwood.cli.terminal import answer, console, working


def evaluate(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(metavar="D", help="Text to measure on: a file, a folder, token ids, or a name; as for prune."),
    ],
    variant: Annotated[
        Literal["plain", "gptq", "c4-random"],
        typer.Option(help="The text as one string, rows joined by two newlines, or random windows of C4 documents."),
    ] = "plain",
    seq_length: options.SeqLength = 2048,
    limit: Annotated[int | None, typer.Option(min=1, metavar="WINDOWS", help="Measure only the first windows.")] = None,
    bos: options.Bos = "auto",
    seed: options.Seed = 0,
    stream: Annotated[
        bool, typer.Option("--stream", help="One block in memory at a time, for models larger than memory.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")
    ] = "auto",
    device: options.Device = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text.

    \b
    Examples:
      budwood evaluate ./SmolLM2-wrp --data wiki.test.raw --limit 16
      budwood evaluate ./SmolLM2-wrp --data sotu --stream --json
    """
    with working():
        import budwood

        measured = budwood.evaluate(
            model,
            data,
            variant=variant,
            seq_length=seq_length,
            limit=limit,
            bos=bos,
            seed=seed,
            stream=stream,
            dtype=dtype,
            device=device,
            progress=telling(quiet),
        )
    answer(measured, json, show)


def show(measured: Mapping[str, Any]) -> None:
    out = console()
    out.print(f"perplexity {measured['perplexity']:.4f}   (mean loss {measured['mean_loss']:.5f} per token)")
    out.print(
        f"{measured['windows']} windows of {measured['seq_length']:,} tokens, {measured['variant']}, "
        f"bos {measured['bos']}, {measured['dtype']}, {humanize.seconds(measured['seconds'])}"
    )
    for note in measured["notes"]:
        out.print(f"note: {note}")
