"""The results of a comparison: `results.json` in the folder that `budwood compare` fills; one row for each run.

    results.json     this record (`Results`)
    results.csv, results.parquet, results.md     the same rows as a flat table
    report.html      the page of `budwood report`
    runs/NAME/       one folder a run: result.json (its `Row`), and model/ where the pruned model is kept

A row is one source, one method and one draw of the calibration text. It holds the records of the verbs as they gave
them: `report` is `report.json` of the pruned folder (blocks, linears, totals, training, machine), `results` the
records of `reports/results.py` as JSON (perplexity, divergence, repetition, tasks, pairs), each with its own
conditions, `speed` what `budwood bench` measured. `figures` are the numbers of a table, by the keys that `FIGURES`
explains; one that was not measured is absent, never 0.
`Results.published` holds figures of papers, which no run measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from budwood.checkpoints.files import write_json
from budwood.checkpoints.schema import COUNT, NONE, NUMBER, Each, fault, shown
from budwood.checkpoints.sidecars import read_object
from budwood.errors import RunError, UsageError
from budwood.reports.record import SCHEMA as REPORT
from budwood.reports.record import SPEED

FILE = "results.json"
SCHEMA = 1

# Keys of `Row.figures`. NAME is that of a text or task in the recipe, or as said. Lower is better for perplexity, D,
# KL, repetition and bytes.
FIGURES = {
    "perplexity NAME": "exp of the mean loss on a text",
    "D NAME": "ln(perplexity / perplexity of the dense model) on a text",
    "D": "mean of D over the texts",
    "KL NAME": "mean divergence from the dense model on a text, nats a token",
    "same top NAME": "share of tokens on which the dense model and this one find the same token most probable",
    "accuracy NAME": "share of right answers of a task, 0 to 1: acc_norm where the task has it",
    "accuracy": "mean over the tasks",
    "repetition": "share of repeated 4-grams in greedy continuations",
    "bits per weight": "of the matrices in scope, index and scales included, over their dense weights",
    "density": "non-zero weights over dense weights, of the matrices in scope",
    "groups keeping NAME": "share of the groups of four adjacent inputs that keep so many weights, 0 to 4",
    "recovered": "weights beyond 2:4 over dense weights, of the matrices in scope",
    "bytes": "of all tensors of the model, as stored; of a quantised row: codes and scales, counted",
    "share of dense": "bytes over the bytes of the dense model in the same dtype",
    "parameters": "of the whole model, removed units not counted",
    "seconds": "of pruning",
    "peak memory": "bytes of the process that pruned",
    "prefill times dense": "speed at reading a prompt over that of the dense model",
    "decode times dense": "speed at generating over that of the dense model",
    "times dense NAME": "speed of the matrices of a shape, with a number of rows of activations, over dense ones",
}

Kind = Literal["dense", "quantised", "pruned"]
Status = Literal["done", "failed", "waiting"]  # waiting: not begun, or interrupted


class Row(TypedDict):
    """One run. JSON-plain."""

    name: str  # of the run and of its folder in runs/
    row: str  # of the recipe's row; all points of its grid and all draws have the same
    label: str  # for pictures and tables: row name and the settings that differ, without the draw
    kind: Kind
    source: str  # the recipe's name of the model
    method: str | None  # the canonical expression, also rtn(...); None for the dense model
    settings: dict[str, Any]  # the options that differ between the points of this row's grid, such as {"alpha": 0.25}
    draw: int  # seed of the calibration windows
    status: Status
    error: str | None  # the sentence of a failed run
    seconds: dict[str, float]  # of each step that was made: prune, perplexity NAME, tasks, ...
    figures: dict[str, float]  # see FIGURES
    report: dict[str, Any] | None  # report.json of the pruned folder
    results: list[dict[str, Any]]  # of the evaluations, as `reports/result_json.to_json` gives them
    speed: dict[str, Any] | None
    machine: dict[str, Any]  # that this run was made on, with versions
    folder: NotRequired[str | None]  # of the model, relative to that of results.json; None where it was dropped


class PublishedFigure(TypedDict):
    """One published figure, to stand beside a measured one. `figure` is a key as in FIGURES."""

    table: str  # such as "WRP, Table 2"
    model: str
    method: str  # as published: "Wanda 2:4"
    row: NotRequired[str | None]  # the row of this recipe that it belongs to, where there is one
    source: NotRequired[str | None]  # the source of this recipe that is the same model
    settings: NotRequired[dict[str, Any]]
    figure: str
    value: float
    conditions: NotRequired[str]  # window, calibration text, and what else is known


class Results(TypedDict):
    """All of one comparison."""

    schema: int
    budwood: str | None
    title: str
    description: str
    recipe: dict[str, Any]  # as it was run, variables replaced
    sources: dict[str, dict[str, Any]]  # by the recipe's name: name, sha256, parameters, bytes_dense
    created: str
    complete: bool  # whether every row is done
    columns: list[str]  # the settings that differ between rows, for the first columns of a table
    rows: list[Row]
    published: list[PublishedFigure]
    notes: list[str]


MOST_RUNS = 2000  # of a comparison
COLUMNS = 200  # of one kind, in a table
LARGEST = 64 * 2**20  # bytes; a row with all its records has some 100 kB
ROW: dict[str, Any] = {
    **dict.fromkeys(("name", "row", "label", "kind", "source", "status"), str),
    **dict.fromkeys(("method", "error", "folder?"), (str, NONE)),
    "settings": dict,
    "draw": COUNT,
    "seconds": Each(NUMBER),
    "figures": Each(NUMBER),
    "report": (REPORT, NONE),
    "results": [dict],
    "speed": (SPEED, NONE),
    "machine": {"versions?": dict},
}
PUBLISHED: dict[str, Any] = {
    **dict.fromkeys(("table", "model", "method", "figure"), str),
    **dict.fromkeys(("row?", "source?", "conditions?"), (str, NONE)),
    "settings?": dict,
    "value": NUMBER,
}
CONTENT: dict[str, Any] = {
    "title": str,
    "description": str,
    "complete": bool,
    "rows": [ROW],
    "published": [PUBLISHED],
    "notes": [str],
}


def read_results(folder: str | Path) -> Results:
    """The results in a folder or a file. Raises UsageError where there are none, RunError where they are damaged."""
    file = Path(folder).expanduser()
    file = file / FILE if file.is_dir() else file
    advice = "give the command budwood compare again"
    content = read_object(file, {}, advice, most=LARGEST)
    if content is None:
        raise UsageError(f"there is no {file}; give a folder that budwood compare wrote")
    if content.get("schema") != SCHEMA:
        raise UsageError(f"{file} has the schema {shown(content.get('schema'))}, and this version reads {SCHEMA}")
    found = fault(content, CONTENT) or too_many(content)
    if found:
        raise RunError(f"{file} is damaged: {found}; {advice}")
    return cast(Results, content)


def too_many(content: dict[str, Any]) -> str | None:
    """What a table of the results would have too much of, as part of a sentence; None where it can be made."""
    rows = content["rows"]
    counts = {
        "rows": (len(rows), MOST_RUNS),
        "published figures": (len(content["published"]), 4 * MOST_RUNS),
        "figures": (len({name for row in rows for name in row["figures"]}), COLUMNS),
        "settings": (len({name for row in rows for name in row["settings"]}), COLUMNS),
    }
    return next(
        (f"it has {count} {name}, at most {most}" for name, (count, most) in counts.items() if count > most), None
    )


def write_results(folder: Path, results: Results) -> None:
    write_json(folder / FILE, results)


def dense_row(rows: Sequence[Row], source: str) -> Row | None:
    """The dense row of a source; None where there is none that is done."""
    found = (row for row in rows if row["kind"] == "dense" and row["source"] == source and row["status"] == "done")
    return next(found, None)
