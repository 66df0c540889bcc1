"""Matrices by kind: the name inside their block, all experts of one name together."""

import re
from collections.abc import Mapping, Sequence

from budwood.pages.shown import Shown
from budwood.pages.text import number

PLACE = re.compile(r"^(?P<path>.*?)\.(?P<block>\d{1,6})\.(?P<kind>.+)$")
MOST = 6  # models in one picture


def place_of(name: str) -> tuple[int, str] | None:
    """Block and kind of a matrix by its full name: `model.layers.7.mlp.up_proj` is (7, "mlp.up_proj")."""
    found = PLACE.match(name)
    return None if found is None else (int(found["block"]), re.sub(r"\.\d+\.", ".*.", found["kind"]))


def chosen(models: Sequence[Shown], most: int = MOST) -> list[Shown]:
    """At most `most` of the models: the best of every family (by D) before others; in their order."""
    ranked = sorted(models, key=lambda model: model.figures.get("D", 0.0))
    best = {model.family: model for model in reversed(ranked)}
    first = [model for model in models if best[model.family] is model]
    picked = {model.label for model in [*first, *(model for model in models if model not in first)][:most]}
    return [model for model in models if model.label in picked]


def by_kind(model: Shown, field: str) -> Mapping[str, list[float]]:
    """A field of the matrices, by kind, in the order of the blocks."""
    found: dict[str, list[float]] = {}
    for name, matrix in model.linears.items():
        place, value = place_of(name), number(matrix.get(field))
        if place is not None and value is not None:
            found.setdefault(place[1], []).append(value)
    return found


def by_place(model: Shown, field: str) -> Mapping[tuple[int, str], float]:
    """The mean of a field over the matrices of one kind in one block."""
    found: dict[tuple[int, str], list[float]] = {}
    for name, matrix in model.linears.items():
        place, value = place_of(name), number(matrix.get(field))
        if place is not None and value is not None:
            found.setdefault(place, []).append(value)
    return {place: sum(values) / len(values) for place, values in found.items()}
