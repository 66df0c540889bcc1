"""Which matrices keep how much: blocks down, kinds of matrix across, the share of non-zero weights in each cell."""

from collections.abc import Iterator, Mapping, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import PAPER, Picture, figure, picture
from budwood.pages.pictures.kinds import by_place
from budwood.pages.shown import Shown
from budwood.pages.text import short

MAPS = 6
BLOCKS, KINDS = 200, 40  # that a map can hold
UNEVEN = 0.003  # a difference of densities below it is no pattern to look at


def density_maps(models: Sequence[Shown]) -> Iterator[Picture]:
    """Maps of the models whose matrices differ in density; of all where none does and there is one model."""
    found = [(model, cells) for model in models if model.kind == "pruned" and (cells := by_place(model, "density"))]
    found = [(model, cells) for model, cells in found if fits(cells)]
    uneven = [(model, cells) for model, cells in found if max(cells.values()) - min(cells.values()) > UNEVEN]
    chosen = uneven or (found if len(found) == 1 else [])
    for number, (model, cells) in enumerate(chosen[:MAPS]):
        yield density_map(model, cells, number, len(chosen))


def fits(cells: Mapping[tuple[int, str], float]) -> bool:
    """Whether a picture can hold the map."""
    return len({block for block, _ in cells}) <= BLOCKS and len({kind for _, kind in cells}) <= KINDS


def density_map(model: Shown, cells, number: int, count: int) -> Picture:  # type: ignore[no-untyped-def]
    from matplotlib import colormaps

    blocks = sorted({block for block, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    low, high = min(cells.values()), max(cells.values())
    colours = colormaps["cividis"]
    made, axes = figure(1.3 + 0.17 * len(blocks))
    axes.grid(False)
    for (block, kind), density in cells.items():
        part = (density - low) / (high - low) if high > low else 0.5
        x, y = kinds.index(kind), blocks.index(block)
        red, green, blue, _ = colours(part)
        axes.add_patch(rectangle(x - 0.5, y - 0.5, (red, green, blue)))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        if len(kinds) <= 12:
            ink = "#ffffff" if dark else "#000000"
            axes.text(x, y, f"{100 * density:.1f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=7)
    axes.set_xticks(range(len(kinds)), [short(kind, 24) for kind in kinds], rotation=35, ha="right", fontsize=8)
    axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    lowest, highest = min(cells, key=cells.__getitem__), max(cells, key=cells.__getitem__)
    more = (
        f" {count} models have matrices of different density; {MAPS} are drawn." if count > MAPS and not number else ""
    )
    return picture(
        made,
        "density",
        f"Density of the matrices: {short(model.label, 60)}",
        f"Non-zero weights of each written matrix in per cent, from {100 * low:.1f} (dark) to {100 * high:.1f} (light)."
        + more,
        f"Map of {len(blocks)} blocks by {len(kinds)} kinds of matrix. Lowest density {100 * low:.1f} % in block "
        f"{lowest[0]}, {lowest[1]}; highest {100 * high:.1f} % in block {highest[0]}, {highest[1]}.",
        number,
        [conditions.sizes(model), conditions.pruning(model)],
    )


def rectangle(x: float, y: float, colour: tuple[float, float, float]):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=PAPER, linewidth=0.6)
