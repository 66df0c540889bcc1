"""Formats with 4-bit codes: bytes, exactness, the two sizes of groups, and what is refused."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_formats import scattered, skeleton

from budwood.errors import RunError
from budwood.formats import FORMATS, ROUNDED, Forecast, predict, store
from budwood.formats.checks import check_layout, check_positions
from budwood.formats.int4 import pack_nibbles, unpack_nibbles
from budwood.sparsity.codes import dequantise4, quantise4

INT4 = [format.name for format in ROUNDED["int4"].values()]


def sample(name, shape=(8, 300), dtype=torch.bfloat16):
    return skeleton(*shape, 0.0 if name == "two_four_int4" else 0.05, dtype)


def checked(name, tensors, shape):
    check_layout("x", name, shape, {suffix: (part.dtype, tuple(part.shape)) for suffix, part in tensors.items()})
    check_positions("x", name, shape, tensors)


def test_the_tensors_of_each():
    weight = skeleton(16, 600, dtype=torch.bfloat16)
    found = {
        name: {suffix: (part.dtype, tuple(part.shape)) for suffix, part in FORMATS[name].nearest(weight).items()}
        for name in INT4
    }
    for tensors in found.values():
        assert tensors["scales"] == (torch.int16, (16, 5))
        assert tensors["epsilon"] == (torch.bfloat16, (1,))
    assert found["two_four_int4"]["values"] == (torch.uint8, (16, 150))
    assert found["bitmask_int4"]["values"] == (torch.uint8, (16 * 150,))
    assert found["dense_int4"]["values"] == (torch.uint8, (16, 300))


@given(st.lists(st.integers(-8, 7), max_size=9))
def test_two_codes_in_a_byte_the_lower_index_in_the_low_nibble(codes):
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8))
    assert packed.numel() == -(-len(codes) // 2)
    assert unpack_nibbles(packed)[: len(codes)].tolist() == codes
    for index, code in enumerate(codes):
        assert int(packed[index // 2]) >> 4 * (index % 2) & 15 == code % 16
    assert pack_nibbles(torch.tensor([-8, 7, 1], dtype=torch.int8)).tolist() == [0x78, 0x01]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", INT4)
def test_a_weight_is_the_exact_product_of_code_and_scale(name, dtype):
    weight = sample(name, dtype=dtype)
    tensors = FORMATS[name].nearest(weight)
    back = FORMATS[name].unpack(tensors, (8, 300))
    scales = (tensors["scales"].int() << 16).view(torch.float32).double().repeat_interleave(128, 1)[:, :300]
    ratio = back.double() / scales
    exact = ratio == ratio.round()
    if name == "two_four_compact_int4":
        assert torch.equal(back[~exact], weight[~exact])  # recovered weights keep their bits
        exact |= back == weight
    assert bool(exact.all())
    again = FORMATS[name].unpack(FORMATS[name].nearest(back), (8, 300))
    if name != "two_four_compact_int4":  # rounding may change which two of four are the largest
        assert torch.equal(again, back)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["bitmask_int4", "dense_int4"]), st.integers(0, 1 << 30), st.integers(65, 300))
@example("bitmask_int4", 89056, 65)
@example("dense_int4", 1, 130)
def test_levels_of_groups_of_64_columns_are_kept(name, seed, width):
    generator = torch.Generator().manual_seed(seed)
    held = torch.rand(5, width, generator=generator) < 0.5
    weight = torch.where(held, torch.randn(5, width, generator=generator), 0).bfloat16()
    levels = dequantise4(*quantise4(weight, held, 64), torch.bfloat16, 64)
    tensors = FORMATS[name].pack(levels)
    stored = levels != 0 if name == "bitmask_int4" else torch.ones_like(held)
    coarse = dequantise4(*quantise4(levels, stored, 128), torch.bfloat16, 128)
    group = 128 if torch.equal(coarse, levels) else 64  # few columns beyond the first 64 may fit its scales by chance
    assert tensors["scales"].shape == (5, -(-width // group))
    checked(name, tensors, (5, width))
    assert torch.equal(FORMATS[name].unpack(tensors, (5, width)), levels)


@pytest.mark.parametrize("name", ["bitmask_int4", "dense_int4"])
def test_an_unused_nibble_is_zero(name):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    tensors = FORMATS[name].nearest(weight)
    checked(name, tensors, (3, 7))
    tensors["values"].view(-1)[-1] |= 0x10
    with pytest.raises(RunError, match="holds no code"):
        checked(name, tensors, (3, 7))


@pytest.mark.parametrize("change", [-1, 1, 2])
def test_a_bitmask_marks_as_many_weights_as_there_are_codes(change):
    weight = scattered(3, 40, 0.5)
    tensors = FORMATS["bitmask_int4"].nearest(weight)
    values = tensors["values"]
    tensors["values"] = values[:change] if change < 0 else torch.cat([values, values[:change]])
    with pytest.raises(RunError, match="does not mark as many weights"):
        checked("bitmask_int4", tensors, (3, 40))


@pytest.mark.parametrize("bits", [0, -0x8000, 0x7F80, -0x80, 0x7FC0, 0x3F81, 0x3F84, 0x0080, 0x7C00])
@pytest.mark.parametrize("name", INT4)
def test_a_scale_that_rounding_does_not_give_is_refused(name, bits):
    """Zero, infinity, NaN, more than 5 significant bits, too small, too large."""
    tensors = FORMATS[name].nearest(sample(name))
    tensors["scales"][3, 1] = bits
    with pytest.raises(RunError, match="5 significant bits"):
        checked(name, tensors, (8, 300))


def test_a_scale_of_float16_stays_in_its_range():
    tensors = FORMATS["dense_int4"].nearest(sample("dense_int4", dtype=torch.float16))
    checked("dense_int4", tensors, (8, 300))
    tensors["scales"][0, 0] = 0x4600  # 2**13
    with pytest.raises(RunError, match="5 significant bits"):
        checked("dense_int4", tensors, (8, 300))


def test_a_negative_scale_is_sound():
    weight = torch.tensor([[4.0, 3.0, 2.0, -3.5]])
    tensors = FORMATS["dense_int4"].pack(weight)
    assert int(tensors["scales"][0, 0]) < 0  # the largest weight is -8 times the scale
    assert torch.equal(FORMATS["dense_int4"].unpack(tensors, (1, 4)), weight)


def test_unpruned_matrices_are_dense_and_others_as_in_int8():
    assert store(scattered(16, 256, 1.0), "auto_int4")[0] == "dense_int4"
    assert store(scattered(16, 256, 0.9), "auto_int4")[0] == "dense_int4"
    assert store(scattered(16, 256, 0.5), "auto_int4")[0] == "bitmask_int4"
    assert store(skeleton(16, 256), "auto_int4")[0] == "two_four_int4"
    assert store(skeleton(16, 256, 0.03), "auto_int4")[0] == "two_four_compact_int4"


def test_bits_for_a_weight():
    shape = (4096, 4096)
    for forecast, name, bits in (
        (Forecast(shape[0] * shape[1] / 2, 0), "two_four_int4", 3.125),
        (Forecast(shape[0] * shape[1] / 2), "bitmask_int4", 3.125),
        (Forecast(shape[0] * shape[1]), "dense_int4", 4.125),
    ):
        found, nbytes = predict(shape, forecast, 2, "auto_int4")
        assert found == name
        assert 8 * nbytes / (shape[0] * shape[1]) == pytest.approx(bits, abs=1e-5)
