"""Sections of a recipe as pydantic checks them, and its mistakes as sentences with a line."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from budwood.comparison.document import Document, Place
from budwood.errors import UsageError

F = TypeVar("F")


def written_out(content: dict[str, Any]) -> None:
    """Short forms in full, in place: a text for `{method: ...}`, `true` for an empty section, `false` for none."""
    for section, field in (("sources", "model"),):
        values = content.get(section)
        if isinstance(values, dict):
            content[section] = {k: {field: v} if isinstance(v, str) else v for k, v in values.items()}
    if isinstance(content.get("methods"), list):
        content["methods"] = [{"method": row} if isinstance(row, str) else row for row in content["methods"]]
    evaluate = content.get("evaluate")
    if isinstance(evaluate, dict):
        texts = evaluate.get("texts")
        if isinstance(texts, dict):
            evaluate["texts"] = {k: {"data": v} if isinstance(v, str) else v for k, v in texts.items()}
        if isinstance(evaluate.get("tasks"), list):
            evaluate["tasks"] = {"names": evaluate["tasks"]}
        switch(evaluate, "tasks", "divergence", "repetition")
    switch(content, "speed")
    for section in ("calibration", "prune", "evaluate", "variables", "published"):
        if section in content and content[section] is None:  # a heading with nothing under it
            del content[section]


def switch(section: dict[str, Any], *names: str) -> None:
    for name in names:
        if section.get(name) is True:
            section[name] = {}
        elif name in section and section[name] in (False, None):
            del section[name]


def checked(kind: type[F], content: Any, place: Place, document: Document) -> F:
    """The fields of one section. Raises UsageError for the first of its mistakes, by line."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(content)  # type: ignore[attr-defined, no-any-return]
    except ValidationError as error:
        found = [((*place, *mistake["loc"]), mistake) for mistake in error.errors(include_url=False)]
        where, mistake = min(found, key=lambda pair: (document.line(pair[0]), pair[1]["type"] == "missing"))
        raise document.error(where, reason(where, mistake, kind, document)) from None


def reason(place: Place, mistake: Mapping[str, Any], kind: type, document: Document) -> str:
    """A sentence about one mistake that pydantic found."""
    known = place
    while known and known not in document.lines:
        known = known[:-1]
    inside = ".".join(map(str, known)) or "the recipe"
    if mistake["type"] == "extra_forbidden":
        around = ".".join(map(str, place[:-1])) or "a recipe"
        names = fields_at(kind, mistake["loc"][:-1])
        close = difflib.get_close_matches(str(place[-1]), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"there is no field {place[-1]} in {around}; there are {', '.join(names)}{hint}"
    if mistake["type"] == "missing":
        return f"{inside} lacks the field {place[-1]}"
    text = mistake["msg"][:1].lower() + mistake["msg"][1:]
    value = repr(mistake["input"])
    return f"{inside}: {text.replace('input ', 'the value ')}, got {value if len(value) < 80 else value[:77] + '...'}"


def fields_at(kind: Any, loc: tuple[str | int, ...]) -> list[str]:
    """The names of the fields that a section at `loc` of a model may have."""
    for step in loc:
        annotations = getattr(kind, "model_fields", None)
        if annotations is None:
            return []
        field = annotations.get(step)
        if field is not None:
            kind = model_in(field.annotation)
    return list(getattr(kind, "model_fields", {}))


def model_in(annotation: Any) -> Any:
    """The section type inside an annotation such as `dict[Name, TextFields]` or `TaskFields | None`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for inner in getattr(annotation, "__args__", ()) if (found := model_in(inner))), None)


class at:
    """Errors inside get the line of a place of the document."""

    def __init__(self, document: Document, place: Place):
        self.document, self.place = document, place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        prefix = f"{self.document.file}, line "
        if isinstance(error, UsageError) and not str(error).startswith(prefix):
            raise self.document.error(self.place, str(error)) from error
