"""Progress goes to stderr: lines where there is no terminal, nothing with --quiet."""

import pytest

from budwood.cli import progress
from budwood.cli.progress import BarProgress, LineProgress, Silent, progress_for


def run_steps(shown, count=3):
    shown.start(count, "pruning")
    for index in range(count):
        shown.block(index, f"model.layers.{index}", 0.1, 0.25)
    shown.note("a note")
    shown.finish()


@pytest.mark.parametrize("kind", [BarProgress, LineProgress, Silent])
def test_nothing_reaches_stdout(kind, capsys):
    run_steps(kind())
    assert capsys.readouterr().out == ""


def test_lines_show_the_last_step_and_notes(capsys):
    run_steps(LineProgress())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pruning: 3 of 3, output error 25.0 %, ")
    assert lines[1:] == ["a note"]


def test_lines_show_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 20.0])  # made, started, after the first step, after the second
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = LineProgress()
    lines.start(3, "pruning")
    lines.block(0, "a", 10.0)
    lines.block(1, "b", 10.0)
    assert capsys.readouterr().err.splitlines() == [
        "pruning: 1 of 3, 20.0 s left",
        "pruning: 2 of 3, 10.0 s left",
    ]


def test_quiet_is_silent(capsys):
    run_steps(progress_for(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_lines():
    assert isinstance(progress_for(quiet=False), LineProgress)
