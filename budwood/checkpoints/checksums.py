"""Detects altered and truncated checkpoints: the index holds the sha256 of every shard.

The index is the usual one of Hugging Face (`metadata`, `weight_map`) with one more entry in its metadata,
`sha256: {shard file: hex}`. Folders written by other programs have none; then nothing is compared.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from budwood.checkpoints.schema import FILE_NAME
from budwood.checkpoints.sidecars import INDEX, read_object
from budwood.errors import RunError

INDEX_NAME = "sparse.safetensors.index.json"
READERS = 4  # hashing releases the interpreter lock, so several shards are read at a time


def sha256(file: Path) -> str:
    """The digest of a file, in hex, read in chunks."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def index_of(weight_map: dict[str, str], total_size: int, digests: dict[str, str]) -> dict[str, Any]:
    """The content of an index: `weight_map` tensor -> shard, `total_size` bytes, `digests` shard -> hex."""
    metadata = {"total_size": total_size, "sha256": dict(sorted(digests.items()))}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def read_index(index: Path) -> dict[str, Any]:
    """The content of an index; RunError when it is missing, damaged, or names files outside its folder."""
    advice = "fetch or write the checkpoint again"
    content = read_object(index, INDEX, advice)
    if content is None:
        raise RunError(f"{index} is missing; {advice}")
    digests = content.setdefault("metadata", {}).get("sha256", {})
    outside = next((name for name in digests if not FILE_NAME.holds(name)), None)
    if outside is not None:
        raise RunError(f"{index} is damaged: it has a sha256 of {outside!r}, a file outside its folder; {advice}")
    return content


def verify(checkpoint: Path) -> None:
    """Compare every shard with the digest in the index; `checkpoint` is a folder or its index file.

    Raises RunError naming the first shard, in the order of names, that is missing, altered or not listed.
    """
    index = checkpoint if checkpoint.is_file() else checkpoint / INDEX_NAME
    content = read_index(index)
    digests: dict[str, str] = content["metadata"].get("sha256", {})
    shards = sorted({*content["weight_map"].values(), *digests})
    for name in shards:
        if not (index.parent / name).is_file():
            raise RunError(f"{index.parent / name} is missing, but {index.name} names it; fetch it again")
    if not digests:
        return
    unlisted = [name for name in shards if name not in digests]
    if unlisted:
        raise RunError(f"{index} holds no sha256 of {unlisted[0]}; write the checkpoint again")
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(sha256, [index.parent / name for name in shards])
        for name, digest in zip(shards, found, strict=True):
            if digest != digests[name]:
                raise RunError(
                    f"{index.parent / name} was altered or truncated: its sha256 is {digest[:12]}..., "
                    f"{index.name} says {digests[name][:12]}...; fetch or write it again"
                )
