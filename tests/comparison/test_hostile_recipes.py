"""A recipe may come from anyone: what it costs to read is bounded, and so is what it stands for."""

import contextlib
import time

import pytest

from budwood.comparison.document import read_document
from budwood.comparison.recipe import read_recipe_file
from budwood.comparison.runs import runs_of
from budwood.errors import UsageError

HEAD = "title: T\nsources: {a: dense}\ncalibration: {data: text.txt, num_samples: 4, seq_length: 24}\n"
PLACE = "'${a}'"
ROW = 'methods:\n  - wanda("2:4")\n'


def numbers(count, start="0."):
    return ",".join(f"{start}{number:05d}" for number in range(1, count))


BOMBS = {
    "draws": (HEAD + "draws: 1000000000\n" + ROW, "less than or equal to 1000"),
    "draws, in hexadecimal": (HEAD + f"draws: 0x{'f' * 9999}\n" + ROW, "is no int that can be used"),
    "draws, many digits": (HEAD + f"draws: {'9' * 5000}\n" + ROW, "is no int that can be used"),
    "draws below zero": (HEAD + "draws: [1, -3]\n" + ROW, "draws"),
    "windows": (HEAD.replace("num_samples: 4", f"num_samples: 1{'0' * 17}") + ROW, "less than 2147483648"),
    "length": (HEAD.replace("seq_length: 24", f"seq_length: 0x{'f' * 900}") + ROW, "is no int that can be used"),
    "a long grid": (HEAD + f'methods:\n  - "wrp(alpha={{{numbers(90_000)}}})"\n', "at most 1000 points"),
    "many grids": (HEAD + f'methods:\n  - "{"{a,b}" * 30}"\n', "more than 1000 points together"),
    "rows of grids": (
        HEAD + "methods:\n" + "".join(f'  - "wrp(alpha={{{numbers(900, f"0.{row}")}}})"\n' for row in range(9)),
        "more than 2000 runs",
    ),
    "rows times draws": (HEAD + f'draws: 999\nmethods:\n  - "wrp(alpha={{{numbers(9)}}})"\n', "more than 2000 runs"),
    "values": ("title: T\nsources: [" + "1," * 400_000 + "1]\n", "at most 20,000 values"),
    "variables": (
        f"title: T\nvariables: {{a: {'x' * 400_000}}}\ndescription: '{'${a}' * 100_000}'\n" + HEAD[9:] + ROW,
        "with its variables replaced",
    ),
    "variables in many places": (
        f"title: T\nvariables: {{a: {'x' * 100_000}}}\npublished: [{', '.join([PLACE] * 5_000)}]\n" + HEAD[9:] + ROW,
        "with its variables replaced",
    ),
    "half a surrogate pair": (HEAD.replace("title: T", 'title: "\\ud800"') + ROW, "half of a surrogate pair"),
    "published twice": (HEAD + ROW + "published: [a.yaml, a.yaml]\n", "there twice"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_costs_more_than_a_recipe_is_refused_with_its_line(tmp_path, name):
    text, reason = BOMBS[name]
    (tmp_path / "recipe.yaml").write_text(text)
    begin = time.process_time()
    with pytest.raises(UsageError, match=rf"recipe.yaml, line \d+: .*{reason}"):
        runs_of(read_recipe_file(tmp_path / "recipe.yaml"))
    assert time.process_time() - begin < 20  # each took minutes, or all memory


@pytest.mark.parametrize("value", ["9" * 5000, "2001-99-99", "0x" + "f" * 2000, "[" * 50, "!!int x", "\ud800", ""])
def test_a_variable_of_the_command_line_is_a_value_or_a_text(tmp_path, value):
    (tmp_path / "recipe.yaml").write_text("variables: {x: 1}\ntext: ${x}\n")
    found = read_document(tmp_path / "recipe.yaml", {"x": value}).content["text"]
    assert found in (value, None)


def test_a_date_that_is_none_is_text(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 2001-99-99\nb: 0b\nc: .inf\n")
    assert read_document(tmp_path / "recipe.yaml").content == {"a": "2001-99-99", "b": "0b", "c": float("inf")}


@pytest.mark.parametrize(
    "text", ["a: 0x_\n", "a: !!int ''\n", "a: !!float x\n", "a: !!bool maybe\n", "a: !!timestamp x\n"]
)
def test_a_value_that_is_not_of_its_kind_is_refused_or_text(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with contextlib.suppress(UsageError):
        assert isinstance(read_document(tmp_path / "recipe.yaml").content["a"], str | None)
