"""One law for all formats: a matrix is restored bit for bit, in the predicted bytes, or refused.

Formats with rounded values satisfy it for matrices that are rounded already.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import UsageError
from budwood.formats import FORMATS, LOSSLESS, Refusal, choose, count, pack_as, predict
from budwood.formats.bits import raw
from budwood.formats.two_four import covered
from budwood.sparsity.forecast import Forecast

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [4, 7, 8, 12, 36, 260, 288, 576]
PURE = {"two_four", "two_four_int8", "two_four_int4"}  # cannot store recovered weights
DENSITIES = [0.0, 0.02, 0.3, 0.5, 1.0]


def scattered(out: int, width: int, density: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights, of which a random share is kept."""
    generator = torch.Generator().manual_seed(1000 * out + width)
    weight = torch.randn(out, width, generator=generator)
    keep = torch.rand(out, width, generator=generator) < density
    return torch.where(keep, weight, 0).to(dtype)


def skeleton(out: int, width: int, more: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights, the two largest of every four kept and a random share of the others."""
    generator = torch.Generator().manual_seed(out + width)
    weight = torch.randn(out, width, generator=generator)
    keep = weight.abs().view(-1, 4).argsort(1).argsort(1).view(out, width) >= 2
    keep |= torch.rand(out, width, generator=generator) < more
    return torch.where(keep, weight, 0).to(dtype)


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check(name: str, weight: torch.Tensor) -> None:
    """The contract of a format, on one matrix."""
    format, shape = FORMATS[name], tuple(weight.shape)
    predicted = format.nbytes(shape, count(weight), weight.element_size())
    if predicted is None:
        with pytest.raises(Refusal, match=f"{shape[0]} x {shape[1]}"):
            format.pack(weight)
        return
    nearest = format.nearest(weight)
    assert size(nearest) == predicted
    base = None
    if name not in LOSSLESS:
        base = covered(nearest["places"], shape[1]) if "places" in nearest else None
        weight = format.unpack(nearest, shape)
    before = weight.clone()
    tensors = format.pack(weight, base)
    assert torch.equal(raw(weight), raw(before))
    assert tuple(tensors) == tuple(nearest) == format.suffixes
    assert size(tensors) == predicted or name in (
        "bitmask_int8",
        "bitmask_int4",
    )  # a value rounded to 0 is not stored again
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = format.unpack(tensors, shape)
    assert back.dtype == weight.dtype
    assert back.shape == weight.shape
    assert torch.equal(raw(back), raw(weight))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_packing_loses_nothing_and_takes_the_predicted_bytes(name, dtype, width):
    for out in (3,) if name.endswith("int4") else (1, 3, 32):  # codes of four bits take the longest to find
        for density in DENSITIES:
            check(name, scattered(out, width, density, dtype))
        if width % 4 == 0:
            check(name, skeleton(out, width, 0.0, dtype))
            check(name, skeleton(out, width, 0.05, dtype))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    out=st.integers(1, 24),
    groups=st.integers(1, 80),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_matrix(name, out, groups, density, dtype):
    check(name, scattered(out, 4 * groups, density, dtype))


@pytest.mark.parametrize("name", LOSSLESS)
def test_signed_zeros_infinities_and_nans_keep_their_bits(name):
    odd = torch.tensor([-0.0, float("nan"), 0, 0, float("-inf"), -0.0, 0, 0]).repeat(4, 2)
    odd.view(torch.int32)[0, 1] |= 1  # a NaN with another payload
    check(name, odd)


@pytest.mark.parametrize("name", sorted(set(LOSSLESS) - {"two_four"}))
def test_groups_of_more_than_two_keep_signed_zeros_and_nans(name):
    odd = torch.tensor([0, -0.0, -0.0, -0.0, float("nan"), 1, float("nan"), -0.0]).repeat(4, 2)
    check(name, odd)
    assert count(odd).recovered == 4 * 2 * (1 + 2)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - PURE))
def test_a_transposed_weight_packs_like_its_copy(name):
    weight = scattered(32, 24, 0.6).t()
    check(name, weight)
    tensors, copied = FORMATS[name].nearest(weight), FORMATS[name].nearest(weight.contiguous())
    assert all(torch.equal(tensors[suffix], copied[suffix]) for suffix in copied)


def test_packing_in_pieces_gives_the_same_tensors(monkeypatch):
    weight = skeleton(40, 96, 0.2)
    whole = {name: FORMATS[name].nearest(weight) for name in set(FORMATS) - PURE}
    monkeypatch.setattr("budwood.formats.bits.SLAB", 7 * 96)
    for name, tensors in whole.items():
        pieces = FORMATS[name].nearest(weight)
        assert all(torch.equal(pieces[suffix], tensor) for suffix, tensor in tensors.items())


@pytest.mark.parametrize("start", sorted(set(LOSSLESS) - {"two_four"}))
def test_every_format_converts_into_every_other(start):
    weight = skeleton(32, 64, 0.1, torch.bfloat16)
    there = FORMATS[start].unpack(FORMATS[start].pack(weight), (32, 64))
    for name in set(LOSSLESS) - {"two_four"}:
        assert torch.equal(FORMATS[name].unpack(FORMATS[name].pack(there), (32, 64)), weight)


def test_two_four_refuses_a_third_weight_in_a_group():
    with pytest.raises(Refusal, match="1 x 4 matrix: 1 weights are beyond two of a group"):
        FORMATS["two_four"].pack(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("two_four")])
def test_a_width_that_does_not_divide_by_four_is_refused(name):
    with pytest.raises(Refusal, match="2 x 6 matrix: its width does not divide by 4"):
        FORMATS[name].pack(torch.zeros(2, 6))


def test_blocks_refuse_a_height_that_does_not_divide_by_four():
    with pytest.raises(Refusal, match="6 x 8 matrix: its height does not divide by 4"):
        FORMATS["two_four_ell"].pack(torch.ones(6, 8))


def test_a_base_with_three_of_a_group_is_refused():
    base = torch.tensor([[True, True, True, False]])
    with pytest.raises(Refusal, match="more than two of a group"):
        FORMATS["two_four_csr"].pack(torch.ones(1, 4), base)


def test_two_four_refuses_weights_outside_its_base():
    base = torch.tensor([[True, True, False, False]])
    with pytest.raises(Refusal, match="1 weights are outside the 2:4 mask"):
        FORMATS["two_four"].pack(torch.tensor([[1.0, 0, 3.0, 0]]), base)


@pytest.mark.parametrize("name", [name for name in LOSSLESS if name.startswith("two_four_")])
def test_a_known_base_decides_what_is_recovered(name):
    weight = skeleton(8, 32, 0.3)
    base = weight.abs().view(-1, 4).argsort(1).argsort(1).view(8, 32) < 2  # the two smallest of each group
    tensors = FORMATS[name].pack(weight, base)
    assert torch.equal(tensors["values"].view(-1), weight[base])
    assert torch.equal(FORMATS[name].unpack(tensors, (8, 32)), weight)


def test_the_smallest_is_chosen():
    assert choose(torch.randn(16, 64))[0] == "dense"
    assert choose(scattered(16, 64, 0.3))[0] == "bitmask"
    assert choose(scattered(16, 63, 0.3))[0] == "bitmask"
    assert choose(skeleton(16, 64, 0.02, torch.bfloat16))[0] == "bitmask"


def test_of_equal_sizes_two_four_comes_before_bitmask():
    weight = skeleton(16, 64)
    assert size(FORMATS["two_four"].pack(weight)) == size(FORMATS["bitmask"].pack(weight))
    assert choose(weight)[0] == "two_four"


@pytest.mark.parametrize("density", DENSITIES)
def test_no_format_would_have_been_smaller_than_the_chosen(density):
    for weight in (scattered(32, 64, density), skeleton(32, 64, density / 4)):
        name, tensors = choose(weight)
        assert torch.equal(FORMATS[name].unpack(tensors, (32, 64)), weight)
        for format in LOSSLESS.values():
            try:
                assert size(tensors) <= size(format.pack(weight))
            except Refusal:
                continue


def test_only_the_formats_asked_for_are_chosen_from():
    weight = skeleton(16, 64, 0.02)
    some = {name: FORMATS[name] for name in ("two_four", "two_four_csr", "two_four_compact")}
    assert choose(weight, some)[0] == "two_four_compact"
    with pytest.raises(UsageError, match="two_four cannot hold a 16 x 64 matrix"):
        choose(weight, {"two_four": FORMATS["two_four"]})


def test_a_named_format_that_does_not_fit_is_a_usage_error():
    with pytest.raises(UsageError, match="two_four cannot hold this 2 x 8 matrix: 8 weights are"):
        pack_as("two_four", torch.ones(2, 8))
    with pytest.raises(UsageError, match="no format 'csr'; choose one of dense, two_four"):
        pack_as("csr", torch.ones(2, 8))


def test_prediction_from_shapes():
    wrp = Forecast(nonzeros=8388608 + 258048, recovered=258048)
    assert predict((4096, 4096), wrp, 2, "two_four_csr") == ("two_four_csr", 20439044)
    assert predict((4096, 4096), wrp, 2) == ("bitmask", 2 * (8388608 + 258048) + 2097152)
    assert predict((4096, 4096), Forecast(8388608, 0), 2) == ("two_four", 18874368)
    with pytest.raises(UsageError, match="two_four cannot hold a 4096 x 4096 matrix"):
        predict((4096, 4096), wrp, 2, "two_four")
    with pytest.raises(UsageError, match="two_four_ell cannot hold"):
        predict((4096, 4096), Forecast(8388608), 2, "two_four_ell")
