"""Rounding to the nearest level: laws, a worked example, bytes."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from budwood.sparsity.rounding import groups, rounded, rounded_bytes


def test_a_worked_example():
    """Scale 1 and zero point 8: whole numbers from -8 to 7 are levels, 0.4 goes to 0."""
    weight = torch.tensor([[-8.0, 7.0, 0.4, 3.0]])
    assert rounded(weight, 4, 4).tolist() == [[-8.0, 7.0, 0.0, 3.0]]
    assert rounded(weight, 4, 2)[0, 2:].tolist() == pytest.approx([0.4, 3.0], abs=0.11)  # levels 0.2 apart


@example(5, 13, 8, 1, 157)
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([4, 8]), st.integers(1, 48), st.integers(0, 1000))
def test_every_weight_is_within_half_a_step_and_a_group_has_few_levels(out, width, bits, group, seed):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    result = rounded(weight, bits, group)
    for columns in groups(width, group):
        piece, found = weight[:, columns], result[:, columns]
        step = (piece.amax(1).clamp(min=0) - piece.amin(1).clamp(max=0)) / (2**bits - 1)  # [out]
        # Half a step, and half more at the ends, where the zero point is rounded. The scale is a float16, off by 2^-11
        # of its size, or by 2^-25 where it is small: at the ends that counts as often as there are levels.
        levels = 2**bits - 1
        bound = (1 + levels * 2**-11) * step[:, None] + levels * 2**-25 + 1e-6
        assert ((piece - found).abs() <= bound).all()
        assert all(len(row.unique()) <= 2**bits for row in found)


def test_zero_stays_zero_and_a_group_of_zeros_is_zeros():
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -3.0, 0.3]])
    result = rounded(weight, 4, 4)
    assert result[0, :4].tolist() == [0, 0, 0, 0]
    assert result[0, 5] == 0


def test_more_bits_and_smaller_groups_are_nearer():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    error = {(bits, group): (weight - rounded(weight, bits, group)).norm() for bits in (4, 8) for group in (16, 128)}
    assert error[8, 128] < error[4, 16] < error[4, 128]


def test_bytes_are_those_of_codes_scales_and_zero_points():
    assert rounded_bytes((576, 1536), 4, 128) == 576 * (1536 * 4 + 12 * (16 + 4)) // 8
    assert rounded_bytes((2, 130), 8, 128) == 2 * (130 * 8 + 2 * (16 + 8)) // 8
    assert rounded_bytes((1, 1), 4, 128) == 3  # 24 bits
