"""How much blocks turn hidden states, and which of them go."""

import pytest
import torch

from budwood.sparsity.depth import lowest, lowest_run, turns


def test_turns_are_one_minus_cosines():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    after = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert turns(before, after).tolist() == pytest.approx([0, 1, 2, 1 - 0.5**0.5, 0], abs=1e-15)


def test_the_lowest_go_and_of_equal_ones_the_later():
    scores = [0.3, 0.1, 0.1, 0.2, 0.1]
    assert lowest(scores, 1, ()) == [4]
    assert lowest(scores, 2, ()) == [2, 4]
    assert lowest(scores, 3, {4}) == [1, 2, 3]


def test_the_best_run_of_blocks():
    scores = [0.5, 0.2, 0.1, 0.1]  # of runs of 2 among 5 blocks
    assert lowest_run(scores, 2, ()) == [3, 4]
    assert lowest_run(scores, 2, {4}) == [2, 3]
    assert lowest_run(scores, 2, {1, 3}) == []
