"""A command that fails prints one sentence on stderr and exits with the status of the error."""

import errno

import pytest
import typer

from budwood.cli import with_dashes
from budwood.cli.errors import Interrupted, report_errors
from budwood.errors import RunError, UsageError


def caused(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UsageError("alpha must lie in [0, 1]"), 2, "budwood: alpha must lie in [0, 1]\n"),
        (RunError("the shard is damaged"), 1, "budwood: the shard is damaged\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            1,
            "budwood: out/x: no space left on device\n",
        ),
        (
            ZeroDivisionError("by zero"),
            1,
            "budwood: ZeroDivisionError: by zero (set BUDWOOD_DEBUG=1 for the traceback)\n",
        ),
        (
            ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
            1,
            "budwood: no space left on device\n",
        ),
        (
            ValueError("header too large (os error 2)"),
            1,
            "budwood: ValueError: header too large (os error 2) (set BUDWOOD_DEBUG=1 for the traceback)\n",
        ),
        (
            caused(ImportError("cannot import"), OSError(errno.EMFILE, "Too many open files", "a.py")),
            1,
            "budwood: a.py: too many open files\n",
        ),
        (KeyboardInterrupt(), 130, "budwood: interrupted\n"),
        (Interrupted("the same command goes on"), 130, "budwood: the same command goes on\n"),
    ],
)
def test_errors_give_a_sentence_and_a_status(error, status, sentence, capsys, monkeypatch):
    monkeypatch.delenv("BUDWOOD_DEBUG", raising=False)

    @report_errors
    def verb() -> None:
        raise error

    with pytest.raises(typer.Exit) as exit_:
        verb()
    assert exit_.value.exit_code == status
    assert capsys.readouterr() == ("", sentence)


def test_debug_raises_the_exception(monkeypatch):
    monkeypatch.setenv("BUDWOOD_DEBUG", "1")

    @report_errors
    def verb() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        verb()


def test_underscores_and_dashes_are_equivalent():
    given = [
        "prune",
        "--num_samples",
        "4",
        "--seq_length=8",
        "my_model",
        "--prompt=a_b",
        "-q",
        "--",
        "--left_alone",
    ]
    turned = [
        "prune",
        "--num-samples",
        "4",
        "--seq-length=8",
        "my_model",
        "--prompt=a_b",
        "-q",
        "--",
        "--left_alone",
    ]
    assert with_dashes(given) == turned


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["prune", "a", "b"], "--method"),
        (["prune", "a", "b"], "--recipe"),
        (["prune", "a", "b", "--recipe", "no-such-recipe.json"], "no-such-recipe.json"),
        (["prune", "a", "b", "--method", "wrp()", "--sparse-products", "maybe"], "maybe"),
        (["prune", "a", "b", "--method", "wrp()", "--attention", "flash"], "flash"),
        (["prune", "a", "b", "--method", "wrp()", "--activation-memory", "much"], "much"),
        (["prune", "a", "b", "--method", "wrp()", "--sampling", "sometimes"], "sometimes"),
        (["prune", "a", "b", "--method", "wrp()", "--num-samples", "0"], "--num-samples"),
        (["evaluate", "a"], "--data"),
        (["evaluate", "a", "--data", "b", "--variant", "own"], "own"),
        (["evaluate", "a", "--tasks", "piqa", "--tasks-data", "no-such-folder"], "no-such-folder"),
        (["evaluate", "a", "--tasks", "piqa,piqa"], "twice"),
        (["evaluate", "a", "--tasks", "piqa", "--batch-size", "few"], "few"),
        (["uproot"], "uproot"),
        (["prune", "a", "b", "--methd", "wrp()"], "--methd"),
    ],
)
def test_invalid_arguments_are_status_2(run_here, arguments, word):
    result = run_here(*arguments)
    assert result.status == 2
    assert result.stdout == ""
    assert word in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("place", ["parse_args", "invoke"])
def test_ctrl_c_before_the_verb_begins_is_a_sentence(run_here, monkeypatch, place):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.core.TyperGroup, place, pressed)
    result = run_here("methods")
    assert result.status == 130
    assert result.stderr.strip() == "budwood: interrupted"
