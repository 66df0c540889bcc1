"""The two kinds of errors that users see, each with its exit status. A message is one sentence."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

DEBUG = "BUDWOOD_DEBUG"  # set to 1 in the environment, exceptions of the command line are raised
SYSTEM_ERROR = re.compile(r"\(os error (\d{1,4})\)")
LACKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BudwoodError(Exception):
    """An error that the user can understand and act on; the command line prints it without a traceback."""

    exit_status = 1


class UsageError(BudwoodError, ValueError):
    """The request cannot be carried out: nothing was started, nothing was written."""

    exit_status = 2


class RunError(BudwoodError, RuntimeError):
    """The work was started and failed."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Inside, a panic of a library in Rust, which is no `Exception`, is a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from panic


def message(error: BaseException) -> str:
    """The sentence that is printed for `error`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BudwoodError):
        return str(error)
    system = error if isinstance(error, OSError) else resource_error(error)
    if system is not None and system.strerror:
        file = f"{system.filename}: " if system.filename else ""
        return f"{file}{system.strerror.lower()}"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (set {DEBUG}=1 for the traceback)"


def resource_error(error: BaseException) -> OSError | None:
    """The lack of something on this machine that an exception of another library comes from; None where there is none.

    Libraries written in Rust give the number in their text, others raise their own error while they handle the first.
    """
    found: BaseException | None = error
    while found is not None:
        number = SYSTEM_ERROR.search(str(found))
        system = OSError(int(number[1]), os.strerror(int(number[1]))) if number else found
        if isinstance(system, OSError) and system.errno in LACKS:
            return system
        found = found.__cause__ or found.__context__
    return None
