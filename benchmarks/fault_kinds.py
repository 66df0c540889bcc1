"""The faults that `faults.py` injects into a process: at the n-th file operation, after a time, or as a limit.

File operations are counted by replacing functions of `os` and `open` in the forked process, so that every write,
rename, flush, deletion and reservation can be the one that meets the fault. Limits (`RLIMIT_FSIZE`, `RLIMIT_NOFILE`)
reach libraries in other languages too.
"""

import _io
import builtins
import errno
import io
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAKES_SPACE = ("write", "fsync", "mkdir", "create", "replace", "rename", "posix_fallocate", "ftruncate")
OPERATIONS = ("fsync", "mkdir", "replace", "rename", "unlink", "remove", "rmdir", "posix_fallocate", "ftruncate")


@dataclass
class Wire:
    """Counts the file operations of this process; `act` is told the number and the kind of each before it is done."""

    act: Callable[[int, str], None]
    count: int = 0

    def step(self, kind: str) -> None:
        self.count += 1
        self.act(self.count, kind)

    def lay(self, inside: Path) -> None:
        """From now on. Files opened outside the folder `inside` are not counted."""
        for name in OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name), name))
        real = io.open
        counted = self._opening(real, str(inside))
        builtins.open = io.open = _io.open = counted  # type: ignore[assignment]

    def _counted(self, real: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.step(kind)
            return real(*arguments, **options)

        return call

    def _opening(self, real: Callable[..., Any], inside: str) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or not os.fspath(file).startswith(inside):
                return real(file, mode, *arguments, **options)
            written = any(letter in mode for letter in "wxa+")
            self.step("create" if written else "open")
            stream = real(file, mode, *arguments, **options)
            return Watched(stream, self) if written else stream

        return opened


class Watched:
    """A file whose writes are counted; one that fails has written a half, as on a disk that fills up."""

    def __init__(self, stream: Any, wire: Wire):
        self.__dict__.update(stream=stream, wire=wire)

    def write(self, data: Any) -> Any:
        try:
            self.wire.step("write")
        except OSError:
            self.stream.write(data[: len(data) // 2])
            raise
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "Watched":
        self.stream.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.stream.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self.stream)


def kill_at(moment: int, sent: signal.Signals) -> Callable[[int, str], None]:
    def act(number: int, kind: str) -> None:
        if number == moment:
            os.kill(os.getpid(), sent)

    return act


def fail_at(moment: int, code: int, lasting: bool) -> Callable[[int, str], None]:
    """An error of the operating system; `lasting`: of all later operations of this kind too.

    A full disk (ENOSPC) lets files be read, renamed and deleted, but for the one operation that it is tried on.
    """
    met = False

    def act(number: int, kind: str) -> None:
        nonlocal met
        full = code == errno.ENOSPC
        if number >= moment and (kind in TAKES_SPACE or not full) and (not met or (lasting and kind != "replace")):
            met = True
            raise OSError(code, os.strerror(code))

    return act


def do_at(moment: int, what: Callable[[], object]) -> Callable[[int, str], None]:
    """Something done to the world by another program, once."""
    done = False

    def act(number: int, kind: str) -> None:
        nonlocal done
        if number >= moment and not done:
            done = True  # first: what is done opens files itself
            what()

    return act


def limit_file_size(most: int) -> None:
    """A write beyond it fails with EFBIG; libraries written in C and Rust meet it too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def limit_handles(more: int) -> None:
    """So many files can be opened beyond those that are open."""
    free, limit = more, 0
    while free >= 0 or is_open(limit):
        free -= not is_open(limit)
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
