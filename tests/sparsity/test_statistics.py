"""Sums over tokens: any split, merged in any order, on any processor, gives the sums of the whole."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from budwood.errors import RunError
from budwood.sparsity.statistics import Gram, PublishedNorm, SquaredNorm

# Two sequences of two tokens; the per-sequence mean of the sums of squares is [1 16 4 9 25 1 4 9].
FIRST = torch.tensor([[1.0, 4, 2, 3, 5, 1, 2, 3], [0.0] * 8])
DIGEST = "eb9da356cfa39616f611927b95840c1b3fabd2c1c77cfed8bcdac165e5ec55c4"
STATISTICS = pytest.mark.parametrize("statistic", [SquaredNorm, PublishedNorm, Gram])
SECOND = torch.tensor([[0.0, 0, 0, 0, 4, 1, 0, 3], [1, 4, 2, 3, 3, 0, 2, 0]])


def test_norms_of_the_worked_example():
    statistic = SquaredNorm(8)
    statistic.add(FIRST)
    statistic.add(SECOND)
    assert statistic.count == 4
    assert (statistic.total / 2).tolist() == [1, 16, 4, 9, 25, 1, 4, 9]
    statistic.add(FIRST)
    statistic.add(SECOND)
    assert statistic.norms().tolist() == [2, 8, 4, 6, 10, 2, 4, 6]


def summed(statistic, width, *inputs):
    result = statistic(width)
    for x in inputs:
        result.add(x)
    return result


@pytest.mark.parametrize("statistic", [SquaredNorm, Gram])
@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 700), width=st.integers(1, 500))
def test_any_split_of_the_tokens_gives_the_same_sums(statistic, cut, width):
    x = torch.randn(700, width, generator=torch.Generator().manual_seed(cut))
    whole, parts = summed(statistic, width, x), summed(statistic, width, x[:cut], x[cut:])
    assert whole.count == parts.count == 700
    # float32 products and sums of 700 terms: relative error about 1e-6 of the terms' size
    if statistic is Gram:
        torch.testing.assert_close(whole.matrix(), parts.matrix(), rtol=1e-5, atol=1e-3)
    else:
        torch.testing.assert_close(whole.total, parts.total, rtol=1e-5, atol=1e-3)


@STATISTICS
@settings(deadline=None, max_examples=20)
@given(data=st.data(), sequences=st.integers(1, 9), width=st.integers(1, 40))
def test_parts_merged_in_any_order_are_the_whole(statistic, data, sequences, width):
    x = torch.randn(sequences, 21, width, generator=torch.Generator().manual_seed(sequences))
    order = data.draw(st.permutations(range(sequences)))
    cuts = sorted(data.draw(st.lists(st.integers(0, sequences), max_size=4)))
    parts = [
        summed(statistic, width, x[order[start:stop]])
        for start, stop in zip([0, *cuts], [*cuts, sequences], strict=True)
    ]
    random.Random(width).shuffle(parts)
    merged, whole = statistic(width), summed(statistic, width, x)
    for part in parts:
        merged.merge(part)
    assert merged.count == whole.count == 21 * sequences
    found, wanted = merged.state(), whole.state()
    assert found.keys() == wanted.keys()
    assert int(found.get("sequences", 0)) == int(wanted.get("sequences", 0))
    if statistic is SquaredNorm:
        assert torch.equal(merged.total, whole.total)
    elif statistic is PublishedNorm:
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(merged.matrix(), whole.matrix(), rtol=1e-5, atol=1e-4)


@STATISTICS
def test_a_state_is_the_statistic_again(statistic, tmp_path):
    generator = torch.Generator().manual_seed(0)
    before, later = (torch.randn(3, 50, 7, generator=generator) for _ in range(2))
    first = summed(statistic, 7, before)
    save_file(first.state(), tmp_path / "state.safetensors")
    second = statistic(7)
    second.load_state(load_file(tmp_path / "state.safetensors"))
    for same in (first, second):
        same.add(later)
    assert torch.equal(first.norms(), second.norms())
    assert first.count == second.count == 300
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_a_merged_gram_forgets_its_factors():
    gram = summed(Gram, 3, torch.eye(3))
    factor = gram.factor(0.01)
    gram.merge(summed(Gram, 3, torch.ones(2, 3)))
    assert gram.factor(0.01) is not factor
    restored = summed(Gram, 3, torch.eye(3))
    restored.factor(0.01)
    restored.load_state(gram.state())
    assert torch.equal(restored.factor(0.01).upper, gram.factor(0.01).upper)


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
    assert norm.total.tolist() == [90000, 1]
    assert gram.matrix().tolist() == [[90000, 300], [300, 1]]


def test_the_published_norm_is_the_root_of_a_square_as_published():
    x = torch.randn(3, 300, 70, generator=torch.Generator().manual_seed(0))
    norm, other = summed(PublishedNorm, 70, x), summed(SquaredNorm, 70, x)
    scaler_row = torch.zeros(70)  # the published program's name
    for index, sequence in enumerate(x):
        scaler_row *= index / (index + 1)
        scaler_row += torch.norm(sequence, p=2, dim=0) ** 2 / (index + 1)
    assert torch.equal(norm.norms(), scaler_row.sqrt())
    torch.testing.assert_close(other.total / 3, norm.mean.double(), rtol=1e-6, atol=0)


def test_squares_are_summed_to_float32_precision():
    x = torch.randn(4, 513, 60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(summed(SquaredNorm, 60, x).total, x.double().square().sum((0, 1)), rtol=2e-7, atol=0)


def digest_of_norms():
    """Of the sums and norms of inputs that every machine draws alike."""
    values = torch.tensor(random.Random(0).choices(range(-(2**23), 2**23), k=4 * 129 * 75)).float()
    x = values.view(4, 129, 75) * 1e-3
    norm = summed(SquaredNorm, 75, x, x.bfloat16())
    return hashlib.sha256(norm.total.numpy().tobytes() + norm.norms().numpy().tobytes()).hexdigest()


def test_equal_inputs_have_equal_norms_on_every_processor():
    """As this process finds it, and without vector instructions and in two threads."""
    program = "import test_statistics; print(test_statistics.digest_of_norms())"
    places = os.pathsep.join((os.path.dirname(__file__), os.getcwd(), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": places, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == digest_of_norms() == DIGEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [576, 1000])
@pytest.mark.parametrize("statistic", [SquaredNorm, Gram])
def test_the_number_of_threads_changes_no_bit(statistic, dtype, width):
    x = torch.randn(2048, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(summed(statistic, width, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].total, found[1].total)
    assert torch.equal(found[0].total, found[2].total)


def test_moments_of_bfloat16_are_exact_to_float32():
    x = torch.randn(512, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    gram, precision = Gram(400), torch.get_float32_matmul_precision()
    gram.add(x)
    exact = x.double().T @ x.double()
    assert (gram.matrix() - exact).abs().max() <= 3e-6 * exact.diagonal().max()
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("width", [1, 5, 384, 385, 800])
def test_the_matrix_is_symmetric_and_whole(width):
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(width))
    gram = Gram(width)
    gram.add(x)
    torch.testing.assert_close(gram.matrix(), (x.double().T @ x.double()), rtol=1e-5, atol=1e-4)
    assert torch.equal(gram.matrix(), gram.matrix().T)


@STATISTICS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_reported(statistic, value):
    x = torch.ones(300, 6)
    x[270, 3] = value
    sums = statistic(6)
    sums.add(torch.ones(2, 6))
    sums.check("fine")
    sums.add(x)
    with pytest.raises(RunError, match=r"model\.layers\.3\.q_proj: 1 of 6 input features"):
        sums.check("model.layers.3.q_proj")


def test_a_factor_is_computed_once_per_damping_until_tokens_are_added():
    gram = Gram(3)
    gram.add(torch.eye(3))
    factor = gram.factor(0.01)
    assert gram.factor(0.01) is factor
    assert gram.factor(0.02) is not factor
    gram.add(torch.eye(3))
    assert gram.factor(0.01) is not factor


def test_the_precision_of_products_is_restored():
    torch.set_float32_matmul_precision("high")
    try:
        Gram(4).add(torch.ones(2, 4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
