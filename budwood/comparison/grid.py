"""Grids in method expressions: `wrp(alpha={0.1,0.2})` stands for two expressions, two grids for their product."""

from collections.abc import Iterator
from itertools import product

from budwood.errors import UsageError

MOST = 1000  # points of one grid
CLOSING = {"(": ")", "[": "]"}
QUOTES = "\"'"


def points(text: str) -> list[str]:
    """The expressions that `text` stands for, the last grid varying fastest; itself where it has no grid.

    Alternatives are parted by commas outside quotes and brackets. Braces with a colon outside quotes are no grid but a
    mapping, as in `wrp(alpha={"mlp": 0.3})`. Raises UsageError for braces that do not fit.
    """
    pieces = list(_pieces(text))  # alternatives; plain text is a single one
    count = 1
    for choices in pieces:
        count *= len(choices)
        if count > MOST:
            raise UsageError(f"the grids here have more than {MOST} points together; make them smaller")
    return ["".join(point) for point in product(*pieces)]


def _pieces(text: str) -> Iterator[list[str]]:
    start = index = 0
    quote = ""  # that is open
    while index < len(text):
        letter = text[index]
        if letter in QUOTES:
            quote = "" if quote == letter else quote or letter
        elif letter == "}":
            raise UsageError(f"in {text!r}: '}}' closes no grid; a grid is written {{0.1,0.2}}")
        elif letter == "{":
            end, choices = _alternatives(text, index + 1, quote)
            if choices is not None:
                yield [text[start:index]]
                yield _checked(choices, text)
                start = end + 1
            index = end
        index += 1
    yield [text[start:]]


def _alternatives(text: str, first: int, around: str) -> tuple[int, list[str] | None]:
    """The place of the closing brace, and the alternatives before it; None for a mapping.

    around: the quote that the whole grid stands in, which parts nothing.
    """
    found, start, quote, inside = [], first, "", ""  # inside: the closing brackets that are awaited
    mapping = False
    for index in range(first, len(text)):
        letter = text[index]
        if letter in QUOTES and letter != around:
            quote = "" if quote == letter else quote or letter
        elif quote:
            continue
        elif letter == around and around:
            break
        elif letter == "{":
            raise UsageError(f"in {text!r}: a grid inside a grid; write the alternatives out")
        elif letter in CLOSING:
            inside += CLOSING[letter]
        elif inside and letter == inside[-1]:
            inside = inside[:-1]
        elif not inside and letter == ":" and not around:
            mapping = True
        elif not inside and letter in ",}":
            found.append(text[start:index].strip())
            start = index + 1
            if letter == "}":
                return index, None if mapping else found
    raise UsageError(f"in {text!r}: the grid that begins with '{{' has no end; a grid is written {{0.1,0.2}}")


def _checked(found: list[str], whole: str) -> list[str]:
    if len(found) > MOST:
        raise UsageError(f"a grid has at most {MOST} points, and one here has {len(found)}; make it smaller")
    if "" in found:
        raise UsageError(f"in {whole!r}: the grid has an empty alternative; a grid is written {{0.1,0.2}}")
    twice = next((value for value in found if found.count(value) > 1), None)
    if twice is not None:
        raise UsageError(f"in {whole!r}: {twice} is twice in the grid; leave one out")
    return found
