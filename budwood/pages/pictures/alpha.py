"""Perplexity and density against alpha, as figure 3 of the WRP paper (Tan, Zhang, Wei, ACL 2024) has them."""

from collections.abc import Iterator, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import INK, MUTED, Picture, figure, legend, picture, plain_numbers, series
from budwood.pages.shown import Shown
from budwood.pages.text import short


def alpha(models: Sequence[Shown]) -> Iterator[Picture]:
    """One picture for each source that WRP pruned with two or more alphas."""
    for number, source in enumerate(dict.fromkeys(model.source for model in models)):
        points = sorted(
            (model for model in models if model.source == source and model.alpha is not None and plain(model)),
            key=lambda model: model.alpha or 0,
        )
        if len({model.alpha for model in points}) < 2:
            continue
        keys = list(dict.fromkeys(key for model in points for key in model.figures if key.startswith("perplexity ")))
        made, axes = figure(4.6 if keys else 2.6, rows=2 if keys else 1, sharex=True, squeeze=False)
        upper, lower = axes[0][0], axes[-1][0]
        for index, key in enumerate(keys):
            known = [model for model in points if key in model.figures]
            style = series(index)
            upper.plot(
                [model.alpha for model in known], [model.figures[key] for model in known], label=short(key), **style
            )
            for model in models:
                if model.kind == "dense" and model.source == source and key in model.figures:
                    upper.axhline(model.figures[key], color=style["color"], linewidth=1, linestyle=":")
                    upper.annotate("dense", (1, model.figures[key]), (-2, 2), xycoords=("axes fraction", "data"),
                                   textcoords="offset points", ha="right", color=MUTED, fontsize=8)  # fmt: skip
        if keys:
            upper.set_ylabel("perplexity")
            upper.set_yscale("log")
            plain_numbers(upper.yaxis)
        densities = [(model.alpha, 100 * density(model)) for model in points if density(model) is not None]
        lower.plot([x for x, _ in densities], [y for _, y in densities], color=INK, marker="o")
        lower.set_ylabel("recovered, %")
        lower.set_xlabel("alpha")
        if keys:
            legend(made, upper)
        worst, best = points[0], points[-1]
        said = "; ".join(
            f"{key}: {worst.figures[key]:.4g} at alpha {worst.alpha:g}, {best.figures[key]:.4g} at {best.alpha:g}"
            for key in keys
            if key in worst.figures and key in best.figures
        )
        yield picture(
            made,
            "alpha",
            "Perplexity and density against alpha",
            f"{short(source, 60)}. WRP keeps 2:4 and takes back crucial weights; their share of all weights is below.",
            f"Line charts of perplexity and of the recovered density against alpha. {said}.",
            number,
            [conditions.of_figure(model, key) for model in points for key in (*keys, "recovered", "seconds")],
        )


def plain(model: Shown) -> bool:
    """Whether the method is WRP by elements with an alpha alone, which makes one curve."""
    return "block=" not in str(model.method) and "density=" not in str(model.method)


def density(model: Shown) -> float | None:
    """The recovered share; 0 for alpha 0, which recovers nothing."""
    return 0.0 if model.alpha == 0 else model.figures.get("recovered")
