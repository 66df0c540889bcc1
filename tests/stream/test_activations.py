"""Hidden states between two blocks: in memory or in a file, batch by batch."""

import errno
import os

import pytest
import torch
from full_disk import files_up_to

from budwood.errors import RunError
from budwood.stream.activations import Activations, batch_size, reserve

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


def test_room_for_a_file_is_taken_at_once_or_it_is_a_sentence(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        reserve(file.fileno(), 3 << 20)
    assert (tmp_path / "a").stat().st_size == 3 << 20
    assert (tmp_path / "a").stat().st_blocks * 512 >= 3 << 20
    with (
        files_up_to(1 << 16),
        pytest.raises(RunError, match=r"65792 bytes of activations cannot be kept in .*make room"),
    ):
        Activations((1, 257, 64), torch.float32, 1, limit=0, folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    with pytest.raises(RunError, match="cannot be kept in"):
        Activations((1, 257, 64), torch.float32, 1, limit=0, folder=tmp_path / "none")


def test_where_room_cannot_be_reserved_the_file_is_filled(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with open(tmp_path / "a", "wb") as file:
        reserve(file.fileno(), (1 << 20) + 5)
    assert (tmp_path / "a").read_bytes() == bytes((1 << 20) + 5)
