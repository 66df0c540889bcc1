"""Taylor importance: the worked example, the invariants, the order of reductions."""

import pytest
import torch

from budwood.sparsity.taylor import combine, salience, slice_scores, unit_scores

GATE = ([[1, -2], [3, 0.5]], [[0.1, 0.1], [-0.1, 0.2]], [[0.04, 0.02], [0.02, 0.04]])
UP = ([[2, 1], [-1, 1]], [[0.2, -0.1], [0.1, 0.1]], [[0.05, 0.02], [0.02, 0.02]])
DOWN = ([[1, 2], [-1, 0.5]], [[0.3, -0.1], [0.1, 0.2]], [[0.1, 0.02], [0.02, 0.05]])
EXAMPLE = {  # gate, up, down, then sum, max, product, last
    "vector": ([0.1, 0.2], [0.3, 0], [0.2, 0.1], [0.6, 0.3], [0.3, 0.2], [0.006, 0], [0.2, 0.1]),
    "first": ([0.3, 0.4], [0.5, 0.2], [0.4, 0.3], [1.2, 0.9], [0.5, 0.4], [0.06, 0.024], [0.4, 0.3]),
    "second": (
        [0.12, 0.19],
        [0.22, 0.04],
        [0.12, 0.0925],
        [0.46, 0.3225],
        [0.22, 0.19],
        [0.003168, 0.000703],
        [0.12, 0.0925],
    ),
    "mixed": (
        [0.32, 0.485],
        [0.41, 0.2],
        [0.36, 0.33375],
        [1.09, 1.01875],
        [0.41, 0.485],
        [0.047232, 0.03237375],
        [0.36, 0.33375],
    ),
}
ORDERS = list(EXAMPLE)


def slices(order, loss=1.0):
    """Slices of gate, up and down of the worked example, [neurons] each; the loss multiplied by a factor."""
    found = []
    for values, columns in ((GATE, False), (UP, False), (DOWN, True)):
        weight, gradient, square = (torch.tensor(value, dtype=torch.float64) for value in values)
        found.append(slice_scores(salience(weight, order, loss * gradient, loss**2 * square), order, columns))
    return found


@pytest.mark.parametrize("order", ORDERS)
def test_the_worked_example(order):
    gate, up, down, *groups = (torch.tensor(value, dtype=torch.float64) for value in EXAMPLE[order])
    members = slices(order)
    for found, expected in zip(members, (gate, up, down), strict=True):
        torch.testing.assert_close(found, expected)
    for reduction, expected in zip(("sum", "max", "product", "last"), groups, strict=True):
        found = unit_scores([member[:, None] for member in members], reduction)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
        removed = int(found.argmin())
        assert removed == (0 if (order, reduction) == ("mixed", "max") else 1)
    torch.testing.assert_close(combine(members, "mean"), groups[0] / 3)
    torch.testing.assert_close(combine(members, "second"), up)
    assert int(combine(members, "first").argmin()) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_the_sign_of_a_row_with_its_gradient_does_not_matter(order):
    weight, gradient, square = torch.randn(3, 6, 8)
    sign = torch.tensor([1.0, -1, 1, -1, -1, 1])[:, None]
    plain = slice_scores(salience(weight, order, gradient, square), order, False)
    torch.testing.assert_close(
        slice_scores(salience(sign * weight, order, sign * gradient, square), order, False), plain
    )


def test_scores_follow_the_scale_of_the_loss():
    for order, factor in (("first", 3.0), ("vector", 3.0), ("second", 9.0)):
        for plain, scaled in zip(slices(order), slices(order, loss=3.0), strict=True):
            torch.testing.assert_close(scaled, factor * plain)


def test_only_what_an_order_needs_must_be_given():
    weight, some = torch.randn(2, 3, 4)
    assert torch.equal(salience(weight, "first", gradient=some), weight * some)
    assert torch.equal(salience(weight, "second", square=some), weight.square() * some)
    for order, given in (("first", "square"), ("second", "gradient"), ("mixed", "gradient"), ("mixed", "square")):
        with pytest.raises(ValueError, match="needs"):
            salience(weight, order, **{given: some})


def test_linears_are_combined_before_the_channels_of_a_head_are_summed():
    query = torch.tensor([[1.0, 5, 2, 2]])  # one unit, two query heads of two channels
    key = torch.tensor([[4.0, 1]])
    assert unit_scores([query, key], "max").item() == 4 + 7  # channels 1 + 2 against 4, 5 + 2 against 1
    assert unit_scores([query, key], "product").item() == 3 * 4 + 7 * 1
    assert unit_scores([query, key], "sum").item() == query.sum() + key.sum()
    assert unit_scores([query, key], "last").item() == 5


def test_a_member_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="second"):
        combine([torch.ones(2)], "second")
