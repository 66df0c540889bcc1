import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import UsageError
from budwood.methods import METHODS, parse_method
from budwood.methods.magnitude import Magnitude
from budwood.methods.method import Wrapper, name_of
from budwood.methods.refit import Refit
from budwood.methods.sparsegpt import SparseGPT
from budwood.methods.wanda import Wanda
from budwood.methods.wrp import Wrp


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("wrp(alpha=0.3)", Wrp(alpha=0.3)),
        (" wrp ( 0.3 ) ", Wrp(alpha=0.3)),
        ("wrp", Wrp()),
        ("wrp(alpha=0.25)", Wrp()),
        ("wrp(alpha=1)", Wrp(alpha=1)),
        ("wrp(block=32, k=8)", Wrp(block=32, k=8)),
        ("wrp(alpha={'down': 0.3, '': 0.2})", Wrp(alpha={"down": 0.3, "": 0.2})),
        ("wrp(metric='magnitude', pattern='4:8')", Wrp(metric="magnitude", pattern="4:8")),
        ('magnitude("2:4")', Magnitude("2:4")),
        ('wanda("50%", scope="matrix")', Wanda(scope="matrix")),
        ('sparsegpt("2:4", damp=-0.0)', SparseGPT("2:4", damp=0)),
        ("sparsegpt(published=True, block=64)", SparseGPT(published=True, block=64)),
        ("sparsegpt(mask=wrp(alpha=0.3))", SparseGPT(mask=Wrp(alpha=0.3))),
        ("refit(wrp(alpha=0.3), damp=0.1)", Refit(Wrp(alpha=0.3), damp=0.1)),
        ('refit(refit(wanda("2:4")))', Refit(Refit(Wanda("2:4")))),
    ],
)
def test_text_becomes_a_method_and_text_again(text, method):
    assert parse_method(text) == method
    assert parse_method(str(method)) == method
    assert str(parse_method(str(method))) == str(method)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (Wrp(alpha=0.3), "wrp(alpha=0.3)"),
        (Wrp(), "wrp(alpha=0.25)"),
        (SparseGPT("2:4"), 'sparsegpt("2:4")'),
        (Wanda("4:8", tie="low-prunes"), 'wanda("4:8", tie="low-prunes")'),
        (SparseGPT(mask=Wanda("2:4")), 'sparsegpt(mask=wanda("2:4"))'),
    ],
)
def test_only_what_differs_is_written(method, text):
    assert str(method) == text


@pytest.mark.parametrize("text", ["x" * 200_000, f"wrp(alpha={dict.fromkeys(map(str, range(20_000)), 0.5)})"])
def test_a_text_of_any_length_costs_little(text):
    """A foreign recipe gives it; the nearest names of a long one took minutes."""
    with pytest.raises(UsageError, match="characters, and 100000 are allowed") as refused:
        parse_method(text)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", METHODS)
def test_every_name_alone_has_defaults_unless_it_wraps_a_method(name):
    assert name == name_of(METHODS[name])
    if issubclass(METHODS[name], Wrapper):
        with pytest.raises(UsageError, match=f"{name} needs inner"):
            parse_method(name)
        return
    assert type(parse_method(name)) is METHODS[name]
    assert str(parse_method(name)).startswith(f"{name}(")


@pytest.mark.parametrize(
    ("text", "current"),
    [
        ('wanda("2:4", tie="published")', 'wanda("2:4", published=True)'),
        ('magnitude("2:4", parity=True)', 'magnitude("2:4", published=True)'),
        ('sparsegpt("50%", parity=True)', "sparsegpt(published=True)"),
        ("sparsegpt(parity=False)", 'sparsegpt("50%")'),
        ('refit(wrp(tie="published"))', "refit(wrp(published=True))"),
        ('wanda("50%", allocate="global")', 'allocate(wanda("50%"))'),
        ('wrp(density=0.05, allocate="uniform")', "wrp(density=0.05)"),
        ('refit(wrp(density=0.05, allocate="global"))', "refit(allocate(wrp(density=0.05)))"),
    ],
)
def test_expressions_of_earlier_versions_are_read(text, current):
    assert str(parse_method(text)) == current


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wpr()", "there is no method wpr; there are magnitude, wanda, sparsegpt, wrp.*; did you mean wrp"),
        ("wrp(alfa=0.3)", "there is no option alfa; there are alpha, .*; did you mean alpha"),
        ("wrp(alpha=0.2, alpha=0.3)", "no method|given twice"),
        ("wrp(0.2, alpha=0.3)", "alpha is given twice"),
        ('magnitude("2:4", "row", False, 3)', "takes at most 3 options: pattern, scope, published"),
        ("wrp(**{'alpha': 0.3})", r"'\*\*' cannot be used"),
        ("__import__('os').system('true')", "neither a number"),
        ("wrp(alpha=__import__('os'))", "no method __import__"),
        ("wrp(alpha=0.1 + 0.2)", "neither a number"),
        ("wrp(alpha=[x for x in (1,)])", "neither a number"),
        ("sparsegpt(published=true)", "no method true"),
        ("lambda: 0", "neither a number"),
        ("0.25", "is no method"),
        ("'wrp'", "is no method"),
        ("", "is no method"),
        ("wrp(", "is no method"),
        ("wrp(); wanda()", "is no method"),
        ("wrp\0", "is no method"),
        ("(" * 5000, "is no method"),
        ("wrp(alpha=" + "-" * 100_000 + "1)", "is no method|neither"),
    ],
)
def test_anything_else_is_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_method(text)


@pytest.mark.parametrize(
    "text",
    [
        "wrp(alpha=1.5)",
        "wrp(alpha=-0.1)",
        "wrp(alpha=1e999)",
        "wrp(alpha='much')",
        "wrp(alpha=True)",
        "wrp(alpha={'(': 0.3})",
        "wrp(alpha={1: 0.3})",
        "wrp(alpha={'q': 3})",
        "wrp(alpha=0.3, density=0.01)",
        "wrp(alpha=0.3, block=32, k=2)",
        "wrp(density=0.6)",
        "wrp(block=32)",
        "wrp(block=32, k=2, density=0.1)",
        "wrp(block=0, k=2)",
        "wrp(block=32, k=-1)",
        "wrp(block=32.0, k=1)",
        "wrp(block=32, k=2, scope='matrix')",
        "wrp(block=32, k=2, budget='row')",
        "wrp(k=2)",
        "wrp(pad=True)",
        "wrp(pad=1, block=4, k=1)",
        "wrp(metric='taylor')",
        "wrp(metric=[])",
        "wrp(pattern='50%')",
        "wrp(scope='layer')",
        "wrp(scope='matrix', budget='row')",
        "magnitude('5:4')",
        "magnitude('50')",
        "magnitude(scope='column')",
        "wanda(tie='high')",
        "wanda('2:4', variant=True)",
        "wanda(variant=True, scope='matrix')",
        "wanda(variant=1)",
        "sparsegpt(damp=-1)",
        "sparsegpt(damp='x')",
        "sparsegpt(block=0)",
        "sparsegpt('2:4', published=True)",
        "sparsegpt('2:4', mask=wanda())",
        "sparsegpt(mask='wanda')",
    ],
)
def test_settings_that_cannot_be_are_refused_when_made(text):
    with pytest.raises(UsageError):
        parse_method(text)


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet=st.sampled_from("wrpanda(){}[]=,.:\"'0159%*- \n_#"), max_size=30))
def test_no_text_does_anything_but_parse_or_refuse(text):
    try:
        method = parse_method(text)
    except UsageError:
        return
    assert parse_method(str(method)) == method
