"""What pictures choose: the Pareto front, the models that are drawn, the kinds of matrices."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budwood.pages.pictures.density import BLOCKS, fits
from budwood.pages.pictures.front import front_of
from budwood.pages.pictures.kinds import chosen, place_of
from budwood.pages.shown import Shown
from budwood.pages.text import number

COORDINATE = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12))
def test_the_front_is_what_nothing_beats(points):
    front = [points[index] for index in front_of(points)]
    assert front == sorted(front)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))
    for point in points:
        assert any(better[0] <= point[0] and better[1] <= point[1] for better in front)


@given(st.lists(st.tuples(st.sampled_from("abcde"), COORDINATE), max_size=12), st.integers(1, 6))
def test_the_best_of_every_family_is_drawn_first(found, most):
    models = [
        Shown(label=str(number), kind="pruned", source="s", method=None, family=family, place="", figures={"D": loss})
        for number, (family, loss) in enumerate(found)
    ]
    drawn = chosen(models, most)
    assert len(drawn) == min(most, len(models))
    assert [model for model in models if model in drawn] == drawn
    families = {model.family for model in models}
    if len(families) <= most:
        for family in families:
            best = min(model.figures["D"] for model in models if model.family == family)
            assert best in [model.figures["D"] for model in drawn if model.family == family]


def test_experts_of_one_name_are_one_kind():
    assert place_of("model.layers.7.mlp.up_proj") == (7, "mlp.up_proj")
    assert place_of("model.layers.11.mlp.experts.3.up_proj") == (11, "mlp.experts.*.up_proj")
    assert place_of("lm_head") is None


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e300, float("nan"), float("inf"), True, None, "3", [1]])
def test_a_value_that_cannot_be_drawn_is_no_number(value):
    assert number(value) is None
    assert number(0.25) == 0.25
    assert number(1e-320) == 0


def test_maps_that_no_picture_holds_are_left_out():
    """A picture of a million blocks would take all memory; a name with that many digits is no place."""
    assert fits({(block, "mlp"): 0.5 for block in range(BLOCKS)})
    assert not fits({(block, "mlp"): 0.5 for block in range(BLOCKS + 1)})
    assert not fits({(0, str(kind)): 0.5 for kind in range(1000)})
    assert place_of(f"model.layers.{'9' * 5000}.mlp") is None
    assert place_of("model.layers.7.mlp.up_proj") == (7, "mlp.up_proj")
