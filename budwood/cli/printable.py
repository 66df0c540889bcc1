"""Text of models, files and users made harmless for a terminal.

Control characters could move the cursor, change the title or hide a line, and marks of writing direction could show a
name in another order than it has. Whatever the command line prints passes through one of these functions.
"""

import re
from typing import TextIO

DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# C0 and C1 controls, DEL, marks of direction, separators that end a line, byte-order mark, half of a surrogate pair.
UNSAFE = re.compile(f"[\x00-\x1f\x7f-\x9f{DIRECTION}\u2028\u2029\ufeff\ud800-\udfff]")


def printable(text: object, keep: str = "\n\t") -> str:
    r"""`text` with every unsafe character as its escape, such as \x1b; those in `keep` stay."""

    def escaped(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return UNSAFE.sub(escaped, str(text))


def one_line(text: object) -> str:
    """`text` on one line: white space as single spaces, unsafe characters escaped."""
    return printable(" ".join(str(text).split()), keep="")


def printable_json(text: str) -> str:
    """JSON with every unsafe character inside its strings as JSON's own escape; the same value."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Escaping:
    """A text stream for what the library and its dependencies print, which is written escaped to `stream`."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["stream"], name)


def unwrapped(stream: object) -> TextIO:
    """The stream below any `Escaping`, for what draws with control characters of its own."""
    while isinstance(stream, Escaping):
        stream = stream.stream
    return stream  # type: ignore[return-value]
