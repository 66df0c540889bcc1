"""Expressions find what `re` finds, in a bounded number of steps whatever they are."""

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import UsageError
from budwood.methods import parse_method
from budwood.models import expressions
from budwood.models.expressions import Expression, Expressions

ATOMS = ["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "A", "(a.b)", "^", "$", r"\b", r"\B", r"\A", r"\Z"]
ATOMS += ["(?=b)", "(?!a)", "(?<=a)", "(?<!ab)", "(?i:a)", ""]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.builds("(?:{}){}".format, inner, st.sampled_from(REPEATS))
        | st.builds("{}{}".format, inner, inner)
        | st.builds("(?:{}|{})".format, inner, inner)
        | st.builds("(?={})".format, inner)
        | st.builds("(?!{})".format, inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(["", "(?i)", "(?m)", "(?s)"]), PATTERNS, st.text("abAB1. \n_", max_size=8))
def test_what_re_finds_is_found(flag, pattern, text):
    assert Expression(flag + pattern).search(text) == (re.search(flag + pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "((a*)*)*b",
        "(.*)*x",
        "a?" * 30 + "a" * 30,
        "^(([a-z])+.)+[A-Z]([a-z])+$",
        ".*.*.*.*.*.*z",
        "(a{1,1000}){1,1000}b",
        "(?=(a*)*b)(?=a*)*",
    ],
)
@pytest.mark.parametrize("text", ["a" * 40, "model.layers.0.self_attn.q_proj", "a" * 400])
def test_every_expression_ends(pattern, text):
    """Python's own matcher takes 2^40 steps for some of them; here there is an answer, or a sentence."""
    with contextlib.suppress(UsageError):
        assert Expression(pattern).search(text) in (False, True)


def test_the_number_of_steps_is_bounded(monkeypatch):
    monkeypatch.setattr(expressions, "STEPS", 100)
    with pytest.raises(UsageError, match=r"--skip '\(a\|b\)\*c' takes too long"):
        Expression("(a|b)*c").search("a" * 100)


def test_all_expressions_together_are_bounded(monkeypatch):
    """A foreign recipe may have thousands, each of them just below the bound for one."""
    names = [f"model.layers.{block}.mlp.down_proj" for block in range(32)]
    costly = [f"{'.*' * 40}{number}z" for number in range(200)]
    monkeypatch.setattr(expressions, "TOTAL", 200_000)
    for option in ("--skip", "alpha:"):
        rules = Expressions(costly, option)
        with pytest.raises(UsageError, match=f"the expressions of {option} take too long"):
            list(map(rules.first, names))
        assert rules.steps < 300_000
    with pytest.raises(UsageError, match="take too long"):
        parse_method(f"wrp(alpha={dict.fromkeys(costly, 0.5)})").alpha_for(names[0])
    with pytest.raises(UsageError, match="has 10001 regular expressions; give at most 10000"):
        Expressions([f"a{number}" for number in range(10_001)])


def test_the_first_expression_that_is_found_counts():
    rules = Expressions(["up", "proj", "down_proj"])
    assert [rules.first(name) and rules.first(name).pattern for name in ("a.down_proj", "a.up_proj", "a")] == [
        "proj",
        "up",
        None,
    ]
    before = rules.steps
    assert rules.first("a.down_proj").pattern == "proj"
    assert rules.steps == before


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("(", "is not a regular expression"),
        ("*", "is not a regular expression"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("(" * 1000 + ")" * 1000, "is not a regular expression"),
        (r"(a)\1", "a back reference"),
        ("(?>a*)b", "an atomic group"),
        ("a*+b", "a possessive repeat"),
        ("(a)?(?(1)b|c)", "a condition"),
        ("a" * 3000, "of at most 2000 characters"),
        (3, "of at most 2000 characters"),
    ],
)
def test_what_is_no_expression_is_one_sentence(pattern, found):
    with pytest.raises(UsageError, match=found):
        Expression(pattern)


def test_expressions_inside_a_method_are_bounded_too():
    method = parse_method('wrp(alpha={"(a|a)*(a|a)*c": 0.5, "q_proj": 0.25})')
    assert method.alpha_for("a" * 40) == 0.25 or method.alpha_for("q_proj") == 0.25
    with pytest.raises(UsageError, match=r"alpha: .* back reference"):
        parse_method(r'wrp(alpha={"(a)\\1": 0.5})')
