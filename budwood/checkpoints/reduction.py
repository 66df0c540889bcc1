"""A model without some of its blocks or experts, read from the files of the whole one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from budwood.checkpoints.source import Source
from budwood.checkpoints.structure import ModelStructure, shapes_unfused
from budwood.checkpoints.trial import Json, Shape, Trial, differences, quiet
from budwood.checkpoints.weights import Weights
from budwood.models.experts import FUSED, LINEAR
from budwood.models.routing import mixtures


@dataclass(frozen=True)
class Kept:
    """What stays of a model: indices of blocks, sorted, and of experts by name of the module that holds them.

    Names are those of the whole model.
    """

    blocks: Sequence[int]
    experts: Mapping[str, Sequence[int]]


@dataclass
class Reduced(Source):
    """The source `whole` without the blocks and experts that are not `kept`. trial: its configuration."""

    whole: Source = None  # type: ignore[assignment]
    kept: Kept = None  # type: ignore[assignment]
    reduced: Trial = None  # type: ignore[assignment]

    @classmethod
    def of(cls, whole: Source, kept: Kept, reduced: Trial) -> "Reduced":
        return cls(whole.name, whole.folder, whole.trust_remote_code, whole, kept, reduced)

    @cached_property
    def config(self) -> PretrainedConfig:
        return self.reduced.config

    @cached_property
    def trial(self) -> Trial:
        return self.reduced

    @cached_property
    def content(self) -> Json:
        return self.reduced.content

    @cached_property
    def packed(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in shapes_unfused(self.whole.shapes).items()}
        mapped = self._names.mapped(shapes)
        return {name: tuple(tensor.shape) for name, tensor in mapped.items()}

    @cached_property
    def _names(self) -> "Names":
        return Names(self.whole.structure(), self.kept, self.reduced.shapes)

    def weights(self, structure: ModelStructure) -> Weights:
        return ReducedWeights(self.whole.weights(self.whole.structure()), self._names, structure)


class Names:
    """Tensors of the whole model as tensors of the reduced one. wanted: shapes of the reduced model's tensors."""

    def __init__(self, whole: ModelStructure, kept: Kept, wanted: Mapping[str, Shape]):
        self.inside, self.kept, self.wanted = f"{whole.path}.", kept, wanted
        held = [name for name in mixtures(whole.module) if name in kept.experts]
        self.experts = {f"{name}.": torch.tensor(sorted(kept.experts[name])) for name in held}
        self.place = {old: new for new, old in enumerate(kept.blocks)}

    def renamed(self, name: str) -> str | None:
        """A name in the reduced model, with the number of its block there; None in a block that is left out."""
        if not name.startswith(self.inside):
            return name
        number, _, rest = name.removeprefix(self.inside).partition(".")
        place = self.place.get(int(number))
        return None if place is None else f"{self.inside}{place}.{rest}"

    def mapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the whole model, experts as plain linears, under new names and without what is left out."""
        return {new: tensor for old, each in tensors.items() for new, tensor in self._mapped(old, each)}

    def _mapped(self, old: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        name, prefix = self.renamed(old), next((path for path in self.experts if old.startswith(path)), None)
        if name is None:
            return
        expert = LINEAR.fullmatch(old.removeprefix(prefix)) if prefix else None
        if prefix and expert:
            kept = self.experts[prefix].tolist()
            if int(expert["expert"]) in kept:
                number = kept.index(int(expert["expert"]))
                path = str(self.renamed(prefix))
                yield f"{path}{expert['part']}.{number}.{expert['kind']}", tensor
            return
        yield name, self._cut(old, name, tensor)

    def _cut(self, old: str, name: str, tensor: Tensor) -> Tensor:
        """Rows of routers: the dimension in which the reduced model's tensor is smaller has one entry per expert."""
        wanted = self.wanted.get(name)
        if wanted is None or wanted == tuple(tensor.shape):
            return tensor
        mixture = next((path for path in self.experts if old.startswith(parent_of(path))), None)
        kept = self.experts[mixture] if mixture else torch.empty(0, dtype=torch.long)
        for dimension, size in enumerate(wanted):
            if size != tensor.shape[dimension] and size == len(kept):
                tensor = tensor.index_select(dimension, kept.to(tensor.device))
        return tensor


def parent_of(path: str) -> str:
    """`model.layers.0.mlp.experts.` -> `model.layers.0.mlp.`"""
    return path.removesuffix(".").rpartition(".")[0] + "."


class ReducedWeights(Weights):
    """The tensors of a reduced model, read from the files of the whole one."""

    def __init__(self, whole: Weights, names: Names, structure: ModelStructure):
        self.whole, self._names, self.model = whole, names, structure.module
        self.known = {new: old for old in whole.names() if (new := names.renamed(old)) is not None}
        linears = {new.rpartition(".")[0]: old.rpartition(".")[0] for new, old in self.known.items()}
        self.packed = {new: whole.packed[old] for new, old in linears.items() if old in whole.packed}

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.known if name.startswith(prefix)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._names.mapped(self.whole.read([self.known[name] for name in names]))


def with_experts(trial: Trial, old: int, new: int) -> Trial | None:
    """The configuration with `new` experts in place of `old` in every layer; None where none is found."""
    with quiet():
        return next((each for each in trial.with_number(old, new) if _has_experts(each, trial, old, new)), None)


def _has_experts(found: Trial, whole: Trial, old: int, new: int) -> bool:
    wrong = differences(found.shapes, whole.shapes)
    experts = {name for name in whole.shapes if FUSED.fullmatch(name)}
    return (
        bool(experts)
        and experts <= {name for name, _ in wrong}
        and all(d >= 0 and (whole.shapes[n][d], found.shapes[n][d]) == (old, new) for n, d in wrong)
        and found.computes_like(whole)
    )


def with_blocks(trial: Trial, path: str, count: int, kept: Sequence[int]) -> Trial | None:
    """The configuration of a model that has, of `count` blocks in the list `path`, those `kept`; None if none is found.

    Lists with one entry per block are cut. Where shapes still differ, numbers that may count the first blocks, and
    lists that may hold indices of blocks, are changed too.
    """
    inside, place = f"{path}.", {old: new for new, old in enumerate(kept)}
    target = {}
    for name, shape in trial.shapes.items():
        number, _, rest = name.removeprefix(inside).partition(".")
        if not name.startswith(inside):
            target[name] = shape
        elif int(number) in place:
            target[f"{inside}{place[int(number)]}.{rest}"] = shape
    with quiet():
        return next((each for each in _with_blocks(trial, count, kept) if each.shapes == target), None)


def _with_blocks(trial: Trial, count: int, kept: Sequence[int]) -> Iterator[Trial]:
    fields, place = trial.fields(), {old: new for new, old in enumerate(kept)}
    lists = {
        key: [value[index] for index in kept]
        for key, value in fields.items()
        if isinstance(value, list) and len(value) == count
    }
    repairs: list[Json] = []
    for key, value in fields.items():
        if type(value) is int and 0 < value < count:
            repairs.append({key: sum(index < value for index in kept)})
        if isinstance(value, list) and all(type(entry) is int and 0 <= entry < count for entry in value):
            repairs.append({key: [place[entry] for entry in value if entry in place]})
    for base in trial.with_number(count, len(kept), **lists):
        yield base
        yield from (base.changed(**repair) for repair in repairs)
        yield base.changed(**{key: value for repair in repairs for key, value in repair.items()})
