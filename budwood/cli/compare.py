"""`budwood compare`: methods compared as a recipe says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from budwood import humanize
from budwood.cli import options
from budwood.cli.errors import Interrupted
from budwood.cli.progress import progress_for
from budwood.cli.terminal import console, print_result, stdout_to_stderr, table
from budwood.errors import RunError, UsageError


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="Sources, methods and evaluations.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder of the results; a later call continues it.")],
    variable: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A variable of the recipe; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print the plan, and stop: nothing is written.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Runs at a time, each in a process of its own; 0: none of its own.")
    ] = 1,
    keep_models: Annotated[
        bool | None,
        typer.Option("--keep-models/--drop-models", help="Whether pruned models stay; by default as the recipe says."),
    ] = None,
    trust_remote_code: options.Trust = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Compare methods as RECIPE.yaml says, run by run, into OUT.

    The recipe is checked and a plan printed first. Interrupted, or after rows were added, the same command continues:
    finished runs are not done again. A run that fails is recorded and the others go on; the exit status is then 1.

    \b
    Examples:
      budwood compare recipes/wrp-smollm2.yaml ./compared --dry-run
      budwood compare recipes/wrp-smollm2.yaml ./compared --set data=wiki.test.raw
    """
    try:
        with stdout_to_stderr():
            variables = parse_variables(variable or [])
            if not Path(recipe).expanduser().is_file():
                raise UsageError(f"there is no file {recipe}; give a recipe (.yaml)")
            from budwood.comparison.recipe import read_recipe_file

            found = read_recipe_file(recipe, variables)
            from budwood.comparison.compare import Comparison

            progress = progress_for(quiet)
            comparison = Comparison.read(
                found,
                out,
                jobs=jobs,
                keep_models=keep_models,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            early = comparison.plan() if dry_run or comparison.is_here else None
            if dry_run and early is not None:
                result: Mapping[str, Any] = early
            else:
                with comparison.claimed():
                    comparison.bring()
                    plan = early or comparison.plan()
                    for sentence in sentences(plan):
                        progress.note(sentence)
                    result = comparison.run()
                    comparison.page()
    except KeyboardInterrupt:
        raise Interrupted("interrupted; finished runs are kept: give the same command again to continue") from None
    if dry_run:
        print_result(result, json, show_plan)
        return
    print_result(result, json, lambda result: show(result, out))
    failed = [row for row in result["rows"] if row["status"] == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(result['rows'])} runs failed, first {failed[0]['name']}: {failed[0]['error']}; the "
            "same command tries them again"
        )


def parse_variables(given: list[str]) -> dict[str, str]:
    """Names and values of `NAME=VALUE`; UsageError for other text, and for a name that is there twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes NAME=VALUE, such as data=wiki.test.raw; got '{text}'")
        if name in found:
            raise UsageError(f"--set {name} is given twice")
        found[name] = value
    return found


def sentences(plan: Mapping[str, Any]) -> list[str]:
    """Number of runs, time and disk space."""
    runs, waiting = len(plan["runs"]), plan["waiting"]
    found = [f"{plan['title']}: {runs} runs, {runs - waiting} of them finished"]
    for name in plan["missing"]:
        found.append(f"{name} is not here yet; what its runs take is known once it is")
    if plan["seconds"] is not None:
        found.append(f"at least {humanize.seconds(plan['seconds'])} of forward passes; fits and searches come on top")
    if plan["disk"] is not None:
        kept = "models are kept" if plan["keep_models"] else "models are dropped once their figures are kept"
        found.append(
            f"{humanize.size(plan['disk'])} of disk space ({kept}); {humanize.size(plan['disk_free'])} are free"
        )
    return found


def show_plan(plan: Mapping[str, Any]) -> None:
    out = console()
    out.print(
        table(
            ("run", "source", "draw", "state", "forward passes", "written"),
            [
                (
                    run["label"],
                    run["source"],
                    run["draw"],
                    "finished" if run["done"] else "waiting",
                    humanize.seconds(run["seconds"]),
                    humanize.size(run["bytes"]),
                )
                for run in plan["runs"]
            ],
            text_columns=("source", "state"),
        )
    )
    for sentence in sentences(plan):
        out.print(sentence)


def show(results: Mapping[str, Any], out: str) -> None:
    where = console()
    rows = results["rows"]
    texts = [name for name in dict.fromkeys(n for row in rows for n in row["figures"]) if name.startswith("perplexity")]
    where.print(
        table(
            ("run", "source", "draw", "state", "bits", *texts, "D"),
            [
                (
                    row["label"],
                    row["source"],
                    row["draw"],
                    row["status"],
                    humanize.figure(row["figures"].get("bits per weight")),
                    *(humanize.figure(row["figures"].get(name)) for name in texts),
                    humanize.figure(row["figures"].get("D"), 3),
                )
                for row in rows
            ],
            text_columns=("source", "state"),
        )
    )
    for row in rows:
        if row["status"] == "failed":
            where.print(f"{row['name']} failed: {row['error']}")
    where.print(f"written: {out}/results.json, .csv, .parquet, .md; report.html")
