"""The rows of the results, put together from the records that the runs left in their folders."""

import contextlib
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from budwood import humanize
from budwood.checkpoints.files import write_json
from budwood.comparison.execute import ERROR
from budwood.comparison.runs import Run
from budwood.comparison.sources import DenseModel
from budwood.comparison.task import MODEL, PRUNE, RUNS, SPEED, STEPS, Task, read_json
from budwood.errors import UsageError
from budwood.evaluation.paired import paired_loss, paired_score
from budwood.reports.comparison import Row, Status
from budwood.reports.result_json import from_json, to_json

PAIRS = "pairs.json"
SAME_TEXT = ("sha256", "variant")  # of two perplexities that may be compared


def rows_of(runs: Sequence[Run], tasks: Mapping[str, Task], models: Mapping[str, DenseModel]) -> list[Row]:
    """A row for each run; figures that need the dense model of the same source are added where it is finished."""
    rows = [row_of(run, tasks[run.name], models[run.source]) for run in runs]
    for row in rows:
        dense = next((other for other in rows if other["kind"] == "dense" and other["source"] == row["source"]), None)
        if dense is not None:
            row["figures"] |= distances(row, dense)
            if dense is not row:
                row["results"] += pairs(row, dense, tasks[row["name"]])
    return rows


def row_of(run: Run, task: Task, model: DenseModel) -> Row:
    records = {step: record for step in task.steps if (record := task.record(step)) is not None}
    error = read_json(task.folder / ERROR, {"error": str})
    missing = len(records) < len(task.steps)
    status: Status = "failed" if error and missing else "waiting" if missing else "done"
    results = [
        to_json(from_json(result, f"{task.folder / STEPS}, {step}"))
        for step, record in records.items()
        for result in record.get("results", [])
    ]
    speed = records.get(SPEED, {}).get("speed")
    kept = run.kind == "pruned" and (task.model / "config.json").is_file()
    row: Row = {
        "name": run.name,
        "row": run.row,
        "label": run.label,
        "kind": run.kind,
        "source": run.source,
        "method": None if run.method is None else str(run.method),
        "settings": run.settings,
        "draw": run.draw,
        "status": status,
        "error": str(error["error"]) if error and missing else None,
        "seconds": {step: record["seconds"] for step, record in records.items()},
        "figures": {},
        "report": records.get(PRUNE, {}).get("report"),
        "results": results,
        "speed": speed,
        "machine": next((record["machine"] for record in reversed(records.values()) if "machine" in record), {}),
        "folder": f"{RUNS}/{run.name}/{MODEL}" if kept else None,
    }
    row["figures"] = sizes(run, records.get(PRUNE), model) | evaluated(results) | speeds(speed)
    return row


def pairs(row: Row, dense: Row, task: Task) -> list[dict[str, Any]]:
    """The paired differences of a row from the dense one, by text and task; kept in the folder of the run.

    What was measured on other windows or items is not compared.
    """
    ours, theirs = results_by_subject(row), results_by_subject(dense)
    shared = [subject for subject in ours if subject in theirs]
    asked = json.dumps([[ours[subject], theirs[subject]] for subject in shared], sort_keys=True)
    key = hashlib.sha256(asked.encode()).hexdigest()[:32]
    file = task.folder / STEPS / PAIRS
    kept = read_json(file, {"id": str, "results": [dict]})
    if kept is None or kept["id"] != key:
        found = []
        for subject in shared:
            compare: Any = paired_loss if ours[subject]["kind"] == "perplexity" else paired_score
            with contextlib.suppress(UsageError):
                found.append(to_json(compare(from_json(ours[subject]), from_json(theirs[subject]))))
        kept = {"id": key, "results": found}
        if shared:
            write_json(file, kept)
    return list(kept["results"])


def results_by_subject(row: Row) -> dict[str, dict[str, Any]]:
    """Perplexities by text, scores by task."""
    names = {"perplexity": lambda result: result["text"]["name"], "task": lambda result: result["task"]}
    return {
        f"{result['kind']} {names[result['kind']](result)}": result
        for result in row["results"]
        if result["kind"] in names
    }


def sizes(run: Run, record: Mapping[str, Any] | None, model: DenseModel) -> dict[str, float]:
    """Bytes, bits and counts of the model itself."""
    structure, _, _ = model.structure(run.prune.skip)
    itemsize = model.storage(run.prune.dtype).itemsize
    whole = structure.parameters * itemsize
    if run.kind == "dense":
        found = {"bits per weight": 8.0 * itemsize, "density": 1.0, "bytes": whole, "share of dense": 1.0}
        return found | {"parameters": structure.parameters}
    if record is None:
        return {}
    totals = record["report"]["totals"]
    found = {
        **record["size"],
        "density": totals["density"],
        "recovered": totals["recovered"],
        "share of dense": record["size"]["bytes"] / whole,
        "parameters": totals.get("parameters_after", totals["parameters"]),
        "seconds": record["report"]["seconds"]["total"],
        "peak memory": record["report"]["peak_memory"],
    }
    found |= groups(record["report"])
    if run.kind == "quantised":  # a zero costs as much as any code
        found["density"] = 1.0
        del found["recovered"]
    return {name: value for name, value in found.items() if value is not None}


def evaluated(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of the evaluations."""
    found: dict[str, float] = {}
    scores = []
    for result in results:
        kind = result["kind"]
        if kind == "perplexity":
            found[f"perplexity {result['text']['name']}"] = result["perplexity"]
        elif kind == "divergence":
            found[f"KL {result['text']['name']}"] = result["kl_mean"]
            found[f"same top {result['text']['name']}"] = result["same_top"]
        elif kind == "repetition":
            found["repetition"] = result["share"]
        elif kind == "task":
            found[f"accuracy {result['task']}"] = result["value"]
            scores.append(result["value"])
    if len(scores) > 1:
        found["accuracy"] = statistics.fmean(scores)
    return found


def speeds(speed: Mapping[str, Any] | None) -> dict[str, float]:
    model = (speed or {}).get("model", {})
    matrices = {
        f"times dense {humanize.shape(matrix['shape'])}, {matrix['rows']} rows": matrix["times_dense"]
        for matrix in (speed or {}).get("matrices", [])
    }
    names = {"prefill times dense": "prefill_times_dense", "decode times dense": "decode_times_dense"}
    return {name: model[key] for name, key in names.items() if key in model} | matrices


def groups(report: Mapping[str, Any]) -> dict[str, float]:
    """Shares of the groups of four adjacent inputs that keep 0, 1, 2, 3, 4 weights, over all matrices."""
    counts = [matrix["x4"] for matrix in report["linears"].values() if matrix.get("x4")]
    summed = [sum(found) for found in zip(*counts, strict=True)]
    return {f"groups keeping {kept}": count / max(1, sum(summed)) for kept, count in enumerate(summed)}


def distances(row: Row, dense: Row) -> dict[str, float]:
    """D of every text that both rows were measured on, on the same windows; their mean where all texts are there."""
    theirs = {result["text"]["name"]: result for result in dense["results"] if result["kind"] == "perplexity"}
    found: dict[str, float] = {}
    for result in row["results"]:
        if result["kind"] != "perplexity":
            continue
        other = theirs.get(result["text"]["name"])
        if other is not None and all(other["text"][key] == result["text"][key] for key in SAME_TEXT):
            found[f"D {result['text']['name']}"] = result["mean_loss"] - other["mean_loss"]
    if found and len(found) == len(theirs):
        found["D"] = statistics.fmean(found.values())
    return found


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The settings that differ between rows: source, the options of grids, draw."""
    options = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    several = [name for name in ("source", "draw") if len({row[name] for row in rows}) > 1]  # type: ignore[literal-required]
    return [*(["source"] if "source" in several else []), "label", *options, *(["draw"] if "draw" in several else [])]
