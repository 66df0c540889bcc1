"""Memory in huge pages for the weights of a whole model: far fewer TLB misses."""

import ctypes
import mmap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

LINE = 64  # bytes: tensors are aligned to cache lines
HUGE = 2 << 20
MAPS = Path("/proc/self/maps")

Range = tuple[int, int]  # of addresses: the first, and the one after the last


class Arena:
    """`nbytes` of memory, allocated piece by piece; freed with the last tensor in it."""

    def __init__(self, nbytes: int):
        self.nbytes, self.used = nbytes, 0
        whole = -(-max(nbytes, 1) // HUGE) * HUGE + HUGE
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: private, since shared memory, the default, gets small pages
            self.memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            self.memory = mmap.mmap(-1, whole)
        address = torch.frombuffer(self.memory, dtype=torch.uint8, count=1).data_ptr()
        self.start = -address % HUGE

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the arena; where it no longer fits, the tensor itself."""
        room = self.take(tensor.nbytes)
        return tensor if room is None else room.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def take(self, nbytes: int) -> Tensor | None:
        """Zeros, uint8 `[nbytes]`, aligned to a cache line; None where they no longer fit."""
        size = -(-nbytes // LINE) * LINE
        if nbytes == 0 or self.used + size > self.nbytes:
            return None
        offset = self.start + self.used
        self.used += size
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=nbytes, offset=offset)


def size_in_arena(tensor: Tensor) -> int:
    """Bytes of an arena that a tensor takes."""
    return -(-tensor.numel() * tensor.element_size() // LINE) * LINE


def release_file_pages(copied: Iterable[Tensor], files: Iterable[Range]) -> None:
    """Release the pages of a mapped file that were read only to be copied; a later access reads the file again.

    Only whole pages inside tensors that lie one behind the other, and only inside a file mapping: the contents of other
    pages would be lost. Other tensors of the file keep all of it mapped, and without this every page once read would
    count as resident. files: the addresses of file mappings.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    ranges: list[Range] = []
    for start, end in sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in copied):
        if ranges and start <= ranges[-1][1]:
            start, last_end = ranges.pop()
            end = max(end, last_end)
        ranges.append((start, end))
    for start, end in ranges:
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(low <= first and last <= high for low, high in files):
            advise(first, last - first, mmap.MADV_DONTNEED)


def mapped(tensors: Iterable[Tensor], files: Iterable[Range]) -> list[Tensor]:
    """Those that lie in file mappings."""
    return [t for t in tensors if any(start <= t.data_ptr() < end for start, end in files)]


def file_mappings() -> list[Range]:
    """The addresses of the file mappings of this process; empty where the system does not list them."""
    found: list[Range] = []
    for line in MAPS.read_text().splitlines() if MAPS.exists() else []:
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and path[0].startswith("/") and not path[0].startswith(("/dev/", "/memfd:")):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found
