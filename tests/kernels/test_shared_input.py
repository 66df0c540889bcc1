"""Layers learn from their calls which of them share an input, and no product is ever stale."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budwood.kernels import shared_input
from budwood.kernels.linear import SparseLinear
from budwood.kernels.optimize import optimize
from budwood.kernels.shared_input import CHANCES, LONE_CALLS, InputObserver, SharedInput

pytestmark = pytest.mark.usefixtures("fastest")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def sparse(out: int, width: int = 64) -> SparseLinear:
    weight = torch.randn(out, width)
    return SparseLinear.from_dense(weight.where(torch.rand(out, width) < 0.5, 0), torch.randn(out), "bitmask")


class Attention(nn.Module):
    """Names of no model family; the last layer has the width of the others and another input."""

    def __init__(self) -> None:
        super().__init__()
        self.red, self.green, self.blue, self.mix = sparse(64), sparse(16), sparse(16), sparse(64)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.cat([self.red(x), self.green(x), self.blue(x)], -1)
        return self.mix(inner[..., :64].contiguous())


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.back = sparse(96), sparse(96), sparse(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.silu(self.one(x)) * self.two(x))


@pytest.fixture
def joint(monkeypatch) -> list[int]:
    """The number of matrices of every native call for several layers."""
    calls = []

    class Counted(shared_input.MatrixGroup):
        def linear(self, *given, **named):
            calls.append(len(self.matrices))
            return super().linear(*given, **named)

    monkeypatch.setattr(shared_input, "MatrixGroup", Counted)
    return calls


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A module that learns and its copy that does not."""
    torch.manual_seed(0)
    model = kind()
    alone = copy.deepcopy(model)
    optimize(model)
    return model, alone


@pytest.mark.parametrize(("kind", "members"), [(Attention, 3), (FeedForward, 2)])
def test_layers_called_with_one_tensor_are_multiplied_together_from_the_next_call_on(joint, kind, members):
    model, alone = pair(kind)
    for turn in range(6):
        x = torch.randn(1 + turn, 64)
        assert torch.equal(model(x), alone(x))
    assert joint == [members] * 5
    layers = [layer for layer in model.children() if isinstance(layer.shared_input, SharedInput)]
    assert len(layers) == members
    assert all(layer.shared_input is layers[0].shared_input for layer in layers)
    assert all(layer.shared_input is None for layer in model.children() if layer not in layers)
    assert all(layer.shared_input is None for layer in alone.children())


def test_many_rows_are_multiplied_alone_and_keep_the_group(joint):
    model, alone = pair(Attention)
    for rows in (1, 100, 1, 100, 1):
        x = torch.randn(rows, 64)
        assert torch.equal(model(x), alone(x))
    assert joint == [3, 3]


def learned() -> tuple[nn.Module, nn.Module]:
    model, alone = pair(Attention)
    for _ in range(2):
        model(torch.randn(1, 64))
    assert isinstance(model.red.shared_input, SharedInput)
    return model, alone


def test_an_input_that_is_changed_in_place_gives_no_stale_product():
    model, alone = learned()
    x = torch.randn(1, 64)
    before = model.red(x)
    x.mul_(2)
    assert torch.equal(model.green(x), alone.green(x))
    assert not torch.equal(before, alone.red(x))
    assert torch.equal(model.blue(x), alone.blue(x))


def test_another_tensor_dissolves_the_group_and_it_is_learned_again(joint):
    model, alone = learned()
    x, other = torch.randn(1, 64), torch.randn(1, 64)
    assert torch.equal(model.red(x), alone.red(x))
    assert torch.equal(model.green(other), alone.green(other))
    assert isinstance(model.red.shared_input, InputObserver)
    assert torch.equal(model.blue(x), alone.blue(x))
    del joint[:]
    for _ in range(4):
        x = torch.randn(1, 64)
        assert torch.equal(model(x), alone(x))
    assert joint[-1:] == [3]


def test_a_member_that_is_no_longer_called_dissolves_the_group():
    model, alone = learned()
    for _ in range(2):
        x = torch.randn(1, 64)
        assert torch.equal(model.red(x), alone.red(x))
        assert torch.equal(model.blue(x), alone.blue(x))
    assert isinstance(model.red.shared_input, InputObserver)


def test_groups_that_are_wrong_again_and_again_are_given_up():
    model, alone = learned()
    for turn in range(6 * CHANCES):
        x, other = torch.randn(1, 64), torch.randn(1, 64)
        assert torch.equal(model.red(x), alone.red(x))
        assert torch.equal(model.green(x if turn % 2 else other), alone.green(x if turn % 2 else other))
        assert torch.equal(model.blue(other), alone.blue(other))
    assert not any(isinstance(layer.shared_input, SharedInput) for layer in (model.red, model.green, model.blue))


def test_layers_that_never_share_are_no_longer_observed():
    model, _ = pair(Attention)
    for _ in range(LONE_CALLS + 1):
        for layer in model.children():
            layer(torch.randn(1, 64))
    assert all(layer.shared_input is None for layer in model.children())


@pytest.mark.parametrize("change", ["values in place", "bias in place", "replaced", "cast"])
def test_a_weight_that_changes_between_two_calls_gives_no_stale_product(change):
    model, alone = learned()
    x = torch.randn(1, 64)
    model.red(x)
    for layer in (model.green, alone.green):
        if change == "values in place":
            layer.values.mul_(2)
        elif change == "bias in place":
            layer.bias.add_(1)
        elif change == "replaced":
            layer.values = nn.Parameter(torch.ones_like(layer.values), requires_grad=False)
        else:
            layer.to(torch.float16).to(torch.float32)
    assert torch.equal(model.green(x), alone.green(x))
    assert torch.equal(model.blue(x), alone.blue(x))


def test_copies_pickles_and_casts_compute_the_same():
    model, alone = learned()
    x = torch.randn(2, 64)
    expected = alone(x)
    model.red(x)  # products are waiting while it is copied
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
        assert copied.red.shared_input is None
    assert torch.equal(model(x), expected)
    model.to(torch.bfloat16), alone.to(torch.bfloat16)
    for _ in range(3):
        x = torch.randn(1, 64, dtype=torch.bfloat16)
        assert torch.equal(model(x), alone(x))


def test_inference_tensors_are_multiplied_alone():
    model, alone = pair(Attention)
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(1, 64)
            assert torch.equal(model(x), alone(x))
    assert isinstance(model.red.shared_input, InputObserver)


def test_gradients_reach_the_input_through_a_group(joint):
    model, alone = learned()
    del joint[:]
    with torch.enable_grad():
        for _ in range(3):
            x = torch.randn(1, 64, requires_grad=True)
            model(x).sum().backward()
            found, x.grad = x.grad, None
            alone(x).sum().backward()
            assert torch.equal(found, x.grad)
    assert joint == [3, 3, 3]


def test_threads_do_not_mix_their_products():
    model, alone = pair(Attention)
    wrong = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(1, 64, generator=generator)
                if not torch.equal(model(x), alone(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert isinstance(model.red.shared_input, SharedInput)
