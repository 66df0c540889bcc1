"""Small files written whole or not at all: under a temporary name, flushed to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from budwood.errors import RunError

TEMPORARY = ".budwood-tmp"  # ends the name of a file that is being written; what a killed process left is written over


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Yields the path to write to; afterwards the content has the name `file`, or after an error is gone.

    Raises RunError where the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}{TEMPORARY}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):  # a broken disk may refuse this too; the first error is the one to report
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(
                f"{file} could not be written ({error}); make room or give another folder, and give the command again"
            ) from error
        raise


def write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    with written_whole(file) as temporary:
        # Names of files may hold bytes that are no UTF-8, which Python keeps as halves of surrogate pairs. Written as
        # \\udcXX they are the same text again in JSON.
        temporary.write_text(text, "utf-8", "backslashreplace")


def copy_file(source: Path, file: Path) -> None:
    """The content alone, a piece at a time."""
    with open(source, "rb") as content, written_whole(file) as temporary, open(temporary, "wb") as copy:
        shutil.copyfileobj(content, copy)


def flush(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())
