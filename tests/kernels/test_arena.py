"""Packed weights are in huge pages, and only once in memory."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from budwood.kernels.arena import LINE, Arena, file_mappings, release_file_pages, size_in_arena

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel about memory")


def mapping_of(tensor: Tensor) -> dict[str, str]:
    """The smaps entry of the mapping in which a tensor begins."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=1)
        if not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside:
            found[first[:-1]] = rest[0] if rest else ""
    return found


def test_a_placed_tensor_is_equal_and_aligned_to_a_cache_line():
    tensors = [torch.randn(7, 3), torch.arange(5, dtype=torch.uint8), torch.randn(64).bfloat16()]
    arena = Arena(sum(map(size_in_arena, tensors)))
    placed = [arena.place(tensor) for tensor in tensors]
    assert all(map(torch.equal, placed, tensors))
    assert all(tensor.data_ptr() % LINE == 0 for tensor in placed)
    late = torch.randn(3)
    assert arena.place(late) is late  # it is full


@linux
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_huge_pages_are_requested():
    flags = mapping_of(Arena(8 << 20).place(torch.ones(1 << 20)))["VmFlags"].split()
    assert "hg" in flags  # requested,
    assert "sh" not in flags  # and not shared memory, which gets small pages


@linux
def test_pages_of_a_file_that_were_copied_are_released(tmp_path):
    weight = torch.randn(64 * mmap.PAGESIZE // 4)
    (tmp_path / "weights").write_bytes(weight.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=weight.numel())
    inner = mapped[100:-100]  # begins and ends within a page
    assert torch.equal(inner, weight[100:-100])  # all read, all resident
    assert int(mapping_of(mapped)["Rss"].split()[0]) == 64 * mmap.PAGESIZE // 1024
    release_file_pages([inner], file_mappings())
    assert int(mapping_of(mapped)["Rss"].split()[0]) == 2 * mmap.PAGESIZE // 1024
    assert torch.equal(mapped, weight)


@linux
def test_tensors_one_behind_the_other_are_released_together(tmp_path):
    weight = torch.randn(8 * mmap.PAGESIZE // 4)
    (tmp_path / "weights").write_bytes(weight.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=weight.numel())
    assert torch.equal(mapped, weight)
    release_file_pages([mapped[5000:], mapped[300:5000]], file_mappings())
    assert int(mapping_of(mapped)["Rss"].split()[0]) == mmap.PAGESIZE // 1024  # of the first 300
    assert torch.equal(mapped, weight)


@linux
def test_memory_outside_file_mappings_is_unchanged():
    weight = torch.randn(1 << 20)
    before = weight.clone()
    release_file_pages([weight, Arena(weight.nbytes).place(weight)], file_mappings())
    assert torch.equal(weight, before)
