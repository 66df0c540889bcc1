"""What a run has read of its source: a digest of every tensor, taken while it is read.

So a source that has changed is noticed without a second pass over its files: a tensor that is read again must be what
it was, and so must all that an interrupted run had read, before it is continued.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.checkpoints.checksums import READERS, sha256
from budwood.checkpoints.files import write_json
from budwood.checkpoints.reader import Shards, read_tensor
from budwood.checkpoints.sidecars import parse
from budwood.errors import RunError


class Reads:
    """Digests of tensors by their names in the files, as hex."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self.digests: dict[str, str] = {}
        self._saved = 0

    def note(self, name: str, tensor: Tensor) -> None:
        """Takes note of a tensor that was read. Raises RunError where it is not what it was before."""
        digest = digest_of(tensor)
        if self.digests.setdefault(name, digest) != digest:
            raise RunError(
                f"{self.shards.locations[name].file} was changed during the run: {name} is no longer what was read "
                "before; prune a folder that stays as it is, and give --overwrite to begin again"
            )

    def save(self, file: Path) -> None:
        """Keeps the digests for a resumed run; call it before anything is kept that was made from the tensors."""
        if len(self.digests) != self._saved:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, dict(self.digests))
            self._saved = len(self.digests)

    def resume(self, file: Path) -> bool:
        """Takes over the digests that an interrupted run has kept; whether its tensors still are what they were.

        This reads again what that run had read.
        """
        try:
            kept = parse(file.read_bytes())
        except (OSError, ValueError):
            return False
        if not isinstance(kept, dict) or not kept.keys() <= self.shards.locations.keys():
            return False
        if self._digests(list(kept)) != kept:
            return False
        self.digests, self._saved = dict(kept), len(kept)
        return True

    def whole(self, companions: list[Path]) -> str:
        """One digest of all tensors and of the small files beside them; reads the tensors that were not read yet."""
        names = self.shards.names()
        found = self._digests([name for name in names if name not in self.digests])
        self.digests |= found
        lines = [f"{name} {self.digests[name]}" for name in sorted(names)]
        lines += [f"{file.name} {sha256(file)}" for file in companions]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _digests(self, names: list[str]) -> dict[str, str]:
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(lambda name: digest_of(read_tensor(self.shards.locations[name])), names)
            return dict(zip(names, found, strict=True))


def digest_of(tensor: Tensor) -> str:
    """sha256 of the bytes of a contiguous tensor."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return hashlib.sha256(data).hexdigest()
