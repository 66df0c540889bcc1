"""A recipe read and checked: its fields, its expressions, its names. Nothing is opened, nothing run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from budwood.comparison.document import Document, Place, read_document
from budwood.comparison.fields import at, checked, written_out
from budwood.comparison.grid import points
from budwood.comparison.published import Published, read_published
from budwood.comparison.rounding import parse_row
from budwood.errors import UsageError
from budwood.formats import known_layout
from budwood.humanize import parse_bytes
from budwood.methods.method import Method
from budwood.reports.comparison import MOST_RUNS

if TYPE_CHECKING:
    from budwood.comparison.schema import CalibrationFields, PruneFields, RecipeFields


@dataclass(frozen=True)
class RecipeRow:
    """One entry of `methods`: an expression for each point of its grid, and its own settings."""

    index: int  # in the recipe
    name: str | None
    text: str  # as written
    methods: tuple[Method | None, ...]  # None: the dense model
    sources: tuple[str, ...]
    draws: tuple[int, ...]
    calibration: "CalibrationFields"
    prune: "PruneFields"

    @property
    def place(self) -> Place:
        return ("methods", self.index, "method")


@dataclass(frozen=True)
class Recipe:
    """fields: as checked. document: for the lines of later errors. rows: expanded. published: figures of papers."""

    fields: "RecipeFields"
    document: Document
    rows: tuple[RecipeRow, ...]
    published: tuple[Published, ...]


def read_recipe_file(file: str | Path, given: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file. given: values of variables, as text.

    Raises UsageError with the line and the reason for anything that cannot be: an unknown field, a value of another
    type, an unknown method or option, a bad grid, a name that is there twice. `check_files` looks for sources, texts.
    """
    document = read_document(file, given)
    from budwood.comparison.schema import RecipeFields

    written_out(document.content)
    fields = checked(RecipeFields, document.content, (), document)
    check_evaluations(fields, document)
    rows: list[RecipeRow] = []
    for index in range(len(fields.methods)):
        rows.append(row_of(fields, index, document))
        if sum(len(row.methods) * len(row.sources) for row in rows) > MOST_RUNS:
            raise document.error(rows[-1].place, f"from here on the recipe stands for more than {MOST_RUNS} runs")
    check_names(rows, document)
    published = []
    if len(set(fields.published)) < len(fields.published):
        raise document.error(("published",), "a published table is there twice; leave one out")
    for index, name in enumerate(fields.published):
        with at(document, ("published", index)):
            published.append(read_published(document.file.parent / name))
    return Recipe(fields, document, tuple(rows), tuple(published))


def row_of(fields: "RecipeFields", index: int, document: Document) -> RecipeRow:
    """One entry of `methods`, its expressions parsed and its own settings put over those of the recipe."""
    from budwood.comparison.schema import CalibrationFields, PruneFields

    entry, place = fields.methods[index], ("methods", index)
    with at(document, (*place, "method")):
        methods = tuple(parse_row(point) for point in points(entry.method))
        canonical = [str(method) for method in methods]
        twice = next((text for text in canonical if canonical.count(text) > 1), None)
        if twice is not None:
            raise UsageError(f"in {entry.method!r}: two points of the grid are {twice}; leave one out")
    calibration = checked(
        CalibrationFields, {**fields.calibration.model_dump(), **entry.calibration}, (*place, "calibration"), document
    )
    prune = checked(PruneFields, {**fields.prune.model_dump(), **entry.prune}, (*place, "prune"), document)
    with at(document, (*place, "prune") if entry.prune else ("prune",)):
        known_layout(prune.format, prune.values)
        parse_bytes(prune.activation_memory)
    if calibration.data is None and any(method is not None and method.calibrated for method in methods):
        raise document.error((*place, "method"), f"{entry.method} needs text, and calibration has no data")
    unknown = next((name for name in entry.sources or () if name not in fields.sources), None)
    if unknown is not None:
        known = ", ".join(fields.sources)
        raise document.error((*place, "sources"), f"there is no source {unknown}; there are {known}")
    return RecipeRow(
        index,
        entry.name,
        entry.method,
        methods,
        tuple(entry.sources or fields.sources),
        seeds(fields.draws, ("draws",), document)
        if entry.draws is None
        else seeds(entry.draws, (*place, "draws"), document),
        calibration,
        prune,
    )


def seeds(draws: int | list[int], place: Place, document: Document) -> tuple[int, ...]:
    """The seeds of the draws: 3 stands for 0, 1, 2."""
    found = list(range(draws)) if isinstance(draws, int) else draws
    if not found or len(set(found)) < len(found):
        raise document.error(place, f"draws is a number, or a list of different seeds; got {draws}")
    return tuple(found)


def check_names(rows: Sequence[RecipeRow], document: Document) -> None:
    """Raises UsageError where two rows have the same name, or are the same without one."""
    first: dict[str, RecipeRow] = {}
    for row in rows:
        name = row.name or row.text
        if name in first:
            before = document.line(("methods", first[name].index))
            place = ("methods", row.index, "name") if row.name else row.place
            raise document.error(
                place, f"the name {name} is that of the row in line {before} too; give it another name"
            )
        first[name] = row


def check_evaluations(fields: "RecipeFields", document: Document) -> None:
    asked = fields.evaluate
    named = [
        (("divergence", "texts"), asked.divergence.texts if asked.divergence else None),
        (("repetition", "text"), [asked.repetition.text] if asked.repetition and asked.repetition.text else None),
    ]
    for place, texts in named:
        unknown = next((text for text in texts or () if text not in asked.texts), None)
        if unknown is not None:
            known = ", ".join(asked.texts) or "none"
            raise document.error(
                ("evaluate", *place), f"there is no text {unknown} in evaluate.texts; there are {known}"
            )
    for section in ("tasks", "repetition"):
        if asked.stream and getattr(asked, section) is not None:
            raise document.error(("evaluate", section), f"{section} needs the whole model in memory; leave out stream")
    for section in ("divergence", "repetition"):
        if getattr(asked, section) is not None and not asked.texts:
            raise document.error(("evaluate", section), f"{section} needs a text; give one in evaluate.texts")
