"""The rows of the benchmark of bits: patterns, densities and values, as methods."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budwood.methods import parse_method
from budwood.methods.method import Method, Step, Wrapper
from budwood.sparsity.codes import GROUP
from budwood.sparsity.rounding import SCALE_BITS, rounded

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model

DENSITIES = {"2:4": (0.53, 0.6, 0.7, 0.8, 0.9), "free": (0.4, 0.5, 0.54, 0.6, 0.7, 0.79, 0.9)}
SCALE = (SCALE_BITS + 3) / GROUP  # bits per weight of scales and zero points of three bits
BUDGETS = {"free": (2.75, 3.25, 3.3, 3.75, 4.3, 5.0), "2:4": (3.25, 3.6, 4.3, 5.0)}  # of int4 fitted


@dataclass(frozen=True)
class Row:
    """method: an expression, None for the model itself. values: the option of `prune`. kind: of values.

    simulated: values are rounded by `Levels` and written dense. counted: the bits of a report that are not stored.
    """

    pattern: str
    kind: str
    method: str | None = None
    values: str | None = None
    calibrated: bool = True
    simulated: bool = False
    counted: Callable[[dict[str, Any]], float] | None = None


def rows() -> dict[str, Row]:
    """By name, the dense model first."""
    found = {
        "dense": Row("dense", "bf16", calibrated=False),
        "dense int8": Row("dense", "int8", "dense()", "int8", calibrated=False),
        "dense int4": Row("dense", "int4", "dense()", "int4", calibrated=False),
        "dense int4 fitted": Row("dense", "int4 fitted", 'refit(dense(), values="int4")'),
        "dense int3": simulated("dense", "dense()", calibrated=False),
    }
    for pattern, densities in DENSITIES.items():
        for density in densities:
            name, method = f"{pattern} {density:.0%}", f'graft(bits={1 + 16 * density:g}, pattern="{pattern}")'
            found[f"{name} bf16"] = Row(pattern, "bf16", method)
            found[f"{name} int8"] = Row(pattern, "int8", method, "int8")
            found[f"{name} int4"] = Row(pattern, "int4", method, "int4")
            if density <= 0.6:
                found[f"{name} int3"] = simulated(pattern, method)
        for bits in BUDGETS[pattern]:
            method = f'graft(bits={bits:g}, pattern="{pattern}", values="int4")'
            found[f"{pattern} int4 fitted in {bits:g} bits"] = Row(pattern, "int4 fitted", method)
    return found


def simulated(pattern: str, method: str, calibrated: bool = True) -> Row:
    """Values of three bits, counted in a bitmask, or without one where nothing is dropped."""
    places = 0 if pattern == "dense" else 1
    return Row(
        pattern,
        "int3",
        method,
        calibrated=calibrated,
        simulated=True,
        counted=lambda report: places + 3 * report["totals"]["density"] + SCALE,
    )


@dataclass(frozen=True)
class Levels(Wrapper):
    """The weights of another method rounded to 8 levels for every group of a row, with a zero point; zeros stay."""

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        return LevelsStep(self.inner.prepare(model, windows, work))


@dataclass(frozen=True)
class LevelsStep(Step):
    inner: Step

    def __call__(self, block: "Block") -> None:
        self.inner(block)
        for linear in block.linears.values():
            linear.weight = torch.where(linear.weight != 0, rounded(linear.stored, 3, GROUP), 0)

    def finish(self, run: "Run") -> None:
        self.inner.finish(run)


def method_of(row: Row) -> Method:
    """The method of a row that has one."""
    assert row.method is not None
    return Levels(parse_method(row.method)) if row.simulated else parse_method(row.method)


ROWS = rows()
