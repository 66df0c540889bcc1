"""Sums over routed tokens, scores and the choice of experts, on the worked example and by laws."""

import pytest
import torch

from budwood.sparsity.experts import SCORES, ExpertSums, choose, super_experts

# Three experts, top-2, two tokens: in the order of experts, e0 of both tokens, e1 of the first, e2 of the second.
COUNTS = [2, 1, 1]
OUTPUTS = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
WEIGHTS = torch.tensor([[0.7], [0.4], [0.3], [0.6]])


def example():
    sums = ExpertSums(3)
    sums.add(COUNTS, OUTPUTS, WEIGHTS)
    return sums.sums


@pytest.mark.parametrize(
    ("score", "expected", "kept"),
    [
        ("reap", [1.95, 0.6, 0.6], [0, 1]),
        ("ean", [6, 2, 1], [0, 1]),
        ("frequency", [2, 1, 1], [0, 1]),
        ("man", [3, 2, 1], [0, 1]),
        ("msan", [13, 4, 1], [0, 1]),
    ],
)
def test_worked_example(score, expected, kept):
    found = SCORES[score](example())
    assert found.tolist() == pytest.approx(expected, rel=1e-7)
    assert choose(torch.tensor(expected), 2).tolist() == kept


def test_largest_activations():
    assert example()[-1].tolist() == [4, 2, 1]


def test_sums_do_not_depend_on_batches_or_order():
    random = torch.Generator().manual_seed(0)
    outputs, weights = torch.randn(60, 8, generator=random), torch.rand(60, 1, generator=random)
    experts = torch.randint(0, 4, (60,), generator=random)

    def of(order, size):
        sums = ExpertSums(5)
        for part in order.split(size):
            rows = part[experts[part].argsort(stable=True)]
            sums.add(torch.bincount(experts[rows], minlength=5).tolist(), outputs[rows], weights[rows])
        return sums.sums

    whole = of(torch.arange(60), 60)
    torch.testing.assert_close(of(torch.arange(60), 7), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(of(torch.randperm(60, generator=random), 11), whole, rtol=1e-12, atol=0)
    assert not whole[:, 4].any()


def test_unreached_experts_go_first():
    sums = torch.tensor([[2.0, 0.0, 1.0], [0.2, 0.0, 0.1], [1.0, 0.0, 0.5], [1.0, 0.0, 0.1], [1.0, 0.0, 0.1]])
    for score in SCORES.values():
        assert choose(score(sums.double()), 2).tolist() == [0, 2]


def test_ties_keep_the_lower_index_and_groups_keep_the_same_number():
    assert choose(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert choose(scores, 4).tolist() == [0, 1, 2, 3]
    assert choose(scores, 4, groups=2).tolist() == [0, 1, 6, 7]
    assert choose(scores, 4, groups=4).tolist() == [0, 2, 5, 7]


def test_permuted_scores_permute_the_choice():
    random = torch.Generator().manual_seed(1)
    scores, order = torch.randn(16, generator=random), torch.randperm(16, generator=random)
    kept = set(choose(scores, 6).tolist())
    assert {int(order[i]) for i in choose(scores[order], 6)} == kept


def test_super_experts_stay():
    largest = torch.ones(4, 100)
    largest[2, 7] = 50
    found = super_experts(largest)
    assert found.nonzero().tolist() == [[2, 7]]
    scores = torch.arange(100.0).flip(0)
    scores[7] = -torch.inf
    assert 7 not in choose(scores, 10).tolist()
    assert choose(scores, 10, protected=found[2]).tolist() == [*range(7), 7, 8, 9]
