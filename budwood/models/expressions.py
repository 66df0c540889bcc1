"""Regular expressions from users and from foreign recipes, searched in a bounded number of steps.

Python's matcher tries one way after the other, and for some expressions their number doubles with every character.
Here all ways are followed at once: what is kept is the set of places in the text that the expression can have reached.
The syntax, and what is found, are those of `re`; back references, atomic groups and possessive repeats, which need the
other way of matching, are refused.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from budwood.errors import UsageError

LONGEST = 2_000  # characters of an expression
STEPS = 100_000  # places visited in one text; names of matrices and usual expressions need some hundreds
MOST = 10_000  # expressions of one option
TOTAL = 50_000_000  # places that all of them visit in all texts; some 20 seconds
CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}
REFUSED = {
    sre.GROUPREF: "a back reference",
    sre.GROUPREF_EXISTS: "a condition",
    sre.ATOMIC_GROUP: "an atomic group",
    sre.POSSESSIVE_REPEAT: "a possessive repeat",
}


@dataclass(frozen=True)
class Expression:
    """A regular expression; option: what it was given as, for messages.

    Raises UsageError where the text is none, or uses what cannot be bounded.
    """

    pattern: str
    option: str = "--skip"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or len(self.pattern) > LONGEST:
            shown = str(self.pattern)[:80]
            raise UsageError(f"{self.option} {shown!r} is no regular expression of at most {LONGEST} characters")
        try:
            refused = next(iter(_operators(_parsed(self.pattern))), None)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{self.option} {self.pattern!r} is not a regular expression: {error}") from error
        if refused is not None:
            raise UsageError(f"{self.option} {self.pattern!r} has {refused}, which is not supported; write it without")

    def search(self, text: str) -> bool:
        """Whether the expression is found anywhere in the text, as `re.search` finds it.

        Raises UsageError where that takes more than `STEPS` steps.
        """
        return _found(self, text)[0]


class Expressions:
    """The expressions of one option, in their order: together they are searched in a bounded number of steps too.

    Raises UsageError where one of them is none, and where there are more than `MOST`.
    """

    def __init__(self, patterns: Sequence[str], option: str = "--skip"):
        if len(patterns) > MOST:
            raise UsageError(f"{option} has {len(patterns)} regular expressions; give at most {MOST}")
        self.rules = [Expression(pattern, option) for pattern in patterns]
        self.option, self.steps = option, 0
        self._first: dict[str, Expression | None] = {}

    def search(self, rule: Expression, text: str) -> bool:
        """Whether one of them is found in the text. Raises UsageError where all took more than `TOTAL` steps."""
        found, steps = _found(rule, text)
        self.steps += steps
        if self.steps > TOTAL:
            raise UsageError(f"the expressions of {self.option} take too long to be searched for; write simpler ones")
        return found

    def first(self, text: str) -> Expression | None:
        """The first that is found in the text, None where none is."""
        if text not in self._first:
            self._first[text] = next((rule for rule in self.rules if self.search(rule, text)), None)
        return self._first[text]


@lru_cache(maxsize=16)
def together(patterns: tuple[str, ...], option: str) -> Expressions:
    """The same `Expressions` for the same patterns, for methods, which are asked for one name at a time."""
    return Expressions(patterns, option)


@lru_cache(maxsize=256)
def _parsed(pattern: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of syntax that may change
        return _parser.parse(pattern)


@lru_cache(maxsize=1 << 16)
def _found(expression: Expression, text: str) -> tuple[bool, int]:
    """Whether it is found, and the steps that this took."""
    tree, search = _parsed(expression.pattern), _Search(text, expression)
    return bool(search.sequence(tree, set(range(len(text) + 1)), tree.state.flags)), search.steps


def _operators(tree: Iterable[Any]) -> Iterable[str]:
    """What is refused in a tree, in words."""
    for operator, argument in tree:
        if operator in REFUSED:
            yield REFUSED[operator]
        for inner in _inner(operator, argument):
            yield from _operators(inner)


def _inner(operator: Any, argument: Any) -> list[Any]:
    if operator is sre.BRANCH:
        return list(argument[1])
    if operator in (sre.SUBPATTERN, sre.MAX_REPEAT, sre.MIN_REPEAT, sre.ASSERT, sre.ASSERT_NOT):
        return [argument[-1]]
    return []


class _Search:
    """One text and the steps that were made in it."""

    def __init__(self, text: str, expression: Expression):
        self.text, self.expression, self.steps = text, expression, 0

    def sequence(self, tree: Iterable[Any], places: set[int], flags: int) -> set[int]:
        """Where the tree can end, having begun at any of the places."""
        for operator, argument in tree:
            if not places:
                break
            self.steps += len(places)
            if self.steps > STEPS:
                raise UsageError(
                    f"{self.expression.option} {self.expression.pattern!r} takes too long to be searched for; write a "
                    "simpler expression"
                )
            places = self._step(operator, argument, places, flags)
        return places

    def _step(self, operator: Any, argument: Any, places: set[int], flags: int) -> set[int]:
        if operator in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            fits = _test(operator, argument, flags)
            return {place + 1 for place in places if place < len(self.text) and fits(self.text[place])}
        if operator is sre.AT:
            return {place for place in places if self._is_at(argument, place, flags)}
        if operator is sre.BRANCH:
            return set().union(*(self.sequence(branch, places, flags) for branch in argument[1]))
        if operator is sre.SUBPATTERN:
            _, added, removed, tree = argument
            return self.sequence(tree, places, (flags | added) & ~removed)
        if operator in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, tree = argument
            return self._repeat(least, most, tree, places, flags)
        assert operator in (sre.ASSERT, sre.ASSERT_NOT), operator
        direction, tree = argument
        wanted = operator is sre.ASSERT
        return {place for place in places if self._looks(direction, tree, place, flags) is wanted}

    def _repeat(self, least: int, most: int, tree: Any, places: set[int], flags: int) -> set[int]:
        """More repeats than characters add nothing: one of them is empty, and may be left out or done again."""
        longest = len(self.text) + 1
        for _ in range(min(least, longest)):
            places = self.sequence(tree, places, flags)
        reached, new = set(places), places
        for _ in range(min(most, longest) - min(least, longest) if most is not sre.MAXREPEAT else longest):
            new = self.sequence(tree, new, flags) - reached
            if not new:
                break
            reached |= new
        return reached

    def _looks(self, direction: int, tree: Any, place: int, flags: int) -> bool:
        """Whether the tree matches from a place on, or (direction < 0, of one width) up to it."""
        if direction > 0:
            return bool(self.sequence(tree, {place}, flags))
        start = place - tree.getwidth()[0]
        return start >= 0 and place in self.sequence(tree, {start}, flags)

    def _is_at(self, where: Any, place: int, flags: int) -> bool:
        text, many = self.text, flags & re.MULTILINE
        if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            lines = many and where is sre.AT_BEGINNING
            return place == 0 or bool(lines and text[place - 1] == "\n")
        if where is sre.AT_END_STRING:
            return place == len(text)
        if where is sre.AT_END:
            last = place == len(text) - 1 or many
            return place == len(text) or bool(last and text[place] == "\n")
        word = [_category(r"\w", text[i], flags) for i in (place - 1, place) if 0 <= i < len(text)]
        at_boundary = (word == [True]) if len(word) == 1 else len(set(word)) == 2
        return at_boundary is (where is sre.AT_BOUNDARY) and bool(text)


def _test(operator: Any, argument: Any, flags: int) -> Callable[[str], bool]:
    """Whether a node of one character fits one."""
    if operator is sre.ANY:
        return lambda character: bool(flags & re.DOTALL) or character != "\n"
    if operator is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        items = argument[1:] if negated else argument
        return lambda character: any(_is_item(item, character, flags) for item in items) is not negated
    literal = (sre.LITERAL, argument)
    return lambda character: _is_item(literal, character, flags) is (operator is sre.LITERAL)


def _is_item(item: tuple[Any, Any], character: str, flags: int) -> bool:
    operator, argument = item
    if operator is sre.CATEGORY:
        return _category(CATEGORIES[argument], character, flags)
    low, high = (argument, argument) if operator is sre.LITERAL else argument
    same = {character, character.lower(), character.upper()} if flags & re.IGNORECASE else {character}
    return any(len(each) == 1 and low <= ord(each) <= high for each in same)


def _category(pattern: str, character: str, flags: int) -> bool:
    return re.fullmatch(pattern, character, re.DOTALL | flags & re.ASCII) is not None
