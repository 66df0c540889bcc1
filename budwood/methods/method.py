"""What a method is: a function of one decoder block, with its settings as fields."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import Pattern, Shape
from budwood.sparsity.selection import NotFinite

S = TypeVar("S")


class Linear(Protocol):
    """One prunable matrix of a block."""

    name: str  # in full, "model.layers.7.self_attn.q_proj"
    stored: Tensor  # [out, in] in the storage type
    recovered: int | None  # positions beyond the base pattern, set by methods that recover

    @property
    def shape(self) -> Shape: ...

    @property
    def weight(self) -> Tensor: ...  # float32 [out, in]

    @weight.setter
    def weight(self, value: Tensor) -> None: ...  # [out, in], kept in the storage type


class Block(Protocol):
    """One decoder block as a method sees it."""

    @property
    def linears(self) -> Mapping[str, Any]: ...  # Linear by name inside the block

    def collect(self, statistic: Callable[[int], S]) -> dict[str, S]: ...  # one pass, by name inside the block


class Method:
    """The call changes the weights of one block. Everything else has a default or a plain answer.

    Subclasses are frozen dataclasses whose fields are the options a user can set, checked when made.
    """

    calibrated: ClassVar[bool] = True  # False: works on weights alone, nothing runs forward

    @property
    def published(self) -> bool:
        """Whether the figures of a published program are to be met, whose products are all torch's own."""
        return getattr(self, "tie", None) == "published" or bool(getattr(self, "parity", False))

    def check(self, linears: Mapping[str, Shape]) -> None:
        """Raise UsageError where a linear (full name: [out, in]) cannot be pruned as asked."""
        for name, shape in linears.items():
            self.pattern_for(shape, name).check(shape, name)

    def forecast(self, shape: Shape, name: str = "") -> Forecast:
        """What will be left of a matrix [out, in]; `name` matters only where settings differ by linear."""
        return self.pattern_for(shape, name).forecast(shape)

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        """What may stay of the linear `name`, [out, in]."""
        raise NotImplementedError

    def prepare(self, model: Any, batches: Any) -> Callable[[Any], None]:
        """Look at the whole model first; most methods need not."""
        return self

    def __call__(self, block: Block) -> None:
        raise NotImplementedError

    def expression(self) -> str:
        """The method as text, without fields left at their defaults; `parse_method` reads it back."""
        from budwood.methods.expression import write_method

        return write_method(self)

    __str__ = expression


def prune(linear: Linear, scores: Tensor, pattern: Pattern) -> int:
    """Set to zero what `pattern` does not keep; returns how many positions stay."""
    with naming(linear.name):
        keep = pattern.keep(scores)  # [out, in]
    linear.weight = torch.where(keep, linear.stored, 0)  # a product would leave negative zeros
    return int(keep.sum())


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Scores without a rank become a failure that names the linear."""
    try:
        yield
    except NotFinite as error:
        raise RunError(f"{name}: {error}; check the weights and the calibration for NaN and overflow") from error
