"""`budwood retrain`: train a pruned folder with its zeros fixed."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_model, check_training
from budwood.cli.errors import Interrupted
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, name_value_table, print_notes, print_result, stdout_to_stderr


def retrain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned folder.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    data: Annotated[
        str,
        typer.Option(metavar="D", help="Text to train on, as for prune; an eighth of the windows are held out."),
    ],
    move: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="What is trained, joined by +: biases, norms, one of masklora, loraprune, scalelora, spp, scales, "
            "weights; on request head and embeddings.",
        ),
    ] = "biases+norms+masklora",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank term of every matrix.")] = 16,
    alpha: Annotated[float, typer.Option(help="The low-rank term is multiplied by alpha / rank.")] = 32.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, metavar="WINDOWS", help="Windows per step.")] = 8,
    rate: Annotated[float, typer.Option(help="Highest learning rate, after the first tenth of the steps.")] = 5e-4,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after so many tenths of the steps without a lower held-out loss.")
    ] = 3,
    save_every: Annotated[int, typer.Option(min=1, metavar="STEPS", help="Steps between two checkpoints.")] = 50,
    num_samples: Annotated[int, typer.Option(min=2, metavar="WINDOWS", help="Number of windows.")] = 1024,
    seq_length: options.SeqLength = 2048,
    sampling: Annotated[
        Literal["random", "consecutive"], typer.Option(help="Where in the text the windows are cut.")
    ] = "random",
    seed: options.Seed = 0,
    bos: options.Bos = "auto",
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of the forward and backward passes; auto times a matmul and takes the faster."),
    ] = "auto",
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    trust_remote_code: options.Trust = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Train the pruned MODEL on text and write it to TARGET in the same format. Every zero stays.

    An interrupted run continues when the same command is given again.

    \b
    Examples:
      budwood retrain ./SmolLM2-wanda ./SmolLM2-retrained --data c4
      budwood retrain ./SmolLM2-wanda ./SmolLM2-retrained --data text.txt --move biases+norms --rate 1e-3
    """
    try:
        with stdout_to_stderr():
            check_model(model)
            check_training(move)
            import budwood

            report = budwood.retrain(
                model,
                target,
                data,
                move=move,
                rank=rank,
                alpha=alpha,
                steps=steps,
                batch=batch,
                rate=rate,
                patience=patience,
                save_every=save_every,
                num_samples=num_samples,
                seq_length=seq_length,
                sampling=sampling,
                seed=seed,
                bos=bos,
                compute_dtype=compute_dtype,
                device=device,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress_for(quiet),
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; give the same command again to continue") from None
    print_result(report, json, lambda report: show(report, target))


def show(report: Mapping[str, Any], target: str) -> None:
    out = console()
    training = (report.get("training") or [{}])[-1]
    losses = [loss for _, loss in training.get("held_out", [])]
    rows: list[tuple[str, object]] = [
        ("trained", f"{training.get('trained', 0):,} ({humanize.share(training.get('trained_share'))} of the weights)"),
        ("steps", f"{training.get('steps', 0):,}, the best after {training.get('best_step', 0):,}"),
        ("density of the pruned matrices", humanize.share(report["totals"]["density"])),
        ("weights on disk", humanize.size(report["totals"]["bytes"])),
        ("peak memory", humanize.size(report["peak_memory"])),
        ("time", humanize.seconds(report["seconds"]["total"])),
    ]
    if losses:
        rows.insert(2, ("held-out loss", f"{losses[0]:.4g} before, {min(losses):.4g} after"))
    out.print(name_value_table(rows))
    print_notes(out, report["notes"])
    out.print(f"written: {target} (details in {target}/report.md)")
