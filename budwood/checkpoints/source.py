"""A model to read from: a folder or a hub name, its configuration, its shards, its fingerprint."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from budwood.checkpoints.locate import local_folder
from budwood.checkpoints.meta_model import read_config
from budwood.checkpoints.reader import Shards, sample
from budwood.checkpoints.sidecars import check_blocks, read_config_json
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.trial import Trial
from budwood.checkpoints.weights import Weights
from budwood.errors import UsageError

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]


@dataclass
class Source:
    """One model folder, dense or pruned."""

    name: str  # as given by the user
    folder: Path
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> PretrainedConfig:
        return read_config(self.folder, self.trust_remote_code)

    @cached_property
    def trial(self) -> Trial:
        """The configuration as a starting point for changed ones; see `checkpoints/trial.py`."""
        content = {key: value for key, value in self.content.items() if key != "quantization_config"}
        return Trial(type(self.config), content, self.trust_remote_code)

    @cached_property
    def content(self) -> dict[str, Any]:
        """config.json"""
        return read_config_json(self.folder / "config.json")

    @cached_property
    def shards(self) -> Shards:
        return Shards.of_folder(self.folder)

    @cached_property
    def packed(self) -> dict[str, dict[str, Any]]:
        """Format and shape of every packed matrix; empty for a dense model."""
        return dict(self._quantization.get("linears") or {})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that differ from those of the configuration, by full name; empty for most models."""
        shapes = self._quantization.get("shapes") or {}
        return {name: tuple(shape) for name, shape in shapes.items()}

    @cached_property
    def _quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json. Raises UsageError when another program wrote it."""
        settings: dict[str, Any] | None
        settings = self.content.get("quantization_config")
        if settings is None:
            return {}
        if settings.get("quant_method") != "budwood":
            raise UsageError(
                f"{self.name} is stored with {settings.get('quant_method')!r}; budwood reads dense checkpoints and "
                "its own; dequantize it first"
            )
        return settings

    def structure(self, skip: Sequence[str] = (), compute: torch.dtype = torch.float32) -> ModelStructure:
        """The model without its weights; see `ModelStructure`.

        Raises UsageError where config.json asks for more layers than the files can hold.
        """
        if any(self.folder.glob("*.safetensors")):  # `plan` takes a folder without weights too
            check_blocks(self.content, len(self.shards.locations), self.folder / "config.json")
        return ModelStructure(
            self.config, compute=compute, skip=skip, trust_remote_code=self.trust_remote_code, shapes=self.shapes
        )

    def weights(self, structure: ModelStructure) -> Weights:
        """The tensors of the folder, under the names of the modules of `structure`."""
        return Weights(self.shards, structure, self.packed)

    @property
    def is_local(self) -> bool:
        """Whether the user named a folder, not a repository of the hub."""
        return Path(self.name).expanduser() == self.folder

    @property
    def license(self) -> str | None:
        """The license named in the model card, None without any."""
        card = self.folder / "README.md"
        text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
        found = re.search(r"^license:\s*(\S+)\s*$", text, re.MULTILINE)
        return found[1] if found else None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the configuration, every header and the first bytes of every tensor."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, location in sorted(self.shards.locations.items()):
            digest.update(f"{name} {location.dtype} {location.shape}".encode())
            digest.update(sample(location))
        return digest.hexdigest()


def open_source(name: str | Path, trust_remote_code: bool = False) -> Source:
    """The model called `name`: a local folder, or a repository of the hub (downloaded or cached).

    Raises UsageError when there is no such model, with the nearest local name.
    """
    folder = local_folder(name)
    return Source(str(name), _download(str(name)) if folder is None else folder, trust_remote_code)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises dozens of kinds; all mean that the model is not available
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"there is no folder {name}, and the hub has no model of that name ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a local folder"
        ) from error
