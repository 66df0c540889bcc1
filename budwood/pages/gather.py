"""What a page is about, read from folders: pruned models, and comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from budwood.errors import UsageError
from budwood.pages.shown import Shown, family_of, figures_of, mapping
from budwood.pages.text import number
from budwood.reports.comparison import FILE as RESULTS
from budwood.reports.comparison import PublishedFigure, read_results
from budwood.reports.record import FILE as REPORT
from budwood.reports.record import read_report


@dataclass(frozen=True)
class Gathered:
    """models: in the order given. published: figures of papers. notes: what a reader has to know."""

    models: tuple[Shown, ...]
    published: tuple[PublishedFigure, ...] = ()
    notes: tuple[str, ...] = ()
    title: str | None = None
    description: str | None = None


def gather(folders: Sequence[str | Path]) -> Gathered:
    """Everything in the folders. Raises UsageError where one holds neither, RunError where a file is damaged."""
    found = [read(Path(folder).expanduser()) for folder in folders]
    models = distinct([model for each in found for model in each.models])
    titles = [each for each in found if each.title]
    return Gathered(
        tuple(models),
        tuple(figure for each in found for figure in each.published),
        tuple(note for each in found for note in each.notes),
        titles[0].title if len(found) == 1 and titles else None,
        titles[0].description if len(found) == 1 and titles else None,
    )


def read(folder: Path) -> Gathered:
    if folder.is_file() or (folder / RESULTS).is_file():
        return of_comparison(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; give a folder that budwood prune or budwood compare wrote")
    report = read_report(folder)
    if report is None:
        raise UsageError(
            f"{folder} holds neither {REPORT} nor {RESULTS}; give a folder that budwood prune or budwood compare wrote"
        )
    return Gathered((of_folder(folder, cast(dict[str, Any], report)),))


def of_folder(folder: Path, report: dict[str, Any]) -> Shown:
    method = str(report.get("method"))
    results = [mapping(result) for result in report.get("results") or [] if isinstance(result, dict)]
    speed = mapping(report.get("speed")) or None
    name = folder.resolve().name
    return Shown(
        label=f"{name}: {method}",
        kind="pruned",
        source=str(report.get("source")),
        method=method,
        family=family_of(method),
        place=name,
        draw=draw_of(mapping(report.get("data"))),
        figures=figures_of(report, results, speed),
        report=report,
        results=results,
        speed=speed,
        machine=mapping(report.get("machine")),
    )


def draw_of(data: Any) -> int | None:
    seed = number(data.get("seed"))
    return None if seed is None else int(seed)


def of_comparison(folder: Path) -> Gathered:
    results = read_results(folder)
    several = len({str(row.get("draw")) for row in results["rows"]}) > 1
    models = []
    for row in results["rows"]:
        settings = mapping(row.get("settings"))
        label = str(row.get("label") or row.get("name"))
        pruned = row.get("kind") == "pruned"
        models.append(
            Shown(
                label=f"{label}, draw {row.get('draw')}" if several and pruned else label,
                kind=str(row.get("kind")),
                source=str(row.get("source")),
                method=row.get("method"),
                family=str(row.get("row") or family_of(row.get("method"))),
                place=str(row.get("name")),
                settings=settings,
                draw=row.get("draw") if pruned else None,
                status=str(row.get("status")),
                error=row.get("error"),
                figures={key: value for key, value in mapping(row.get("figures")).items() if number(value) is not None},
                report=mapping(row.get("report")) or None,
                results=[mapping(result) for result in row.get("results") or []],
                speed=mapping(row.get("speed")) or None,
                machine=mapping(row.get("machine")),
            )
        )
    notes = [str(note) for note in results.get("notes", [])]
    if not results.get("complete", True):
        notes.insert(0, "the comparison is not complete: rows without figures have not been run, or failed")
    return Gathered(
        tuple(models),
        tuple(results.get("published", [])),
        tuple(notes),
        str(results.get("title") or "") or None,
        str(results.get("description") or "") or None,
    )


def distinct(models: Sequence[Shown]) -> list[Shown]:
    """The models with labels of their own: equal ones get a number."""
    counts: dict[str, int] = {}
    found = []
    for model in models:
        count = counts[model.label] = counts.get(model.label, 0) + 1
        found.append(model if count == 1 else replace(model, label=f"{model.label} ({count})"))
    return found
