"""Results go to stdout, as JSON or as a table that fits; all else goes to stderr."""

import json
import math
import sys

from budwood.cli.terminal import answer, console, table, working


def test_json_is_one_object_and_says_null_for_what_it_cannot_say(capsys):
    answer({"perplexity": math.inf, "losses": [1.0, math.nan], "name": "ü"}, True, lambda result: None)
    out = capsys.readouterr().out
    assert json.loads(out) == {"perplexity": None, "losses": [1.0, None], "name": "ü"}
    assert out.count("\n") == 1


def test_what_a_dependency_prints_while_working_is_no_result(capsys):
    with working():
        print("chatter")
    print("result")
    assert capsys.readouterr() == ("result\n", "chatter\n")


def test_a_narrow_terminal_folds_names_and_cuts_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "model.layers.11.self_attn.q_proj_with_a_long_name"
    console().print(table(("matrix", "bytes"), [(name, "1,234,567")]))
    out = capsys.readouterr().out
    assert all(len(line) <= 40 for line in out.splitlines())
    assert name in "".join(line.split()[0] for line in out.splitlines() if line.strip()).replace("1,234,567", "")


def test_names_are_not_markup(capsys):
    console().print(table(("matrix",), [("[red]layer[/red] :smile:",)]))
    assert "[red]layer[/red] :smile:" in capsys.readouterr().out


def test_stdout_is_back_after_work():
    before = sys.stdout
    with working():
        assert sys.stdout is sys.stderr
    assert sys.stdout is before
