import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity import selection
from budwood.sparsity.selection import NotFinite, highest, largest, portion, two_of_four


def by_stable_sort(scores, count):
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), width=st.integers(1, 40), levels=st.integers(1, 50), data=st.data())
def test_it_equals_a_stable_descending_sort(dtype, rows, width, levels, data):
    count = data.draw(st.integers(0, width))
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    scores = torch.randint(0, levels, (rows, width), generator=generator).to(dtype)  # few levels, many ties
    assert torch.equal(largest(scores, count), by_stable_sort(scores, count))
    assert torch.equal(largest(scores.T.contiguous().T, count), by_stable_sort(scores, count))
    flat = scores.flatten()
    assert torch.equal(largest(flat, count), by_stable_sort(flat, count))
    indices = flat.sort(descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(highest(flat, count), indices)


@pytest.mark.parametrize("width", [4, 40])
def test_the_size_of_the_pieces_changes_nothing(monkeypatch, width):
    scores = torch.randint(0, 3, (50, width), generator=torch.Generator().manual_seed(0)).float()
    whole = largest(scores, 2)
    monkeypatch.setattr(selection, "CHUNK", 7)
    assert torch.equal(largest(scores, 2), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [4, 40])
@pytest.mark.parametrize("count", [0, 2, 4])
def test_scores_that_are_not_finite_are_refused(value, width, count):
    scores = torch.rand(3, width)
    scores[1, 2] = value
    with pytest.raises(NotFinite):
        largest(scores, count)


def test_an_empty_matrix():
    assert largest(torch.empty(0, 4), 2).shape == (0, 4)


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.3, 10, 3),
        (0.29, 100, 29),
        (1 / 288, 288, 1),
        (0.25, 15, 3),
        (0, 7, 0),
        (1, 7, 7),
        (0.1, 16_777_216, 1_677_721),
    ],
)
def test_portions_round_down_but_not_because_of_binary_fractions(share, count, expected):
    assert portion(share, count) == expected


@pytest.mark.parametrize("levels", [2, 5, 1_000_000])
def test_two_of_four_equals_largest_along_columns(levels):
    scores = torch.randint(levels, (4, 500), generator=torch.Generator().manual_seed(levels)).double()
    assert torch.equal(two_of_four(scores), largest(scores.T, 2).T)
    with pytest.raises(NotFinite):
        two_of_four(scores.fill_(torch.nan))
