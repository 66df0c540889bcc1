"""`rtn("int4", group=128)`: quantised rows of a comparison, so that pruned models stand beside what users have.

The dense model is rounded and dequantised block by block; what is written is an ordinary dense folder, read once by the
evaluations and dropped. The bytes of the row are counted from codes, scales and zero points (`sparsity/rounding.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from budwood.errors import UsageError
from budwood.methods.expression import parse_method
from budwood.methods.method import Method, inner_methods
from budwood.methods.option import option
from budwood.methods.registry import METHODS
from budwood.methods.validation import one_of, whole
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.rounding import rounded, rounded_bytes

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.stream.block import Block

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Rtn(Method):
    """Round to nearest: every matrix in scope to integers with a scale and a zero point for each group of columns."""

    values: Literal["int8", "int4"] = option("int8", "integers of 8 or of 4 bits")
    group: int = option(128, "columns with one scale")

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("values", self.values, BITS)
        whole("group", self.group, 1)

    @property
    def bits(self) -> int:
        return BITS[self.values]

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        """Every position is kept."""
        return {name: Forecast(shape[0] * shape[1]) for name, shape in structure.shapes.items()}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of one matrix [out, in] as it would be stored."""
        return rounded_bytes(shape, self.bits, self.group)

    def __call__(self, block: "Block") -> None:
        for linear in block.linears.values():
            linear.weight = rounded(linear.stored, self.bits, self.group).to(linear.stored.dtype)


def parse_row(text: str) -> Method | None:
    """The method of a row: an expression, `rtn(...)`, or None for `dense`. Raises UsageError for the rest."""
    if text.strip() == "dense":
        return None
    method = parse_method(text, METHODS | {"rtn": Rtn})
    if any(isinstance(inner, Rtn) for inner in nested(method)):
        raise UsageError(f"in {text!r}: rtn stands alone; it rounds the dense model and no pruned one")
    return method


def nested(method: Method) -> list[Method]:
    """All methods inside a method."""
    found = inner_methods(method)
    return found + [deeper for inner in found for deeper in nested(inner)]
