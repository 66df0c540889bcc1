"""What is mutated: small folders, files and texts that budwood accepts."""

import gzip
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from families import save_model, token_ids
from safetensors.torch import save_file
from torch import Tensor

from budwood.formats import FORMATS
from budwood.pruning import prune

FAMILIES = ("llama", "gpt2", "mixtral", "gemma2")
LAYOUTS = {"two_four": "2:4", "bitmask": "3:4", "two_four_compact": "3:4", "two_four_csr": "3:4", "auto_int8": "2:4"}
EXPRESSIONS = (
    "wrp(alpha=0.25)",
    "wrp(density=0.03)",
    'magnitude("2:4")',
    'wanda("50%", published=True)',
    'refit(sparsegpt("2:4"))',
    'allocate(wanda("50%"))',
    'perp(wanda("2:4"), rank=4, steps=8, batch=4, rate=0.01)',
    'matched(sds(magnitude("2:4")))',
    "graft(bits=4.5)",
    "flap(drop=0.25)",
    "reap(drop=0.25)",
    "drop_blocks(count=1)",
)
SPEED = {
    "machine": {"processor": "p", "instructions": "i", "threads": 2},
    "model": {"pruned": {"decode_tokens_per_second": 1.5, "prefill_tokens_per_second": 2.5}},
    "dtype": "float32",
    "kernels": "k",
    "matrices": [
        {
            "shape": [4, 4],
            "rows": 1,
            "seconds": {"pruned": {"median": 1e-6}, "dense": {"median": 2e-6}},
            "times_dense": 2.0,
        }
    ],
    "warnings": ["slow"],
}


@dataclass(frozen=True)
class Seeds:
    """folder: where they are made, on first use."""

    folder: Path

    def family(self, name: str) -> Path:
        """A dense model with its tokenizer."""
        folder = self.folder / name
        if not folder.is_dir():
            save_model(name, folder)
        return folder

    def packed(self, layout: str) -> Path:
        """A finished folder of `prune`."""
        folder = self.folder / f"packed-{layout}"
        if not folder.is_dir():
            prune(self.family("llama"), folder, f'magnitude("{LAYOUTS[layout]}")', format=layout)
        return folder

    @cached_property
    def gguf(self) -> bytes:
        from fuzz_gguf import small_gguf

        return small_gguf(self.folder / "model.gguf")

    @cached_property
    def data(self) -> dict[str, bytes]:
        """Files of texts and token ids by name."""
        import pyarrow
        from pyarrow import parquet

        rows = [{"text": f"row {number} of a text that is long enough", "id": str(number)} for number in range(40)]
        lines = "\n".join(map(json.dumps, rows)).encode()
        ids = token_ids(2, 200)
        parquet.write_table(pyarrow.Table.from_pylist(rows), self.folder / "d.parquet")
        numpy.save(self.folder / "d.npy", ids.numpy())
        save_file({"ids": ids}, self.folder / "d.safetensors")
        binary = {f"d.{kind}": (self.folder / f"d.{kind}").read_bytes() for kind in ("parquet", "npy", "safetensors")}
        text = "\n".join(str(row["text"]) for row in rows).encode()
        return {"d.txt": text, "d.jsonl": lines, "d.jsonl.gz": gzip.compress(lines), **binary}

    def json(self, file: Path) -> Any:
        return json.loads(file.read_text("utf-8"))


def matrix(format: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """A random matrix in a format, with recovered weights where the format has a place for them."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=chance).to(dtype)
    groups = weight.float().abs().view(shape[0], -1, 4)
    keep = groups.argsort(dim=-1).argsort(dim=-1) >= 2
    if format not in ("two_four", "two_four_int8", "two_four_int4"):
        keep |= torch.rand(keep.shape, generator=chance) < 0.1
    return FORMATS[format].nearest(weight.masked_fill(~keep.view(shape), 0))
