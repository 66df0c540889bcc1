"""Perplexity and density against alpha, as figure 3 of the WRP paper (Tan, Zhang, Wei, ACL 2024) has them."""

import re
from collections.abc import Iterator, Mapping, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import INK, MUTED, Picture, figure, legend, picture, plain_numbers, series
from budwood.pages.shown import Shown
from budwood.pages.text import short

CURVES = 8  # in one picture


def alpha(models: Sequence[Shown]) -> Iterator[Picture]:
    """One picture for each row of WRP, on each source, with two or more alphas."""
    curves = dict.fromkeys((model.source, model.family) for model in models)
    for number, (source, family) in enumerate(curves):
        points = sorted(
            (model for model in models if (model.source, model.family) == (source, family) and plain(model)),
            key=lambda model: model.alpha or 0,
        )
        if len({model.alpha for model in points}) >= 2:
            dense = [model for model in models if model.kind == "dense" and model.source == source]
            yield alpha_picture(points, dense, source, number)


def alpha_picture(points: Sequence[Shown], dense: Sequence[Shown], source: str, number: int) -> Picture:
    keys = list(dict.fromkeys(key for model in points for key in model.figures if key.startswith("perplexity ")))[
        :CURVES
    ]
    made, axes = figure(4.6 if keys else 2.6, rows=2 if keys else 1, sharex=True, squeeze=False)
    upper, lower = axes[0][0], axes[-1][0]
    said = []
    for index, key in enumerate(keys):
        style = series(index)
        curve = mean_by_alpha(points, {model.label: model.figures.get(key) for model in points})
        upper.plot([x for x, _ in curve], [y for _, y in curve], label=short(key), **style)
        said.append(f"{key}: {curve[0][1]:.4g} at alpha {curve[0][0]:g}, {curve[-1][1]:.4g} at {curve[-1][0]:g}")
        for value in [model.figures[key] for model in dense if key in model.figures]:
            upper.axhline(value, color=style["color"], linewidth=1, linestyle=":")
            upper.annotate(
                "dense", (1, value), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", color=MUTED, fontsize=8,
            )  # fmt: skip
    if keys:
        upper.set_ylabel("perplexity")
        upper.set_yscale("log")
        plain_numbers(upper.yaxis)
        legend(made, upper)
    densities = mean_by_alpha(points, {model.label: density(model) for model in points})
    lower.plot([x for x, _ in densities], [100 * y for _, y in densities], color=INK, marker="o")
    lower.set_ylabel("recovered, %")
    lower.set_xlabel("alpha")
    draws = len({model.draw for model in points})
    return picture(
        made,
        "alpha",
        "Perplexity and density against alpha",
        f"{short(source, 60)}. WRP keeps 2:4 and takes back crucial weights; their share of all weights is below."
        + (f" Means over {draws} draws." if draws > 1 else ""),
        f"Line charts of perplexity and of the recovered density against alpha. {'; '.join(said)}.",
        number,
        [conditions.of_figure(model, key) for model in points for key in (*keys, "recovered", "seconds")],
    )


def mean_by_alpha(points: Sequence[Shown], values: Mapping[str, float | None]) -> list[tuple[float, float]]:
    """Alpha and the mean of the values of its models, where there are any. values: by label."""
    found: dict[float, list[float]] = {}
    for model in points:
        value = values[model.label]
        if model.alpha is not None and value is not None:
            found.setdefault(model.alpha, []).append(value)
    return [(x, sum(known) / len(known)) for x, known in sorted(found.items())]


def plain(model: Shown) -> bool:
    """Whether the method is WRP by elements with an alpha, which makes one curve."""
    return model.alpha is not None and not re.search(r"\b(block|density)=", str(model.method))


def density(model: Shown) -> float | None:
    """The recovered share; 0 for alpha 0, which recovers nothing."""
    return 0.0 if model.alpha == 0 else model.figures.get("recovered")
