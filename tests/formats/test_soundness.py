"""What passes the checks of a format is sound: packing the matrix that it unpacks to gives the same tensors.

Tensors are altered at random, in positions and, where zeros among values say where a weight is, in values.
"""

import random

import pytest
import torch
from test_formats import skeleton

from budwood.errors import RunError
from budwood.formats import FORMATS
from budwood.formats.bits import raw
from budwood.formats.checks import check_layout, check_positions
from budwood.formats.two_four import covered
from budwood.formats.two_four_ell import TwoFourEll

PURE = ("two_four", "two_four_int8", "two_four_int4")  # cannot store recovered weights
SPARSE = [name for name in FORMATS if not name.startswith("dense")]  # with positions
SHAPE = (16, 264)


def honest(format, share=0.1, shape=SHAPE):
    weight = skeleton(*shape, 0.0 if format in PURE else share)
    if format == "two_four_ell":  # blocks of more than one size, with some that only fill a row
        weight[:4] = skeleton(4, shape[1], 0.0)
    return FORMATS[format].nearest(weight)


def positions(format, tensors, shape):
    """The tensors that say where weights are; no value that is stored is zero."""
    plain = getattr(FORMATS[format], "plain", FORMATS[format])
    ones = {"values": torch.ones_like, "rec_values": torch.ones_like}
    parts = {suffix: tensors[suffix] for suffix in plain.suffixes}
    if hasattr(FORMATS[format], "numbers"):
        parts["values"] = FORMATS[format].numbers(tensors, shape)
    return plain, {suffix: ones[suffix](part.float()) if suffix in ones else part for suffix, part in parts.items()}


def assert_sound(format, tensors, shape=SHAPE):
    plain, parts = positions(format, tensors, shape)
    if "ell_values" in parts:
        parts["ell_values"] = parts["ell_values"].float()
    base = covered(parts["places"], shape[1]) if "places" in parts else None
    again = plain.pack(plain.unpack(parts, shape), base)
    assert all(torch.equal(raw(again[suffix]), raw(part)) for suffix, part in parts.items())


def accepted(format, tensors, shape=SHAPE):
    try:
        check_layout("x", format, shape, {suffix: (part.dtype, tuple(part.shape)) for suffix, part in tensors.items()})
        check_positions("x", format, shape, tensors)
    except RunError:
        return False
    return True


def altered(tensor, chance):
    """Another tensor of the same size: a flipped bit, two places exchanged, one repeated, or one moved by one."""
    tensor = tensor.clone()
    flat = tensor.view(-1)
    one, other = chance.randrange(len(flat)), chance.randrange(len(flat))
    kind = chance.choice(["bit", "exchanged", "repeated", "moved"])
    bits = raw(flat)
    if kind == "bit":
        bits[one] ^= 1 << chance.randrange(8)
    elif kind == "exchanged":
        bits[[one, other]] = bits[[other, one]]
    elif kind == "repeated":
        bits[one] = bits[one - 1]
    else:
        flat[one] += 1
    return tensor


@pytest.mark.parametrize("format", SPARSE)
def test_what_passes_is_sound(format):
    chance, passed, whole = random.Random(1), 0, honest(format)
    assert accepted(format, whole)
    assert_sound(format, whole)
    places = [suffix for suffix, part in whole.items() if part.dtype in (torch.uint8, torch.int32) and part.numel()]
    places = [suffix for suffix in places if suffix not in ("scales", "values")] + [*FORMATS[format].placing]
    for _ in range(300):
        tensors = dict(whole)
        for _ in range(chance.randint(1, 2)):
            suffix = chance.choice(places)
            tensors[suffix] = altered(tensors[suffix], chance)
        if accepted(format, tensors):
            passed += 1
            assert_sound(format, tensors)
    assert passed < 300


@pytest.mark.parametrize("format", [name for name in SPARSE if "rec_values" in FORMATS[name].suffixes])
def test_recovered_weights_have_the_dtype_of_the_matrix(format):
    tensors = honest(format)
    for dtype in (torch.float64, torch.float16):
        assert not accepted(format, tensors | {"rec_values": tensors["rec_values"].to(dtype)})


def test_blocks_have_the_dtype_of_the_matrix():
    tensors = honest("two_four_ell")
    assert not accepted("two_four_ell", tensors | {"ell_values": tensors["ell_values"].double()})


@pytest.mark.parametrize("format", [name for name in SPARSE if name.endswith("int8")])
def test_an_int8_that_no_rounding_gives_is_refused(format):
    tensors = honest(format)
    tensors["values"].view(-1)[3] = -128
    assert not accepted(format, tensors)


def ell(**changes):
    return {**honest("two_four_ell"), **changes}


def test_a_block_with_a_weight_of_the_two_four_part_is_refused():
    """Unpacking would take the one, a product the sum of both."""
    tensors = ell()
    side = SHAPE[0] // tensors["ell_columns"].shape[0]
    values = tensors["ell_values"].clone()
    column = int(tensors["ell_columns"][-1, 0]) * side
    held = covered(tensors["places"], SHAPE[1])[-1, column : column + side]
    values[-1, int(held.nonzero()[0])] = 1.0
    assert not accepted("two_four_ell", ell(ell_values=values))


def test_a_block_that_only_fills_its_row_is_the_lowest():
    tensors = ell()
    columns, values = tensors["ell_columns"].clone(), tensors["ell_values"]
    assert columns.shape[1] > 1
    assert not values[:4].any()
    columns[0, -1] = SHAPE[1] // 4 - 1
    assert not accepted("two_four_ell", ell(ell_columns=columns))


def test_blocks_that_are_larger_than_needed_are_refused():
    weight = skeleton(8, 32, 0.0)
    weight[0, :4] = torch.arange(1.0, 5)
    small = TwoFourEll.pack(weight)
    assert small["ell_columns"].shape == (2, 1)
    large = small | {"ell_columns": torch.zeros(1, 1, dtype=torch.int32), "ell_values": torch.zeros(8, 8)}
    large["ell_values"][:4, :4] = small["ell_values"][:4]
    assert accepted("two_four_ell", small, (8, 32))
    assert not accepted("two_four_ell", large, (8, 32))
