"""Rewrite the option tables of docs/methods from the methods themselves: python docs/update_option_tables.py

A page holds its table between `<!-- options: begin NAME -->` and `<!-- options: end -->`.
"""

import re
from pathlib import Path

from budwood.cli.methods import describe_method
from budwood.methods import METHODS

PAGES = Path(__file__).parent / "methods"
END = "<!-- options: end -->"


def option_table(name: str, method: type) -> str:
    """The options of a method as a Markdown table: name, default, meaning."""
    rows = [
        f"| `{option['name']}` | {default_cell(option['default'])} | {cell(option['help'])} |"
        for option in describe_method(name, method)["options"]
    ]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])


def default_cell(default: str | None) -> str:
    return "required" if default is None else f"`{cell(default)}`"


def cell(text: str) -> str:
    """Text that stays in one cell: in one line, with `|` escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def with_table(page: str, name: str, table: str) -> str:
    """The page with `table` between its markers; ValueError where it does not have exactly one pair for `name`."""
    begin = f"<!-- options: begin {name} -->"
    parts = re.split(f"(?s){re.escape(begin)}.*?{re.escape(END)}", page)
    if len(parts) != 2:
        raise ValueError(f"the page of {name} has {len(parts) - 1} tables between '{begin}' and '{END}'; it needs one")
    return f"{parts[0]}{begin}\n{table}\n{END}{parts[1]}"


def main() -> None:
    for name, method in METHODS.items():
        file = PAGES / f"{name}.md"
        file.write_text(with_table(file.read_text("utf-8"), name, option_table(name, method)), "utf-8")


if __name__ == "__main__":
    main()
