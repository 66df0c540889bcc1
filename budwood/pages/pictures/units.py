"""What structured methods kept of every block: KV groups and neurons."""

from collections.abc import Iterator, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import Picture, figure, legend, picture, series
from budwood.pages.pictures.errors import omitted
from budwood.pages.pictures.kinds import chosen
from budwood.pages.shown import Shown, mapping
from budwood.pages.text import number, short

KINDS = {"attention": "KV groups", "mlp": "neurons"}


def units(models: Sequence[Shown]) -> Iterator[Picture]:
    found = [model for model in models if any(block.get("units") for block in model.blocks)]
    if not found:
        return
    shown = chosen(found)
    made, axes = figure(4.2 + 0.16 * ((len(shown) + 1) // 2), rows=2, sharex=True)
    said = []
    for panel, (kind, words) in zip(axes, KINDS.items(), strict=True):
        for index, model in enumerate(shown):
            kept = [(place, pair) for place, block in enumerate(model.blocks) if (pair := pair_of(block, kind))]
            if not kept:
                continue
            style = series(index) | {"markersize": 3}
            shares = [100 * stayed / total for _, (stayed, total) in kept]
            panel.step([place for place, _ in kept], shares, where="mid", label=short(model.label, 30), **style)
            said.append(f"{short(model.label)} keeps {min(shares):.0f} to {max(shares):.0f} % of the {words}")
        panel.set_ylabel(f"{words} kept, %")
        panel.set_ylim(0, 105)
    axes[1].set_xlabel("block")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    legend(made, axes[1] if axes[1].get_legend_handles_labels()[1] else axes[0])
    yield picture(
        made,
        "units",
        "Heads and neurons kept by block",
        "Of the KV groups of the attention (with the query heads that read them) and of the neurons of the MLP."
        + omitted(len(found), len(shown)),
        f"Two step charts by block. {'; '.join(said)}.",
        conditions=[conditions.pruning(model) for model in shown],
    )


def pair_of(block, kind: str) -> tuple[float, float] | None:  # type: ignore[no-untyped-def]
    """How many units stayed, of how many; None where that is not known."""
    pair = mapping(block.get("units")).get(kind)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    stayed, total = number(pair[0]), number(pair[1])
    return None if stayed is None or not total else (stayed, total)
