"""The dense models of a comparison: looked at for the plan, then brought to the machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from budwood.checkpoints.locate import local_folder
from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.comparison.presence import is_packaged
from budwood.conversion import convert
from budwood.errors import UsageError
from budwood.planning import open_model, storage_of
from budwood.runs.reading import Reading

if TYPE_CHECKING:
    from budwood.comparison.schema import SourceFields

FOLDER = "sources"  # of converted models, in the folder of the comparison


@dataclass
class DenseModel:
    """One source of a recipe. model: as the recipe says. path: its folder here, or its configuration, or None."""

    name: str
    model: str
    trust_remote_code: bool
    path: Path | None
    complete: bool  # whether `path` is a folder with weights
    _structures: dict[tuple[str, ...], tuple[ModelStructure, Any, Any]] = field(default_factory=dict)

    def structure(self, skip: Sequence[str] = ()) -> tuple[ModelStructure, Any, Any]:
        """Structure, configuration and shards, without the matrices that are skipped."""
        if self.path is None:
            raise UsageError(f"{self.model} is not here yet")
        key = tuple(skip)
        if key not in self._structures:
            self._structures[key] = open_model(self.path, key, self.trust_remote_code)
        return self._structures[key]

    def storage(self, dtype: str | None) -> torch.dtype:
        """The dtype of written weights."""
        _, config, shards = self.structure()
        return storage_of(dtype, config, shards)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What the recipe of a pruned folder says of its source: `sha256`, and `content`, the digest of all its files.

        Reads all of them, once. Raises RunError where one is damaged.
        """
        source = open_source(str(self.path), self.trust_remote_code)
        source.check()
        return {"sha256": source.fingerprint, "content": Reading(source).content()}

    def record(self) -> dict[str, Any]:
        """As `Results.sources` has it."""
        structure, _, _ = self.structure()
        return {
            "name": self.model,
            "sha256": self.identity["content"],
            "parameters": structure.parameters,
            "in_scope": structure.in_scope,
            "blocks": len(structure.modules),
        }


def look(name: str, fields: "SourceFields", out: Path) -> DenseModel:
    """The model as far as it is here; of one on the hub the configuration alone is fetched.

    Nothing is written to `out`. `path` is None where nothing is known yet.
    """
    path, complete = None, False
    if is_packaged(fields.model):
        folder = out / FOLDER / fields.model
        complete = (folder / "config.json").is_file()
        path = folder if complete else None
    else:
        path = local_folder(fields.model)
        complete = path is not None
        if path is None:
            path = hub_config(fields.model)
    return DenseModel(name, fields.model, fields.trust_remote_code, path, complete)


def bring(name: str, fields: "SourceFields", out: Path) -> DenseModel:
    """The model with its weights in a folder here: converted from its package, or downloaded, where it is not yet.

    Raises UsageError where it cannot be had.
    """
    if is_packaged(fields.model):
        folder = out / FOLDER / fields.model
        if not (folder / "config.json").is_file():
            convert(fields.model, folder, overwrite=True)
    else:
        folder = open_source(fields.model, fields.trust_remote_code).folder
    return DenseModel(name, fields.model, fields.trust_remote_code, folder, True)


def hub_config(name: str) -> Path | None:
    """The configuration of a model on the hub, or in its cache; None where it is not available."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception:  # the hub client raises dozens of kinds; all mean that the model is not available
        return None
