"""The runs that a recipe stands for: rows x points of their grids x sources x draws, each with a name of its own."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budwood.comparison.document import Place
from budwood.comparison.recipe import Recipe, RecipeRow
from budwood.comparison.rounding import Rtn
from budwood.methods.method import Method
from budwood.reports.comparison import MOST_RUNS, Kind

if TYPE_CHECKING:
    from budwood.comparison.schema import CalibrationFields, PruneFields

LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class Run:
    """One source, one method, one draw. name: also that of its folder in `runs`; it does not depend on other rows."""

    name: str
    row: str
    label: str
    source: str
    method: Method | None  # None: the dense model
    settings: dict[str, Any]
    draw: int
    calibration: "CalibrationFields"
    prune: "PruneFields"
    place: Place  # in the recipe

    @property
    def kind(self) -> Kind:
        if self.method is None:
            return "dense"
        return "quantised" if isinstance(self.method, Rtn) else "pruned"

    @property
    def calibrated(self) -> bool:
        return self.method is not None and self.method.calibrated


def runs_of(recipe: Recipe) -> list[Run]:
    """All runs in the order of the recipe, the dense model of each source first.

    Methods without calibration text, and the dense model, have one draw. Raises UsageError where two runs would have
    the same name, or there are too many.
    """
    found: dict[str, Run] = {}
    for row in recipe.rows:
        settings = differing(row.methods)
        for method, own in zip(row.methods, settings, strict=True):
            for source in row.sources:
                for draw in row.draws if method is not None and method.calibrated else row.draws[:1]:
                    run = run_of(row, method, own, source, draw)
                    if run.name in found:
                        before = recipe.document.line(found[run.name].place)
                        raise recipe.document.error(
                            run.place, f"{run.label} is also a run of line {before}; give one of the rows a name"
                        )
                    if len(found) == MOST_RUNS:
                        raise recipe.document.error(run.place, f"from here on there are more than {MOST_RUNS} runs")
                    found[run.name] = run
    return sorted(found.values(), key=lambda run: run.kind != "dense")


def run_of(row: RecipeRow, method: Method | None, settings: dict[str, Any], source: str, draw: int) -> Run:
    expression = "dense" if method is None else str(method)
    label = expression
    if row.name:
        label = " ".join([row.name, *(f"{key}={value}" for key, value in settings.items())])
    whole = row.name or (expression if len(row.methods) == 1 else row.text)
    return Run(
        name=slug(f"{source} {label} {draw}"),
        row=whole,
        label=label,
        source=source,
        method=method,
        settings=settings,
        draw=draw,
        calibration=row.calibration,
        prune=row.prune,
        place=row.place,
    )


def slug(text: str) -> str:
    """A name for a folder; a long one is cut and ends with a digest."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9].rstrip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def differing(methods: Sequence[Method | None]) -> list[dict[str, Any]]:
    """For each method the options that are not the same in all of them, such as `{"alpha": 0.25}`.

    Options of inner methods have the last part of their name where it is clear, else `inner.alpha`.
    """
    options = [{"method": "dense"} if method is None else flat(method) for method in methods]
    names = list(dict.fromkeys(name for found in options for name in found))
    chosen = [name for name in names if len({repr(found.get(name)) for found in options}) > 1]
    last = [name.rpartition(".")[2] for name in chosen]
    keys = {name: end if last.count(end) == 1 else name for name, end in zip(chosen, last, strict=True)}
    return [{keys[name]: found[name] for name in chosen if name in found} for found in options]


def flat(method: Method, prefix: str = "") -> dict[str, Any]:
    """The options of a method and of those inside it, JSON-plain; the names of the methods where they are nested."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if isinstance(value, Method):
            found[f"{prefix}{field.name}"] = type(value).__name__.lower()
            found |= flat(value, f"{prefix}{field.name}.")
        elif field.init:
            found[f"{prefix}{field.name}"] = list(value) if isinstance(value, tuple) else value
    return found
