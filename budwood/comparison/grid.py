"""Grids in method expressions: `wrp(alpha={0.1,0.2})` stands for two expressions, two grids for their product."""

from itertools import product

from budwood.errors import UsageError

MOST = 1000  # points of one grid
CLOSING = {"(": ")", "[": "]", "{": "}"}


def points(text: str) -> list[str]:
    """The expressions that `text` stands for, the last grid varying fastest; itself where it has no grid.

    Alternatives are parted by commas outside quotes and brackets. Raises UsageError for braces that do not fit.
    """
    pieces: list[list[str]] = []  # alternatives, plain text being a single one
    rest = text
    count = 1
    while rest:
        plain, brace, after = rest.partition("{")
        if "}" in plain:
            raise UsageError(f"in {text!r}: '}}' closes no grid; a grid is written {{0.1,0.2}}")
        pieces.append([plain])
        if not brace:
            break
        choices, rest = _alternatives(after, text)
        count *= len(choices)
        if count > MOST:
            raise UsageError(f"in {text!r}: the grid has more than {MOST} points; make it smaller")
        pieces.append(choices)
    return ["".join(point) for point in product(*pieces)] if pieces else [text]


def _alternatives(text: str, whole: str) -> tuple[list[str], str]:
    """The alternatives before the closing brace, and what follows it."""
    found, start, inside = [], 0, ""  # inside: the closing brackets that are awaited
    for index, letter in enumerate(text):
        if letter == "{":
            raise UsageError(f"in {whole!r}: a grid inside a grid; write the alternatives out")
        if letter in CLOSING:
            inside += CLOSING[letter]
        elif inside and letter == inside[-1]:
            inside = inside[:-1]
        elif not inside and letter in ",}":
            found.append(text[start:index].strip())
            start = index + 1
            if letter == "}":
                return _checked(found, whole), text[start:]
    raise UsageError(f"in {whole!r}: the grid that begins with '{{' has no end; a grid is written {{0.1,0.2}}")


def _checked(found: list[str], whole: str) -> list[str]:
    if "" in found:
        raise UsageError(f"in {whole!r}: the grid has an empty alternative; a grid is written {{0.1,0.2}}")
    twice = next((value for value in found if found.count(value) > 1), None)
    if twice is not None:
        raise UsageError(f"in {whole!r}: {twice} is twice in the grid; leave one out")
    return found
