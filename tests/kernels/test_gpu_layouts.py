"""The GPU layout is lossless, and takes the bytes of its docstring."""

import pytest
import torch
from matrices import SHAPES, pruned

from budwood.errors import UsageError
from budwood.kernels.gpu_layouts import pack_two_four, two_of_four

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_restores_the_matrix(shape, dtype):
    weight, base = pruned(*shape, dtype)
    assert torch.equal(pack_two_four(weight, base).unpack().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(pack_two_four(weight).unpack().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(pack_two_four(weight, base).skeleton(), weight.masked_fill(~base, 0.0))


def test_negative_zeros_and_all_zeros_survive():
    weight, base = pruned(8, 32, 0.1, torch.bfloat16)
    weight[~base & (weight != 0)] = -0.0
    assert torch.equal(pack_two_four(weight, base).unpack().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(pack_two_four(weight).unpack().view(torch.int16), weight.view(torch.int16))
    nothing = torch.zeros_like(weight)
    assert torch.equal(pack_two_four(nothing, base).unpack(), nothing)
    free = torch.randn(9, 64).bfloat16().masked_fill(torch.rand(9, 64) < 0.5, 0.0)
    assert torch.equal(pack_two_four(free).unpack(), free)


def test_the_widest_column_fits_its_sixteen_bits():
    weight = torch.zeros(2, 65536, dtype=torch.bfloat16)
    base = torch.tensor([True, True, False, False]).repeat(2, 16384)
    weight[1, 65535] = -1.5
    assert torch.equal(pack_two_four(weight, base).unpack(), weight)


def test_the_codes_of_a_word_are_a_stride_apart():
    weight, base = pruned(3, 512, 0.0, torch.bfloat16)
    layout = pack_two_four(weight, base)
    assert layout.stride == 8
    codes = layout.index[2, 8 + 5].item()  # the second run of 64 groups, lane 5
    for step in range(8):
        group = 64 + 8 * step + 5
        kept = base[2, 4 * group : 4 * group + 4].nonzero().flatten().tolist()
        assert [codes >> 4 * step & 3, codes >> 4 * step + 2 & 3] == kept


def test_recovered_weights_are_stored_row_by_row():
    weight, base = pruned(70, 128, 0.05, torch.bfloat16)
    layout = pack_two_four(weight, base)
    recovered = (weight != 0) & ~base
    assert torch.equal(layout.starts[: 70 + 1].diff(), recovered.sum(1))
    assert torch.equal(layout.entries[:-1] & 0xFFFF, recovered.nonzero()[:, 1].int())


def test_two_of_every_four_are_chosen_in_any_mask():
    keep = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    found = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(two_of_four(keep), found)


def test_the_bytes_are_those_of_the_docstring():
    weight, base = pruned(1024, 1024, 0.0, torch.bfloat16)
    size = weight.numel()
    assert pack_two_four(weight, base).nbytes / size == pytest.approx(1.125, rel=0.01)
    free = torch.ones(1024, 1024).bfloat16().masked_fill(torch.rand(1024, 1024) < 0.5, 0.0)
    assert pack_two_four(free).nbytes / size == pytest.approx(1.5, rel=0.01)


def test_matrices_that_the_layout_cannot_store_are_refused():
    weight, base = pruned(8, 32, 0.1, torch.bfloat16)
    with pytest.raises(UsageError, match="float32"):
        pack_two_four(weight.float(), base)
    with pytest.raises(UsageError, match="two of every four"):
        pack_two_four(weight, torch.ones_like(base))
    with pytest.raises(UsageError, match="divide by 4"):
        pack_two_four(weight[:, :30], base[:, :30])
    with pytest.raises(UsageError, match="up to 65536 columns"):
        pack_two_four(torch.zeros(1, 65540, dtype=torch.bfloat16))
