"""Hidden states between two blocks: in memory or in a file, batch by batch."""

import pytest
import torch

from budwood.stream.activations import Activations, batch_size

CPU = torch.device("cpu")


@pytest.mark.parametrize("limit", [0, 2**20], ids=["file", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_is_read(tmp_path, limit, dtype):
    activations = Activations((5, 3, 4), dtype, 2, limit, tmp_path)
    whole = torch.randn(5, 3, 4).to(dtype)
    assert [activations.span(index) for index in activations.indices()] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for index in activations.indices():
        activations.write(index, whole[activations.span(index)].float())
    assert torch.equal(activations.hidden, whole)
    assert [activations.read(index, CPU).shape[0] for index in activations.indices()] == [2, 2, 1]
    activations.read(1, CPU).zero_()  # a copy
    assert torch.equal(activations.read(1, CPU), whole[2:4])
    assert not list(tmp_path.iterdir())  # a file is unlinked as soon as it is open


def test_only_what_exceeds_the_limit_goes_to_a_file(tmp_path, monkeypatch):
    opened, real = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda name, **options: opened.append(name) or real(name, **options))
    size = 5 * 3 * 4 * 4
    Activations((5, 3, 4), torch.float32, 2, size, tmp_path)
    assert opened == []
    Activations((5, 3, 4), torch.float32, 2, size - 1, tmp_path)
    assert [name.startswith(str(tmp_path)) for name in opened] == [True]


@pytest.mark.parametrize(
    ("windows", "tokens", "target", "size"),
    [
        (128, 2048, 1024, 1),  # a window is longer than the target
        (128, 128, 1024, 8),
        (12, 100, 1000, 6),  # 10 fit, 6 divide 12
        (13, 100, 1000, 10),  # nothing above 5 divides 13
        (3, 10, 1000, 3),
        (1, 10, 1000, 1),
    ],
)
def test_batches_are_alike_where_that_is_possible(windows, tokens, target, size):
    assert batch_size(windows, tokens, target) == size
