"""A recipe's YAML as plain data with the line of every value. Read with the safe loader; the text is untrusted."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.errors import UsageError

LARGEST, DEEPEST = 1 << 20, 20  # bytes of a recipe, sections inside sections
VARIABLE = re.compile(r"\$\{([^}]*)\}")
VARIABLES = "variables"
HERE = "here"  # the variable that holds the folder of the recipe
Place = tuple[str | int, ...]  # keys and indices that lead to a value
Scalar = str | int | float | bool | None


@dataclass
class Document:
    """text: as read. content: mappings, lists and scalars. lines: of every value, from 1; of an entry, of its key."""

    file: Path
    text: str = ""
    content: Any = None
    lines: dict[Place, int] = field(default_factory=dict)

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest one around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def error(self, place: Place, reason: str) -> UsageError:
        """The refusal of a value, with its line."""
        return UsageError(f"{self.file}, line {self.line(place)}: {reason}")


def read_document(file: str | Path, given: Mapping[str, str] | None = None) -> Document:
    """The document in a file, its variables replaced; `given` ones take the place of those of the same name in it.

    Raises UsageError, with the line, for text that is no YAML, tags, aliases, a key that is there twice, and a variable
    that is not defined; without one where the file or the package PyYAML is missing.
    """
    path = Path(file).expanduser()
    document = Document(path, _text(path))
    root = _composed(path, document.text)
    document.content = _plain(root, (), document)
    _replace(document, given or {})
    return document


def _text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give a recipe (.yaml)")
    if path.stat().st_size > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST} bytes, so it is no recipe")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error


def _composed(path: Path, text: str) -> Any:
    """The tree of YAML nodes."""
    yaml = yaml_package()
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # the reader takes time that grows with the square of the depth
                raise UsageError(f"{path}, line {event.start_mark.line + 1}: this is nested too deeply for a recipe")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                line = event.start_mark.line + 1
                raise UsageError(f"{path}, line {line}: anchors and aliases are not read; use variables, ${{NAME}}")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: this is no YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}, line 1: a recipe is a mapping such as 'title: ...'; see docs/compare.md")
    return root


def _plain(node: Any, place: Place, document: Document) -> Any:
    """The value of a node; the lines of everything in it are noted."""
    yaml = yaml_package()
    document.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _scalar(key_node, place, document)
            key = key if isinstance(key, str) else str(key_node.value)
            if key in result:
                first = document.line((*place, key))
                document.lines[(*place, key)] = key_node.start_mark.line + 1
                raise document.error((*place, key), f"{key} is there twice, first in line {first}; keep one")
            document.lines[(*place, key)] = key_node.start_mark.line + 1
            result[key] = _plain(value_node, (*place, key), document)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(inner, (*place, index), document) for index, inner in enumerate(node.value)]
    return _scalar(node, place, document)


def _scalar(node: Any, place: Place, document: Document) -> Scalar:
    yaml = yaml_package()
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "int", "float", "bool", "null", "timestamp"):
        line = node.start_mark.line + 1
        raise UsageError(f"{document.file}, line {line}: {kind} cannot be used here; write a text or a number")
    if kind == "timestamp" or ":" in node.value:  # 2:4 is a pattern here, not a number to the base of 60
        return str(node.value)
    try:
        return typed(node.value) if kind != "str" else str(node.value)
    except ValueError as error:
        raise document.error(place, f"{node.value!r} is no {kind}") from error


def typed(text: str) -> Scalar:
    """A scalar as YAML reads it: a number, true, false, null, or the text itself."""
    yaml = yaml_package()
    try:
        value = yaml.safe_load(text) if text.strip() and ":" not in text else text
    except (yaml.YAMLError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


def _replace(document: Document, given: Mapping[str, str]) -> None:
    """Puts the values of variables in the place of `${NAME}`, everywhere but in `variables` itself."""
    defined = document.content.get(VARIABLES) or {}
    if not isinstance(defined, dict) or any(isinstance(value, dict | list) for value in defined.values()):
        raise document.error((VARIABLES,), "variables is a mapping of names to texts or numbers")
    unknown = next((name for name in given if name not in defined), None)
    if unknown is not None:
        known = ", ".join(defined) or "none"
        raise UsageError(f"{document.file} has no variable {unknown}; it has {known}")
    values = {HERE: str(document.file.parent), **defined, **{name: typed(text) for name, text in given.items()}}
    document.content = {
        key: value if key == VARIABLES else _replaced(value, (key,), values, document)
        for key, value in document.content.items()
    }


def _replaced(value: Any, place: Place, values: Mapping[str, Scalar], document: Document) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, (*place, key), values, document) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, (*place, index), values, document) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in values:
            raise document.error(place, f"there is no variable {name}; there are {', '.join(values)}")
    whole = VARIABLE.fullmatch(value)
    return values[whole[1]] if whole else VARIABLE.sub(lambda found: str(values[found[1]]), value)


def yaml_package() -> Any:
    """PyYAML. Raises UsageError, with the command that installs the extra, where it or pydantic is missing."""
    try:
        import pydantic  # noqa: F401
        import yaml
    except ImportError as error:
        raise UsageError("recipes need PyYAML and pydantic; run: pip install 'budwood[compare]'") from error
    return yaml
