"""Every verb has a help text with two examples that its own parser accepts."""

import shlex

import pytest

from budwood.cli import VERBS, app

NAMES = [verb.__name__ for verb in VERBS]


def examples(text: str) -> list[list[str]]:
    lines = text.split("Examples:")[1].split("\n\n")[0].strip().splitlines()
    return [shlex.split(line) for line in lines]


def test_the_list_shows_every_verb(run_here):
    shown = run_here("--help")
    assert shown.status == 0
    assert all(f"\n  {name} " in shown.stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_examples_that_the_verb_parses(run_here, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal must not break them
    shown = run_here(name, "--help")
    assert shown.status == 0
    assert len(examples(shown.stdout)) == 2
    for program, *arguments in examples(shown.stdout):
        assert program == "budwood"
        assert arguments[0] == name
        verb = app_command().commands[name]
        verb.make_context(name, arguments[1:])  # raises where an option is unknown or missing


def app_command():
    import typer

    return typer.main.get_command(app)


def test_no_argument_shows_the_help_and_is_a_usage_error(run_here):
    assert run_here().status == 2


def test_version(run_here):
    import budwood

    assert run_here("--version").stdout == f"budwood {budwood.__version__}\n"
