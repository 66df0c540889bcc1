"""What quality costs in bits: D = ln(perplexity / dense perplexity) against bits per weight, with the Pareto front."""

from collections.abc import Iterator, Sequence
from typing import Any

from budwood.pages import conditions
from budwood.pages.pictures.drawing import INK, MUTED, Picture, figure, legend, picture, plain_numbers, series
from budwood.pages.shown import Shown
from budwood.pages.text import short

Point = tuple[float, float]


def front_of(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates, from the left; lower is better in both."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def front(models: Sequence[Shown]) -> Iterator[Picture]:
    """One picture for each source with two or more models of which D and bits are known."""
    for number, source in enumerate(dict.fromkeys(model.source for model in models)):
        known = [
            model
            for model in models
            if model.source == source and "D" in model.figures and "bits per weight" in model.figures
        ]
        compared = [model for model in known if model.kind != "dense"]
        if len(compared) < 2:
            continue
        points = [(model.figures["bits per weight"], model.figures["D"]) for model in compared]
        best = front_of(points)
        families = list(dict.fromkeys(model.family for model in compared))
        made, axes = figure(3.9 + 0.16 * ((len(families) + 1) // 2))
        axes.plot([points[i][0] for i in best], [points[i][1] for i in best], color=MUTED, linewidth=1, zorder=1)
        pruned = [i for i, model in enumerate(compared) if model.kind == "pruned"]
        second = [pruned[i] for i in front_of([points[i] for i in pruned])]
        axes.plot(
            [points[i][0] for i in second],
            [points[i][1] for i in second],
            color=MUTED,
            linewidth=1,
            linestyle=":",
            zorder=1,
        )
        for index, family in enumerate(families):
            mine = [i for i, model in enumerate(compared) if model.family == family]
            style = series(index)
            axes.plot(
                [points[i][0] for i in mine],
                [points[i][1] for i in mine],
                linestyle="none",
                color=style["color"],
                marker=style["marker"],
                markerfacecolor="none" if compared[mine[0]].kind == "quantised" else style["color"],
                label=short(family, 28),
            )
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("D = ln(perplexity / dense)")
        if max(y for _, y in points) > 20 * max(1e-3, min(abs(y) for _, y in points)) and min(y for _, y in points) > 0:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        best_first = list(dict.fromkeys([*best, *second]))
        named = best_first if len(best_first) <= 10 else best_first[:: -(-len(best_first) // 10)]
        place_names(made, axes, [(*points[i], short(compared[i].label, 24)) for i in named], points)
        legend(made, axes)
        names = ", ".join(f"{short(compared[i].label)} ({points[i][0]:.3g} bits, D {points[i][1]:.3f})" for i in best)
        yield picture(
            made,
            "front",
            "Loss against bits per weight",
            f"{short(source, 60)}. Lower and further left is better. The line joins what nothing beats in both, the "
            "dotted one what no other pruned model does. Open marks: quantised dense models. Bits are those of the "
            "pruned matrices, index and scales included; D is the mean over the texts.",
            f"Scatter plot of D against bits per weight for {len(compared)} models. On the Pareto front: {names}.",
            number,
            [conditions.of_figure(model, key) for model in compared for key in ("D", "bits per weight", "seconds")],
        )


def place_names(made, axes, names: Sequence[tuple[float, float, str]], points: Sequence[Point]) -> None:  # type: ignore[no-untyped-def]
    """Writes names beside their points where they cover no other name and the fewest points."""
    made.canvas.draw()
    renderer = made.canvas.get_renderer()
    frame, marks = axes.get_window_extent(renderer), axes.transData.transform(points)
    taken: list[Any] = []
    for x, y, name in names:
        tried: list[tuple[float, int, Any, Any]] = []
        for shift, ha, va in (
            ((6, 4), "left", "bottom"),
            ((-6, 4), "right", "bottom"),
            ((6, -4), "left", "top"),
            ((-6, -4), "right", "top"),
            ((0, 8), "center", "bottom"),
            ((0, -8), "center", "top"),
            ((14, 14), "left", "bottom"),
            ((-14, -14), "right", "top"),
        ):
            text = axes.annotate(name, (x, y), shift, textcoords="offset points", ha=ha, va=va, fontsize=7.5, color=INK)
            box = text.get_window_extent(renderer)
            cost = 5.0 * sum(box.overlaps(other) for other in taken)
            cost += sum(bool(box.contains(*mark)) for mark in marks)
            cost += 8.0 * (box.x0 < frame.x0 or box.x1 > frame.x1 + 4 or box.y0 < frame.y0 or box.y1 > frame.y1 + 8)
            tried.append((cost, len(tried), text, box))
        tried.sort(key=lambda each: each[:2])
        for _, _, text, _ in tried[1:]:
            text.remove()
        if tried[0][0] >= 5:
            tried[0][2].remove()  # no room: the table has the name
        else:
            taken.append(tried[0][3])
