"""`budwood evaluate`: perplexity of a dense or a pruned model."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_model
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, print_notes, print_result, stdout_to_stderr


def evaluate(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(metavar="D", help="Evaluation text: a file, a folder, token ids, or a name; as for prune."),
    ],
    variant: Annotated[
        Literal["plain", "gptq", "c4-random"],
        typer.Option(
            help="The text as one string, its rows joined by two newlines, or random windows of C4 documents."
        ),
    ] = "plain",
    seq_length: options.SeqLength = 2048,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="WINDOWS", help="Evaluate the first windows only.")
    ] = None,
    bos: options.Bos = "auto",
    seed: options.Seed = 0,
    stream: Annotated[
        bool, typer.Option("--stream", help="One block in memory at a time, for models larger than memory.")
    ] = False,
    dtype: options.ComputeDtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.Trust = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text.

    \b
    Examples:
      budwood evaluate ./SmolLM2-wrp --data wiki.test.raw --limit 16
      budwood evaluate ./SmolLM2-wrp --data sotu --stream --json
    """
    with stdout_to_stderr():
        check_model(model)
        import budwood

        result = budwood.evaluate(
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
            trust_remote_code=trust_remote_code,
            progress=progress_for(quiet),
        )
    print_result(result, json, show)


def show(result: Mapping[str, Any]) -> None:
    out = console()
    out.print(f"perplexity {result['perplexity']:.4f}   (mean loss {result['mean_loss']:.5f} per token)")
    out.print(
        f"{result['windows']} windows of {result['seq_length']:,} tokens, {result['variant']}, "
        f"bos {result['bos']}, {result['dtype']}, {humanize.seconds(result['seconds'])}"
    )
    print_notes(out, result["notes"])
