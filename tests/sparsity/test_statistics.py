import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import RunError
from budwood.sparsity.statistics import Gram, PublishedNorm, SquaredNorm

# Two sequences of two tokens; the per-sequence mean of the sums of squares is [1 16 4 9 25 1 4 9].
FIRST = torch.tensor([[1.0, 4, 2, 3, 5, 1, 2, 3], [0.0] * 8])
SECOND = torch.tensor([[0.0, 0, 0, 0, 4, 1, 0, 3], [1, 4, 2, 3, 3, 0, 2, 0]])


def test_norms_of_the_worked_example():
    statistic = SquaredNorm(8)
    statistic.add(FIRST)
    statistic.add(SECOND)
    assert statistic.count == 4
    assert (statistic.total / 2).tolist() == [1, 16, 4, 9, 25, 1, 4, 9]
    assert statistic.norms().tolist() == [1, 4, 2, 3, 5, 1, 2, 3]


@pytest.mark.parametrize("statistic", [SquaredNorm, PublishedNorm, Gram])
@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 700), width=st.integers(1, 500))
def test_any_split_of_the_tokens_gives_the_same_sums(statistic, cut, width):
    x = torch.randn(700, width, generator=torch.Generator().manual_seed(cut))
    whole, parts = statistic(width), statistic(width)
    whole.add(x)
    parts.add(x[:cut])
    parts.add(x[cut:])
    assert whole.count == parts.count == 700
    # float32 products and sums of 700 terms: relative error about 1e-6 of the terms' size
    torch.testing.assert_close(whole.sums()[0], parts.sums()[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("statistic", [SquaredNorm, PublishedNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_do_not_matter_to_the_last_bit(statistic, dtype):
    x = torch.randn(6, 50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, two, six = statistic(40), statistic(40), statistic(40)
    one.add(x)
    for pair in x.split(2):
        two.add(pair)
    for sequence in x:
        six.add(sequence)
    assert torch.equal(one.norms(), two.norms())
    assert torch.equal(one.norms(), six.norms())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_types_are_squared_in_float32(dtype):
    x = torch.tensor([[300.0, 1.0]], dtype=dtype)  # the square of 300 overflows float16
    norm, gram = SquaredNorm(2), Gram(2)
    norm.add(x)
    gram.add(x)
    assert norm.norms().tolist() == [300, 1]
    assert gram.matrix().tolist() == [[90000, 300], [300, 1]]


def test_the_published_norm_is_the_root_of_a_square_as_published():
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    norm, fast = PublishedNorm(70), SquaredNorm(70)
    norm.add(x)
    fast.add(x)
    assert torch.equal(norm.mean, torch.norm(x, p=2, dim=0) ** 2)
    torch.testing.assert_close(fast.norms(), norm.norms(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [576, 1000])
def test_the_number_of_threads_changes_no_bit(dtype, width):
    x = torch.randn(2048, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Gram(width))
            found[-1].add(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].total, found[1].total)
    assert torch.equal(found[0].total, found[2].total)


def test_moments_of_bfloat16_lose_nothing():
    x = torch.randn(512, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    gram, precision = Gram(400), torch.get_float32_matmul_precision()
    gram.add(x)
    exact = x.double().T @ x.double()
    assert (gram.matrix() - exact).abs().max() <= 3e-6 * exact.diagonal().max()
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("width", [1, 5, 384, 385, 800])
def test_the_upper_triangle_tells_the_whole_matrix(width):
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(width))
    gram = Gram(width)
    gram.add(x)
    torch.testing.assert_close(gram.matrix(), (x.double().T @ x.double()), rtol=1e-5, atol=1e-4)
    assert torch.equal(gram.matrix(), gram.matrix().T)


@pytest.mark.parametrize("statistic", [SquaredNorm, PublishedNorm, Gram])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_hidden(statistic, value):
    x = torch.ones(300, 6)
    x[270, 3] = value
    sums = statistic(6)
    sums.add(torch.ones(2, 6))
    sums.check("fine")
    sums.add(x)
    with pytest.raises(RunError, match=r"model\.layers\.3\.q_proj: 1 of 6 input features"):
        sums.check("model.layers.3.q_proj")


def test_a_factor_is_made_once_per_damping_and_forgotten_when_tokens_come():
    gram = Gram(3)
    gram.add(torch.eye(3))
    factor = gram.factor(0.01)
    assert gram.factor(0.01) is factor
    assert gram.factor(0.02) is not factor
    gram.add(torch.eye(3))
    assert gram.factor(0.01) is not factor


def test_the_precision_of_products_is_put_back():
    torch.set_float32_matmul_precision("high")
    try:
        Gram(4).add(torch.ones(2, 4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
