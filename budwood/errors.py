"""The two kinds of errors that users see, each with its exit status. A message is one sentence."""

DEBUG = "BUDWOOD_DEBUG"  # set to 1 in the environment, exceptions of the command line are raised


class BudwoodError(Exception):
    """An error that the user can understand and act on; the command line prints it without a traceback."""

    exit_status = 1


class UsageError(BudwoodError, ValueError):
    """The request cannot be carried out: nothing was started, nothing was written."""

    exit_status = 2


class RunError(BudwoodError, RuntimeError):
    """The work was started and failed."""


def message(error: BaseException) -> str:
    """The sentence that is printed for `error`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BudwoodError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror.lower()}"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (set {DEBUG}=1 for the traceback)"
