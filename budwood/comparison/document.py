"""A recipe's YAML as plain data with the line of every value. Read with the safe loader; the text is untrusted."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.errors import UsageError

LARGEST = 1 << 20  # bytes of a recipe, before and after its variables are replaced
DEEPEST = 20  # sections inside sections
MOST = 20_000  # texts, numbers, lists and mappings of a recipe: the reader takes some 0.1 ms for each
WIDEST = 2**63  # numbers are smaller
SHOWN = 60  # characters of a wrong value in a message
VARIABLE = re.compile(r"\$\{([^}]*)\}")
SURROGATE = re.compile("[\ud800-\udfff]")
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
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if count > MOST:
                line = event.start_mark.line + 1
                raise UsageError(f"{path}, line {line}: a recipe has at most {MOST:,} values; divide it into several")
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
    if SURROGATE.search(node.value):
        raise document.error(place, f"{shown(node.value)} holds half of a surrogate pair; write the character itself")
    if kind in ("str", "timestamp") or ":" in node.value:  # 2:4 is a pattern here, not a number to the base of 60
        return str(node.value)
    value = typed(node.value)
    if kind in ("int", "float") and isinstance(value, str):
        raise document.error(place, f"{shown(node.value)} is no {kind} that can be used")
    return value


def typed(text: str) -> Scalar:
    """A scalar as YAML reads it: a number of at most 63 bits, true, false, null, or the text itself."""
    yaml = yaml_package()
    try:
        value = yaml.safe_load(text) if text.strip() and ":" not in text else text
    except (yaml.YAMLError, RecursionError, ValueError):  # such as of a number of very many digits
        return text
    if isinstance(value, int) and abs(value) >= WIDEST:
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


def shown(text: str) -> str:
    """A wrong value in a message, cut where it is long."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."


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
    replacing = Replacing(document, values)
    document.content = {
        key: value if key == VARIABLES else replacing(value, (key,)) for key, value in document.content.items()
    }


class Replacing:
    """Puts variables in their places. What they make of a recipe is bounded as the recipe itself is."""

    def __init__(self, document: Document, values: Mapping[str, Scalar]):
        self.document, self.values = document, values
        self.texts = {name: str(value) for name, value in values.items()}
        self.left = LARGEST

    def __call__(self, value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: self(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self(inner, (*place, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        names = VARIABLE.findall(value)
        unknown = next((name for name in names if name not in self.values), None)
        if unknown is not None:
            raise self.document.error(place, f"there is no variable {unknown}; there are {', '.join(self.values)}")
        self.left -= sum(len(self.texts[name]) for name in names)
        if self.left < 0:
            raise self.document.error(place, f"with its variables replaced the recipe has more than {LARGEST} bytes")
        whole = VARIABLE.fullmatch(value)
        return self.values[whole[1]] if whole else VARIABLE.sub(lambda found: self.texts[found[1]], value)


def yaml_package() -> Any:
    """PyYAML. Raises UsageError, with the command that installs the extra, where it or pydantic is missing."""
    try:
        import pydantic  # noqa: F401
        import yaml
    except ImportError as error:
        raise UsageError("recipes need PyYAML and pydantic; run: pip install 'budwood[compare]'") from error
    return yaml
