"""Second moments of differences between tokens, and the factors of rows: worked examples and laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity.differences import LEAST, MixedGram, row_factors
from budwood.sparsity.patterns import Top
from budwood.sparsity.statistics import Gram

X = torch.tensor([[1.0, 2], [3, 0], [2, 2]])  # three tokens
H = torch.tensor([[14.0, 6], [6, 8]], dtype=torch.float64)
NEIGHBOURS = torch.tensor([[3.75, -4.5], [-4.5, 6]], dtype=torch.float64)  # differences (2, -2) and (-1, 2)
ALL = torch.tensor([[2.0, -2], [-2, 8 / 3]], dtype=torch.float64)  # about the mean (2, 4/3)


def mixed(x, share, pairs="neighbours"):
    gram = MixedGram(x.shape[-1], share, pairs)
    gram.add(x)
    return gram.matrix()


@pytest.mark.parametrize(("pairs", "expected"), [("neighbours", NEIGHBOURS), ("all", ALL)])
def test_the_worked_example(pairs, expected):
    torch.testing.assert_close(mixed(X, 0.0, pairs), H)
    torch.testing.assert_close(mixed(X, 1.0, pairs), expected)
    torch.testing.assert_close(mixed(X, 0.5, pairs), (H + expected) / 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 9), sequences=st.integers(1, 3))
def test_all_pairs_are_the_mean_over_pairs_and_constants_cancel(seed, tokens, sequences):
    x = torch.randn(sequences, tokens, 4, generator=torch.Generator().manual_seed(seed))
    flat = x.flatten(0, 1).double()
    pairs = flat[:, None] - flat[None]
    explicit = torch.einsum("abi,abj->ij", pairs, pairs) / (2 * len(flat))
    torch.testing.assert_close(mixed(x, 1.0, "all"), explicit, rtol=1e-4, atol=1e-4)
    for kind in ("neighbours", "all"):
        if kind == "all" or tokens > 1:
            torch.testing.assert_close(mixed(x + 3, 1.0, kind), mixed(x, 1.0, kind), rtol=1e-3, atol=1e-3)
        assert torch.linalg.eigvalsh(mixed(x, 0.7, kind)).min() > -1e-4
    plain = Gram(4)
    plain.add(x)
    assert torch.equal(mixed(x, 0.0), plain.matrix())


def test_parts_are_merged():
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1))
    parts = [MixedGram(3, 0.3) for _ in range(2)]
    for gram, some in zip(parts, x.split(2), strict=True):
        gram.add(some)
    parts[0].merge(parts[1])
    torch.testing.assert_close(parts[0].matrix(), mixed(x, 0.3))
    torch.testing.assert_close(parts[0].mean, x.double().flatten(0, 1).mean(dim=0))
    again = MixedGram(3, 0.3)
    again.load_state(parts[0].state())
    assert torch.equal(again.matrix(), parts[0].matrix())


def test_neighbours_are_within_a_sequence():
    x = torch.stack([torch.zeros(2, 3), torch.full((2, 3), 5.0)])
    assert not mixed(x, 1.0).any()
    one = MixedGram(3, 1.0)
    one.add(x[:, :1])  # sequences of one token: no pair, so the moments are the plain ones
    torch.testing.assert_close(one.matrix(), torch.full((3, 3), 25.0, dtype=torch.float64))


def test_rows_that_matter_more_keep_more():
    """Sensitivities 4 and 1: the scores [[3, 2], [5, 4]] rank as [[6, 4], [5, 4]]."""
    scores, factors = torch.tensor([[3.0, 2], [5, 4]]), row_factors(torch.tensor([4.0, 1]))
    torch.testing.assert_close(factors, torch.tensor([4.0, 1]).div(2.5).sqrt())
    assert Top(0.5, "matrix").keep(scores).tolist() == [[False, False], [True, True]]
    assert Top(0.5, "matrix").keep(scores * factors[:, None]).tolist() == [[True, False], [True, False]]
    assert row_factors(torch.tensor([7.0, 7])).tolist() == [1, 1]
    assert row_factors(torch.zeros(3)).tolist() == [1, 1, 1]
    assert row_factors(torch.tensor([1.0, 0]))[1] == pytest.approx(LEAST)
