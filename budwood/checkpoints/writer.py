"""The shards of a run: one per finished block, written under a temporary name and renamed; index and config at the end.

A finished file is finished work; nothing else is remembered. Every shard carries the id of its run, so that shards of
another run in the same folder are not taken for its own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.checkpoints.checksums import index_of, sha256
from budwood.checkpoints.description import Description
from budwood.checkpoints.files import write_json, written_whole
from budwood.checkpoints.packing import PackedEntries
from budwood.checkpoints.reader import Shards, read_header
from budwood.checkpoints.schema import fault
from budwood.checkpoints.shard import write_shard
from budwood.checkpoints.sidecars import BLOCK_NOTES, SHARD, parse
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.weights import Weights
from budwood.errors import RunError

OUTSIDE = -1  # the index of the shard of everything outside the blocks


@dataclass(frozen=True)
class ShardNotes:
    """What the header of a shard says in addition to its tensors.

    packed: format and [out, in] shape of every packed matrix. shapes: parameters (full name: shape as the module stores
    it) that the configuration gives another shape, or none. notes: JSON-plain, for the report.
    """

    run: str | None
    packed: PackedEntries
    shapes: dict[str, list[int]]
    notes: dict[str, Any]


class Writer:
    """Writes the shards of one run into `folder`, and reads back those that are finished.

    run: the id of the run. blocks: number of decoder blocks. layout: a format's name, "auto", "auto_int8" or
    "auto_int4". Shards of a dense layout have the usual file names. before: is called before a shard is written.
    """

    def __init__(self, folder: Path, run: str, blocks: int, layout: str, before: Callable[[], None] | None = None):
        self.folder, self.run, self.blocks, self.layout, self._before = folder, run, blocks, layout, before
        self.accepted = {run}  # ids of shards that count as finished
        self.stem = "model" if layout == "dense" else "sparse"

    def shard(self, index: int) -> Path:
        """File of block `index`, or of everything outside the blocks."""
        return self.folder / f"{self.stem}-{index + 2:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self, index: int) -> bool:
        file = self.shard(index)
        return file.is_file() and self.about(index).run in self.accepted

    def write(
        self, index: int, tensors: dict[str, Tensor], packed: PackedEntries, shapes: dict[str, list[int]], notes: Any
    ) -> None:
        """One shard; see `ShardNotes`. Raises RunError where it cannot be written."""
        about = {"run": self.run, "packed": packed, "shapes": shapes, "notes": notes}
        try:
            if self._before is not None:
                self._before()
            with written_whole(self.shard(index)) as temporary:
                write_shard(temporary, tensors, {"format": "pt", "budwood": json.dumps(about)})
        except RunError as error:
            finished = sum(self.finished(i) for i in range(self.blocks))
            raise RunError(f"{error}; {finished} of {self.blocks} blocks are finished and kept") from error

    def read(self, index: int, structure: ModelStructure) -> tuple[dict[str, Tensor], ShardNotes]:
        """The dense tensors of a finished shard as the modules of the model hold them, and what its header says."""
        about = self.about(index)
        weights = Weights(Shards([self.shard(index)]), structure, about.packed)
        return weights.read(weights.names()), about

    def about(self, index: int) -> ShardNotes:
        """What the header of a shard says. Raises RunError where it is damaged."""
        file = self.shard(index)
        advice = "delete it and give the same command again"
        try:
            said = parse(read_header(file)[1].get("budwood", "{}"))
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); {advice}") from error
        found = fault(said, SHARD, "its header")
        if found:
            raise RunError(f"{file} is damaged: {found}; {advice}")
        return ShardNotes(said.get("run"), said.get("packed", {}), said.get("shapes", {}), said.get("notes", {}))

    def notes(self, index: int) -> dict[str, Any]:
        """The notes of a finished block. Raises RunError where they are not those of a block."""
        notes = self.about(index).notes
        found = fault(notes, BLOCK_NOTES, "its header")
        if found:
            raise RunError(f"{self.shard(index)} is damaged: {found}; delete it and give the same command again")
        return notes

    def sizes(self) -> dict[str, int]:
        """Bytes of every matrix stored under its own name, by linear; those fused with others are not listed."""
        sizes: dict[str, int] = {}
        for index in range(self.blocks):
            for name, place in read_header(self.shard(index))[0].items():
                linear, _, part = name.rpartition(".")
                if part != "bias":
                    sizes[linear] = sizes.get(linear, 0) + place.nbytes
        return sizes

    def total_bytes(self) -> int:
        """Bytes of all tensors written so far."""
        files = [self.shard(index) for index in range(OUTSIDE, self.blocks)]
        return sum(place.nbytes for file in files if file.is_file() for place in read_header(file)[0].values())

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the tensors of all blocks that the configuration of the source does not give, by full name."""
        return {name: shape for index in range(self.blocks) for name, shape in self.about(index).shapes.items()}

    def write_outside(self, read: Callable[[], dict[str, Tensor]]) -> None:
        """The shard of everything that is in no block, once."""
        if not self.finished(OUTSIDE):
            self.write(OUTSIDE, read(), {}, {}, {})

    def needs_plug_in(self, description: Description) -> bool:
        """Whether transformers alone would not load these shards, or would load them wrongly."""
        return self.layout != "dense" or bool(description.shapes)

    def write_index(self, description: Description) -> None:
        """The index of all shards with their checksums; under the usual name where no plug-in is needed."""
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        for index in range(OUTSIDE, self.blocks):
            file = self.shard(index)
            weight_map |= dict.fromkeys(read_header(file)[0], file.name)
            digests[file.name] = sha256(file)
        stem = "sparse" if self.needs_plug_in(description) else "model"
        listing = index_of(weight_map, self.total_bytes(), digests)
        write_json(self.folder / f"{stem}.safetensors.index.json", listing)

    def config(self, description: Description, method: str | None, dtype: str) -> dict[str, Any]:
        """The content of config.json, with dtype and packing of what was written."""
        config = {key: value for key, value in description.config.items() if key != "torch_dtype"}
        config["dtype"] = dtype
        if self.needs_plug_in(description):
            written = [self.about(index) for index in range(self.blocks)]
            config["quantization_config"] = {
                "quant_method": "budwood",
                "format_version": 1,
                "recipe": method,
                "linears": {name: entry for about in written for name, entry in about.packed.items()},
                **({"shapes": description.shapes} if description.shapes else {}),
            }
        return config
