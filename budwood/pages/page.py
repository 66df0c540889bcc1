"""The page itself: gathered, drawn, and written as one file that needs nothing else."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from budwood.checkpoints.files import write_text
from budwood.environment import installed
from budwood.errors import UsageError
from budwood.humanize import printable
from budwood.pages import conditions, tables
from budwood.pages.conditions import Footnotes
from budwood.pages.gather import Gathered, gather
from budwood.pages.pictures import DRAWN, Picture, pictures
from budwood.pages.shown import Shown, mapping
from budwood.pages.tiles import tiles

HERE = Path(__file__).parent
MARK = "<!-- budwood report -->"  # in the first lines of every page, so that only a page is replaced
DEFAULT = "report.html"


def report(
    folders: Sequence[str | Path], output: str | Path | None = None, *, title: str | None = None
) -> dict[str, Any]:
    """Writes the page about `folders` (of `prune` or `compare`) and returns what is in it.

    output: the file; `report.html` in the first folder where it is None. A page of budwood is replaced, whole.
    Raises UsageError where a folder holds nothing to show, matplotlib is missing or `output` is another file, RunError
    where a report is damaged or the page cannot be written.
    """
    if not folders:
        raise UsageError("a report needs a folder; give one or more that budwood prune or budwood compare wrote")
    first = Path(folders[0]).expanduser()
    file = Path(output).expanduser() if output is not None else (first if first.is_dir() else first.parent) / DEFAULT
    check_output(file)
    gathered = gather(folders)
    drawn = pictures(gathered.models)
    page = render(gathered, drawn, title)
    write_text(file, page)
    return {
        "file": str(file),
        "bytes": len(page.encode()),
        "models": [model.label for model in gathered.models],
        "pictures": [picture.name for picture in drawn],
    }


def check_output(file: Path) -> None:
    """UsageError where the page cannot be put: its folder is missing, or it would replace another file."""
    if not file.parent.is_dir():
        raise UsageError(f"there is no folder {file.parent} to write {file.name} to; make it, or give another --output")
    if file.is_dir():
        raise UsageError(f"{file} is a folder; give a file such as {file / DEFAULT}")
    if file.is_file():
        with open(file, "rb") as stream:
            if MARK.encode() not in stream.read(200):
                raise UsageError(f"{file} is no report of budwood and is not replaced; give another --output")


def render(gathered: Gathered, drawn: Sequence[Picture], title: str | None = None) -> str:
    """The page as HTML. Every text of a model, a recipe or a user is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    models, notes = gathered.models, Footnotes()
    script = (HERE / "sort.js").read_text("utf-8").strip()
    shown = [
        tables.main_table(models, notes),
        tables.perplexity_table(models, notes),
        tables.divergence_table(models, notes),
        tables.task_table(models, notes),
        tables.pair_table(models, notes),
        tables.published_table(gathered.published, models),
        tables.failed_table(models),
    ]
    return environment.get_template("report.html.jinja").render(
        mark=MARK,
        title=printable(title or gathered.title or heading(models)),
        description=printable(gathered.description or ""),
        tiles=tiles(models, notes),
        tables=[table for table in shown if table],
        pictures=[(picture, [notes.mark(line) for line in picture.conditions]) for picture in drawn],
        recipes=[(printable(model.label), made_how(model)) for model in models if model.report],
        notes=[printable(note) for note in gathered.notes] + notes_of(models),
        footnotes=[printable(line) for line in notes.lines],
        style=(HERE / "report.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        budwood=installed("budwood") or "",
    )


def heading(models: Sequence[Shown]) -> str:
    if len(models) == 1:
        return models[0].label
    sources = list(dict.fromkeys(model.source for model in models))
    return f"{len(models)} models from {sources[0]}" if len(sources) == 1 else f"{len(models)} models"


def made_how(model: Shown) -> list[tuple[str, str]]:
    """How a pruned model was made, in rows of name and value."""
    report = mapping(model.report)
    rows = [
        ("source", report.get("source")),
        ("method", report.get("method")),
        ("calibration and machine", conditions.pruning(model)),
        ("stored as", conditions.joined(report.get("dtype"), report.get("format"))),
        ("measured speed", conditions.speed(model)),
    ]
    return [(name, printable(value)) for name, value in rows if value]


def notes_of(models: Sequence[Shown]) -> list[str]:
    """The notes of the runs, each once, with the models that it is of where there are several."""
    found: dict[str, list[str]] = {}
    for model in models:
        for note in mapping(model.report).get("notes") or []:
            found.setdefault(printable(note), []).append(printable(model.label))
    if len(models) == 1:
        return list(found)
    if len(models) > DRAWN:
        found[f"the pictures show the first {DRAWN} of {len(models)} models"] = [""] * len(models)
    return [f"{note} ({labels[0] if len(labels) == 1 else f'{len(labels)} models'})" for note, labels in found.items()]
