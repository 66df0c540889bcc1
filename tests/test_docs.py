"""The documents agree with the program: option tables, commands, method expressions, links."""

import importlib.util
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from budwood.cli import app, with_dashes
from budwood.methods import METHODS, parse_method

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def generator():
    spec = importlib.util.spec_from_file_location("update_option_tables", DOCS / "update_option_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = generator()


@pytest.mark.parametrize("name", METHODS)
def test_the_option_table_of_a_method_is_up_to_date(name):
    page = (DOCS / "methods" / f"{name}.md").read_text("utf-8")
    table = tables.option_table(name, METHODS[name])
    assert page == tables.with_table(page, name, table), "run: python docs/update_option_tables.py"


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_help_text(name):
    options = tables.describe_method(name, METHODS[name])["options"]
    assert not [option["name"] for option in options if not option["help"]]


@dataclass(frozen=True)
class Toy:
    """A method with one option of each kind."""

    pattern: str = field(default="2:4", metadata={"help": '"N:M" | "50%"'})
    damp: float = field(default=0.01, metadata={"help": "added to the\n  diagonal"})
    mask: str | None = field(default=None, metadata={"help": "the mask"})
    bits: float = field(kw_only=True, metadata={"help": "per weight"})
    cache: dict = field(default_factory=dict, init=False)


TOY_TABLE = r"""| option | default | meaning |
| --- | --- | --- |
| `pattern` | `"2:4"` | "N:M" \| "50%" |
| `damp` | `0.01` | added to the diagonal |
| `mask` | `None` | the mask |
| `bits` | required | per weight |"""


def test_an_option_table_shows_name_default_and_help():
    assert tables.option_table("toy", Toy) == TOY_TABLE


def test_a_table_replaces_what_is_between_its_markers():
    page = "# Toy\n\n<!-- options: begin toy -->\nold\n\nolder\n<!-- options: end -->\n\nText.\n"
    new = tables.with_table(page, "toy", "| new |")
    assert new == "# Toy\n\n<!-- options: begin toy -->\n| new |\n<!-- options: end -->\n\nText.\n"
    assert tables.with_table(new, "toy", "| new |") == new


@pytest.mark.parametrize("name", ["other", "toy"])
def test_a_page_without_exactly_one_table_is_refused(name):
    one = "<!-- options: begin toy -->\n<!-- options: end -->\n"
    with pytest.raises(ValueError, match="it needs one"):
        tables.with_table(one + one, name, "")


def commands(page: Path) -> list[str]:
    """The `budwood ...` commands in the code blocks of a page, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"budwood\s", line)]


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


def test_there_are_commands_to_check():
    assert {page.name for page, _ in COMMANDS} >= {"README.md", "command-line.md", "wrp.md"}


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.stem}: {line}" for page, line in COMMANDS])
def test_a_command_in_the_documents_parses(page, line):
    _, verb, *arguments = shlex.split(line, comments=True)
    context = typer.main.get_command(app).commands[verb].make_context(verb, with_dashes(arguments))
    if context.params.get("method"):
        parse_method(context.params["method"])


def links(page: Path) -> list[str]:
    """The targets of a page's relative links, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    return [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_point_to_files(page):
    assert not [target for target in links(page) if not (page.parent / target).exists()]


def test_there_are_links_to_check():
    assert {"docs/command-line.md", "CONTRIBUTING.md"} <= set(links(REPOSITORY / "README.md"))
