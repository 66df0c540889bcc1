"""The target folder: one shard per finished block, written beside and renamed; the rest when all are there.

A finished file is finished work and nothing else is remembered: `recipe.json` is written first and says what the
folder is for, `config.json` last, so that a folder that was interrupted can be resumed and cannot be loaded.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from budwood.checkpoints.checksums import index_of, sha256
from budwood.checkpoints.reader import Shards, read_header
from budwood.checkpoints.shard import write_shard
from budwood.checkpoints.weights import assemble
from budwood.errors import RunError, UsageError

OURS = (
    "sparse*.safetensors*",
    "model*.safetensors*",
    "config.json",
    "recipe.json",
    "report.*",
    "README.md",
    "*.tmp",
)
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
NOT_COMPANIONS = ("config.json", "recipe.json", "report.json", "adapter_config.json")
IDENTITY = ("budwood", "method", "source", "data", "dtype", "compute_dtype", "format", "skip")


class Writer:
    """Writes the shards of one run into `target`, and reads back those that are finished.

    target: the folder; created here. recipe: JSON-plain, says what the run is (IDENTITY keys decide whether a folder
    belongs to it). blocks: number of decoder blocks. layout: a format's name, or "auto"; a
    dense folder carries the usual file names.
    """

    def __init__(self, target: Path, recipe: dict[str, Any], blocks: int, layout: str):
        self.target, self.recipe, self.blocks, self.layout = target, recipe, blocks, layout
        self.stem = "model" if layout == "dense" else "sparse"
        target.mkdir(parents=True, exist_ok=True)
        for stray in target.glob("*.tmp"):
            stray.unlink()
        write_json(target / "recipe.json", recipe)

    def shard(self, index: int) -> Path:
        """File of block `index`; index -1 is the shard of everything outside the blocks."""
        return self.target / f"{self.stem}-{index + 2:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self, index: int) -> bool:
        return self.shard(index).is_file()

    def write(
        self, index: int, tensors: dict[str, Tensor], packed: dict[str, dict[str, Any]], notes: dict[str, Any]
    ) -> None:
        """One shard. packed: format and shape of the matrices stored as several tensors; notes: JSON-plain."""
        metadata = {"format": "pt", "budwood": json.dumps({"packed": packed, "notes": notes})}
        beside = self.shard(index).with_suffix(".tmp")
        try:
            write_shard(beside, tensors, metadata)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            finished = sum(self.finished(i) for i in range(self.blocks))
            raise RunError(
                f"{beside.parent} could not be written ({error}); {finished} of {self.blocks} blocks are finished and "
                "kept there: make room and give the same command again"
            ) from error
        os.replace(beside, self.shard(index))

    def read(self, index: int, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The dense tensors of a finished shard as the modules of `model` hold them, and its notes."""
        shards = Shards([self.shard(index)])
        packed, notes = self.about(index)
        return assemble({name: shards.read(name) for name in shards.names()}, packed, model), notes

    def about(self, index: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """What is packed in a finished shard and how, and its notes."""
        said = json.loads(read_header(self.shard(index))[1]["budwood"])
        return said["packed"], said["notes"]

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
        files = [self.shard(index) for index in range(-1, self.blocks)]
        return sum(place.nbytes for file in files if file.is_file() for place in read_header(file)[0].values())

    def write_outside(self, names: Iterable[str], read: Callable[[str], dict[str, Tensor]]) -> None:
        """The shard of everything that is in no block, once."""
        if not self.finished(-1):
            tensors = {full: tensor for name in names for full, tensor in read(name).items()}
            self.write(-1, tensors, {}, {})

    def finish(self, source: Path, method: str, documents: Mapping[str, str]) -> None:
        """Index, companions of the source (tokenizer, templates), documents by file name, and last the config."""
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        for index in range(-1, self.blocks):
            file = self.shard(index)
            places, _ = read_header(file)
            weight_map |= dict.fromkeys(places, file.name)
            digests[file.name] = sha256(file)
        listing = index_of(weight_map, self.total_bytes(), digests)
        write_json(self.target / f"{self.stem}.safetensors.index.json", listing)
        copy_companions(source, self.target)
        for name, text in documents.items():
            write_text(self.target / name, text)
        write_json(self.target / "config.json", self._config(source, method))

    def _config(self, source: Path, method: str) -> dict[str, Any]:
        """The source's config.json, with the type and the packing of what was written."""
        config = json.loads((source / "config.json").read_text("utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = self.recipe["dtype"]
        if self.layout != "dense":
            packed = [entry for index in range(self.blocks) for entry in self.about(index)[0].items()]
            config["quantization_config"] = {
                "quant_method": "budwood",
                "format_version": 1,
                "recipe": method,
                "linears": dict(packed),
            }
        return config


def claim(target: Path, recipe: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Looks whether a run may go to `target`: returns the recipe found there when it is the same run, else None.

    Raises UsageError when the folder holds something else and `overwrite` is not set; with it, files of an earlier
    run are removed (never anything that budwood does not write).
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; give a folder")
    if not target.exists() or not any(target.iterdir()):
        return None
    if overwrite:
        for pattern in OURS:
            for file in target.glob(pattern):
                file.unlink()
        return None
    file = target / "recipe.json"
    if not file.is_file():
        raise UsageError(f"{target} is not empty and holds no budwood run; give another folder, or --overwrite")
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is damaged; give another folder, or --overwrite") from error
    for key in IDENTITY:
        if _identity(found.get(key)) != _identity(recipe.get(key)):
            raise UsageError(
                f"{target} holds another run: its {key.replace('_', ' ')} is {_short(found.get(key))}, asked for is "
                f"{_short(recipe.get(key))}; give another folder, or --overwrite"
            )
    return found


def _identity(value: Any) -> Any:
    """What makes a part of a recipe the same: a digest where there is one (names and paths may differ)."""
    return value.get("sha256", value) if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 160 else text[:157] + "..."


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation config: all small files beside the weights, as they are."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.name not in NOT_COMPANIONS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """DenseStream, then renamed."""
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text, "utf-8")
    _flush(beside)
    os.replace(beside, file)


def _flush(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())
