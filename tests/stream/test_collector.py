"""Statistics of inputs: shared where inputs are, one pass for several, no work after the last linear."""

import pytest
import torch
from torch import nn

from budwood.errors import RunError
from budwood.sparsity.statistics import Gram, SquaredNorm
from budwood.stream.collector import Collector, Several, StopForward

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))  # [sequences, tokens, in]


class Net(nn.Module):
    """Two linears on one input, then one on another."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.ended = 0

    def forward(self, x, change=False, keyword=False):
        left = self.left(input=x) if keyword else self.left(x)
        if change:
            x.mul_(2)
        out = self.last(left + self.right(x))
        self.ended += 1
        return out


def collector(net, statistic=SquaredNorm, names=("left", "right", "last")):
    return Collector({name: net.get_submodule(name) for name in names}, dict.fromkeys(names, 4), statistic)


@torch.no_grad()
def passes(net, collecting, batches, **options):
    with collecting:
        for batch in batches:
            collecting.next_batch()
            try:
                net(batch, **options)
            except StopForward:
                continue
    return collecting.statistics()


@pytest.mark.parametrize("keyword", [False, True])
def test_one_input_has_one_statistic_added_to_once(keyword):
    net = Net()
    found = passes(net, collector(net), [X, X + 1], keyword=keyword)
    assert found["left"] is found["right"] is not found["last"]
    assert found["left"].count == found["last"].count == 20
    expected = SquaredNorm(4)
    expected.add(X)
    expected.add(X + 1)
    assert torch.equal(found["left"].total, expected.total)


def test_a_tensor_changed_in_place_is_another_input():
    net = Net()
    found = passes(net, collector(net), [X.clone()], change=True)
    assert found["left"] is not found["right"]
    torch.testing.assert_close(found["right"].total, 4 * found["left"].total)


def test_from_the_second_batch_on_the_last_input_ends_the_pass():
    net = Net()
    passes(net, collector(net), [X, X, X])
    assert net.ended == 1


def test_a_linear_called_twice_or_never_lets_the_pass_end_by_itself():
    class Twice(Net):
        def forward(self, x):
            self.ended += 1
            return self.left(x) + self.left(x + 1)

    net = Twice()
    found = passes(net, collector(net), [X, X, X])
    assert net.ended == 3
    assert (found["left"].count, found["right"].count) == (60, 0)
    assert found["right"].total.tolist() == [0] * 4


def test_inputs_shared_in_one_batch_and_not_in_another_are_refused():
    class Router(Net):
        def forward(self, x):
            self.ended += 1
            return self.left(x) + self.right(x if self.ended > 1 else x.clone())

    net = Router()
    with pytest.raises(RunError, match="right shares its input with left in one batch and not in another"):
        passes(net, collector(net, names=("left", "right")), [X, X])


def test_hooks_are_gone_afterwards_even_after_a_failure():
    net = Net()
    with collector(net):
        assert all(len(module._forward_pre_hooks) == 1 for module in net.children())
    with pytest.raises(KeyError), collector(net):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_several_statistics_see_the_same_inputs():
    several, norm, gram = Several(4, [SquaredNorm, Gram]), SquaredNorm(4), Gram(4)
    for statistic in (several, norm, gram):
        statistic.add(X)
    assert several.count == norm.count == 10
    assert torch.equal(several.parts[SquaredNorm].total, norm.total)
    assert torch.equal(several.parts[Gram].total, gram.total)
