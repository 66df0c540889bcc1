"""What is packed for a GPU comes back bit for bit, and takes the bytes its docstring says."""

import pytest
import torch
from matrices import SHAPES, pruned

from budwood.errors import UsageError
from budwood.kernels.gpu_layouts import SLAB, pack_bitmask, pack_two_four

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_layouts_give_the_matrix_back(shape, dtype):
    weight, base = pruned(*shape, dtype)
    assert torch.equal(pack_two_four(weight, base).unpack().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(pack_bitmask(weight).unpack().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(pack_two_four(weight, base).skeleton(), weight.masked_fill(~base, 0.0))


def test_negative_zeros_and_nothing_at_all_survive():
    weight, base = pruned(8, 32, 0.1, torch.bfloat16)
    weight[~base & (weight != 0)] = -0.0
    assert torch.equal(pack_two_four(weight, base).unpack().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(pack_bitmask(weight).unpack().view(torch.int16), weight.view(torch.int16))
    nothing = torch.zeros_like(weight)
    assert torch.equal(pack_two_four(nothing, base).unpack(), nothing)
    assert torch.equal(pack_bitmask(nothing).unpack(), nothing)


def test_the_widest_column_fits_its_sixteen_bits():
    weight = torch.zeros(2, 65536, dtype=torch.bfloat16)
    base = torch.tensor([True, True, False, False]).repeat(2, 16384)
    weight[1, 65535] = -1.5
    assert torch.equal(pack_two_four(weight, base).unpack(), weight)


def test_rows_that_recovered_most_come_first_and_share_slabs():
    weight, base = pruned(64, 128, 0.05, torch.bfloat16)
    layout = pack_two_four(weight, base)
    counts = ((weight != 0) & ~base).sum(1)[layout.order.long()]
    assert torch.equal(counts, counts.sort(descending=True).values)
    assert torch.equal(layout.starts.diff(), counts.view(-1, SLAB).amax(1) * SLAB)


def test_the_bytes_are_those_the_docstrings_say():
    weight, base = pruned(1024, 1024, 0.0, torch.bfloat16)
    size = weight.numel()
    assert pack_two_four(weight, base).nbytes / size == pytest.approx(1.125, rel=0.01)
    assert pack_bitmask(weight).nbytes / size == pytest.approx(2 * 0.5 + 0.125 + 0.0625, rel=0.01)


def test_what_a_layout_cannot_hold_is_refused():
    weight, base = pruned(8, 32, 0.1, torch.bfloat16)
    with pytest.raises(UsageError, match="float32"):
        pack_two_four(weight.float(), base)
    with pytest.raises(UsageError, match="two of every four"):
        pack_two_four(weight, torch.ones_like(base))
    with pytest.raises(UsageError, match="divide by 4"):
        pack_two_four(weight[:, :30], base[:, :30])
    with pytest.raises(UsageError, match="cover every weight"):
        pack_bitmask(weight, base)
