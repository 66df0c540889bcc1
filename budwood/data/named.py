"""Several evaluation texts at once: `wikitext2=wiki.test.raw,sotu`, the grammar of a mix without shares."""

import os
import re
from collections.abc import Mapping, Sequence

from budwood.data.mix import MOST, PART, parts_of
from budwood.data.sources import Data
from budwood.errors import UsageError

NAMED = re.compile(r"(?P<name>[\w.+-]+)=(?P<data>.+)", re.DOTALL)
BRACKETED = re.compile(r"\[([^][]+)\]")


def named_texts(data: Data | Mapping[str, Data]) -> dict[str, Data]:
    """The texts that `data` describes, by name; a single one without a name is called as it is written.

    A mapping of names to texts; or a text that lists them with commas, each as DATA or NAME=DATA, DATA in brackets
    where it holds a comma. A text that is the name of a file or folder is never read as a list. Raises UsageError for a
    mix, which serves for calibration only, and for two texts of one name.
    """
    if isinstance(data, Mapping):
        if any(isinstance(value, int | float) for value in data.values()):
            raise UsageError(f"{dict(data)} is a mix, which serves for calibration only; give names of texts")
        return {name: text for name, text in data.items() if not isinstance(text, int | float)}
    if not isinstance(data, str):
        return {str(data) if isinstance(data, os.PathLike) else unnamed(data): data}
    texts: dict[str, Data] = {}
    for part in [data] if os.path.exists(data) else parts_of(data):
        name, text = named(part.strip(), data)
        if name in texts:
            raise UsageError(f"{name} is twice in {data!r}; give the texts different names, as NAME=DATA")
        texts[name] = text
    return texts


def named(part: str, whole: str) -> tuple[str, str]:
    """Name and data of one part of a list."""
    if os.path.exists(part):
        return part, part
    if (share := PART.fullmatch(part)) and float(share["share"]) <= MOST:
        raise UsageError(f"{whole!r} is a mix, which serves for calibration only; give texts as DATA or NAME=DATA")
    match = NAMED.fullmatch(part)
    text = match["data"] if match else part
    if bracketed := BRACKETED.fullmatch(text):
        text = bracketed[1]
    if not text.strip():
        raise UsageError(f"{whole!r} holds an empty part; texts are listed as DATA or NAME=DATA, with commas between")
    return (match["name"] if match else text), text


def unnamed(data: Data) -> str:
    """What a list of documents or a tensor is called."""
    return "token ids" if hasattr(data, "shape") else "list of strings"


def merged_texts(data: Sequence[str]) -> dict[str, Data]:
    """The texts of several lists, as of an option that is repeated. Raises UsageError for two of one name."""
    texts: dict[str, Data] = {}
    for part in data:
        for name, text in named_texts(part).items():
            if name in texts:
                raise UsageError(f"{name} is given twice; give the texts different names, as NAME=DATA")
            texts[name] = text
    return texts
