"""One process at a time writes to a folder. The lock is the kernel's: it ends with the process, however that ends."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from budwood.errors import RunError

PATIENCE = 10.0  # seconds to wait for another process that changes a few files


def acquire(folder: Path) -> int | None:
    """Locks a folder; closing the descriptor gives it up. None on a system without such locks.

    Raises BlockingIOError where another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # a file system without locks
    return descriptor


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """In this context no other process changes the folder. Raises RunError where one does, and does not end soon."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = acquire(folder)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"another budwood process writes to {folder}; wait until it ends and give the command again"
                ) from error
        time.sleep(0.05)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
