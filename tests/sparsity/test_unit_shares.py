"""How many units every matrix loses: budgets, the program's counts, one unit that stays."""

import pytest
import torch

from budwood.sparsity.unit_shares import (
    UnitPool,
    even_counts,
    program_count,
    program_ranked_counts,
    ranked_counts,
)


def pools(layers=4, groups=4, neurons=160, width=16):
    kinds = (("attention", groups, 4 * 64 * width, width), ("mlp", neurons, 3 * 64, 1))
    return [UnitPool(layer, *rest) for layer in range(layers) for rest in kinds]


def removed_weights(pools, counts):
    return sum(pool.cost * count for pool, count in zip(pools, counts, strict=True))


@pytest.mark.parametrize(
    ("count", "width", "share", "removed"),
    [
        (32, 128, 0.25, 8),
        (11008, 1, 0.25, 2752),
        (8, 128, 0.25, 2),
        (14336, 1, 0.25, 3584),
        (4, 16, 0.3, 1),
        (2, 16, 0.25, 0),
        (5, 1, 0.5, 3),
    ],
)
def test_the_programs_counts(count, width, share, removed):
    assert program_count(UnitPool(0, "mlp", count, 1, width), share) == removed


@pytest.mark.parametrize("drop", [0, 0.05, 0.2, 0.25, 0.333, 0.5, 0.77])
@pytest.mark.parametrize("some", [pools(), pools(layers=3, groups=3, neurons=96), pools(groups=2, neurons=7)])
def test_even_counts_spend_the_budget_to_one_unit(some, drop):
    weights = drop * sum(pool.weights for pool in some)
    counts = even_counts(some, weights)
    assert all(0 <= count < pool.count for count, pool in zip(counts, some, strict=True))
    if drop < 0.5:
        assert abs(removed_weights(some, counts) - weights) <= 3 * 64 / 2
    if drop < 0.6 and some[1].count > 7:
        for kind in (0, 1):
            assert max(counts[kind::2]) - min(counts[kind::2]) <= 1


def test_neurons_take_what_heads_cannot_lose():
    some = pools(layers=1, groups=2)
    head, neurons = even_counts(some, 0.25 * sum(pool.weights for pool in some))
    assert head == 0
    assert neurons == round(0.25 * sum(pool.weights for pool in some) / 192)


def test_experts_share_what_their_block_loses():
    some = [UnitPool(0, "attention", 3, 4096, 16), *(UnitPool(0, "mlp", 32, 96) for _ in range(4))]
    counts = even_counts(some, 0.2 * sum(pool.weights for pool in some))
    assert max(counts[1:]) - min(counts[1:]) <= 1
    assert abs(removed_weights(some, counts) - 0.2 * sum(pool.weights for pool in some)) <= 48


def test_without_neurons_groups_spend_the_budget():
    some = [UnitPool(layer, "attention", 3, 100, 16) for layer in range(5)]
    assert sum(even_counts(some, 0.4 * 1500)) == 6


@pytest.mark.parametrize("drop", [0, 0.2, 0.5, 0.9])
def test_ranked_counts_remove_the_cheapest_and_leave_one(drop):
    some, generator = pools(), torch.Generator().manual_seed(0)
    scores = [torch.rand(pool.count, generator=generator) * pool.cost for pool in some]
    weights = drop * sum(pool.weights for pool in some)
    counts = ranked_counts(some, scores, weights)
    assert all(count < pool.count for count, pool in zip(counts, some, strict=True))
    if drop < 0.9:
        assert abs(removed_weights(some, counts) - weights) <= some[0].cost / 2
    price = [score.sort().values / pool.cost for score, pool in zip(scores, some, strict=True)]
    full = [pool.count - 1 == count for pool, count in zip(some, counts, strict=True)]
    gone = [float(each[count - 1]) for each, count in zip(price, counts, strict=True) if count]
    kept = [float(each[count]) for each, count, at_least in zip(price, counts, full, strict=True) if not at_least]
    assert not gone or not kept or max(gone) <= min(kept)


def test_costs_decide_between_heads_and_neurons():
    some = [UnitPool(0, "attention", 2, 100), UnitPool(0, "mlp", 2, 1)]
    scores = [torch.tensor([10.0, 20]), torch.tensor([1.0, 2])]
    assert ranked_counts(some, scores, 1, costs=False) == [0, 1]
    assert ranked_counts(some, scores, 100) == [1, 0]


def test_the_programs_ranking_counts_units():
    some = [UnitPool(0, "attention", 2, 100), UnitPool(0, "mlp", 6, 1)]
    assert program_ranked_counts(some, [torch.tensor([3.5, 9]), torch.arange(6.0)], 0.5) == [0, 4]
    assert program_ranked_counts(some, [torch.tensor([3.5, 9]), torch.arange(6.0)], 0.6) == [1, 4]
    assert program_ranked_counts(some, [torch.tensor([3.5, 9]), torch.arange(6.0)], 0) == [0, 0]
