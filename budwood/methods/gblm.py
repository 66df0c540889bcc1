"""GBLM-Pruner: weights, activations and gradients (Das, Sun, Ma, Shen, 2023, arXiv 2311.04902)."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import PatternMethod, Step, naming, prune
from budwood.methods.metrics import norm_statistic, reached
from budwood.methods.option import option
from budwood.methods.validation import number, one_of, truth
from budwood.sparsity import scores
from budwood.sparsity.patterns import NM, LowPrunes, Pattern, Shape, parse_pattern
from budwood.sparsity.statistics import PublishedNorm, SquaredNorm

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block, Linear
    from budwood.stream.model import Model

log = logging.getLogger(__name__)

SAMPLES = 128  # of the published setting, at which alpha means the same with published=True
ROWS = 256  # of a matrix, about, in which masks are compared
SAME, OTHER = 0.999, 0.6  # agreement with Wanda's masks above and below which one of the two terms has no effect


@dataclass(frozen=True)
class Gblm(PatternMethod):
    """Drop the weights of each row whose magnitude, times the norm of their input plus that of their gradient over the
    calibration windows, is smallest. No weight is changed.
    """

    pattern: str = option("50%", 'N:M such as "2:4" (N kept of M), or a share to drop of every row such as "50%"')
    norm: Literal["l1", "l2"] = option("l1", "of the gradients of one weight over the calibration windows")
    alpha: float = option(100, "weight of the gradients; with 0 the masks are those of wanda")
    published: bool = option(
        False,
        "sums and ties of the published program: gradients are summed over the windows, so alpha depends on their "
        "number; a share drops the lower index, and torch's unstable top-k decides N:M",
    )

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        one_of("norm", self.norm, ("l1", "l2"))
        number("alpha", self.alpha, 0, float("inf"))
        if math.isinf(self.alpha):
            raise UsageError("alpha must be finite")
        truth("published", self.published)

    def pattern_for(self, shape: Shape, name: str) -> Pattern:
        pattern = parse_pattern(self.pattern)
        if not self.published:
            return pattern
        return replace(pattern, published=True) if isinstance(pattern, NM) else LowPrunes(pattern)

    def kept_share(self) -> float:
        raise UsageError(f"allocate needs a method that looks at one block at a time, and {self} needs gradients")

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        work.record("gradients", lambda: save_gradients(model, windows, work, self.norm))
        return GblmStep(self, len(windows), work)

    def factor(self, windows: int) -> float:
        """What the mean norm of a gradient over windows is multiplied by: their number, or the published one."""
        samples = windows if self.published else SAMPLES
        return samples if self.norm == "l1" else math.sqrt(samples)


def save_gradients(model: "Model", windows: Tensor, work: "Work", norm: str) -> dict[str, int | str]:
    """Stores the mean norm of the gradient of every weight, one file per block; a description of them.

    l1: (1/N) Σ |g|. l2: sqrt((1/N) Σ g²). N windows, g of the mean loss of one window. Raises RunError where a loss is
    not finite.
    """
    from budwood.models.linears import read
    from budwood.training.gradients import Sums, gradients

    kind = {"l1": "magnitude", "l2": "square"}[norm]
    sums = Sums(kind)

    def finished(index: int) -> None:
        inside = f"{model.path}.{index}."
        norms: dict[str, Tensor] = {}
        for name, module in model.linears.items():
            if name.startswith(inside):
                mean = sums.take(name, read(module))[kind].div_(len(windows))
                norms[name] = (mean if norm == "l1" else mean.sqrt_()).contiguous().cpu()
        work.save(f"gradients-{inside[:-1]}", norms)

    gradients(model, windows, model.linears, sums, finished)
    return {"norm": norm, "windows": len(windows), "tokens": windows.shape[1]}


@dataclass(frozen=True)
class GblmStep(Step):
    """windows: number of them. work: holds the gradients of every block."""

    method: Gblm
    windows: int
    work: "Work"
    agreements: list[float] = field(default_factory=list)  # with Wanda's masks, of the matrices so far

    def __call__(self, block: "Block") -> None:
        method = self.method
        norms: Mapping[str, SquaredNorm | PublishedNorm] = block.collect(norm_statistic(method.published))
        stored = self.work.tensors(f"gradients-{block.name}")
        for name, linear in block.linears.items():
            pattern = method.pattern_for(linear.shape, linear.name)
            if not reached(linear, norms[name]):
                prune(linear, scores.magnitude(linear.weight), pattern)
                continue
            by_gradient = stored.pop(linear.name) * method.factor(self.windows)
            if not by_gradient.any():
                log.warning("%s: all its gradients are zero, so it is pruned by weights and activations", linear.name)
            inputs = self.per_window(norms[name])
            with naming(linear.name):
                keep = pattern.keep(scores.gblm(linear.weight, inputs, by_gradient, method.alpha))
                self.compare(linear, keep, inputs, by_gradient, pattern)
            linear.weight = torch.where(keep, linear.stored, 0)

    def per_window(self, norm: SquaredNorm | PublishedNorm) -> Tensor:
        """Root of the mean over windows of the summed squares of each input [in], as the published program has it.

        Not rounded as for `wanda`, since rounding would depend on the number of windows; except with alpha=0.
        """
        if isinstance(norm, PublishedNorm) or not self.method.alpha:
            return norm.norms()
        return (norm.total / self.windows).sqrt().float()

    def compare(self, linear: "Linear", keep: Tensor, inputs: Tensor, by_gradient: Tensor, pattern: Pattern) -> None:
        """Notes how far the gradients change the mask, in some rows."""
        rows = slice(None, None, max(1, linear.shape[0] // ROWS))
        wanda = pattern.keep(scores.wanda(linear.weight[rows], inputs))
        self.agreements.append(float((wanda == keep[rows]).float().mean()))
        share = self.method.alpha * float(by_gradient[rows].median()) / max(float(inputs.median()), 1e-30)
        agreement = 100 * self.agreements[-1]
        log.info("%s: gradients weigh %.3g of activations, %.2f %% as wanda", linear.name, share, agreement)

    def finish(self, run: "Run") -> None:
        """Warns where most masks show that alpha lies in a range in which one of the two terms does nothing."""
        if self.method.alpha and self.agreements:
            middle = median(self.agreements)
            if middle > SAME or middle < OTHER:
                what = "gradients change almost nothing" if middle > SAME else "activations hardly count"
                log.warning("alpha=%g: %.2f %% of the masks are as wanda's, %s", self.method.alpha, 100 * middle, what)
