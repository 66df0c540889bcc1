"""How a command ends when it fails: one sentence on stderr and an exit status, no traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from budwood.cli.printable import one_line
from budwood.errors import DEBUG, BudwoodError, message

P = ParamSpec("P")


class Interrupted(BudwoodError):
    """The user pressed Ctrl-C; the message says what to do next."""

    exit_status = 130  # 128 + SIGINT, the convention of shells


def report_errors(verb: Callable[P, None]) -> Callable[P, None]:
    """`verb`, with every exception turned into a sentence on stderr and an exit status.

    1 the work failed, 2 the request cannot be carried out, 130 Ctrl-C.
    With BUDWOOD_DEBUG=1 in the environment the exception is raised instead.
    """

    @functools.wraps(verb)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
            sys.stdout.flush()  # a closed pipe must raise here, not while the interpreter ends
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            # The reader (`| head`) closed the pipe; the flush at exit must not fail on it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                raise
            typer.echo(f"budwood: {one_line(message(error))}", err=True)
            raise typer.Exit(exit_status(error)) from None

    return reporting


def exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_status
    return error.exit_status if isinstance(error, BudwoodError) else 1
