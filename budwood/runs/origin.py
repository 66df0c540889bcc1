"""How a pruned folder was made, for the verbs that write another one from it."""

import re

from budwood.checkpoints.source import Source
from budwood.errors import UsageError
from budwood.formats import count, has_base
from budwood.runs.recipe import FILE, Recipe, read_recipe
from budwood.stream.linear import Linear


def recipe_of(source: Source) -> Recipe:
    """How a pruned folder was made; of one that transformers saved again, only which matrices are packed.

    Raises UsageError where the folder holds nothing that budwood pruned.
    """
    made = read_recipe(source.folder / FILE)
    if made is not None:
        return made
    if not source.packed:
        raise UsageError(f"{source.name} holds nothing that budwood pruned; prune it first")
    dense = [f"^{re.escape(name)}$" for name in source.structure().shapes if name not in source.packed]
    return Recipe(method=None, source={"name": source.name}, data=None, dtype="auto", format="auto", skip=dense)


def recovered(linear: Linear) -> int | None:
    """The weights beyond a 2:4 part; None where there is no such part, or nothing beyond it."""
    held = count(linear.stored)
    return int(held.recovered) if held.recovered and has_base(linear.shape, held) else None
