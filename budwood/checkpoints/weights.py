"""Tensors of a checkpoint under the names of the model's modules, whatever names the files use.

Files may carry the names of the modules, the older names that transformers renames on loading, experts one by one
where the model holds them fused, or the packed tensors of this project. Renames and merges are transformers' own.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from budwood.checkpoints.reader import Shards
from budwood.checkpoints.structure import ModelStructure
from budwood.errors import RunError, UsageError
from budwood.formats import named
from budwood.formats.checks import check_layout, check_positions
from budwood.models.experts import ExpertLinears, split_fused
from budwood.models.linears import read


@dataclass
class Origin:
    """What one tensor of the model is read from: names in the files, and the converter that merges them."""

    sources: list[tuple[str, str]] = field(default_factory=list)  # (name in the files, pattern that matched)
    converter: WeightConverter | None = None


class Weights:
    """Reads the tensors of a model, dense and in module names (experts as plain linears)."""

    def __init__(self, shards: Shards, structure: ModelStructure, packed: dict[str, dict[str, Any]] | None = None):
        self.shards, self.model = shards, structure.module
        self.packed = packed or {}
        self.origins = self._origins(structure.module, structure.fused)
        self.expected = structure.shapes_in_files

    def _origins(self, model: PreTrainedModel, expected: dict[str, Tensor]) -> dict[str, Origin]:
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        origins: dict[str, Origin] = {}
        for source in sorted(self.shards.names(), key=_numbers_in_order):
            name, pattern = source, None
            if source not in expected:
                name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, expected)
            origin = origins.setdefault(name, Origin())
            if pattern is not None and origin.converter is None:
                origin.converter = deepcopy(by_pattern[pattern])
            origin.sources.append((source, pattern or source))
        for name, origin in origins.items():
            if origin.converter is None and len(origin.sources) > 1 and name in expected:
                first, second = (source for source, _ in origin.sources[:2])
                raise UsageError(
                    f"{self.shards.files[0].parent} holds both {first} and {second}, which are one tensor of the "
                    "model; save it again with transformers (save_pretrained) and give that folder"
                )
        for target, tied_to in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if tied_to not in origins and target in origins:  # files may hold either of two tied tensors
                origins[tied_to] = origins.pop(target)
        return origins

    def check_shapes(self) -> None:
        """Raises RunError where a dense tensor has another shape than the folder says it has."""
        for name, origin in self.origins.items():
            found, expected = self.shards.shape(origin.sources[-1][0]), self.expected.get(name)
            if origin.converter is not None or name.rpartition(".")[0] in self.packed:
                continue
            if expected is not None and found not in (expected, (1, *expected)):  # the latter by `save_pretrained`
                raise RunError(
                    f"{self.shards.files[0].parent} holds {origin.sources[-1][0]} of shape {list(found)}, and by "
                    f"config.json it is {list(expected)}; correct config.json, or write or fetch the model again"
                )

    def names(self, prefix: str = "") -> list[str]:
        """Module names that start with `prefix`; fused experts are one name, a packed matrix one name per part."""
        return [name for name in self.origins if name.startswith(prefix)]

    def groups(self, prefix: str) -> dict[str, list[str]]:
        """Names that are read together: all parts of a packed linear under its name, others alone."""
        groups: dict[str, list[str]] = {}
        for name in self.names(prefix):
            linear = name.rpartition(".")[0]
            part_of_packed = linear in self.packed and not name.endswith(".bias")
            groups.setdefault(linear if part_of_packed else name, []).append(name)
        return groups

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors and the packed matrices among them, dense, experts split into plain linears."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors.update(self._convert(name))
        whole = {linear: entry for linear, entry in self.packed.items() if self._parts(linear) & tensors.keys()}
        return assemble(tensors, whole, self.model)

    def _parts(self, linear: str) -> set[str]:
        return {f"{linear}.{part}" for part in named(self.packed[linear]["format"]).suffixes}

    def _convert(self, name: str) -> dict[str, Tensor]:
        origin = self.origins[name]
        if origin.converter is None:
            return {name: self.shards.read(origin.sources[-1][0])}
        converter = deepcopy(origin.converter)
        for source, pattern in origin.sources:
            converter.add_tensor(name, source, pattern, self.shards.read(source))  # type: ignore[arg-type]
        converted = converter.convert(name)
        return {full: value[0] if isinstance(value, list) else value for full, value in converted.items()}


def assemble(tensors: dict[str, Tensor], packed: dict[str, dict[str, Any]], model: nn.Module) -> dict[str, Tensor]:
    """Stored tensors as the modules of `model` hold them: packed matrices unpacked, fused experts as plain linears.

    packed: format and shape [out, in] of each packed linear. Raises RunError when a part of one is missing, or
    does not describe a matrix of this shape.
    """
    tensors = dict(tensors)
    for linear, entry in packed.items():
        layout = named(entry["format"])
        try:
            stored = {part: tensors.pop(f"{linear}.{part}") for part in layout.suffixes}
        except KeyError as error:
            raise RunError(f"the checkpoint lacks {error}, a part of {linear}; write or fetch it again") from error
        shape = (entry["shape"][0], entry["shape"][1])
        found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.items()}
        check_layout(linear, layout.name, shape, found)
        check_positions(linear, layout.name, shape, stored)
        weight = layout.unpack(stored, shape)  # [out, in]
        tensors[f"{linear}.weight"] = read(model.get_submodule(linear), weight).contiguous()
    unfused = {f"{name}." for name, module in model.named_modules() if isinstance(module, ExpertLinears)}
    return {
        name: part
        for whole, tensor in tensors.items()
        for name, part in (split_fused(whole, tensor) if _path(whole) in unfused else {whole: tensor}).items()
    }


def _path(name: str) -> str:
    return name[: name.rfind(".") + 1]


def published(tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors under the names that checkpoints of the family have, experts one by one where these have them so.

    tensors: under the names of the modules, experts fused; those of any part of the model.
    """
    return dict(revert_weight_conversion(model, tensors))


def _numbers_in_order(name: str) -> list[tuple[int, int | str]]:
    """A sort key: numbers in a name by value, since experts are merged in the order of their numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


STORED = (torch.float32, torch.bfloat16, torch.float16)


def storage_dtype(shards: Shards, otherwise: torch.dtype | None = None) -> torch.dtype:
    """The floating-point dtype that takes most bytes. Where it is none that is written: `otherwise`, or UsageError."""
    bytes_by_type: dict[torch.dtype, int] = {}
    for location in shards.locations.values():
        if location.dtype.is_floating_point:
            bytes_by_type[location.dtype] = bytes_by_type.get(location.dtype, 0) + location.nbytes
    found = max(bytes_by_type, key=lambda dtype: bytes_by_type[dtype], default=torch.float32)
    if found.itemsize == 1:
        raise UsageError(
            f"{shards.files[0].parent} holds weights in {str(found).removeprefix('torch.')}; budwood reads dense "
            "checkpoints of 16 bits and more; dequantize it first"
        )
    if found not in STORED and otherwise is not None:
        return otherwise
    if found not in STORED:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORED)
        raise UsageError(
            f"the weights are stored in {str(found).removeprefix('torch.')}, which is not written; give --dtype, "
            f"one of {names}"
        )
    return found
