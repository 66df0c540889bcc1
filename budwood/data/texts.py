"""The two forms of data: documents of text, or token ids made elsewhere."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from budwood.errors import UsageError

Purpose = Literal["calibration", "evaluation"]


def check_text(text: str, where: str) -> str:
    """The text itself; UsageError where it holds half of a surrogate pair, which no encoding and no tokenizer takes."""
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise UsageError(
            f"{where}: character {found.start() + 1} is {found[0]!a}, half of a surrogate pair, so it is no text; "
            "remove it"
        )
    return text


@dataclass(frozen=True)
class Texts:
    """Documents in order.

    rows_are_lines: they are text files, whose rows are lines; else each is a row. templated: a chat template wrote
    them, special tokens included.
    """

    name: str
    documents: tuple[str, ...]
    rows_are_lines: bool = False
    templated: bool = False

    def joined(self) -> str:
        """All documents as one text, with an empty line between them."""
        return "\n\n".join(self.documents)

    def rows(self) -> list[str]:
        """The rows as on the hub: a line keeps its newline, a blank line is the empty string."""
        if not self.rows_are_lines:
            return list(self.documents)
        lines = [line for document in self.documents for line in re.findall(r"[^\n]*\n|[^\n]+", document)]
        return ["" if not line.strip() else line for line in lines]


@dataclass(frozen=True)
class TokenIds:
    """Token ids: rows of one length, each cut into windows by itself; a single long text is one row."""

    name: str
    ids: Tensor  # [rows, tokens] int64
