"""The two forms of data: documents of text, or token ids made elsewhere."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Texts:
    """Documents in order. `rows_are_lines`: they are text files, whose rows are lines; else each is a row."""

    name: str
    documents: tuple[str, ...]
    rows_are_lines: bool = False

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
