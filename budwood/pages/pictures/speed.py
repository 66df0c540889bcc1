"""How fast: whole models in tokens a second, single products against dense, each with its spread."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from budwood.pages import conditions
from budwood.pages.pictures.drawing import MUTED, Picture, figure, legend, picture, series
from budwood.pages.pictures.errors import omitted
from budwood.pages.pictures.kinds import chosen
from budwood.pages.shown import Shown, mapping
from budwood.pages.text import number, short

SHAPES, TIMED = 24, 1000  # shapes in one picture, and products that are looked at


def decoding(models: Sequence[Shown]) -> Iterator[Picture]:
    """Tokens a second, bars from the tenth to the ninetieth percentile."""
    bars = []
    timed = [model for model in models if rates_of(mapping(mapping(mapping(model.speed).get("model")).get("pruned")))]
    for model in chosen(timed):
        whole = mapping(mapping(model.speed).get("model"))
        for which in ("pruned", "dense"):
            if rates := rates_of(mapping(whole.get(which))):
                bars.append((model, which, rates))
    if not bars:
        return
    shown = bars
    made, axes = figure(1.2 + 0.3 * len(shown))
    for place, (_, which, (middle, low, high)) in enumerate(shown):
        style = {"color": series(0)["color"]} if which == "pruned" else {"color": MUTED, "hatch": "//"}
        axes.barh(place, middle, height=0.62, edgecolor="#040404", linewidth=0, **style)
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="#010101", capsize=2.5, linewidth=1)
        axes.annotate(f"{middle:.1f}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    names = [f"{short(model.label, 26)}, {which}" if which == "pruned" else "dense" for model, which, _ in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(False, axis="y")
    axes.set_xlabel("tokens a second, one at a time")
    said = "; ".join(
        f"{short(model.label)}, {which}: {middle:.1f} ({low:.1f} to {high:.1f})"
        for model, which, (middle, low, high) in shown
    )
    yield picture(
        made,
        "speed",
        "Tokens generated a second",
        "Medians, with the tenth and the ninetieth percentile of the rounds; dense beside each, timed in turns with it."
        + omitted(len(timed), len(chosen(timed))),
        f"Bar chart of tokens a second. {said}.",
        conditions=[conditions.speed(model) for model, _, _ in shown],
    )


def rates_of(found: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Median, low and high in tokens a second."""
    times = mapping(found.get("decode_seconds"))
    known = [number(times.get(key)) for key in ("median", "high", "low")]
    if any(not each or each <= 0 for each in known):
        return None
    middle, low, high = (1 / each for each in known if each)
    return middle, min(low, middle), max(high, middle)


def products(models: Sequence[Shown]) -> Iterator[Picture]:
    """One picture a model: times dense by the number of rows, for every shape of matrix."""
    found = [(model, timed) for model in models if (timed := timed_of(model))]
    best = [model.label for model in chosen([model for model, _ in found], 2)]
    for index, (model, timed) in enumerate(each for each in found if each[0].label in best):
        shapes = list(dict.fromkeys(shape for shape, *_ in timed))[:SHAPES]
        made, axes = figure(3.2 + 0.16 * ((len(shapes) + 2) // 3))
        for place, shape in enumerate(shapes):
            points = [each for each in timed if each[0] == shape]
            style = series(place)
            axes.errorbar(
                [rows * (1 + 0.04 * (place - len(shapes) / 2)) for _, rows, *_ in points],
                [middle for _, _, middle, _, _ in points],
                yerr=[
                    [middle - low for _, _, middle, low, _ in points],
                    [high - middle for _, _, middle, _, high in points],
                ],
                capsize=2,
                label=shape,
                **style,
            )
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.annotate("dense", (0, 1), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      fontsize=8, color=MUTED)  # fmt: skip
        axes.set_xscale("log", base=2)
        rows_seen = sorted({rows for _, rows, *_ in timed})[:SHAPES]
        axes.set_xticks(rows_seen, [f"{rows:g}" for rows in rows_seen])
        axes.set_xlabel("rows of activations (tokens at once)")
        axes.set_ylabel("times as fast as dense")
        axes.set_ylim(bottom=0)
        legend(made, axes, 3)
        said = ", ".join(f"{shape} with {rows:g} rows {middle:.2f}" for shape, rows, middle, _, _ in timed[:12])
        yield picture(
            made,
            "products",
            f"Speed of single products: {short(model.label, 60)}",
            "By shape [out x in]. Ratio of medians; the bars: the same for the tenth and the ninetieth percentile of "
            "the pruned product. Above the line is faster than dense.",
            f"Chart of the speed of sparse products against dense. Times as fast: {said}.",
            index,
            [conditions.speed(model)],
        )


def timed_of(model: Shown) -> list[tuple[str, float, float, float, float]]:
    """Shape, rows, times dense with its low and high of every timed product."""
    found = []
    for matrix in (mapping(model.speed).get("matrices") or [])[:TIMED]:
        seconds = mapping(mapping(matrix).get("seconds"))
        pruned, dense = mapping(seconds.get("pruned")), mapping(seconds.get("dense"))
        known = [number(dense.get("median")), *(number(pruned.get(key)) for key in ("median", "high", "low"))]
        rows, shape = number(matrix.get("rows")), matrix.get("shape")
        if rows and isinstance(shape, list) and all(each and each > 0 for each in known):
            base, middle, high, low = (each for each in known if each)
            found.append((" x ".join(map(str, shape)), rows, base / middle, base / high, base / low))
    return found
