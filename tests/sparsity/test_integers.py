"""Quantisation rounds to the nearest within half a scale, exact in float32, and is idempotent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity.integers import SMALLEST, dequantise, quantise

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def matrix(out: int, width: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights of a standard deviation, and a mask of half of them."""
    generator = torch.Generator().manual_seed(31 * out + width)
    weight = (spread * torch.randn(out, width, generator=generator)).to(dtype)
    return weight, torch.rand(out, width, generator=generator) < 0.5


def test_a_worked_example():
    weight = torch.tensor([[127.0, -64.4, 1.5, 0.4, -0.6, 300.0]])
    integers, scales = quantise(weight, weight < 200)
    assert scales.tolist() == [[1.0]]
    assert integers.tolist() == [[127, -64, 2, 0, -1, 0]]
    assert dequantise(integers, scales, torch.bfloat16).tolist() == [[127.0, -64.0, 2.0, 0.0, -1.0, 0.0]]


def test_every_row_and_every_256_columns_have_their_own_scale():
    weight = torch.zeros(2, 600)
    weight[0, 255], weight[0, 256], weight[1, 599] = 127.0, 254.0, -12.7
    integers, scales = quantise(weight, weight != 0)
    assert scales.shape == (2, 3)
    assert scales[0].tolist() == [1.0, 2.0, SMALLEST]
    assert scales[1, 2].item() == pytest.approx(0.1, rel=2**-16)
    assert integers[weight != 0].tolist() == [127, 127, -127]
    assert int((integers != 0).sum()) == 3


@settings(deadline=None, max_examples=100)
@given(
    out=st.integers(1, 8),
    width=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 12),
)
def test_the_error_is_at_most_half_a_scale_and_rounding_is_done_once(out, width, dtype, exponent):
    weight, mask = matrix(out, width, dtype, 2.0**exponent)
    integers, scales = quantise(weight, mask)
    exact = dequantise(integers, scales, torch.float64)
    assert torch.equal(exact.float().double(), exact)  # a product needs no more bits than float32 has
    assert int(integers.abs().max()) <= 127
    assert not integers[~mask].any()
    half = scales.repeat_interleave(256, 1)[:, :width].double() / 2
    assert bool(((exact - weight.double())[mask].abs() <= half[mask] * (1 + 1e-5)).all())  # a float32 quotient
    there = dequantise(integers, scales, dtype)
    assert torch.equal(there, exact.to(dtype))
    assert torch.equal(dequantise(*quantise(there, mask), dtype), there)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["largest", "smallest_normal", "smallest_subnormal"])
def test_the_extremes_of_a_dtype_survive(dtype, value):
    numbers = {
        "largest": torch.finfo(dtype).max,
        "smallest_normal": torch.finfo(dtype).smallest_normal,
        "smallest_subnormal": 2.0**-24 if dtype == torch.float16 else 2.0**-133,
    }
    weight = torch.tensor([[numbers[value], 0.0, -numbers[value] / 2]], dtype=dtype)
    there = dequantise(*quantise(weight, weight != 0), dtype)
    assert bool(there.isfinite().all())
    assert torch.equal(dequantise(*quantise(there, weight != 0), dtype), there)


def test_zeros_are_quantised_to_zeros():
    integers, scales = quantise(torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    assert not integers.any()
    assert bool((scales == SMALLEST).all())
