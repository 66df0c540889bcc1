"""The hidden states of all calibration windows between two blocks, in memory or in a file."""

import errno
import math
import os
import tempfile
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from budwood.checkpoints.files import TEMPORARY
from budwood.errors import RunError


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
        size = math.prod(shape) * dtype.itemsize
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".activations", suffix=TEMPORARY) as file:
                reserve(file.fileno(), size)
                self.hidden = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        except OSError as error:
            raise RunError(
                f"{size} bytes of activations cannot be kept in {folder or tempfile.gettempdir()} ({error.strerror}); "
                "make room, or raise --activation-memory to keep them in memory"
            ) from error

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


def reserve(file: int, size: int) -> None:
    """Makes the open file `size` bytes long, all of them on the disk. Raises OSError where there is no room.

    A file that is only truncated to its size has no blocks yet: when the disk is full, writing to its mapping kills the
    process.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        _fill(file, size)
    except AttributeError:  # not on this system
        _fill(file, size)


def _fill(file: int, size: int) -> None:
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        part = zeros[: size - start]
        while part:
            part = part[os.write(file, part) :]


def batch_size(windows: int, tokens: int, target: int) -> int:
    """Windows per batch: about `target` tokens at a time, all of equal size where possible."""
    most = max(1, min(windows, target // tokens))
    return next((size for size in range(most, most // 2, -1) if windows % size == 0), most)
