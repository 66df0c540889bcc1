"""Finds the text of a table's rows: a field `text`, a conversation, a prompt with its completion, or the only prose."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from budwood.data.texts import check_text
from budwood.errors import UsageError

Chat = Callable[[Sequence[Mapping[str, Any]], str], str]  # the messages and their place -> their text
TEXT, MESSAGES, STRUCTURE, OTHER = "text", "messages", "structure", "other"  # kinds of values
LOOKED_AT = 100  # rows of a field that is not called `text`, to tell prose from ids and labels
TAKEN = "taken are `text`, `messages`, or `prompt` and `completion`"


class RowReader:
    """Turns rows into texts.

    fields: the fields to read, one after the other; None: those that the first row decides. named: they were asked for,
    so they are not looked at for prose. chat: writes a conversation as text; without it conversations are refused.
    nulls: rows without a value are left out, as in tables, instead of refused. templated: whether a chat template wrote
    the texts, known once a text was read.
    """

    def __init__(
        self,
        fields: Sequence[str] | None = None,
        named: bool = True,
        chat: Chat | None = None,
        nulls: bool = False,
    ):
        self.fields, self.named, self.chat, self.nulls = fields, named, chat, nulls
        self.templated = False

    def texts(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        """The text of each row, given with a description of its place.

        Raises UsageError with the place of a row whose fields hold no text.
        """
        rows = iter(rows)
        first = next(rows, None)
        if first is None:
            return
        where, row = first
        rows = itertools.chain([first], rows)
        fields = self.fields or fields_of({name: kind(value) for name, value in row.items()}, where)
        if (self.fields is None or not self.named) and needs_prose(fields):
            rows = prose(rows, fields[0], where, list(row))
        for where, row in rows:
            text = self._text(row, fields, where)
            if text is not None:
                yield check_text(text, where)

    def _text(self, row: Mapping[str, Any], fields: Sequence[str], where: str) -> str | None:
        values = [row.get(name) for name in fields]
        if self.nulls and None in values:
            return None
        kinds = {kind(value) for value in values}
        if kinds == {TEXT}:
            return "".join(map(str, values))
        if kinds == {MESSAGES}:
            if self.chat is None:
                raise UsageError(
                    f"{where}: {fields[0]!r} holds a conversation, which needs a tokenizer; give plain text"
                )
            self.templated = True
            return self.chat([message for messages in values for message in messages or ()], where)
        names = " and ".join(map(repr, fields))
        raise UsageError(f"{where}: no text in the field {names}; the fields are {', '.join(row) or 'none'}")


def kind(value: Any) -> str:
    """What a field holds. A conversation is a list of objects with a role and a content."""
    if isinstance(value, str):
        return TEXT
    if isinstance(value, list) and value and all(map(is_message, value)):
        return MESSAGES
    return STRUCTURE if isinstance(value, list | dict) and value else OTHER


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def fields_of(kinds: Mapping[str, str], where: str) -> tuple[str, ...]:
    """The fields to read, by the kinds of values in the fields of a row.

    Raises UsageError where none is clearly text.
    """
    if kinds.get("text") == TEXT:
        return ("text",)
    if kinds.get("messages") == MESSAGES:
        return ("messages",)
    pair = (kinds.get("prompt"), kinds.get("completion"))
    if pair in ((TEXT, TEXT), (MESSAGES, MESSAGES)):
        return ("prompt", "completion")
    strings = [name for name, found in kinds.items() if found == TEXT]
    structured = [name for name, found in kinds.items() if found in (STRUCTURE, MESSAGES)]
    if len(strings) == 1 and not structured:
        return (strings[0],)
    found = f"the string fields are {', '.join(strings)}" if strings else "no field holds a string"
    if structured:
        found += f", and {', '.join(structured)} {'holds' if len(structured) == 1 else 'hold'} lists or objects"
    raise UsageError(f"{where}: no field `text`, and {found}; {TAKEN}; rename the one to use to `text`")


def needs_prose(fields: Sequence[str]) -> bool:
    """Whether a field was taken only because no other holds a string."""
    return len(fields) == 1 and fields[0] not in ("text", "messages")


def prose(
    rows: Iterator[tuple[str, dict[str, Any]]], field: str, where: str, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows themselves. Raises UsageError where the field of the first of them holds ids or labels."""
    begun = list(itertools.islice(rows, LOOKED_AT))
    values = [row[field] for _, row in begun if isinstance(row.get(field), str) and row[field].strip()]
    if values and 2 * sum(map(is_prose, values)) < len(values):
        raise UsageError(
            f"{where}: no field `text`, and the only string field {field!r} holds values such as {values[0][:40]!r}, "
            f"which are no text; the fields are {', '.join(names)}; {TAKEN}; rename the one to use to `text`"
        )
    return itertools.chain(begun, rows)


def is_prose(text: str) -> bool:
    """Whether it can be a sentence: three words, or letters beyond ASCII, which scripts without spaces have."""
    return len(text.split(maxsplit=3)) >= 3 or any(letter.isalpha() and not letter.isascii() for letter in text)
