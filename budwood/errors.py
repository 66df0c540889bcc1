"""The two kinds of errors that users see, each with its exit status. A message is one sentence."""


class BudwoodError(Exception):
    """An error that the user can understand and act on; the command line prints it without a traceback."""

    exit_status = 1


class UsageError(BudwoodError, ValueError):
    """The request cannot be carried out: nothing was started, nothing was written."""

    exit_status = 2


class RunError(BudwoodError, RuntimeError):
    """The work was started and failed."""
