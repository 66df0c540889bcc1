"""A command that does not succeed says one sentence on stderr and ends with the status that fits."""

import errno

import pytest
import typer

from budwood.cli import with_dashes
from budwood.cli.errors import Interrupted, told_plainly
from budwood.errors import RunError, UsageError


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
            "budwood: ZeroDivisionError: by zero (set BUDWOOD_DEBUG=1 to see where)\n",
        ),
        (KeyboardInterrupt(), 130, "budwood: interrupted\n"),
        (Interrupted("the same command goes on"), 130, "budwood: the same command goes on\n"),
    ],
)
def test_errors_become_a_sentence_and_a_status(error, status, sentence, capsys, monkeypatch):
    monkeypatch.delenv("BUDWOOD_DEBUG", raising=False)

    @told_plainly
    def verb() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        verb()
    assert ended.value.exit_code == status
    assert capsys.readouterr() == ("", sentence)


def test_debugging_lets_the_exception_through(monkeypatch):
    monkeypatch.setenv("BUDWOOD_DEBUG", "1")

    @told_plainly
    def verb() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        verb()


def test_underscores_and_dashes_are_one():
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
        (["prune", "a", "b", "--method", "wrp()", "--sampling", "sometimes"], "sometimes"),
        (["prune", "a", "b", "--method", "wrp()", "--num-samples", "0"], "--num-samples"),
        (["evaluate", "a"], "--data"),
        (["evaluate", "a", "--data", "b", "--variant", "own"], "own"),
        (["uproot"], "uproot"),
        (["prune", "a", "b", "--methd", "wrp()"], "--methd"),
    ],
)
def test_arguments_that_cannot_be_are_status_2(told, arguments, word):
    ended = told(*arguments)
    assert ended.status == 2
    assert ended.stdout == ""
    assert word in ended.stderr
    assert "Traceback" not in ended.stderr
