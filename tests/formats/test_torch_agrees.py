"""The 2:4 encoding against torch's own conversion, which runs on the CPU as well."""

import pytest
import torch

conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")

from budwood.formats import FORMATS  # noqa: E402


def two_four(out: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """At most two of every four, and often fewer."""
    generator = torch.Generator().manual_seed(out * width)
    weight = torch.randn(out, width, generator=generator)
    keep = torch.rand(out, width, generator=generator).view(-1, 4).argsort(1).argsort(1).view(out, width) >= 2
    return torch.where(keep & (torch.rand(out, width, generator=generator) < 0.7), weight, 0).to(dtype)


@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 96)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_and_words_equal_torchs(shape, dtype):
    weight = two_four(*shape, dtype)
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    tensors = FORMATS["two_four"].pack(weight)
    assert torch.equal(tensors["values"], values)
    bytes_ = tensors["places"].int()
    words = (bytes_[:, 0::2] | bytes_[:, 1::2] << 8).to(torch.int16)  # [out, in/16]
    offsets = conversions._calculate_meta_reordering_scatter_offsets(*words.shape, words.dtype, "cpu")
    assert torch.equal(torch.empty_like(words).view(-1).scatter_(0, offsets, words.view(-1)), meta.view(-1))


def test_the_worked_rows_inside_a_matrix_of_zeros():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[0, [0, 1, 5, 6]] = torch.tensor([2.0, -0.875, 1.875, -0.25], dtype=torch.float16)
    _, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    places = FORMATS["two_four"].pack(weight)["places"]
    assert places[0].tolist() == [0x94, *[0xEE] * 7]
    assert meta.view(-1)[0].item() & 0xFFFF == 0xEE94
    assert (places[1:] == 0xEE).all()
