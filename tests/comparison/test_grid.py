"""Grids in expressions: the product of the alternatives, and braces that do not fit."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budwood.comparison.grid import points
from budwood.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('wanda("2:4")', ['wanda("2:4")']),
        ("wrp(alpha={0.1,0.2})", ["wrp(alpha=0.1)", "wrp(alpha=0.2)"]),
        ('wanda("{2:4, 4:8}")', ['wanda("2:4")', 'wanda("4:8")']),
        ("{wanda,magnitude}({'2:4','50%'})", ["wanda('2:4')", "wanda('50%')", "magnitude('2:4')", "magnitude('50%')"]),
        (
            "refit({wrp(alpha=0.1, scope='row'),wanda('2:4')})",
            ["refit(wrp(alpha=0.1, scope='row'))", "refit(wanda('2:4'))"],
        ),
        ("wrp(alpha={0.1})", ["wrp(alpha=0.1)"]),
        ("wrp(alpha={'mlp': 0.3, '.*': 0.2})", ["wrp(alpha={'mlp': 0.3, '.*': 0.2})"]),
        ("f({'a,b','c'}, \"{1,2}\")", ["f('a,b', \"1\")", "f('a,b', \"2\")", "f('c', \"1\")", "f('c', \"2\")"]),
    ],
)
def test_worked_examples(text, expected):
    assert points(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wrp(alpha={0.1,0.2)", "has no end"),
        ('wanda("{2:4,4:8") or "}"', "has no end"),
        ("wrp(alpha=0.1})", "closes no grid"),
        ("wrp(alpha={0.1,,0.2})", "empty alternative"),
        ("wrp(alpha={})", "empty alternative"),
        ("wrp(alpha={0.1,0.1})", "twice in the grid"),
        ("wrp(alpha={0.1,{0.2,0.3}})", "a grid inside a grid"),
        ("f({" + ",".join(map(str, range(40))) + "},{" + ",".join(map(str, range(40))) + "})", "more than 1000 points"),
    ],
)
def test_a_bad_grid_is_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        points(text)


WORDS = st.text("abc019.=%", min_size=1, max_size=4)


@given(
    st.lists(st.tuples(st.text("abc(=)", max_size=4), st.lists(WORDS, min_size=1, max_size=4, unique=True)), max_size=4)
)
def test_the_points_are_the_product_of_the_grids(parts):
    text = "".join(f"{plain}{{{','.join(choices)}}}" for plain, choices in parts)
    expected = [
        "".join(plain + choice for (plain, _), choice in zip(parts, chosen, strict=True))
        for chosen in product(*(choices for _, choices in parts))
    ]
    assert points(text) == expected
