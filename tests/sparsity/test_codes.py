"""4-bit codes: a matrix of levels is kept exactly, in every dtype; other weights take the nearest level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity.codes import (
    HIGHEST,
    LEADING,
    LOWEST,
    dequantise4,
    limits,
    nearest_scale,
    quantise4,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def levels(seed: int, dtype: torch.dtype, group: int, *, most: int = 8, spread: int = 5) -> tuple[torch.Tensor, ...]:
    """Codes, scales and the mask of a random matrix of levels, 6 x 300."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-300 // group)
    codes = torch.randint(-most, most + 1, (6, 300), generator=generator).clamp(LOWEST, HIGHEST).to(torch.int8)
    smallest, largest = limits(dtype)
    exponent = torch.randint(-spread, spread + 1, (6, groups), generator=generator)
    scales = (1 + torch.rand(6, groups, generator=generator)) * torch.exp2(exponent.float())
    scales = nearest_scale(scales.clamp(smallest, largest) * torch.randn(6, groups, generator=generator).sign(), dtype)
    return codes, scales, torch.rand(6, 300, generator=generator) < 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30), st.sampled_from(DTYPES), st.sampled_from([64, 128]), st.integers(1, 8), st.integers(0, 130)
)
def test_a_matrix_of_levels_is_kept_exactly(seed, dtype, group, most, spread):
    codes, scales, held = levels(seed, dtype, group, most=most, spread=spread)
    weight = torch.where(held, dequantise4(codes, scales, dtype, group), 0)
    assert bool(weight.isfinite().all())
    assert not (weight.signbit() & (weight == 0)).any()
    again, found = quantise4(weight, held, group)
    assert torch.equal(dequantise4(again, found, dtype, group), weight)
    assert torch.equal(nearest_scale(found, dtype), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", [-8, -3, 1, 2, 3, 5, 7])
def test_a_level_of_the_smallest_scales_is_kept_exactly(code, dtype):
    """Half of such a scale, which has twice the code, may be too small to be stored."""
    codes = torch.tensor([[code, 0, 1]], dtype=torch.int8)
    for step in range(16, 65):  # scales of 5 bits, of two octaves; one at a time, since one group may help another
        scale = nearest_scale(torch.tensor([[step / 16 * limits(dtype)[0]]]), dtype)
        weight = dequantise4(codes, scale, dtype)
        again, found = quantise4(weight, weight != 0)
        assert torch.equal(dequantise4(again, found, dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact_at_the_limits(dtype):
    codes = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.int8).repeat(2, 1)
    for limit in limits(dtype):
        scales = nearest_scale(torch.tensor([[limit * 31 / 16], [-limit * 31 / 16]]), dtype)
        exact = codes.double() * scales.double()
        assert torch.equal(dequantise4(codes, scales, dtype).double(), exact)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(-36, 36), st.sampled_from([64, 128]))
def test_every_weight_takes_the_nearest_level_of_a_scale_of_five_bits(seed, size, group):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 200, generator=generator) * 10**size
    held = torch.rand(5, 200, generator=generator) < 0.6
    codes, scales = quantise4(weight, held, group)
    assert scales.shape == (5, -(-200 // group))
    assert torch.equal(scales.view(torch.int32) & LEADING, scales.view(torch.int32))
    assert not codes[~held].any()
    assert int(codes.min()) >= LOWEST
    assert int(codes.max()) <= HIGHEST
    each = scales.repeat_interleave(group, 1)[:, :200].double()
    error = ((codes * each - weight.double()) / each).abs()
    inside = (weight.double() / each).clamp(LOWEST, HIGHEST) == weight.double() / each
    assert bool((error[held & inside] <= 0.5 + 1e-6).all())


def test_the_error_is_below_that_of_fifteen_levels():
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    held = torch.ones_like(weight, dtype=torch.bool)
    found = (dequantise4(*quantise4(weight, held), torch.float32) - weight).square().sum()
    scale = weight.view(64, 8, 128).abs().amax(2, keepdim=True) / 7
    plain = ((weight.view(64, 8, 128) / scale).round() * scale - weight.view(64, 8, 128)).square().sum()
    assert found < 0.82 * plain


def test_a_group_of_zeros_has_the_smallest_scale():
    for dtype in DTYPES:
        codes, scales = quantise4(torch.zeros(2, 130, dtype=dtype), torch.ones(2, 130, dtype=torch.bool))
        assert not codes.any()
        assert scales.unique().tolist() == [limits(dtype)[0]]
