"""refit: least-squares values for the weights that another method kept."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from budwood.methods.fitting import PULL, VALUES, check_fit, check_values, fit
from budwood.methods.method import Step, Wrapper
from budwood.methods.metrics import norm_statistic, reached
from budwood.methods.option import option
from budwood.methods.validation import number
from budwood.sparsity.statistics import Gram
from budwood.stream.cross_moments import cross_moments
from budwood.stream.dense_stream import DenseStream

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model


@dataclass(frozen=True)
class Refit(Wrapper):
    """Let another method choose the mask, then fit the kept weights to the outputs of the dense matrix.

    The mask of the inner method does not change.
    """

    fixed_shapes: ClassVar[bool] = True

    damp: float = option(0.01, "pull towards the dense weights, as a share of the mean second moment")
    iterations: int = option(100, "most steps of conjugate gradients")
    tolerance: float = option(1e-3, "a row is fitted when its gradient has shrunk to this share")
    target: float = option(
        0.0,
        "0 fits to the outputs of the dense weights for the pruned model's inputs, 1 to those of the dense model, and "
        "values between mix both",
    )
    values: str | None = option(None, VALUES)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.damp, self.iterations, self.tolerance)
        number("target", self.target, 0, 1)
        check_values(self.values)

    @property
    def fitted_values(self) -> str | None:
        return self.values

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        dense = DenseStream(model, windows, model.batch_for(windows)) if self.target else None
        return RefitStep(self, self.inner.prepare(model, windows, work), dense)

    def __call__(self, block: "Block") -> None:
        RefitStep(self, self.inner, None)(block)


@dataclass(frozen=True)
class RefitStep(Step):
    """inner: chooses the masks. dense: the dense model's stream, where target is above 0."""

    method: Refit
    inner: Step
    dense: DenseStream | None

    def __call__(self, block: "Block") -> None:
        method = self.method
        with block.sharing(norm_statistic(method.published), Gram):
            grams = block.collect(Gram)
            crosses = cross_moments(self.dense.at(block.index), block) if self.dense else {}
            dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
            self.inner(block)
        for name, linear in block.linears.items():
            gram = grams.pop(name)
            if reached(linear, gram):
                start, moments = linear.weight, gram.matrix()
                cross = torch.lerp(moments, crosses[name], method.target).float() if crosses else None
                fit(
                    linear,
                    start,
                    start != 0,
                    dense[name],
                    moments.float(),
                    method.damp,
                    method.iterations,
                    method.tolerance,
                    cross,
                    method.values,
                    gram.factor(PULL) if method.values else None,
                )

    def finish(self, run: "Run") -> None:
        self.inner.finish(run)
