"""Memory in huge pages for the weights of a whole model: the processor then looks up far fewer addresses."""

import mmap

import torch
from torch import Tensor

LINE = 64  # bytes: weights begin where a line of the cache begins
HUGE = 2 << 20


class Arena:
    """`nbytes` of memory, given out piece by piece; it lives as long as any tensor in it."""

    def __init__(self, nbytes: int):
        self.nbytes, self.used = nbytes, 0
        whole = -(-max(nbytes, 1) // HUGE) * HUGE + HUGE
        self.memory = mmap.mmap(-1, whole)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
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
