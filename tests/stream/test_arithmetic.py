"""How passes compute is chosen once, by what is faster, and kept."""

import pytest
import torch

from budwood.kernels import native
from budwood.stream import arithmetic
from budwood.stream.arithmetic import Arithmetic, fastest

CPU = torch.device("cpu")


@pytest.mark.parametrize("gain", [0.75, 1.5])
def test_the_faster_way_is_taken_where_figures_need_not_be_published_ones(monkeypatch, gain):
    monkeypatch.setattr(arithmetic, "sparse_product_gain", lambda *_: gain)
    monkeypatch.setattr(arithmetic, "blocked_attention_gain", lambda *_: gain)
    monkeypatch.setattr(native, "has", lambda way: True)
    faster = gain > 1
    assert fastest(torch.float32, CPU, published=False) == Arithmetic(torch.float32, faster, faster)
    assert fastest(torch.float32, CPU, published=True) == Arithmetic(torch.float32)
    assert fastest(torch.bfloat16, CPU, published=False) == Arithmetic(torch.bfloat16, blocked_attention=faster)
    assert fastest(torch.float16, CPU, published=False) == Arithmetic(torch.float16)


@pytest.mark.parametrize(
    "chosen", [Arithmetic(), Arithmetic(torch.bfloat16, True, False), Arithmetic(torch.float16, False, True)]
)
def test_what_a_recipe_keeps_gives_it_back(chosen):
    assert Arithmetic.recorded(chosen.record()) == chosen


def test_trying_gives_a_ratio_and_draws_none_of_the_callers_random_numbers():
    before = torch.get_rng_state()
    assert arithmetic.blocked_attention_gain(torch.float32, tokens=16, rounds=1) > 0
    assert arithmetic.sparse_product_gain(width=64, rows=32, rounds=1) >= 0
    assert torch.equal(torch.get_rng_state(), before)
