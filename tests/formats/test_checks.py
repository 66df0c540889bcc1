"""Every format refuses tensors that its own packing cannot have made, before they are unpacked or multiplied."""

import random

import pytest
import torch
from test_formats import skeleton

from budwood.errors import RunError, UsageError
from budwood.formats import FORMATS
from budwood.formats.bits import raw
from budwood.formats.checks import check_layout, check_positions
from budwood.formats.format import Format, by_name
from budwood.formats.two_four import covered

SHAPE = (32, 72)
PURE = ("two_four", "two_four_int8", "two_four_int4")  # cannot store recovered weights


def packed(format, shape=SHAPE):
    return FORMATS[format].nearest(skeleton(*shape, 0.0 if format in PURE else 0.05))


def layout(tensors):
    return {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [SHAPE, (16, 264), (8, 512), (4, 4), (12, 20)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_what_a_format_packs_passes(format, shape):
    tensors = packed(format, shape)
    check_layout("x", format, shape, layout(tensors))
    check_positions("x", format, shape, tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_tensor_or_one_of_another_size_or_dtype_is_refused(format):
    tensors = packed(format)
    for suffix, tensor in tensors.items():
        others = {key: value for key, value in tensors.items() if key != suffix}
        with pytest.raises(RunError, match=rf"lacks x\.{suffix}"):
            check_layout("x", format, SHAPE, layout(others))
        wrong = tensor.to(torch.int64)
        with pytest.raises(RunError, match=rf"x\.{suffix} does not fit"):
            check_layout("x", format, SHAPE, layout(tensors | {suffix: wrong}))
        for sizes in ((1, 1, -1), (-1, 1, 1)):
            with pytest.raises(RunError, match="does not fit"):
                check_layout("x", format, SHAPE, layout(tensors | {suffix: tensor.reshape(sizes)}))
    with pytest.raises(RunError, match="does not fit"):
        check_layout("x", format, (36, 80), layout(tensors))


def outside(tensor, index, value):
    tensor = tensor.clone()
    tensor.view(-1)[index] = value
    return tensor


DAMAGE = [
    ("two_four", "places", 0, 0b0000_0000),  # one column twice
    ("two_four", "places", 0, 0b0100_0001),  # in the wrong order
    ("bitmask", "bitmask", 0, 0b1111_1111),  # more weights than values
    ("two_four_compact", "rec_counts", 0, 255),
    ("two_four_compact", "rec_columns", 0, 200),  # the row has 72 columns
    ("two_four_csr", "rec_offsets", 0, 1),
    ("two_four_csr", "rec_offsets", 5, 2**31 - 1),
    ("two_four_csr", "rec_offsets", 5, -1),
    ("two_four_csr", "rec_offsets", 32, 0),
    ("two_four_csr", "rec_columns", 0, 72),
    ("two_four_csr", "rec_columns", 0, -1),
    ("two_four_ell", "ell_columns", 0, 18),
    ("two_four_ell", "ell_columns", 0, -1),
    ("two_four_int8", "places", 0, 0),
    ("two_four_int8", "scales", 3, 0x7F800000),  # infinite
    ("two_four_int8", "scales", 3, -0x40800000),  # -1
    ("two_four_int8", "scales", 3, 0),
    ("bitmask_int8", "scales", 3, 0x3F800001),  # 24 significant bits: products would not be exact
    ("bitmask_int8", "bitmask", 0, 0b1111_1111),
    ("bitmask_int8", "epsilon", 0, 0.5),  # of no dtype
    ("two_four_compact_int8", "rec_columns", 0, 200),
]


@pytest.mark.parametrize(("format", "suffix", "index", "value"), DAMAGE)
def test_damaged_positions_and_scales_are_refused(format, suffix, index, value):
    tensors = packed(format)
    tensors[suffix] = outside(tensors[suffix], index, value)
    with pytest.raises(RunError, match="x is damaged"):
        check_positions("x", format, SHAPE, tensors)


def test_bits_beyond_the_last_column_are_refused():
    tensors = FORMATS["bitmask"].pack(skeleton(4, 12))
    tensors["bitmask"][0, 1] |= 0x80
    with pytest.raises(RunError, match="beyond the last"):
        check_positions("x", "bitmask", (4, 12), tensors)


def test_offsets_whose_32_bit_differences_wrap_are_refused():
    tensors = packed("two_four_csr")
    tensors["rec_offsets"][3], tensors["rec_offsets"][4] = -(2**31), -1
    with pytest.raises(RunError, match="row offsets do not rise"):
        check_positions("x", "two_four_csr", SHAPE, tensors)


@pytest.mark.parametrize("format", ["two_four_compact", "two_four_compact_int8", "two_four_csr"])
def test_recovered_weights_that_are_doubled_unordered_or_in_the_two_four_part_are_refused(format):
    tensors = packed(format, (4, 600))
    before = tensors["rec_columns"]
    assert before[0] < before[1]  # of one row and segment
    for columns in (before[[0, 0]], before[[1, 0]]):
        tensors["rec_columns"] = torch.cat([columns, before[2:]])
        with pytest.raises(RunError, match="do not rise within a row"):
            check_positions("x", format, (4, 600), tensors)
    held = covered(tensors["places"], 600)[0].nonzero()[:, 0]
    tensors["rec_columns"] = outside(before, 0, int(held[held < before[1]][-1]))
    with pytest.raises(RunError, match="position of the 2:4 part"):
        check_positions("x", format, (4, 600), tensors)


def test_blocks_that_are_doubled_unordered_or_of_an_odd_side_are_refused():
    tensors = FORMATS["two_four_ell"].pack(skeleton(8, 32, 0.5))
    before = tensors["ell_columns"]
    assert before.shape[1] > 1
    for columns in (before[:, [0, *range(before.shape[1] - 1)]], before.flip(1)):
        with pytest.raises(RunError, match="do not rise within a block row"):
            check_positions("x", "two_four_ell", (8, 32), tensors | {"ell_columns": columns.contiguous()})
    odd = {"ell_columns": torch.zeros(4, 1, dtype=torch.int32), "ell_values": torch.zeros(8, 2)}  # of side 2
    with pytest.raises(RunError, match="do not divide the matrix"):
        check_positions("x", "two_four_ell", (8, 32), tensors | odd)


@pytest.mark.parametrize("format", ["bitmask", "two_four", "two_four_compact", "two_four_csr"])
def test_tensors_that_pass_unpack_to_a_matrix_that_packs_to_the_same_tensors(format):
    """Positions altered at random are either refused or as good as packed ones."""
    chance, passed, shape = random.Random(0), 0, (8, 264)
    whole = FORMATS[format].pack(skeleton(*shape, 0.0 if format in PURE else 0.1))
    suffixes = [suffix for suffix, tensor in whole.items() if not tensor.is_floating_point()]
    for _ in range(400):
        tensors = dict(whole)
        for _ in range(chance.randint(1, 2)):
            suffix = chance.choice(suffixes)
            old = int(tensors[suffix].view(-1)[(index := chance.randrange(tensors[suffix].numel()))])
            tensors[suffix] = outside(tensors[suffix], index, old ^ 1 << chance.randrange(8))
        try:
            check_positions("x", format, shape, tensors)
        except RunError:
            continue
        passed += 1
        weight = FORMATS[format].unpack(tensors, shape)
        again = FORMATS[format].pack(weight, covered(tensors["places"], shape[1]) if "places" in tensors else None)
        assert all(torch.equal(raw(again[suffix]), raw(tensor)) for suffix, tensor in tensors.items())
    assert 0 < passed < 400


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="no format 'ell'"):
        check_layout("x", "ell", SHAPE, layout(packed("two_four_ell")))
    with pytest.raises(UsageError, match="no format 'ell'"):
        check_positions("x", "ell", SHAPE, packed("two_four_ell"))


def test_a_format_without_its_checks_cannot_be_registered_or_used(monkeypatch):
    class Unchecked(Format):
        name = "unchecked"
        suffixes = ("weight",)
        pack, unpack, nbytes = (getattr(FORMATS["dense"], method) for method in ("pack", "unpack", "nbytes"))

    with pytest.raises(TypeError, match="Unchecked does not define expected, fault"):
        by_name(Unchecked)
    monkeypatch.setitem(FORMATS, "unchecked", Unchecked)
    with pytest.raises(NotImplementedError):
        check_layout("x", "unchecked", SHAPE, {})
    with pytest.raises(NotImplementedError):
        check_positions("x", "unchecked", SHAPE, {})
