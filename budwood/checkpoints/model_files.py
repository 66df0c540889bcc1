"""Which files of weights a model folder means: those that `from_pretrained` would load, for every verb.

A packed folder names its index in `quantization_config`; without such a name the usual files count, a single one
before an index. What else lies in the folder, such as the shards of an earlier save, is not read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.checkpoints.checksums import INDEX_NAME, read_index
from budwood.checkpoints.sidecars import read_object
from budwood.errors import RunError, UsageError

SINGLE = "model.safetensors"
USUAL_INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class ModelFiles:
    """shards: the files of weights in the order of their names. index: the file that lists them, None for one file."""

    shards: list[Path]
    index: Path | None = None


def model_files(folder: Path) -> ModelFiles:
    """The files of weights of a folder.

    Raises UsageError when there are none that can be read, RunError when one of them, or a file that names them, is
    missing or damaged.
    """
    named = _named(folder)
    if named is not None:
        if not named.endswith(".index.json"):
            return ModelFiles(_present(folder, [named], "config.json"))
        return _listed(folder / named)
    if (folder / SINGLE).is_file():
        return ModelFiles([folder / SINGLE])
    if (folder / USUAL_INDEX).is_file():
        return _listed(folder / USUAL_INDEX)
    pickles = sorted(file for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"{folder} holds {pickles[0].name}, a pickle, which can run code when it is opened; convert it to "
            "safetensors first (with transformers: from_pretrained(...).save_pretrained(...), on a machine you trust)"
        )
    raise UsageError(f"{folder} holds no safetensors file; give the folder of a model or a hub name")


def _named(folder: Path) -> str | None:
    """The file that config.json names, as transformers reads it; None where the usual names count."""
    content = _config(folder / "config.json")
    settings = content.get("quantization_config")
    named = content.get("transformers_weights")
    if isinstance(settings, dict) and settings.get("quant_method") == "budwood":
        index = settings.get("index", INDEX_NAME)
        named = named if index is None else index
    if named is None:
        return None
    if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", ".index.json")):
        raise RunError(
            f"{folder / 'config.json'} names {named!r} as its weights, which is no safetensors file of its own folder; "
            "fetch or write the checkpoint again"
        )
    return named


def _config(file: Path) -> dict[str, Any]:
    return read_object(file, {}, "fetch or write the checkpoint again") or {}


def _listed(index: Path) -> ModelFiles:
    names = sorted(set(read_index(index)["weight_map"].values()))
    return ModelFiles(_present(index.parent, names, index.name), index)


def _present(folder: Path, names: list[str], where: str) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder} lacks {', '.join(missing[:3])}, named in {where}; fetch it again")
    return [folder / name for name in names]
