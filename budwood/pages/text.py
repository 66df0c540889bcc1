"""Figures as text, and foreign text made visible: what a page shows is what its reader can see."""

from typing import Any

from budwood import humanize
from budwood.humanize import printable

MISSING = "\u2013"  # an en dash
LOWER_IS_BETTER = ("perplexity", "D", "KL", "bits per weight", "bytes", "share of dense", "seconds", "repetition")
SHARES = ("density", "recovered", "share of dense", "same top", "accuracy", "repetition")


LEAST, MOST = 1e-15, 1e15  # figures between them can be drawn on any axis


def number(value: Any) -> float | None:
    """`value` as a float where it is a number that can be shown, else None: reports come from files."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -MOST < value < MOST:  # nor is NaN
        return None
    return float(value) if abs(value) > LEAST else 0.0


def text_of(key: str, value: float | None) -> str:
    """A figure of `reports.comparison.FIGURES` for readers."""
    if value is None:
        return MISSING
    if key.startswith(SHARES):
        return humanize.share(value)
    if key.startswith("bytes") or key == "peak memory":
        return humanize.size(value)
    if key == "seconds":
        return humanize.seconds(value)
    if key == "parameters":
        return f"{value:,.0f}"
    if key == "D" or key.startswith(("D ", "KL ")):
        return f"{value:.3f}"
    if key.endswith("times dense") or key == "bits per weight":
        return f"{value:.2f}"
    return humanize.figure(value, 4) if value < 10000 else f"{value:,.0f}"


def short(text: object, length: int = 34) -> str:
    """`text` on one line, visible, at most `length` characters: for pictures."""
    line = " ".join(printable(text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
