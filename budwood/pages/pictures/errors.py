"""Where the error is: of the outputs by block, of the weights by kind of matrix."""

import statistics
from collections.abc import Iterator, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import Picture, figure, legend, picture, series
from budwood.pages.pictures.kinds import by_kind, chosen
from budwood.pages.shown import Shown
from budwood.pages.text import number, short

KINDS = 40  # in one picture


def errors_by_block(models: Sequence[Shown]) -> Iterator[Picture]:
    curves = {}
    for model in models:
        errors = [(index, number(block.get("relative_error"))) for index, block in enumerate(model.blocks)]
        known = [(index, 100 * error) for index, error in errors if error is not None]
        if known:
            curves[model.label] = (model, known)
    if not curves:
        return
    shown = [curves[model.label] for model in chosen([model for model, _ in curves.values()])]
    made, axes = figure(3.2 + 0.16 * ((len(shown) + 1) // 2))
    for index, (model, known) in enumerate(shown):
        style = series(index) | {"markersize": 3}
        axes.plot([x for x, _ in known], [y for _, y in known], label=short(model.label, 30), **style)
    axes.set_xlabel("block")
    axes.set_ylabel("output error, % of the norm")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(made, axes)
    model, known = shown[0]
    worst = max(known, key=lambda pair: pair[1])
    yield picture(
        made,
        "error-by-block",
        "Relative error of the outputs by block",
        "The norm of what pruning changed in a block's outputs over their norm, on the first calibration batch."
        + omitted(len(curves), len(shown)),
        f"Line chart of the relative output error by block for {len(shown)} models. For {short(model.label)} the "
        f"largest is {worst[1]:.1f} % in block {worst[0]}, the mean {statistics.fmean(y for _, y in known):.1f} %.",
        conditions=[conditions.pruning(model) for model, _ in shown],
    )


def errors_by_kind(models: Sequence[Shown]) -> Iterator[Picture]:
    """Median and range over the blocks of the change of each kind of matrix."""
    found = {model.label: (model, changes) for model in models if (changes := by_kind(model, "change"))}
    if not found:
        return
    shown = [found[model.label] for model in chosen([model for model, _ in found.values()], 4)]
    kinds = list(dict.fromkeys(kind for _, changes in shown for kind in changes))[:KINDS]
    step = 0.8 / len(shown)
    made, axes = figure(1.2 + max(0.3, 0.13 * len(shown)) * len(kinds) + 0.16 * len(shown))
    for index, (model, changes) in enumerate(shown):
        style = series(index)
        for place, kind in enumerate(kinds):
            if kind not in changes:
                continue
            values = [100 * value for value in changes[kind]]
            y = place + (index - (len(shown) - 1) / 2) * step
            axes.plot([min(values), max(values)], [y, y], color=style["color"], linewidth=1.2)
            axes.plot(
                [statistics.median(values)],
                [y],
                color=style["color"],
                marker=style["marker"],
                linestyle="none",
                label=short(model.label, 30) if place == 0 else None,
            )
    axes.set_yticks(range(len(kinds)), [short(kind) for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlabel("change of the weights, % of the norm")
    axes.set_xlim(left=0)
    legend(made, axes, 1)
    model, changes = shown[0]
    medians = ", ".join(f"{short(kind)} {100 * statistics.median(values):.1f} %" for kind, values in changes.items())
    yield picture(
        made,
        "error-by-kind",
        "Relative change of the weights by kind of matrix",
        "The norm of what changed in a matrix over its norm before: the median over the blocks and the range."
        + omitted(len(found), len(shown)),
        f"Dots with ranges by kind of matrix for {len(shown)} models. Medians of {short(model.label)}: {medians}.",
        conditions=[conditions.pruning(model) for model, _ in shown],
    )


def omitted(known: int, shown: int) -> str:
    return f" Drawn are {shown} of {known} models, the best of every family first." if known > shown else ""
