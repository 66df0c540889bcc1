"""A look at the whole dense model before pruning: which matrices must keep more of the weights that a budget buys."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from budwood.errors import UsageError
from budwood.methods.method import Method
from budwood.methods.metrics import heard
from budwood.methods.settings import one_of
from budwood.sparsity import scores
from budwood.sparsity.allocation import Curve, curve_of, divide
from budwood.sparsity.patterns import NM, Pattern, Shape, parse_pattern
from budwood.sparsity.statistics import SquaredNorm

Allocate = Literal["uniform", "global"]
WINDOWS, TOKENS = 8, 256  # of the calibration windows: norms from all of them, divergences on the first


def check_allocate(allocate: str, pattern: str) -> None:
    """UsageError where N:M, which leaves nothing to divide, is asked to be divided."""
    one_of("allocate", allocate, ("uniform", "global"))
    if allocate == "global" and isinstance(parse_pattern(pattern), NM):
        raise UsageError(
            f"allocate='global' divides a share among matrices, and {pattern} is the same in all; give '50%'"
        )


def kept_shares(method: Method, model: Any, windows: Tensor, base: NM | None = None) -> dict[str, float]:
    """The share of its weights that each linear keeps, by full name, so that all keep what `method` keeps of them.

    base: N:M that is kept in any case.
    """
    shapes: Mapping[str, Shape] = model.anatomy.shapes
    total = round(sum(method.outlook(shape, name).nonzeros for name, shape in shapes.items()))
    counts = kept_counts(model, windows, method.pattern_for, base, total)
    return {name: count / (shapes[name][0] * shapes[name][1]) for name, count in counts.items()}


def kept_counts(
    model: Any, windows: Tensor, pattern_for: Callable[[Shape, str], Pattern], base: NM | None, total: int
) -> dict[str, int]:
    """How many weights each linear keeps, by full name: `total` in all, where the logits of the model change least.

    A matrix loses Σ (|w| ‖x‖)² over what is dropped, times its sensitivity: the divergence from the dense logits, per
    unit of that loss, when it alone is pruned by `pattern_for`. base: N:M that is kept in any case. windows: token ids
    [windows, tokens]. One pass over the blocks; the hidden states of one short window are kept for every linear.
    """
    few = windows[:WINDOWS, :TOKENS]
    losses: dict[str, float] = {}
    curves: dict[str, Curve] = {}
    hidden: dict[str, Tensor] = {}  # after the blocks so far, with one linear pruned
    for block in model.blocks(few, batch=1):
        norms = block.collect(SquaredNorm)
        with torch.no_grad():
            hidden = {name: block.forward(states) for name, states in hidden.items()}
            for name, linear in block.linears.items():
                dense = linear.weight.clone()  # setting a weight may write into the tensor that was read
                known = heard(linear, norms[name])
                worth = scores.wanda(dense, norms[name].norms()) if known else scores.magnitude(dense)
                keep = pattern_for(linear.shape, linear.name).keep(worth)
                loss = worth.square()
                always = base.keep(worth) if base else torch.zeros_like(keep)
                losses[linear.name] = float(loss[~keep].sum(dtype=torch.float64))
                curves[linear.name] = curve_of(loss[~always], first=int(always.sum()))
                linear.weight = torch.where(keep, dense, 0)
                hidden[linear.name] = block.run(0)
                linear.weight = dense
    with model.outside(), torch.no_grad():
        truth = log_softmax(model.logits(model.activations.read(0, model.device)).float(), dim=-1)
        divergence = {name: _divergence(truth, model.logits(states)) for name, states in hidden.items()}
    weighed = {}
    for name, curve in curves.items():
        sensitivity = divergence[name] / losses[name] if losses[name] else 0.0
        weighed[name] = Curve(curve.cost, [sensitivity * loss for loss in curve.loss])
    return {name: int(count) for name, count in divide(weighed, total).items()}


def _divergence(truth: Tensor, logits: Tensor) -> float:
    """KL of the dense distribution to the other, summed over tokens; never below 0."""
    other = log_softmax(logits.float(), dim=-1)
    return max(0.0, float(kl_div(other, truth, log_target=True, reduction="sum")))
