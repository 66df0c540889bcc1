"""Writes a packed folder as an ordinary one: zeros in place, the usual names, no need of this package.

Matrices are unpacked and written shard by shard, so memory holds one shard (`SHARD_BYTES`, or the experts of
one block where those are more), whatever the size of the model. Experts are fused again, as transformers
holds them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from budwood.checkpoints.checksums import INDEX_NAME, index_of, sha256, verify
from budwood.checkpoints.meta_model import build, read_config
from budwood.checkpoints.quantizer import METHOD, PackedConfig
from budwood.checkpoints.reader import Shards
from budwood.checkpoints.substitution import EXPERT, unfuse_experts
from budwood.checkpoints.writer import OURS, copy_companions, write_json
from budwood.errors import RunError, UsageError
from budwood.formats import FORMATS
from budwood.formats.checks import check_layout, check_positions
from budwood.models.experts import ExpertLinears, fused_state

SHARD_BYTES = 1 << 30
RECORDS = ("recipe.json", "report.*")  # what was done stays true of the unpacked weights


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: their bytes, and how to make them, by name."""

    nbytes: int
    read: Callable[[], Mapping[str, Tensor]]


def export_dense(folder: str | Path, target: str | Path, overwrite: bool = False) -> Path:
    """Write the model of `folder` densely into `target`, which appears whole or not at all; returns it.

    Tokenizer, templates, recipe and report go along; the model card does not, it tells how to load packed
    weights. Raises UsageError when `folder` is not packed or `target` is taken, RunError when a shard is
    damaged.
    """
    source, target = Path(folder), Path(target)
    settings = read_settings(source)
    if target.resolve() == source.resolve() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} cannot be written to; give another folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError(f"{target} is not empty; give another folder, or --overwrite")
    packed = PackedConfig(**settings.pop("quantization_config"))
    packed.check()
    if (source / INDEX_NAME).is_file():
        verify(source)
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        pieces = list(pieces_of(Shards.of_folder(source), packed.linears, build(read_config(source), torch.float32)))
        write_shards(beside, pieces)
        copy_companions(source, beside)
        for pattern in RECORDS:
            for file in source.glob(pattern):
                shutil.copyfile(file, beside / file.name)
        write_json(beside / "config.json", settings)
        move(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def read_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a packed folder; UsageError for any other."""
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no config.json; give a folder that budwood wrote") from error
    except ValueError as error:
        raise RunError(f"{folder / 'config.json'} is damaged: {error}; fetch or write it again") from error
    if (settings.get("quantization_config") or {}).get("quant_method") != METHOD:
        raise UsageError(f"{folder} holds no packed weights of budwood; there is nothing to unpack")
    return settings


def pieces_of(shards: Shards, linears: Mapping[str, dict[str, Any]], model: PreTrainedModel) -> Iterator[Piece]:
    """All tensors in the names and shapes of the modules. `model` is a skeleton; it gets unfused."""
    fused = unfuse_experts(model, linears)
    members: dict[str, list[str]] = {path: [] for path in fused}  # by experts, the names of their tensors
    parts = {f"{name}.{part}" for name, entry in linears.items() for part in FORMATS[entry["format"]].suffixes}
    stands_for = {f"{name}.weight" for name in linears} - parts  # the tripwire of `save_pretrained`
    alone = []
    for name in shards.names():
        linear = name.rpartition(".")[0]
        expert = EXPERT.fullmatch(linear)
        if expert and expert["experts"] in members:
            members[expert["experts"]].append(name)
        elif name.rpartition(".")[0] not in fused and name not in parts | stands_for:
            alone.append(name)
    for name in alone:
        yield Piece(shards.places[name].nbytes, lambda name=name: {name: shards.read(name)})  # type: ignore[misc]
    for name, entry in linears.items():
        expert = EXPERT.fullmatch(name)
        if not (expert and expert["experts"] in fused):
            yield Piece(dense_bytes(shards, name, entry), unpacker(shards, name, entry, model))
    for path, names in members.items():
        yield experts_piece(shards, linears, model, path, names)


def experts_piece(
    shards: Shards, linears: Mapping[str, dict[str, Any]], model: PreTrainedModel, path: str, names: list[str]
) -> Piece:
    """The experts of one block, packed or not, fused."""
    packed = [name for name in linears if name.startswith(f"{path}.")]
    parts = {f"{name}.{part}" for name in packed for part in FORMATS[linears[name]["format"]].suffixes}
    plain = [name for name in names if name not in parts]
    nbytes = sum(dense_bytes(shards, name, linears[name]) for name in packed)
    nbytes += sum(shards.places[name].nbytes for name in plain)

    def read() -> dict[str, Tensor]:
        tensors = {name: shards.read(name) for name in plain}
        for name in packed:
            tensors |= unpacker(shards, name, linears[name], model)()
        state = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
        experts = model.get_submodule(path)
        assert isinstance(experts, ExpertLinears)
        return {f"{path}.{name}": tensor for name, tensor in fused_state(experts, state).items()}

    return Piece(nbytes, read)


def dense_bytes(shards: Shards, name: str, entry: dict[str, Any]) -> int:
    typed = f"{name}.{FORMATS[entry['format']].typed}"
    if typed not in shards.places:
        raise RunError(f"the checkpoint lacks {typed}; fetch or write it again")
    return int(entry["shape"][0] * entry["shape"][1]) * shards.dtype(typed).itemsize


def unpacker(
    shards: Shards, name: str, entry: dict[str, Any], model: PreTrainedModel
) -> Callable[[], dict[str, Tensor]]:
    """Reads, checks and unpacks one matrix, `[out, in]` or `[in, out]` as its module holds it."""
    transposed = isinstance(model.get_submodule(name), Conv1D)

    def read() -> dict[str, Tensor]:
        format, shape = entry["format"], (entry["shape"][0], entry["shape"][1])
        names = {part: f"{name}.{part}" for part in FORMATS[format].suffixes}
        found = {part: shards.places[full] for part, full in names.items() if full in shards.places}
        check_layout(name, format, shape, {part: (place.dtype, place.shape) for part, place in found.items()})
        tensors = {part: shards.read(full) for part, full in names.items()}
        check_positions(name, format, shape, tensors)
        weight = FORMATS[format].unpack(tensors, shape)
        return {f"{name}.weight": weight.T.contiguous() if transposed else weight}

    return read


def write_shards(folder: Path, pieces: list[Piece]) -> None:
    """The usual shards and their index."""
    groups: list[list[Piece]] = []
    size = SHARD_BYTES
    for piece in pieces:
        if size + piece.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: tensor for piece in group for name, tensor in piece.read().items()}
        save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        digests[file.name] = sha256(file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard is read
    write_json(folder / "model.safetensors.index.json", index_of(weight_map, total, digests))


def move(beside: Path, target: Path) -> None:
    """Put a finished folder in place; of a folder that is there, what an earlier run wrote is replaced."""
    if not target.exists():
        os.replace(beside, target)
        return
    for pattern in OURS:
        for file in target.glob(pattern):
            file.unlink()
    for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, target / file.name)
