"""Bytes, fractions, durations, shapes and numbers as text, and sizes of memory from text."""

import math
import re
import unicodedata
from collections.abc import Sequence

from budwood.errors import UsageError

HIDDEN = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
)  # categories of Unicode: control, format (bidi), surrogates, unassigned


def size(count: float | None) -> str:
    """Bytes in decimal units: 268.9 MB."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def share(part: float | None, digits: int = 2) -> str:
    """A fraction as a percentage: 58.80 %."""
    return "-" if part is None else f"{100 * part:.{digits}f} %"


def span(parts: Sequence[float]) -> str:
    """The smallest and the largest of several fractions: 3.10 % to 8.25 %."""
    return f"{share(min(parts))} to {share(max(parts))}"


def seconds(amount: float | None) -> str:
    """A duration: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if amount is None or not math.isfinite(amount):
        return "-"
    if amount < 60:
        return f"{amount:.1f} s"
    minutes, rest = divmod(round(amount), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shape(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def figure(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits."""
    return "-" if value is None else f"{value:.{digits}g}"


def printable(text: object) -> str:
    """`text` with characters that cannot be seen, or that reorder others, as escapes: U+202E becomes \\u202e.

    Spaces, tabs and line ends stay. For names from models and recipes that are shown to people.
    """
    return "".join(
        character if character in " \t\n" or unicodedata.category(character) not in HIDDEN else escaped(character)
        for character in str(text)
    )


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def parse_bytes(amount: int | str) -> int:
    """Bytes of 4294967296, "4GB", "500 MB" or "0", with units of 1024; UsageError for other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", str(amount), re.IGNORECASE)
    if not match:
        raise UsageError(f"{amount!r} is no amount of memory; write for example 4GB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
