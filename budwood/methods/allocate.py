"""allocate: divides the kept weights of a method among the matrices by their effect on the logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.allocation import kept_counts, kept_shares
from budwood.methods.method import PatternMethod, Step, Wrapper
from budwood.methods.option import required
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.patterns import Pattern, Shape

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.stream.block import Block
    from budwood.stream.model import Model


@dataclass(frozen=True)
class Allocate(Wrapper):
    """Divide the weights that a method keeps over all matrices, so that the logits of the model change least.

    The method must keep a share that may differ from matrix to matrix: wanda("50%"), sparsegpt("50%"),
    wrp(density=0.05). All matrices together keep as many weights as without allocate.
    """

    inner: PatternMethod = required('the method, such as wanda("50%") or wrp(density=0.05)')

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, PatternMethod):
            raise UsageError(f"allocate needs a method that keeps a share of each matrix, not {self.inner}")
        self.inner.kept_share()  # raises where the share is fixed

    @property
    def fitted_values(self) -> str | None:
        return self.inner.fitted_values

    def pattern_of(self, shape: Shape, name: str) -> Pattern | None:
        return None

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        pattern_for = self.inner.keeping(self.inner.kept_share())
        return {
            name: self.inner.forecast_for(shape, pattern_for(shape, name)) for name, shape in structure.shapes.items()
        }

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        shapes = model.structure.shapes
        total = round(sum(held.nonzeros for held in self.forecast(model.structure).values()))
        pattern_for = self.inner.keeping(self.inner.kept_share())
        counts = kept_counts(model, windows, work, self, pattern_for, self.inner.base, total)
        return AllocatedStep(self.inner, kept_shares(counts, shapes))


@dataclass(frozen=True)
class AllocatedStep(Step):
    """shares: the share of its weights that each linear keeps, by full name."""

    method: PatternMethod
    shares: Mapping[str, float]

    def __call__(self, block: "Block") -> None:
        def pattern_for(shape: Shape, name: str) -> Pattern:
            return self.method.keeping(self.shares[name])(shape, name)

        self.method.prune_block(block, pattern_for)
