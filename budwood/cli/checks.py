"""Checks of a request that need no model: they run before transformers, which takes seconds to import."""


def check_method(expression: str) -> None:
    """UsageError unless `expression` is a method. Imports torch."""
    from budwood.methods import parse_method

    parse_method(expression)


def check_model(name: str) -> None:
    """UsageError where `name` is neither a model folder nor of the form of a hub name. Imports no torch."""
    from budwood.checkpoints.locate import local_folder

    local_folder(name)


def check_format(format: str, values: str | None) -> None:
    """UsageError unless there is such a format, and it can hold such values. Imports torch."""
    from budwood.formats import known_layout

    known_layout(format, values)
