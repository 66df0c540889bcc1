"""What a result depends on: the machine and the versions, and the windows of a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conditions:
    """What a figure depends on beside the data."""

    dtype: str  # of the forward pass
    device: str  # cpu or cuda
    machine: Mapping[str, Any]  # `environment.machine()`: processor, instructions, cores, threads, memory, accelerator
    versions: Mapping[str, str | None]  # of budwood, torch, transformers and, for tasks, lm_eval
    created: str  # ISO 8601, UTC

    @property
    def threads(self) -> int | None:
        return self.machine.get("threads")


@dataclass(frozen=True)
class Text:
    """Windows of a text. Two results are of the same windows exactly if `sha256` is the same."""

    name: str  # as the user calls it: NAME of --data NAME=FILE, else the data itself
    data: str  # file, folder or name that was read
    variant: str  # plain, gptq or c4-random
    bos: str  # auto, every or none
    seed: int | None  # of c4-random
    windows: int
    seq_length: int
    sha256: str  # of the token ids, as little-endian 64-bit integers
    documents: int | None = None
    tokens_available: int | None = None
