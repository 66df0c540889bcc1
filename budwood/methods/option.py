"""Options of methods: dataclass fields that carry their help text, for the command line and the documentation."""

import dataclasses
from typing import Any


def option(default: Any, help: str) -> Any:
    """A field of a method with its default and one sentence of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A field of a method that must be given."""
    return dataclasses.field(metadata={"help": help})
