"""Memory in huge pages for the weights of a whole model: the processor then looks up far fewer addresses."""

import ctypes
import mmap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

LINE = 64  # bytes: weights begin where a line of the cache begins
HUGE = 2 << 20
MAPS = Path("/proc/self/maps")

Range = tuple[int, int]  # the first address and the one behind the last


class Arena:
    """`nbytes` of memory, given out piece by piece; it lives as long as any tensor in it."""

    def __init__(self, nbytes: int):
        self.nbytes, self.used = nbytes, 0
        whole = -(-max(nbytes, 1) // HUGE) * HUGE + HUGE
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux, where shared memory, the default, comes in small pages
            self.memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            self.memory = mmap.mmap(-1, whole)
        address = torch.frombuffer(self.memory, dtype=torch.uint8, count=1).data_ptr()
        self.start = -address % HUGE

    def place(self, tensor: Tensor) -> Tensor:
        """The same tensor, in here; where it no longer fits, the tensor itself."""
        size = needed(tensor)
        if tensor.numel() == 0 or self.used + size > self.nbytes:
            return tensor
        offset = self.start + self.used
        self.used += size
        placed = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return placed.view(tensor.shape).copy_(tensor)


def needed(tensor: Tensor) -> int:
    """Bytes of an arena that a tensor takes."""
    return -(-tensor.numel() * tensor.element_size() // LINE) * LINE


def forget(copied: Iterable[Tensor], files: Iterable[Range]) -> None:
    """Give back the pages of a mapped file that were read only to be copied; whoever wants them reads the file again.

    Only whole pages inside one tensor, and only where a file lies behind them: elsewhere they would be lost. What else
    of the file is in use keeps all of it mapped, and every page once touched would count as the process's own.
    files: where files are mapped.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for tensor in copied:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(start <= first and last <= end for start, end in files):
            advise(first, last - first, mmap.MADV_DONTNEED)


def file_mappings() -> list[Range]:
    """Where files are mapped into this process; nothing where the system does not tell."""
    found: list[Range] = []
    for line in MAPS.read_text().splitlines() if MAPS.exists() else []:
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and path[0].startswith("/") and not path[0].startswith(("/dev/", "/memfd:")):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found
