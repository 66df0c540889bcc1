"""How many weights groups of four keep: the X:4 analysis, table 1 of the WRP paper."""

from collections.abc import Iterator, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import MUTED, Picture, figure, legend, picture, series
from budwood.pages.pictures.errors import omitted
from budwood.pages.pictures.kinds import chosen
from budwood.pages.shown import Shown
from budwood.pages.text import number, short

HALF = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # half of the weights kept independently of each other
BARS = 4


def groups(models: Sequence[Shown]) -> Iterator[Picture]:
    found = {model.label: (model, shares) for model in models if (shares := shares_of(model)) and shares[4] < 0.999}
    if not found:
        return
    shown = [found[model.label] for model in chosen([model for model, _ in found.values()], BARS)]
    made, axes = figure(3.0 + 0.16 * len(shown))
    width = 0.8 / len(shown)
    hatches = ("", "//", "..", "\\\\", "xx", "--")
    for index, (model, shares) in enumerate(shown):
        places = [kept + (index - (len(shown) - 1) / 2) * width for kept in range(5)]
        axes.bar(
            places,
            [100 * share for share in shares],
            width=0.92 * width,
            color=series(index)["color"],
            hatch=hatches[index],
            edgecolor="#040404",
            linewidth=0,
            label=short(model.label, 30),
        )
        if len(shown) <= 2:
            for place, share in zip(places, shares, strict=True):
                axes.text(place, 100 * share, f"{100 * share:.1f}", ha="center", va="bottom", fontsize=7)
    axes.plot(
        range(5), [100 * share for share in HALF], color=MUTED, linestyle="none", marker="_", markersize=18,
        label="half kept, independent",
    )  # fmt: skip
    axes.set_xticks(range(5), [f"{kept}:4" for kept in range(5)])
    axes.set_xlabel("weights kept of four adjacent inputs")
    axes.set_ylabel("groups, %")
    legend(made, axes)
    model, shares = shown[0]
    listed = ", ".join(f"{kept}:4 {100 * share:.1f} %" for kept, share in enumerate(shares))
    yield picture(
        made,
        "groups",
        "Weights kept in groups of four",
        "All pruned matrices together. The lines: half of the weights kept independently (6.25, 25, 37.5, 25, 6.25 %)."
        + omitted(len(found), len(shown)),
        f"Bar chart of groups keeping 0 to 4 weights of {len(shown)} models. {short(model.label)}: {listed}.",
        conditions=[conditions.pruning(model) for model, _ in shown],
    )


def shares_of(model: Shown) -> list[float] | None:
    """Shares of the groups of all matrices that keep 0, 1, 2, 3, 4 weights; None where they were not counted."""
    sums = [0.0] * 5
    for matrix in model.linears.values():
        counts = matrix.get("x4")
        if isinstance(counts, list) and len(counts) == 5:
            sums = [total + (number(count) or 0) for total, count in zip(sums, counts, strict=True)]
    whole = sum(sums)
    return [each / whole for each in sums] if whole else None
