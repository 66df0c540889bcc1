"""Results go to stdout, as JSON or as a table that fits; everything else goes to stderr."""

import json
import math
import sys

from budwood.cli.terminal import console, print_result, stdout_to_stderr, table


def test_json_is_one_object_with_null_for_infinity_and_nan(capsys):
    print_result({"perplexity": math.inf, "losses": [1.0, math.nan], "name": "ü"}, True, lambda result: None)
    out = capsys.readouterr().out
    assert json.loads(out) == {"perplexity": None, "losses": [1.0, None], "name": "ü"}
    assert out.count("\n") == 1


def test_output_of_dependencies_goes_to_stderr(capsys):
    with stdout_to_stderr():
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


def test_stdout_is_restored():
    before = sys.stdout
    with stdout_to_stderr():
        assert sys.stdout is sys.stderr
    assert sys.stdout is before
