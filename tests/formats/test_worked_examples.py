"""The examples worked by hand for the 2:4 encoding and for recovered weights, and sizes known to the byte."""

import pytest
import torch

from budwood.formats import FORMATS, Forecast
from budwood.formats.bits import pack_bits, unpack_bits
from budwood.formats.two_four import split
from budwood.formats.two_four_ell import pack_blocks, smallest_block

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

ROWS = torch.tensor(
    [
        [2.0, -0.875, 0.125, 0.40625, -0.1875, 1.875, -0.25, 0.25],
        [0.875, -0.5, 0.75, -0.375, -0.15625, 1.25, 1.375, -0.5625],
        [-0.125, 0.21875, 0.3125, -0.015625, 0.28125, -0.1875, 0.09375, 0.625],
        [-0.8125, 1.0, -0.4375, 0.46875, 0.0625, 0.5, -0.75, -0.34375],
    ]
).view(2, 16)
PACKED = torch.tensor(
    [
        [2.0, -0.875, 1.875, -0.25, 0.875, 0.75, 1.25, 1.375],
        [0.21875, 0.3125, 0.28125, 0.625, 1.0, 0.46875, -0.75, -0.34375],
    ]
)


def mask(*rows: list[int], width: int = 16) -> torch.Tensor:
    """True at the listed columns of each row."""
    return torch.stack([torch.isin(torch.arange(width), torch.tensor(row, dtype=torch.long)) for row in rows])


def pruned(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept weights and zeros; a product with the mask would leave negative zeros, which are stored."""
    return torch.where(keep, weight, 0.0)


BASE = mask([0, 1, 5, 6, 8, 10, 13, 14], [1, 2, 4, 7, 9, 11, 14, 15])
RECOVERED = mask([3], [8, 10])


@pytest.mark.parametrize(
    ("kept", "nibble"),
    [
        ([0, 1], 0x4),
        ([0, 2], 0x8),
        ([0, 3], 0xC),
        ([1, 2], 0x9),
        ([1, 3], 0xD),
        ([2, 3], 0xE),
        ([], 0xE),
        ([0], 0x8),
        ([1], 0x9),
        ([2], 0xE),
        ([3], 0xE),
    ],
)
def test_nibbles(kept, nibble):
    weight = mask(kept, width=4).float()
    assert FORMATS["two_four"].pack(weight)["places"].tolist() == [[nibble]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_four_values_places_and_words(dtype):
    tensors = FORMATS["two_four"].pack(pruned(ROWS, BASE).to(dtype), BASE)
    assert torch.equal(tensors["values"], PACKED.to(dtype))
    assert tensors["places"].tolist() == [[0x94, 0x98], [0xC9, 0xED]]
    words = tensors["places"].int()  # the lower byte comes first
    assert (words[:, 0] | words[:, 1] << 8).tolist() == [0x9894, 0xEDC9]


def test_bitmask_bytes():
    assert pack_bits(BASE).tolist() == [[99, 101], [150, 202]]
    assert FORMATS["bitmask"].pack(pruned(ROWS, BASE | RECOVERED))["bitmask"].tolist() == [
        [107, 101],
        [150, 207],
    ]
    assert pack_bits(mask([0, 1], [2, 3, 4, 7], [2, 3, 5, 7], width=8)).tolist() == [[3], [156], [172]]
    assert pack_bits(mask([8], width=9)).tolist() == [[0, 1]]
    assert torch.equal(unpack_bits(pack_bits(RECOVERED), 16), RECOVERED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recovered_weights_in_csr_and_compact(dtype):
    weight = pruned(ROWS, BASE | RECOVERED).to(dtype)
    values = torch.tensor([0.40625, -0.8125, -0.4375], dtype=dtype)
    csr = FORMATS["two_four_csr"].pack(weight, BASE)
    assert torch.equal(csr["values"], PACKED.to(dtype))
    assert csr["rec_offsets"].tolist() == [0, 1, 3]
    assert csr["rec_columns"].tolist() == [3, 8, 10]
    assert torch.equal(csr["rec_values"], values)
    compact = FORMATS["two_four_compact"].pack(weight, BASE)
    assert compact["rec_counts"].tolist() == [[1], [2]]
    assert compact["rec_columns"].tolist() == [3, 8, 10]
    assert torch.equal(compact["rec_values"], values)


def test_compact_counts_per_256_columns_and_columns_inside_them():
    weight = torch.zeros(2, 520)
    weight[0, 252:260] = torch.tensor([4.0, 3, 2, 1, 5, 6, 8, 7])  # both sides of a segment boundary
    weight[1, 516:520] = torch.tensor([1.0, 1, 1, 1])  # a tie: the lower columns are not recovered
    compact = FORMATS["two_four_compact"].pack(weight)
    assert compact["rec_counts"].tolist() == [[2, 2, 0], [0, 0, 2]]
    assert compact["rec_columns"].tolist() == [254, 255, 0, 1, 6, 7]
    assert compact["rec_values"].tolist() == [2, 1, 5, 6, 1, 1]
    assert FORMATS["two_four_compact"].pack(torch.ones(1, 256))["rec_counts"].tolist() == [[128]]


def test_the_split_is_not_unique_but_its_size_is():
    weight = pruned(ROWS, BASE | RECOVERED)
    with_base, without = split(weight, BASE)[1], split(weight)[1]
    assert with_base.sum() == without.sum() == 3
    assert torch.equal(with_base, RECOVERED)
    assert not torch.equal(with_base, without)  # by magnitude another weight is recovered


def test_forward_of_both_parts():
    x = torch.arange(1.0, 17.0)
    weight = pruned(ROWS, BASE | RECOVERED)
    tensors = FORMATS["two_four_csr"].pack(weight, BASE)
    skeleton = FORMATS["two_four"].unpack(tensors, (2, 16))
    assert (skeleton @ x).tolist() == [64.0, 6.65625]
    assert (FORMATS["two_four_csr"].unpack(tensors, (2, 16)) @ x).tolist() == [65.625, -5.46875]


def blocks(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    """8 x 16: weight, 2:4 mask, positions recovered in the best `count` 4 x 4 blocks, and their columns."""
    i, j = torch.arange(8)[:, None], torch.arange(16)
    weight = (1 - 2 * ((i + j) % 2)) * ((5 * i + 3 * j) % 17 + 1) / 16
    metric = weight.abs() * torch.tensor([1.0, 2, 1, 2]).repeat_interleave(4)
    base = metric.view(-1, 4).argsort(dim=1, descending=True, stable=True).argsort(1).view(8, 16) < 2
    sums = (metric * ~base).view(2, 4, 4, 4).sum((1, 3))
    assert (sums * 16).tolist() == [[41, 82, 46, 80], [37, 74, 42, 94]]
    chosen = sums.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
    picked = torch.zeros(2, 4, dtype=torch.bool).scatter_(1, chosen, True)
    recovered = picked.repeat_interleave(4, 0).repeat_interleave(4, 1) & ~base
    return weight, base, recovered, chosen.tolist()


ONE = [
    [[0, 0, 2, -5], [-1, 4, 0, 0], [6, -9, 0, 0], [-11, 0, 0, 3]],
    [[6, -9, 0, 0], [-11, 0, 0, 3], [0, -2, 5, 0], [-4, 7, 0, 0]],
]
TWO = [
    [[0, 0, 2, -5, 3, -6, 0, 0], [-1, 4, 0, 0, -8, 11, 0, 0]],
    [[6, -9, 0, 0, 0, 0, 2, -5], [-11, 0, 0, 3, -1, 4, 0, 0]],
    [[0, -2, 5, 0, 6, -9, 0, 0], [-4, 7, 0, 0, -11, 0, 0, 3]],
    [[9, 0, 0, -1, 0, -2, 5, 0], [0, 0, -3, 6, -4, 7, 0, 0]],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "index", "values", "nbytes"),
    [(1, [[1], [3]], ONE, 72), (2, [[1, 3], [1, 3]], TWO, 144)],
)
def test_block_recovery(count, index, values, nbytes, dtype):
    values = [row for rows in values for row in rows]
    weight, base, recovered, chosen = blocks(count)
    assert chosen == index
    ell = pack_blocks(weight.to(dtype), recovered, 4, count)
    assert ell["ell_columns"].tolist() == index
    assert (ell["ell_values"] * 16).tolist() == values
    assert int((ell["ell_values"] != 0).sum()) == 16 * count
    if dtype.itemsize == 2:
        assert sum(tensor.numel() * tensor.element_size() for tensor in ell.values()) == nbytes
    whole = pruned(weight, base | recovered).to(dtype)
    found = FORMATS["two_four_ell"].pack(whole, base)
    assert found["ell_columns"].tolist() == index
    assert torch.equal(found["ell_values"], ell["ell_values"])
    assert torch.equal(FORMATS["two_four_ell"].unpack(found, (8, 16)), whole)


def test_a_block_row_with_fewer_blocks_takes_the_lowest_unused_columns():
    recovered = torch.zeros(8, 16, dtype=torch.bool)
    recovered[0, 12] = recovered[5, 4] = recovered[6, 9] = True
    ell = pack_blocks(torch.ones(8, 16), recovered, 4, 2)
    assert ell["ell_columns"].tolist() == [[0, 3], [1, 2]]
    assert ell["ell_values"].sum() == 3
    with pytest.raises(ValueError, match="1 blocks of 4 x 4 per block row were asked for, 2 are needed"):
        pack_blocks(torch.ones(8, 16), recovered, 4, 1)
    with pytest.raises(ValueError, match="blocks of 16 x 16 do not divide this 8 x 16 matrix"):
        pack_blocks(torch.ones(8, 16), recovered, 16, 1)


@pytest.mark.parametrize("side", [4, 8, 16, 32, 64, 128])
def test_the_side_of_the_blocks_is_found_from_the_zeros(side):
    generator = torch.Generator().manual_seed(side)
    out, width, count = 2 * side, 5 * side, 2
    weight = torch.randn(out, width, generator=generator)
    base = weight.abs().view(-1, 4).argsort(1).argsort(1).view(out, width) >= 2
    picked = torch.zeros(2, 5, dtype=torch.bool)
    picked[0, [0, 2]] = picked[1, [1, 4]] = True  # not mergeable: the side does not divide further
    recovered = picked.repeat_interleave(side, 0).repeat_interleave(side, 1) & ~base
    tensors = FORMATS["two_four_ell"].pack(pruned(weight, base | recovered))
    assert tensors["ell_columns"].tolist() == [[0, 2], [1, 4]]
    assert tensors["ell_values"].shape == (out, count * side)


def test_no_recovered_weight_takes_no_block():
    assert smallest_block(torch.zeros(32, 16, dtype=torch.bool), 2) == (32, 0)
    assert smallest_block(torch.zeros(6, 16, dtype=torch.bool), 2) is None


@pytest.mark.parametrize(
    ("shape", "recovered", "total"),
    [
        ((4096, 4096), 258048, 20439044),
        ((11008, 4096), 693504, 54929924),
        ((4096, 11008), 693504, 54902276),
        ((1024, 8192), 128000, 10209284),
        ((2, 16), 3, 66),
    ],
)
def test_bytes_of_the_published_format(shape, recovered, total):
    forecast = Forecast(nonzeros=shape[0] * shape[1] / 2 + recovered, recovered=recovered)
    assert FORMATS["two_four_csr"].nbytes(shape, forecast, 2) == total
    skeleton = FORMATS["two_four"].nbytes(shape, Forecast(shape[0] * shape[1] / 2, 0), 2)
    assert skeleton == shape[0] * shape[1] + shape[0] * shape[1] // 8
    assert total - skeleton == 6 * recovered + 4 * (shape[0] + 1)
    assert FORMATS["bitmask"].nbytes(shape, forecast, 2) == skeleton + 2 * recovered


@pytest.mark.parametrize(
    ("shape", "block", "values", "index"),
    [
        ((4096, 4096), (32, 8), 2097152, 4096),
        ((4096, 11008), (64, 4), 2097152, 1024),
        ((11008, 4096), (64, 4), 5636096, 2752),
    ],
)
def test_bytes_of_blocks(shape, block, values, index):
    forecast = Forecast(nonzeros=0, recovered=0, block=block)
    skeleton = FORMATS["two_four"].nbytes(shape, Forecast(0, 0), 2)
    assert FORMATS["two_four_ell"].nbytes(shape, forecast, 2) == skeleton + values + index


def test_bits_per_weight_of_compact():
    shape, recovered = (4096, 4096), 258048
    density = recovered / (4096 * 4096)
    nbytes = FORMATS["two_four_compact"].nbytes(shape, Forecast(0, recovered), 2)
    assert 8 * nbytes / (4096 * 4096) == 9.03125 + 24 * density
