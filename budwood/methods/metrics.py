"""The scores of every linear of a block, each by one metric. A dict, one line per metric."""

import logging
from collections.abc import Callable, Iterator

from torch import Tensor

from budwood.methods.method import Block, Linear
from budwood.sparsity import scores
from budwood.sparsity.statistics import Gram, PublishedNorm, SquaredNorm

log = logging.getLogger(__name__)

DAMP = 0.01  # of the mean diagonal, as SparseGPT has it


def magnitude(block: Block) -> Iterator[tuple[Linear, Tensor]]:
    for linear in block.linears.values():
        yield linear, scores.magnitude(linear.weight)


def wanda(block: Block, published: bool = False) -> Iterator[tuple[Linear, Tensor]]:
    norms = block.collect(PublishedNorm) if published else block.collect(SquaredNorm)
    for name, linear in block.linears.items():
        if heard(linear, norms[name]):
            yield linear, scores.wanda(linear.weight, norms[name].norms())
        else:
            yield linear, scores.magnitude(linear.weight)


def obs(block: Block) -> Iterator[tuple[Linear, Tensor]]:
    grams = block.collect(Gram)
    for name, linear in block.linears.items():
        if heard(linear, grams[name]):
            yield linear, scores.obs(linear.weight, grams[name].factor(DAMP))
        else:
            yield linear, scores.magnitude(linear.weight)


def heard(linear: Linear, statistic: SquaredNorm | PublishedNorm | Gram) -> bool:
    """Whether any token reached the linear; warns that an expert without any is pruned by magnitude.

    Raises RunError where the tokens held NaN or infinite values.
    """
    statistic.check(linear.name)
    if statistic.count == 0:
        log.warning("%s: no calibration token reached it, so it is pruned by magnitude", linear.name)
    return statistic.count > 0


METRICS: dict[str, Callable[[Block], Iterator[tuple[Linear, Tensor]]]] = {
    "wanda": wanda,
    "magnitude": magnitude,
    "obs": obs,
}
