"""Folders of models with one mutated file: configuration, index, weights, the state of a run."""

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from families import token_ids
from fuzz_mutate import json_bytes, mutated, shard_mutated
from fuzz_seeds import FAMILIES, INTERRUPTED, LAYOUTS, Seeds

from budwood.checkpoints.checksums import INDEX_NAME, sha256, verify
from budwood.checkpoints.loading import load
from budwood.checkpoints.reader import shard_files
from budwood.checkpoints.source import open_source
from budwood.errors import BudwoodError
from budwood.evaluation.perplexity import checked, streamed_losses
from budwood.evaluation.subject import window_loss
from budwood.inspection import inspect
from budwood.planning import plan
from budwood.pruning import prune
from budwood.runs.target import MANIFEST, STAGING, SWAP, Target
from budwood.stream.model import Model

IDS = token_ids(1, 16)


class Unsound(Exception):
    """Accepted, though it is not what it says."""


def copied(origin: Path, folder: Path) -> Path:
    """A copy whose large files are hard links."""
    shutil.copytree(origin, folder, copy_function=os.link)
    return folder


def rewrite(file: Path, data: bytes) -> None:
    """Other content; the file that it was linked to stays."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def placed(origin: Path, folder: Path, name: str, chance: Random) -> Path:
    """A copy of a folder in which one JSON file is mutated."""
    copied(origin, folder)
    rewrite(folder / name, json_bytes(chance, json.loads((origin / name).read_bytes())))
    return folder


def resident_loss(folder: Path) -> float:
    """As `evaluate` gives it: a loss that is not finite is refused."""
    with torch.no_grad():
        loss = window_loss(load(folder, dtype=torch.float32)(IDS, use_cache=False).logits, IDS)
    return checked([loss], str(folder))[0]


def streamed_loss(folder: Path) -> float:
    return checked(streamed_losses(Model(open_source(folder)), IDS), str(folder))[0]


def same_losses(folder: Path) -> None:
    """Raises Unsound where the model that is loaded and the one that is streamed are both accepted and differ."""
    one = resident_loss(folder)
    other = streamed_loss(folder)
    if abs(one - other) > 1e-3 * abs(one) and one == one:
        raise Unsound(f"loaded, the loss is {one:.4f}, streamed {other:.4f}")


def config(chance: Random, seeds: Seeds, folder: Path) -> None:
    """What `plan` needs, of a dense model."""
    inner = placed(seeds.family(chance.choice(FAMILIES)), folder / "m", "config.json", chance)
    plan(inner, 'magnitude("2:4")')


def config_loaded(chance: Random, seeds: Seeds, folder: Path) -> None:
    same_losses(placed(seeds.family(chance.choice(FAMILIES)), folder / "m", "config.json", chance))


def packed_config(chance: Random, seeds: Seeds, folder: Path) -> None:
    """`quantization_config`, and what names the same tensors."""
    origin = seeds.packed(chance.choice(list(LAYOUTS)))
    inner = copied(origin, folder / "m")
    content = seeds.json(origin / "config.json")
    part = content["quantization_config"]
    if chance.random() < 0.5:
        part["linears"] = mutated(chance, part["linears"], 2)
    else:
        content["quantization_config"] = mutated(chance, {**part, "shapes": {}, "index": INDEX_NAME}, 2)
    rewrite(inner / "config.json", json.dumps(content).encode())
    if chance.random() < 0.7:
        inspect(inner)
    else:
        same_losses(inner)


def packed_folder(chance: Random, seeds: Seeds, folder: Path) -> None:
    """Packed tensors in their file, mutated, with the checksum that belongs to them."""
    from fuzz_packed import tensor_mutated
    from safetensors.torch import load_file, save_file

    inner = copied(seeds.packed(chance.choice(list(LAYOUTS))), folder / "m")
    index = json.loads((inner / INDEX_NAME).read_bytes())
    name = chance.choice(sorted(index["weight_map"]))
    file = inner / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensor_mutated(chance, tensors[name]).contiguous()
    metadata = {"format": "pt"}
    file.unlink()
    save_file(tensors, file, metadata)
    index["metadata"]["sha256"][file.name] = sha256(file)
    rewrite(inner / INDEX_NAME, json.dumps(index).encode())
    losses: list[float] = []
    refused: list[BudwoodError] = []
    for loss in (resident_loss, streamed_loss):
        try:
            losses.append(loss(inner))
        except BudwoodError as error:
            refused.append(error)
    if losses and refused:
        raise Unsound(f"one way of reading refuses it, the other does not: {refused[0]}")
    if refused:
        raise refused[0]
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
        raise Unsound(f"loaded, the loss is {losses[0]:.4f}, streamed {losses[1]:.4f}")


def index(chance: Random, seeds: Seeds, folder: Path) -> None:
    inner = placed(seeds.packed("two_four"), folder / "m", INDEX_NAME, chance)
    verify(inner)
    for file in shard_files(inner):
        if file.resolve().parent != inner.resolve():
            raise Unsound(f"it names {file}, which is outside the folder")


def manifest(chance: Random, seeds: Seeds, folder: Path) -> None:
    """What a killed run may have left in a target. No file of anyone else is touched."""
    inner = copied(seeds.packed("two_four"), folder / "m")
    (folder / "victim").write_text("mine")
    (inner / "notes.txt").write_text("mine")
    names = ["config.json", "report.md", "recipe.json"]
    state = {"files": [*names, "sparse-00001-of-00005.safetensors"]}
    rewrite(inner / MANIFEST, json_bytes(chance, state) if chance.random() < 0.5 else json.dumps(state).encode())
    (inner / STAGING).mkdir()
    for name in names:
        (inner / STAGING / name).write_text("{}")
    swap = json_bytes(
        chance, {"move": names, "remove": ["report.json", "../victim", "notes.txt"][: chance.randint(0, 2)]}
    )
    (inner / STAGING / SWAP).write_bytes(swap)
    try:
        held = Target.claim(inner)
        held.written()
        held.fill_in_place(["config.json"])
        held.release()
    finally:
        if not (folder / "victim").is_file() or (inner / "notes.txt").read_text() != "mine":
            raise Unsound("a file of the user is gone")


def unfinished(chance: Random, seeds: Seeds, folder: Path) -> None:
    """A run that was interrupted, with one mutated file: continued to the same bytes, or refused."""
    origin, inner = seeds.packed("two_four"), copied(seeds.interrupted, folder / "m")
    damaged(chance, inner)
    prune(seeds.family("llama"), inner, INTERRUPTED, format="two_four")
    same_files(origin, inner)


def retraining(chance: Random, seeds: Seeds, folder: Path) -> None:
    """The same for a training: its checkpoint and the state of its optimiser too."""
    inner = copied(seeds.half_trained, folder / "m")
    damaged(chance, inner)
    seeds.train(inner)
    same_files(seeds.retrained, inner)


def damaged(chance: Random, folder: Path) -> None:
    """Mutates one file of an unfinished run, or takes it away."""
    names = sorted(file for file in folder.rglob("*") if file.is_file())
    file = chance.choice([file for file in names if file.suffix in (".json", ".safetensors")])
    data = file.read_bytes()
    if chance.random() < 0.1:
        file.unlink()
    elif file.suffix == ".json":
        rewrite(file, json_bytes(chance, json.loads(data), 2))
    elif chance.random() < 0.4:
        changed = bytearray(data)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        rewrite(file, bytes(changed))
    else:
        rewrite(file, state_mutated(chance, data))


def same_files(origin: Path, folder: Path) -> None:
    """Raises Unsound where a run ended with other bytes, unless it says that it computed otherwise."""
    said, meant = (json.loads((place / "recipe.json").read_bytes())["arithmetic"] for place in (folder, origin))
    if said != meant:
        return
    for name in ("config.json", INDEX_NAME):
        if (folder / name).read_bytes() != (origin / name).read_bytes():
            raise Unsound(f"continued, {name} is another than without the interruption")


def state_mutated(chance: Random, data: bytes) -> bytes:
    """A shard whose header says something else about its run, or that is damaged."""
    from fuzz_mutate import join_shard, split_shard

    if chance.random() < 0.3:
        return shard_mutated(chance, data)
    header, tensors = split_shard(data)
    if "budwood" not in header["__metadata__"]:
        return join_shard(json_bytes(chance, header, 2), tensors)
    about: dict[str, Any] = json.loads(header["__metadata__"]["budwood"])
    header["__metadata__"]["budwood"] = json_bytes(chance, about, 2).decode(errors="replace")
    return join_shard(json.dumps(header).encode(), tensors)


FOLDER_TARGETS = (
    ("config", 12, config),
    ("config, loaded", 4, config_loaded),
    ("packed config", 6, packed_config),
    ("packed folder", 6, packed_folder),
    ("index", 40, index),
    ("manifest", 40, manifest),
    ("unfinished run", 4, unfinished),
    ("unfinished training", 1, retraining),
)
