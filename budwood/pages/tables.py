"""The tables of a page as records; the template makes HTML of them and escapes every text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from budwood import humanize
from budwood.humanize import printable
from budwood.pages import conditions
from budwood.pages.conditions import Footnotes
from budwood.pages.shown import Shown, mapping
from budwood.pages.text import MISSING, number, text_of
from budwood.reports.comparison import FIGURES, PublishedFigure

FIRST = ("perplexity", "D", "KL", "same top", "accuracy", "repetition")
THEN = ("bits per weight", "density", "recovered", "share of dense", "bytes", "parameters")
LAST = ("decode times dense", "prefill times dense", "seconds", "peak memory")


@dataclass(frozen=True)
class Cell:
    """text: as shown. value: what sorts it, None: last. note: number of a footnote."""

    text: str
    value: float | str | None = None
    note: int | None = None


@dataclass(frozen=True)
class Table:
    """columns: (head, meaning for a tooltip, whether it holds figures)."""

    title: str
    columns: Sequence[tuple[str, str, bool]]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


def text_cell(text: Any) -> Cell:
    shown = printable(text)
    return Cell(shown, shown)


def figure_keys(models: Sequence[Shown]) -> list[str]:
    """The figures that some model has: quality first, then sizes, then times."""
    present = {key for model in models for key in model.figures}

    def place(key: str) -> tuple[int, int, int]:
        for group, names in enumerate((FIRST, THEN, LAST)):
            for index, name in enumerate(names):
                if key == name or key.startswith(f"{name} "):
                    return group, index, 0 if key != name else 1
        return len((FIRST, THEN, LAST)), 0, 0

    order = {key: index for index, key in enumerate(dict.fromkeys(key for model in models for key in model.figures))}
    return sorted(present, key=lambda key: (place(key), order[key]))


def meaning(key: str) -> str:
    """What a figure is, from the table of figures."""
    kind = key if key in FIGURES else next((name for name in FIGURES if key.startswith(name.removesuffix("NAME"))), "")
    return FIGURES.get(kind, "")


def main_table(models: Sequence[Shown], notes: Footnotes) -> Table:
    """One row a model: settings that differ, then every figure."""
    keys = figure_keys(models)
    settings = list(dict.fromkeys(name for model in models for name in model.settings))
    columns = [("model", "", False), *((printable(name), "setting", True) for name in settings)]
    columns += [(printable(key), meaning(key), True) for key in keys]
    rows = []
    for model in models:
        cells = [text_cell(model.label if model.status == "done" else f"{model.label} ({model.status})")]
        for name in settings:
            value = model.settings.get(name)
            cells.append(Cell(MISSING if value is None else printable(value), number(value) or printable(value)))
        for key in keys:
            figure = number(model.figures.get(key))
            mark = notes.mark(conditions.of_figure(model, key)) if figure is not None else None
            cells.append(Cell(text_of(key, figure), figure, mark))
        rows.append(cells)
    return Table("All models", columns, rows, "A head sorts by its column; the small numbers lead to the conditions.")


def perplexity_table(models: Sequence[Shown], notes: Footnotes) -> Table | None:
    rows = []
    for model in models:
        for result in model.of_kind("perplexity"):
            value, error = number(result.get("perplexity")), number(result.get("error"))
            text = mapping(result.get("text"))
            rows.append(
                [
                    text_cell(model.label),
                    text_cell(text.get("name") or text.get("data")),
                    Cell(text_of("perplexity", value), value, notes.mark(conditions.text_conditions(result))),
                    Cell(humanize.figure(error, 2) if error is not None else MISSING, error),
                ]
            )
    columns = [("model", "", False), ("text", "", False), ("perplexity", FIGURES["perplexity NAME"], True)]
    columns += [("± ", "standard error, from the scatter of the windows", True)]
    return Table("Perplexity", columns, rows) if rows else None


DIVERGENCE = (
    ("perplexity", "perplexity", "exp of the mean loss"),
    ("dense", "dense_perplexity", "perplexity of the dense model on the same tokens"),
    ("ln ratio", "ln_ratio", "ln(perplexity / perplexity of the dense model)"),
    ("± ", "ln_ratio_error", "standard error over tokens"),
    ("KL mean", "kl_mean", "divergence from the dense model, nats a token"),
    ("KL median", "kl_median", "of tokens"),
    ("KL 99.9 %", "kl_999", "99.9th percentile of tokens"),
    ("same top", "same_top", "share of tokens with the same most probable next token"),
)


def divergence_table(models: Sequence[Shown], notes: Footnotes) -> Table | None:
    rows = []
    for model in models:
        for result in model.of_kind("divergence"):
            mark = notes.mark(conditions.text_conditions(result))
            text = mapping(result.get("text"))
            cells = [text_cell(model.label), text_cell(text.get("name") or text.get("data"))]
            for _, field, _ in DIVERGENCE:
                value = number(result.get(field))
                shown = humanize.share(value) if field == "same_top" else humanize.figure(value, 4)
                cells.append(Cell(MISSING if value is None else shown, value, mark if field == "perplexity" else None))
            rows.append(cells)
    columns = [("model", "", False), ("text", "", False), *((head, said, True) for head, _, said in DIVERGENCE)]
    return Table("Divergence from the dense model", columns, rows) if rows else None


def task_table(models: Sequence[Shown], notes: Footnotes) -> Table | None:
    rows = []
    for model in models:
        for result in model.of_kind("task"):
            value, error = number(result.get("value")), number(result.get("error"))
            rows.append(
                [
                    text_cell(model.label),
                    text_cell(result.get("task")),
                    text_cell(result.get("metric")),
                    Cell(humanize.share(value), value, notes.mark(conditions.task_conditions(result))),
                    Cell(humanize.share(error) if error is not None else MISSING, error),
                ]
            )
    columns = [("model", "", False), ("task", "", False), ("metric", "", False), ("value", "", True)]
    columns += [("± ", "standard error, as the harness computes it", True)]
    return Table("Tasks", columns, rows) if rows else None


def pair_table(models: Sequence[Shown], notes: Footnotes) -> Table | None:
    rows = []
    for model in models:
        for result in model.of_kind("pair"):
            figures = [number(result.get(field)) for field in ("difference", "low", "high", "p", "better", "worse")]
            cells = [
                text_cell(model.label),
                text_cell(result.get("against")),
                text_cell(result.get("subject")),
                *(Cell(MISSING if each is None else humanize.figure(each, 4), each) for each in figures),
            ]
            mark = notes.mark(conditions.joined(result.get("test"), conditions.computed(result)))
            cells[3] = Cell(cells[3].text, cells[3].value, mark)
            rows.append(cells)
    columns = [(head, "", False) for head in ("model", "against", "of")]
    columns += [("difference", "of the means, model minus the other", True), ("low", "end of the interval", True)]
    columns += [("high", "end of the interval", True), ("p", "of no difference", True)]
    columns += [("better", "pairs", True), ("worse", "pairs", True)]
    return Table("Pairs on the same windows or items", columns, rows) if rows else None


def published_table(figures: Sequence[PublishedFigure], models: Sequence[Shown]) -> Table | None:
    """Figures of papers, and beside each what was measured for the row that it belongs to."""
    rows = []
    families: dict[str, list[Shown]] = {}
    for model in models:
        families.setdefault(model.family, []).append(model)
    for figure in figures:
        found: Mapping[str, Any] = mapping(figure)
        key, value = str(found.get("figure")), number(found.get("value"))
        same = families.get(str(found.get("row")), ())
        measured = next((model.figures.get(key) for model in same if belongs(model, found)), None)
        rows.append(
            [
                text_cell(found.get("table")),
                text_cell(found.get("model")),
                text_cell(found.get("method")),
                text_cell(key),
                Cell(text_of(key, value), value),
                Cell(text_of(key, measured), measured),
                text_cell(found.get("conditions") or MISSING),
            ]
        )
    columns = [("table", "", False), ("model", "", False), ("method", "as published", False), ("figure", "", False)]
    columns += [("published", "", True), ("measured here", "of the row that it belongs to", True)]
    columns += [("conditions, as published", "", False)]
    return Table("Published figures", columns, rows) if rows else None


def belongs(model: Shown, figure: Mapping[str, Any]) -> bool:
    """Whether a model is the run that a published figure stands beside."""
    settings = mapping(figure.get("settings"))
    return (
        bool(figure.get("row"))
        and model.family == figure.get("row")
        and figure.get("source") in (None, model.source)
        and all(model.settings.get(name) == value for name, value in settings.items())
    )


def failed_table(models: Sequence[Shown]) -> Table | None:
    rows = [
        [text_cell(model.label), text_cell(model.status), text_cell(model.error or MISSING)]
        for model in models
        if model.status != "done"
    ]
    return (
        Table("Runs without figures", [(head, "", False) for head in ("run", "status", "why")], rows) if rows else None
    )
