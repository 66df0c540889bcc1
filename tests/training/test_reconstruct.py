"""Fitting a block by gradients: errors fall, zeros stay zero, results repeat."""

import torch

from budwood.training.reconstruct import LOSSES, reconstruct


def network(weights, hidden):
    """Two matrices with a non-linearity between them."""
    return hidden + (hidden @ weights["up"].T).relu() @ weights["down"].T


def problem(seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    dense = {"up": draw(24, 8) / 8**0.5, "down": draw(8, 24) / 24**0.5}
    pruned = {name: weight * (weight.abs() > weight.abs().median()) for name, weight in dense.items()}
    inputs = [draw(2, 10, 8) for _ in range(5)]
    inputs[3][0, 0] *= 1000  # one token with a norm larger than all others together
    return dense, pruned, inputs, [network(dense, hidden) for hidden in inputs]


def distance(weights, inputs, targets):
    """Squared distance over all tokens but the first of each batch."""
    pairs = zip(inputs, targets, strict=True)
    return sum(float((network(weights, hidden) - target)[:, 1:].square().sum()) for hidden, target in pairs)


def test_errors_fall_and_zeros_stay():
    _, pruned, inputs, targets = problem()
    found = reconstruct(pruned, network, inputs, targets, steps=60, rate=0.02)
    assert distance(found, inputs, targets) < 0.7 * distance(pruned, inputs, targets)
    for name, weight in found.items():
        assert torch.equal(weight != 0, pruned[name] != 0)
        assert not weight.requires_grad


def test_results_repeat_and_nothing_is_changed_in_place():
    _, pruned, inputs, targets = problem(1)
    before = {name: weight.clone() for name, weight in pruned.items()}
    found, again = (reconstruct(pruned, network, inputs, targets, steps=7, rate=0.02) for _ in range(2))
    for name, weight in found.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(pruned[name], before[name])


def test_a_solution_stays():
    dense, _, inputs, targets = problem(2)
    found = reconstruct(dense, network, inputs, targets, steps=5, rate=0.02)
    assert all(torch.equal(found[name], weight) for name, weight in dense.items())


def test_no_steps_and_an_empty_matrix():
    _, pruned, inputs, targets = problem(3)
    pruned["down"] = torch.zeros_like(pruned["down"])
    assert torch.equal(reconstruct(pruned, network, inputs, targets, steps=0, rate=0.02)["up"], pruned["up"])
    found = reconstruct(pruned, network, inputs, targets, steps=3, rate=0.02)
    assert not found["down"].any()


def test_zeros_of_other_parameters_may_move():
    _, pruned, inputs, targets = problem(4)
    found = reconstruct(pruned, network, inputs, targets, steps=10, rate=0.02, sparse=["up"])
    assert torch.equal(found["up"] != 0, pruned["up"] != 0)
    assert bool((found["down"] != 0).all())
    assert distance(found, inputs, targets) < distance(pruned, inputs, targets)


def test_a_plain_error_sees_little_but_the_largest_token():
    _, pruned, inputs, targets = problem(5)
    found = {
        name: reconstruct(pruned, network, inputs, targets, steps=60, rate=0.02, loss=loss)
        for name, loss in LOSSES.items()
    }
    assert distance(found["relative"], inputs, targets) < distance(found["plain"], inputs, targets)
    random = torch.Generator().manual_seed(0)
    outputs, wanted = torch.randn(2, 3, 4, generator=random), torch.randn(2, 3, 4, generator=random)
    assert torch.allclose(LOSSES["plain"](outputs, wanted), (outputs - wanted).square().mean())
    assert torch.allclose(LOSSES["relative"](7 * outputs, 7 * wanted), LOSSES["relative"](outputs, wanted))


def test_a_size_replaces_that_of_the_values():
    """The first step of Adam is as long as its rate."""
    _, pruned, inputs, targets = problem(6)
    found = reconstruct(pruned, network, inputs, targets, steps=1, rate=0.01, sizes={"up": 3.0})
    steps = (found["up"] - pruned["up"])[pruned["up"] != 0].abs()
    assert torch.allclose(steps[steps > 0.003], torch.tensor(0.03), rtol=1e-3)
    assert float(steps.max()) <= 0.0301
