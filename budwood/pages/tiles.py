"""The headline of a page: the best of each, with what it is compared with and under which conditions."""

from collections.abc import Sequence
from dataclasses import dataclass

from budwood import humanize
from budwood.humanize import printable
from budwood.pages import conditions
from budwood.pages.conditions import Footnotes
from budwood.pages.shown import Shown, mapping
from budwood.pages.text import number, text_of


@dataclass(frozen=True)
class Tile:
    """name: what it is of. figure: large. detail: below it."""

    name: str
    figure: str
    detail: str
    note: int | None = None


def tiles(models: Sequence[Shown], notes: Footnotes) -> list[Tile]:
    """Perplexity, size, bits and speed of the best pruned model of each; those that were measured."""
    pruned = [model for model in models if model.kind == "pruned" and model.status == "done"]
    many = len(pruned) > 1
    found = []
    texts = [key for model in pruned for key in model.figures if key.startswith("perplexity ")]
    for key in list(dict.fromkeys(texts))[:1]:
        best = min((model for model in pruned if key in model.figures), key=lambda model: model.figures[key])
        dense = dense_perplexity(models, best, key)
        beside = f"dense {text_of(key, dense)}" if dense else "dense not measured"
        found.append(
            tile(f"{'lowest ' if many else ''}{key}", text_of(key, best.figures[key]), beside, best, key, notes, many)
        )
    for key, name, least in (
        ("bytes", "size", True),
        ("bits per weight", "bits per pruned weight", True),
        ("decode times dense", "speed of generating", False),
    ):
        known = [model for model in pruned if number(model.figures.get(key)) is not None]
        if not known:
            continue
        best = (min if least else max)(known, key=lambda model: model.figures[key])
        best_of = ("smallest " if key == "bytes" else "fewest " if least else "fastest ") if many else ""
        value = best.figures[key]
        figure, beside = {
            "bytes": (humanize.size(value), f"{humanize.share(best.figures.get('share of dense'), 1)} of dense"),
            "bits per weight": (text_of(key, value), dense_bits(best)),
            "decode times dense": (f"{value:.2f}\u00d7", "as fast as dense, one token at a time"),
        }[key]
        found.append(tile(best_of + name, figure, beside, best, key, notes, many))
    if not any(tile.name.endswith("speed of generating") for tile in found):
        found.append(Tile("speed", "not measured", "budwood bench measures it"))
    if not texts:
        found.insert(0, Tile("perplexity", "not measured", "budwood evaluate measures it"))
    return found


def dense_bits(model: Shown) -> str:
    """Bits of a dense weight in the dtype of the folder."""
    known = {"float32": 32, "bfloat16": 16, "float16": 16}
    bits = known.get(str(mapping(model.report).get("dtype")))
    return f"dense {bits}" if bits else "index and scales included"


def tile(name: str, figure: str, beside: str, model: Shown, key: str, notes: Footnotes, many: bool) -> Tile:
    detail = f"{beside}; {model.label}" if many else beside
    return Tile(printable(name), figure, printable(detail), notes.mark(conditions.of_figure(model, key)))


def dense_perplexity(models: Sequence[Shown], model: Shown, key: str) -> float | None:
    """The dense model's perplexity on the same text: of its row, or of the divergence that was measured."""
    for other in models:
        if other.kind == "dense" and other.source == model.source and key in other.figures:
            return other.figures[key]
    name = key.removeprefix("perplexity ")
    for result in model.of_kind("divergence"):
        if name in (mapping(result.get("text")).get("name"), mapping(result.get("text")).get("data")):
            return number(result.get("dense_perplexity"))
    return None
