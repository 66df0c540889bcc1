"""Where packed weights lie: in huge pages, and once."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from budwood.kernels.arena import LINE, Arena, file_mappings, forget, needed

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel about memory")


def mapping_of(tensor: Tensor) -> dict[str, str]:
    """What the kernel says of the mapping in which a tensor begins."""
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


def test_what_is_placed_is_equal_and_begins_with_a_line():
    tensors = [torch.randn(7, 3), torch.arange(5, dtype=torch.uint8), torch.randn(64).bfloat16()]
    arena = Arena(sum(map(needed, tensors)))
    placed = [arena.place(tensor) for tensor in tensors]
    assert all(map(torch.equal, placed, tensors))
    assert all(tensor.data_ptr() % LINE == 0 for tensor in placed)
    late = torch.randn(3)
    assert arena.place(late) is late  # it is full


@linux
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_the_system_may_give_huge_pages():
    flags = mapping_of(Arena(8 << 20).place(torch.ones(1 << 20)))["VmFlags"].split()
    assert "hg" in flags  # asked for,
    assert "sh" not in flags  # and not of shared memory, which comes in small ones


@linux
def test_pages_of_a_file_that_were_copied_are_given_back(tmp_path):
    weight = torch.randn(64 * mmap.PAGESIZE // 4)
    (tmp_path / "weights").write_bytes(weight.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=weight.numel())
    inner = mapped[100:-100]  # begins and ends within a page
    assert torch.equal(inner, weight[100:-100])  # all read, all resident
    assert int(mapping_of(mapped)["Rss"].split()[0]) == 64 * mmap.PAGESIZE // 1024
    forget([inner], file_mappings())
    assert int(mapping_of(mapped)["Rss"].split()[0]) == 2 * mmap.PAGESIZE // 1024
    assert torch.equal(mapped, weight)


@linux
def test_memory_without_a_file_is_left_alone():
    weight = torch.randn(1 << 20)
    before = weight.clone()
    forget([weight, Arena(weight.nbytes).place(weight)], file_mappings())
    assert torch.equal(weight, before)
