"""The descent: its schedule, the state it keeps, and the same bits after an interruption."""

import pytest
import torch
from torch import nn

from budwood.checkpoints.work import Work
from budwood.training.adapters import KeptWeights, MaskLora
from budwood.training.descent import Checkpoints, Descent, descend, split
from budwood.training.trainable import Trainable, merge


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(8, 6)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(6, 8, generator=random) * (torch.rand(6, 8, generator=random) > 0.5))
            self.linear.bias.zero_()
        self.requires_grad_(False)


def problem(adapter, seed=0):
    net = Net(seed)
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 8, generator=random)
    targets = torch.randn(64, 6, generator=random)
    trainable = Trainable({"linear.bias": net.linear.bias}, {"linear": net.linear}, adapter, seed=0)

    def slope(step):
        part = slice(8 * (step % 8), 8 * (step % 8) + 8)
        loss = (net.linear(inputs[part]) - targets[part]).square().mean()
        loss.backward()
        return loss.item()

    def held():
        with trainable.finished():
            return float((net.linear(inputs) - targets).square().mean())

    return net, trainable, slope, held


def test_the_rate_rises_from_zero_and_falls_to_its_last_share():
    """As the published program: 20 steps, a tenth of them rising."""
    shares = [Descent(steps=20).factor(step) for step in range(20)]
    assert shares[:4] == [0, 0.5, 1, 17 / 18]
    assert shares[-1] == 1 / 18
    assert Descent(steps=1).factor(0) == 1


def test_windows_are_held_out_evenly():
    assert split(1) == ([0], [])
    assert split(8) == ([0, 1, 2, 3, 5, 6, 7], [4])
    own, out = split(4000)
    assert len(out) == 100
    assert sorted(own + out) == list(range(4000))


@pytest.mark.parametrize("held_out", [False, True])
def test_interrupted_anywhere_it_ends_with_the_same_bits(tmp_path, held_out):
    settings = Descent(steps=30, rate=0.05)

    def run(name, fail_at=None, every=4):
        _, trainable, slope, held = problem(MaskLora(2, 4))

        def failing(step):
            if step == fail_at:
                raise KeyboardInterrupt
            return slope(step)

        checkpoints = Checkpoints(Work(tmp_path), name, every)
        with trainable.attached():
            curve = descend(trainable, failing, settings, held=held if held_out else None, checkpoints=checkpoints)
        return trainable.values(), curve

    whole, curve = run("whole")
    for fail_at in (2, 13, 29):
        with pytest.raises(KeyboardInterrupt):
            run("cut", fail_at)
    values, again = run("cut")
    assert (again.losses, again.held, again.best) == (curve.losses, curve.held, curve.best)
    assert all(torch.equal(value, whole[key]) for key, value in values.items())
    _, known = run("cut", fail_at=0)  # finished: nothing is computed again
    assert known.done


def test_zeros_are_exact_after_many_steps_with_momentum():
    net, trainable, slope, _ = problem(KeptWeights())
    pruned = net.linear.weight.detach().clone()
    with trainable.attached():
        curve = descend(trainable, slope, Descent(steps=50, rate=0.05))
    assert torch.equal(net.linear.weight, pruned)  # frozen tensors are bit-identical
    merged = merge(pruned, "linear", KeptWeights(), trainable.values())
    assert torch.equal(merged != 0, pruned != 0)
    assert curve.losses[-1] < curve.losses[0]
    assert net.linear.weight.grad is None
    assert not net.linear.weight.requires_grad


def test_the_best_state_is_kept():
    """A rate that is far too high: the start is the best there is."""
    net, trainable, slope, held = problem(MaskLora(2, 4))
    with trainable.attached():
        before = held()
        curve = descend(trainable, slope, Descent(steps=40, rate=30.0, clip=None), held=held)
        assert held() == before
    assert curve.best == 0
    assert len(curve.losses) < 40  # it stops early
    assert not net.linear.bias.any()
