"""The scores of every linear of a block, by one metric each."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from budwood.sparsity import scores
from budwood.sparsity.statistics import Gram, PublishedNorm, SquaredNorm

if TYPE_CHECKING:
    from budwood.stream.block import Block
    from budwood.stream.linear import Linear

log = logging.getLogger(__name__)

DAMP = 0.01  # of the mean diagonal, as in SparseGPT


def norm_statistic(published: bool) -> Callable[[int], SquaredNorm | PublishedNorm]:
    """The statistic of input norms: the fast one, or the one with the sums of the published programs."""
    return PublishedNorm if published else SquaredNorm


def magnitude(block: "Block") -> Iterator[tuple["Linear", Tensor]]:
    for linear in block.linears.values():
        yield linear, scores.magnitude(linear.weight)


def wanda(block: "Block", published: bool = False) -> Iterator[tuple["Linear", Tensor]]:
    norms: Mapping[str, SquaredNorm | PublishedNorm] = block.collect(norm_statistic(published))
    for name, linear in block.linears.items():
        if reached(linear, norms[name]):
            yield linear, scores.wanda(linear.weight, norms[name].norms())
        else:
            yield linear, scores.magnitude(linear.weight)


def obs(block: "Block") -> Iterator[tuple["Linear", Tensor]]:
    grams = block.collect(Gram)
    for name, linear in block.linears.items():
        if reached(linear, grams[name]):
            yield linear, scores.obs(linear.weight, grams[name].factor(DAMP))
        else:
            yield linear, scores.magnitude(linear.weight)


def reached(linear: "Linear", statistic: SquaredNorm | PublishedNorm | Gram) -> bool:
    """Whether any calibration token reached the linear; warns that an expert without any is pruned by magnitude.

    Raises RunError where its inputs held NaN or infinite values.
    """
    statistic.check(linear.name)
    if statistic.count == 0:
        log.warning("%s: no calibration token reached it, so it is pruned by magnitude", linear.name)
    return statistic.count > 0


METRICS: dict[str, Callable[["Block"], Iterator[tuple["Linear", Tensor]]]] = {
    "wanda": wanda,
    "magnitude": magnitude,
    "obs": obs,
}
