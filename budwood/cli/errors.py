"""How a command ends when it does not succeed: a sentence on stderr and an exit status, no traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from budwood.errors import BudwoodError

P = ParamSpec("P")
DEBUG = "BUDWOOD_DEBUG"


class Interrupted(BudwoodError):
    """The user pressed Ctrl-C; the sentence says what to do next."""

    exit_status = 130  # 128 + SIGINT, as shells count


def told_plainly(verb: Callable[P, None]) -> Callable[P, None]:
    """`verb`, with whatever it raises turned into a sentence and an exit status.

    0 is done, 1 failed, 2 a request that cannot be, 130 Ctrl-C.
    With BUDWOOD_DEBUG=1 in the environment the exception itself comes through.
    """

    @functools.wraps(verb)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
            sys.stdout.flush()  # a reader that went away must be noticed here, not while the interpreter ends
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            # The reader (`| head`) has seen enough; nothing more can be written, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                raise
            typer.echo(f"budwood: {sentence(error)}", err=True)
            raise typer.Exit(exit_status(error)) from None

    return told


def exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_status
    return error.exit_status if isinstance(error, BudwoodError) else 1


def sentence(error: BaseException) -> str:
    """What to tell a person about `error`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BudwoodError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}"
    said = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {said} (set {DEBUG}=1 to see where)"
