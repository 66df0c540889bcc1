"""A mix of calibration texts: names with shares, such as `wikitext2:3,c4:1`, and how windows are divided among them."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.errors import UsageError

MOST = 999.0  # of a share: four digits would be the years of sotu:1961
PART = re.compile(r"(?:\[(?P<quoted>[^][]+)\]|(?P<name>[^][:,]+)):(?P<share>\d+(?:\.\d+)?)")
SPELLING = "a mix is NAME:SHARE,NAME:SHARE, with brackets where a name holds a colon or comma: '[sotu:1950-]:3,c4:1'"


@dataclass(frozen=True)
class Mix:
    """Names of texts with their shares of the windows. `str` gives the spelling that `mix_of` reads."""

    parts: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if len(names) < 2:
            raise UsageError(f"a mix needs two texts at least, and {str(self)!r} has {len(names)}")
        for name, share in self.parts:
            if names.count(name) > 1:
                raise UsageError(f"{name} is twice in the mix {str(self)!r}; give each text one share")
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= MOST:
                raise UsageError(f"the share of {name} must be above 0 and at most {MOST:g}, not {share!r}")
            if re.search(r"[][]", name):
                raise UsageError(f"{name}: a name in a mix must not hold brackets; rename the file")

    def __str__(self) -> str:
        return ",".join(f"{f'[{name}]' if re.search('[:,]', name) else name}:{share:g}" for name, share in self.parts)

    def counts(self, windows: int) -> list[int]:
        """How many windows each text gives; they add up to `windows`, rounded by largest remainder.

        Raises UsageError where a text would give none.
        """
        whole = sum(share for _, share in self.parts)
        exact = [windows * share / whole for _, share in self.parts]
        counts = [int(count) for count in exact]
        by_rest = sorted(range(len(exact)), key=lambda part: counts[part] - exact[part])  # stable: earlier parts first
        for part in by_rest[: windows - sum(counts)]:
            counts[part] += 1
        for (name, share), count in zip(self.parts, counts, strict=True):
            if count == 0:
                raise UsageError(
                    f"the share {share:g} of {name} is less than one of {windows} windows; take more windows, or leave "
                    "it out"
                )
        return counts


def mix_of(data: Any) -> Mix | None:
    """The mix that `data` describes, a mapping of names to shares or a text; None where it is something else.

    A text is a mix where it holds a comma or begins with a bracket, and no file or folder is called so. Raises
    UsageError where such a text is no mix.
    """
    if isinstance(data, Mapping):
        if not all(isinstance(name, str | Path) for name in data):
            raise UsageError("the keys of a mix are names of data sets, files or folders")
        return Mix(tuple((str(name), share) for name, share in data.items()))
    text = str(data) if isinstance(data, str | Path) else ""
    if not ("," in text or text.startswith("[")) or os.path.exists(text):
        return None
    parts = []
    for part in parts_of(text):
        match = PART.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{text!r} is no file, and {part.strip()!r} no part of a mix; {SPELLING}")
        if match["name"] and os.path.exists(part.strip()):
            raise UsageError(
                f"{part.strip()!r} may be the file of this name or a share; write '[{part.strip()}]:SHARE'"
            )
        share = float(match["share"])
        parts.append((match["quoted"] or match["name"], int(share) if share.is_integer() else share))
    return Mix(tuple(parts))


def parts_of(text: str) -> list[str]:
    """The parts of a list with commas; a comma inside brackets separates nothing."""
    return re.split(r",(?![^[]*\])", text)


def interleaved(counts: Sequence[int]) -> list[int]:
    """Places in the concatenation of lists of these lengths, in an order in which all of them advance evenly."""
    progress = [(place + 0.5) / count for count in counts for place in range(count)]
    return sorted(range(len(progress)), key=progress.__getitem__)
