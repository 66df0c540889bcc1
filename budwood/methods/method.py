"""The contract of a method: prepared once for a model, then called for one decoder block after the other."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from budwood.errors import RunError, UsageError
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import NM, Pattern, Shape
from budwood.sparsity.selection import NotFinite

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.linear import Linear
    from budwood.stream.model import Model

PatternOf = Callable[[Shape, str], Pattern]  # of the linear of this shape [out, in] and full name


class Step:
    """A prepared method: called once for every block, in order, then finished once."""

    def model(self, model: "Model") -> "Model":
        """The model to stream: the given one, or one without some of its blocks or experts."""
        return model

    def inputs(self, windows: Tensor | None) -> Tensor | None:
        """The windows whose hidden states the blocks of the stream need [windows, tokens]; None for none at all."""
        return windows

    def __call__(self, block: "Block") -> None:
        """Changes one block: weights and biases of its linears, or any other parameter of its module."""
        raise NotImplementedError

    def finish(self, run: "Run") -> None:
        """Called after the last block; the default does nothing. `Run.rewrite` yields every block again."""


class Method(Step):
    """A pruning method. Subclasses are frozen dataclasses whose fields are the options, checked when made.

    A method that needs no preparation is its own step. `str` gives the expression that `parse_method` reads.
    """

    name: ClassVar[str] = ""  # in expressions, where it is not that of the class in lower case
    fixed_shapes: ClassVar[bool] = False  # whether methods inside must leave the shapes of matrices as they are
    calibrated: ClassVar[bool] = True  # False: uses the weights alone, without a forward pass

    @property
    def published(self) -> bool:
        """Whether ties, counts and sums follow the published program, to reproduce its figures.

        Methods with a published program have a field of this name; for others the methods inside them decide.
        """
        return any(inner.published for inner in inner_methods(self))

    @property
    def fitted_values(self) -> str | None:
        """The kind of values that the method leaves, such as "int4"; None: those of the dtype."""
        return None

    def check(self, linears: Mapping[str, Shape]) -> None:
        """Raises UsageError where a linear (full name: [out, in]) does not allow these options."""

    def check_structure(self, structure: "ModelStructure") -> None:
        """Raises UsageError where the model as a whole does not allow this method or one inside it."""
        for inner in inner_methods(self):
            inner.check_structure(structure)
            if inner.fitted_values and not self.fitted_values:
                raise UsageError(
                    f"{self} changes the values that {inner} fits to {inner.fitted_values}; leave values out there, or "
                    "prune with the inner method alone"
                )
            if inner.reduced(structure) is not structure and self.reduced(structure) is structure:
                raise UsageError(
                    f"{self} works block by block on the whole model, and {inner} removes blocks or experts; "
                    f"prune with {inner} first, then the result with the other method"
                )
            if self.fixed_shapes and any(
                (held.shape or structure.shapes[name]) != structure.shapes[name]
                for name, held in inner.forecast(structure).items()
            ):
                raise UsageError(
                    f"{self} needs matrices of the same shape before and after, and {inner} makes them smaller; "
                    f"prune with {inner} first, then the result with the other method"
                )

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        """The expected result for every matrix in scope, by full name: counts, and another shape where it changes."""
        raise NotImplementedError

    def reduced(self, structure: "ModelStructure") -> "ModelStructure":
        """The structure of the model that is left, where whole blocks or experts are removed; else the given one."""
        return structure

    def added_parameters(self, structure: "ModelStructure") -> int:
        """How many parameters are added that the model does not have, such as biases."""
        return 0

    def work_bytes(self, structure: "ModelStructure", itemsize: int) -> int:
        """Bytes on disk of intermediate results, which stay until the run is finished. itemsize: of a weight."""
        return 0

    def pattern_of(self, shape: Shape, name: str) -> Pattern | None:
        """The pattern that a matrix [out, in] satisfies afterwards; None where the method guarantees none."""
        return None

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        """Examines the dense model before pruning, where a method needs it; the default does not.

        windows: calibration token ids [windows, tokens]. work: keeps intermediate results until the run is finished.
        """
        return self

    def __str__(self) -> str:
        return write_method(self)


class PatternMethod(Method):
    """A method that gives every matrix a pattern, and accepts other patterns."""

    @property
    def base(self) -> NM | None:
        """The N:M pattern that every matrix keeps in any case; None where there is none."""
        return None

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        """The pattern of the linear `name`, [out, in]."""
        raise NotImplementedError

    def keeping(self, share: float) -> PatternOf:
        """The patterns that keep this share of a matrix's weights. Raises UsageError where the share is fixed."""
        raise UsageError(f"allocate needs a method whose matrices may keep different shares; {self} gives all the same")

    def kept_share(self) -> float:
        """The share of its weights that every matrix keeps. Raises UsageError where there is nothing to divide."""
        raise UsageError(f"allocate needs a method whose matrices may keep different shares; {self} gives all the same")

    def prune_block(self, block: "Block", pattern_for: PatternOf) -> None:
        """Prunes the linears of one block to these patterns."""
        raise NotImplementedError

    def forecast_for(self, shape: Shape, pattern: Pattern) -> Forecast:
        """The expected result of a pattern on a matrix [out, in]."""
        return pattern.forecast(shape)

    def forecast_matrix(self, shape: Shape, name: str = "") -> Forecast:
        """The expected result for one matrix [out, in]."""
        return self.forecast_for(shape, self.pattern_for(shape, name))

    def check(self, linears: Mapping[str, Shape]) -> None:
        for name, shape in linears.items():
            self.pattern_for(shape, name).check(shape, name)

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        return {name: self.forecast_matrix(shape, name) for name, shape in structure.shapes.items()}

    def pattern_of(self, shape: Shape, name: str) -> Pattern | None:
        return self.pattern_for(shape, name)

    def __call__(self, block: "Block") -> None:
        self.prune_block(block, self.pattern_for)


@dataclasses.dataclass(frozen=True)
class Wrapper(Method):
    """A method that improves or directs another one, and delegates to it everything else."""

    inner: Method = dataclasses.field(metadata={"help": "the method, such as wrp(alpha=0.25)"})

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method):
            raise UsageError(f"{name_of(type(self))} needs a method such as wrp(alpha=0.25), got {self.inner!r}")

    def check(self, linears: Mapping[str, Shape]) -> None:
        self.inner.check(linears)

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        return self.inner.forecast(structure)

    def added_parameters(self, structure: "ModelStructure") -> int:
        return self.inner.added_parameters(structure)

    def work_bytes(self, structure: "ModelStructure", itemsize: int) -> int:
        return self.inner.work_bytes(structure, itemsize)

    def pattern_of(self, shape: Shape, name: str) -> Pattern | None:
        return self.inner.pattern_of(shape, name)


def values_of(method: Method, asked: str | None) -> str | None:
    """The values to store: those that a method fits, or those asked for. Raises UsageError where they differ."""
    fitted = method.fitted_values
    if fitted and asked not in (None, fitted):
        raise UsageError(f"{method} fits its weights to {fitted} values, and --values asks for {asked}; leave it out")
    return fitted or asked


def layout_of(layout: str, method: Method, structure: "ModelStructure") -> str:
    """The layout to store a result in: dense in place of "auto" where no matrix is left with zeros.

    Where a method has fitted all of its weights to integers, recovered ones are stored as such too.
    """
    if method.fitted_values and layout == f"auto_{method.fitted_values}":
        recovers = any(held.recovered is not None for held in method.forecast(structure).values())
        return f"bitmask_{method.fitted_values}" if recovers else layout
    forecast = method.forecast(structure) if layout == "auto" else {}
    shapes = structure.shapes if forecast else {}
    full = [held.nonzeros >= math.prod(held.shape or shapes[name]) for name, held in forecast.items()]
    return "dense" if full and all(full) else layout


def inner_methods(method: Method) -> list[Method]:
    """The methods among the options of a method."""
    values = (getattr(method, field.name) for field in dataclasses.fields(method))  # type: ignore[arg-type]
    return [value for value in values if isinstance(value, Method)]


def prune(linear: "Linear", scores: Tensor, pattern: Pattern) -> int:
    """Sets to zero what `pattern` does not keep of scores [out, in]; returns the number of kept positions."""
    with naming(linear.name):
        keep = pattern.keep(scores)  # [out, in]
    linear.weight = torch.where(keep, linear.stored, 0)  # a product would leave negative zeros
    return int(keep.sum())


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turns scores that cannot be ranked into a RunError that names the linear."""
    try:
        yield
    except NotFinite as error:
        raise RunError(f"{name}: {error}; check the weights and the calibration for NaN and overflow") from error


def name_of(kind: type[Method]) -> str:
    """The name of a method in expressions: its own `name`, or that of its class in lower case."""
    return kind.name or kind.__name__.lower()


def write_method(method: Method) -> str:
    """The canonical expression: the options that differ from their defaults, or the first one where none does.

    The first is written without its name if it is text or a method.
    """
    fields = [field for field in dataclasses.fields(method) if field.init]  # type: ignore[arg-type]
    shown = [field for field in fields if getattr(method, field.name) != default_of(field)] or fields[:1]
    arguments = []
    for field in shown:
        value = getattr(method, field.name)
        bare = field is fields[0] and isinstance(value, str | Method)
        arguments.append(_write(value) if bare else f"{field.name}={_write(value)}")
    return f"{name_of(type(method))}({', '.join(arguments)})"


def default_of(field: dataclasses.Field) -> Any:
    """The default of an option; MISSING where it must be given."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _write(value: Any) -> str:
    if isinstance(value, Method):
        return write_method(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
