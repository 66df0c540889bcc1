"""The hidden states of all calibration windows between two blocks, in memory or in a file."""

import math
import tempfile
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from budwood.checkpoints.files import TEMPORARY


class Activations:
    """[windows, tokens, hidden] in the compute dtype, read in batches of equal shape; the last may be smaller.

    limit: bytes above which they are kept in a file in `folder` instead of memory. The file is unlinked as soon as it
    is open, so that nothing remains after the process, even if it is killed.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        batch: int,
        limit: int,
        folder: Path | None = None,
    ):
        self.shape, self.batch = shape, batch
        if math.prod(shape) * dtype.itemsize <= limit:
            self.hidden = torch.empty(shape, dtype=dtype)
            return
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".activations", suffix=TEMPORARY) as file:
            file.truncate(math.prod(shape) * dtype.itemsize)
            self.hidden = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    def __len__(self) -> int:
        return math.ceil(self.shape[0] / self.batch)

    def part(self, windows: slice, batch: int | None = None) -> "Activations":
        """Some of the windows, as a view of the same memory, in batches of the same size or of `batch`."""
        part = copy(self)
        part.hidden = self.hidden[windows]
        part.shape, part.batch = (len(part.hidden), *self.shape[1:]), batch or self.batch
        return part

    def span(self, index: int) -> slice:
        """The windows of batch `index`."""
        return slice(index * self.batch, min((index + 1) * self.batch, self.shape[0]))

    def read(self, index: int, device: torch.device) -> Tensor:
        """Batch `index`, [batch, tokens, hidden]; a copy, so that a block may change it in place."""
        return self.hidden[self.span(index)].to(device, copy=True)

    def write(self, index: int, hidden: Tensor) -> None:
        self.hidden[self.span(index)] = hidden.to(self.hidden.dtype)

    def indices(self) -> Iterator[int]:
        return iter(range(len(self)))


def batch_size(windows: int, tokens: int, target: int) -> int:
    """Windows per batch: about `target` tokens at a time, all of equal size where possible."""
    most = max(1, min(windows, target // tokens))
    return next((size for size in range(most, most // 2, -1) if windows % size == 0), most)
