"""A model to read from: a folder or a hub name, its configuration, its shards, its fingerprint."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from budwood.checkpoints.checksums import read_index, verify
from budwood.checkpoints.companions import is_own
from budwood.checkpoints.locate import local_folder, refuse_adapter
from budwood.checkpoints.meta_model import HALF, build, created_float32, read_config, stays_float32
from budwood.checkpoints.model_files import ModelFiles, model_files
from budwood.checkpoints.packed_config import check_shapes
from budwood.checkpoints.reader import Shards, sample
from budwood.checkpoints.sidecars import check_blocks, read_config_json
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.trial import Trial
from budwood.checkpoints.tying import differ_though_tied
from budwood.checkpoints.weights import Weights
from budwood.errors import RunError, UsageError

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]


@dataclass
class Source:
    """One model folder, dense or pruned."""

    name: str  # as given by the user
    folder: Path
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> PretrainedConfig:
        if self.untied:
            self._config.tie_word_embeddings = False
        return self._config

    @cached_property
    def _config(self) -> PretrainedConfig:
        return read_config(self.folder, self.trust_remote_code)

    @cached_property
    def trial(self) -> Trial:
        """The configuration as a starting point for changed ones; see `checkpoints/trial.py`."""
        content = {key: value for key, value in self.content.items() if key != "quantization_config"}
        return Trial(type(self.config), content, self.trust_remote_code)

    @cached_property
    def content(self) -> dict[str, Any]:
        """config.json, and that nothing is tied where the files say so."""
        content = read_config_json(self.folder / "config.json")
        return content | {"tie_word_embeddings": False} if self.untied else content

    @cached_property
    def untied(self) -> bool:
        """Whether the files hold other values for a tensor than for the one that the configuration ties it to.

        transformers then ties neither, so the configuration of what is pruned says that nothing is tied.
        """
        return differ_though_tied(self.folder, self._config, self.trust_remote_code)

    @cached_property
    def files(self) -> ModelFiles:
        """The files of weights that the folder means."""
        return model_files(self.folder)

    @cached_property
    def shards(self) -> Shards:
        """All tensors of these files, unchecked; see `weights`."""
        return Shards(self.files.shards)

    def check(self) -> bool:
        """Compares the shards with the checksums of the index, once; False where there are none to compare.

        Raises RunError where one differs.
        """
        return self._checked

    @cached_property
    def _checked(self) -> bool:
        index = self.files.index
        if index is None or not read_index(index)["metadata"].get("sha256"):
            return False
        verify(index)
        return True

    @cached_property
    def packed(self) -> dict[str, dict[str, Any]]:
        """Format and shape of every packed matrix; empty for a dense model."""
        return dict(self._quantization.get("linears") or {})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that differ from those of the configuration, by full name; empty for most models."""
        shapes = self._quantization.get("shapes") or {}
        check_shapes(shapes)
        return {name: tuple(shape) for name, shape in shapes.items()}

    @cached_property
    def _quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json. Raises UsageError when another program wrote it."""
        return quantization_of(self.content, self.name)

    def structure(self, skip: Sequence[str] = (), compute: torch.dtype = torch.float32) -> ModelStructure:
        """The model without its weights; see `ModelStructure`.

        Raises UsageError where config.json asks for more layers than the files can hold.
        """
        if any(self.folder.glob("*.safetensors")):  # `plan` takes a folder without weights too
            check_blocks(self.content, len(self.shards.locations), self.folder / "config.json")
        return ModelStructure(
            self.config, compute=compute, skip=skip, trust_remote_code=self.trust_remote_code, shapes=self.shapes
        )

    def stays_float32(self, dtype: torch.dtype, model: PreTrainedModel) -> Callable[[str], bool]:
        """Whether transformers holds the tensor of a full name in float32 when it loads the model in `dtype`."""
        if dtype not in self._created_float32:
            built = build(self.config, dtype, self.trust_remote_code) if dtype in HALF else model
            self._created_float32[dtype] = created_float32(built, dtype)
        return stays_float32(model, dtype, self._created_float32[dtype])

    @cached_property
    def _created_float32(self) -> dict[torch.dtype, set[str]]:
        return {}

    def refuse_missing(self, structure: ModelStructure) -> None:
        """Raises RunError where the headers lack tensors of the blocks, or give other shapes; for dense folders."""
        if self.packed or self.shapes:
            return
        weights = Weights(self.shards, structure)
        weights.check_shapes()
        known = set(weights.names())
        inside = f"{structure.path}."
        if missing := sorted(name for name in structure.fused if name.startswith(inside) and name not in known):
            raise lacking(self.name, missing, structure.path)

    def weights(self, structure: ModelStructure) -> Weights:
        """The tensors of the folder, under the names of the modules of `structure`; compared with their checksums.

        This and `load` are the only ways to the weights of a folder. Raises RunError where one was altered, or does
        not have the shape that config.json gives it.
        """
        self.check()
        weights = Weights(self.shards, structure, self.packed)
        weights.check_shapes()
        return weights

    @property
    def is_local(self) -> bool:
        """Whether the user named a folder, not a repository of the hub."""
        return Path(self.name).expanduser() == self.folder

    @property
    def license(self) -> str | None:
        """The license named in the model card, None without any."""
        card = self.folder / "README.md"
        text = card.read_text("utf-8", errors="replace") if is_own(card) else ""
        found = re.search(r"^license:\s*(\S+)\s*$", text, re.MULTILINE)
        return found[1] if found else None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the configuration, every header and the first bytes of every tensor; of code, where it is run.

        It tells most sources apart before a run begins, without a pass over the files. What is behind the first bytes
        is compared while it is read; see `Reads`.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(self.folder.glob("*.py")) if self.trust_remote_code else ():
            digest.update(file.read_bytes())
        for name, location in sorted(self.shards.locations.items()):
            digest.update(f"{name} {location.dtype} {location.shape}".encode())
            digest.update(sample(location))
        return digest.hexdigest()


def lacking(name: str, missing: Sequence[str], path: str) -> RunError:
    """The error for tensors `missing` of the module `path`, which the files of the model `name` do not hold."""
    return RunError(
        f"{name} lacks {', '.join(missing[:4])} of {len(missing)} tensors of {path}; "
        "save it again with transformers (save_pretrained) and give that folder"
    )


def quantization_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`quantization_config` of a config.json, empty without any.

    name: of the model, for messages. Raises UsageError when another program wrote it.
    """
    settings = content.get("quantization_config") or content.get("compression_config")
    if settings is None:
        return {}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "budwood":
        raise UsageError(
            f"{name} is stored with {method!r}; budwood reads dense checkpoints and its own; dequantize it first"
        )
    return dict(settings)


def open_source(name: str | Path, trust_remote_code: bool = False) -> Source:
    """The model called `name`: a local folder, or a repository of the hub (downloaded or cached).

    Raises UsageError when there is no such model, with the nearest local name.
    """
    folder = local_folder(name)
    if folder is None:
        folder = _download(str(name))
        refuse_adapter(folder)
    return Source(str(name), folder, trust_remote_code)


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
