"""Every verb says what it does and shows two commands to paste, before anything heavy is imported."""

import shlex
import subprocess
import sys

import pytest

from budwood.cli import VERBS, app

NAMES = [verb.__name__ for verb in VERBS]


def examples(text: str) -> list[list[str]]:
    lines = text.split("Examples:")[1].split("\n\n")[0].strip().splitlines()
    return [shlex.split(line) for line in lines]


def test_the_list_shows_every_verb(told):
    shown = told("--help")
    assert shown.status == 0
    assert all(f"\n  {name} " in shown.stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_examples_that_the_verb_itself_understands(told, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal must not break them
    shown = told(name, "--help")
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


def test_no_argument_shows_the_help_and_is_a_usage_error(told):
    assert told().status == 2


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments):
    program = (
        "import sys; sys.argv[1:] = " + repr(arguments) + "\n"
        "from budwood.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_version(told):
    import budwood

    assert told("--version").stdout == f"budwood {budwood.__version__}\n"
