"""Models built on meta from changed configurations: how a configuration that gives certain shapes is found.

Which field of a configuration holds a count is not looked up by name. A field is changed, the model is built, and its
parameters are compared.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from budwood.checkpoints.meta_model import build

Json = dict[str, Any]  # the content of a config.json
Shape = tuple[int, ...]


@dataclass
class Trial:
    """The model of a configuration, on meta. cls: its class. content: its config.json."""

    cls: type[PretrainedConfig]
    content: Json
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises what the class raises for fields that it refuses."""
        return self.cls.from_dict(deepcopy(self.content))

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """None where the class refuses the configuration."""
        try:
            return build(self.config, torch.float32, self.trust_remote_code)
        except Exception:  # classes check their fields in many ways; all of them mean that it cannot be
            return None

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of all stored tensors by full name; empty where the class refuses."""
        return {} if self.model is None else {name: tuple(t.shape) for name, t in self.model.state_dict().items()}

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """The buffers that are computed and not stored, such as those of rotary embeddings."""
        stored = self.shapes
        return {} if self.model is None else {n: b for n, b in self.model.named_buffers() if n not in stored}

    @cached_property
    def constants(self) -> dict[tuple[str, str], float]:
        """Floating-point attributes of the modules, such as the scale of attention, by module and attribute."""
        modules = [] if self.model is None else self.model.named_modules()
        return {
            (name, attribute): value
            for name, module in modules
            for attribute, value in vars(module).items()
            if isinstance(value, float)
        }

    def changed(self, **fields: Any) -> "Trial":
        return Trial(self.cls, {**self.content, **fields}, self.trust_remote_code)

    def fields(self) -> Json:
        """All fields, those of config.json first, then those that have their defaults."""
        return {**self.content, **{key: v for key, v in self.config.to_dict().items() if key not in self.content}}

    def whole_numbers(self) -> dict[str, int]:
        return {key: value for key, value in self.fields().items() if type(value) is int and value > 0}

    def with_number(self, old: int, new: int, **others: Any) -> "Iterator[Trial]":
        """One trial for every field that is `old`, with `new` in its place; then one with all of those in the file.

        others: fields that are changed as well.
        """
        fields = [key for key, value in self.whole_numbers().items() if value == old]
        for key in fields:
            yield self.changed(**others, **{key: new})
        yield self.changed(**others, **{key: new for key in fields if key in self.content})

    def computes_like(self, other: "Trial") -> bool:
        """Whether tables and constants are those of another model; sizes of parameters may differ."""
        if self.tables.keys() != other.tables.keys():
            return False
        same = all(torch.equal(table, other.tables[name]) for name, table in self.tables.items())
        both = self.constants.keys() & other.constants.keys()
        return same and all(self.constants[key] == other.constants[key] for key in both)


def differences(found: Mapping[str, Shape], target: Mapping[str, Shape]) -> set[tuple[str, int]]:
    """Where shapes differ: (name, dimension); dimension -1 for a tensor that only one of them has."""
    wrong = {(name, -1) for name in found.keys() ^ target.keys()}
    for name in found.keys() & target.keys():
        if len(found[name]) != len(target[name]):
            wrong.add((name, -1))
        else:
            wrong |= {(name, d) for d, (a, b) in enumerate(zip(found[name], target[name], strict=True)) if a != b}
    return wrong


def linear_biases(model: nn.Module, names: set[str]) -> set[str]:
    """Those of `names` that are the bias of a linear."""
    linears = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return names & linears


def scaled(value: int, old: int, new: int) -> int | None:
    """The value of a field that explained the size `old` and shall explain `new`; None where no whole number does."""
    return None if old % value or (new * value) % old else new * value // old


@contextmanager
def quiet() -> Iterator[None]:
    """In this context nothing is logged or warned of that is unusual in a configuration."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
