"""The two ways a request can end badly, each told in one sentence and each with its exit status."""


class BudwoodError(Exception):
    """Something a user can understand and act on; the command line prints it without a traceback."""

    exit_status = 1


class UsageError(BudwoodError, ValueError):
    """What was asked for cannot be: nothing was started, nothing was written."""

    exit_status = 2


class RunError(BudwoodError, RuntimeError):
    """The work was begun and could not be finished."""
