"""Drawing with matplotlib, and its SVG made part of a page: colours for light and dark, a name that is read out.

Colours are written as marks (hex values that nothing else uses) and become CSS variables of the page.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budwood.errors import UsageError
from budwood.humanize import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, MUTED, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0000a{number}" for number in range(1, 9))
VARIABLES = {INK: "--ink", GRID: "--line", MUTED: "--muted", PAPER: "--paper"} | {
    mark: f"--s{number}" for number, mark in enumerate(SERIES, start=1)
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
WIDTH = 4.6  # inches: at 360 px of a phone the text is still 8 px high
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "budwood",
    "text.parse_math": False,  # names hold dollar signs
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
}


@dataclass(frozen=True)
class Picture:
    """name: for the test and the result. title, caption: plain text. alternative: what the picture shows, in words.

    svg: markup made here, safe to insert. conditions: lines for the footnotes of the page.
    """

    name: str
    title: str
    caption: str
    alternative: str
    svg: str
    conditions: tuple[str, ...] = ()


def check_matplotlib() -> None:
    """UsageError where the pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "budwood report draws with matplotlib, which is not installed; give: pip install 'budwood[report]'"
        ) from error


@contextmanager
def drawing() -> Iterator[None]:
    """In this context matplotlib has the style of the pages, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that a font does not have
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams  # whose stubs take literal names only
        settings.update(STYLE)
        yield


def figure(height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any) -> tuple[Any, Any]:
    """A figure of `height` inches and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)  # it can measure texts; the file is written as SVG all the same
    return made, made.subplots(rows, columns, **options)


def picture(
    made: "Figure",
    name: str,
    title: str,
    caption: str,
    alternative: str,
    number: int = 0,
    conditions: Iterable[str | None] = (),
) -> Picture:
    """The picture of a figure. number: tells pictures of one kind apart. conditions: of what is drawn."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = embedded(buffer.getvalue(), f"{name}-{number}", alternative)
    return Picture(name, title, caption, alternative, svg, tuple(line for line in dict.fromkeys(conditions) if line))


def embedded(svg: str, key: str, alternative: str) -> str:
    """matplotlib's SVG as an element of a page: ids of its own, colours as variables, an accessible name."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<style type="text/css">.*?</style>', "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", body)
    for mark, variable in VARIABLES.items():
        body = body.replace(mark, f"var({variable})")
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    box = f' viewBox="{size[0].split(chr(34))[1]}"' if size else ""
    end = body.index(">", body.index("<svg"))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"{box} role="img" '
        f'aria-label="{attribute(alternative)}">'
    )
    return head + body[end + 1 :].strip()


def plain_numbers(axis: Any) -> None:
    """Writes the ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 10000 else f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def attribute(text: str) -> str:
    return printable(text).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def series(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the series `index`: no two of the first 24 differ by colour alone."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[(index + index // len(SERIES)) % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def legend(made: "Figure", axes: "Axes", columns: int = 2) -> None:
    """The legend below the axes, in columns."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        made.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
