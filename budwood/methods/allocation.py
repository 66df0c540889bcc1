"""A look at the whole dense model before pruning: which matrices must keep more of the weights that a budget buys."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from budwood.errors import UsageError
from budwood.methods.method import Method
from budwood.methods.metrics import heard
from budwood.methods.validation import one_of
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
    shapes: Mapping[str, Shape] = model.structure.shapes
    total = round(sum(method.forecast(shape, name).nonzeros for name, shape in shapes.items()))
    counts = kept_counts(model, windows, method.pattern_for, base, total)
    return {name: count / (shapes[name][0] * shapes[name][1]) for name, count in counts.items()}


def kept_counts(
    model: Any, windows: Tensor, pattern_for: Callable[[Shape, str], Pattern], base: NM | None, total: int
) -> dict[str, int]:
    """How many weights each linear keeps, by full name: `total` in all, where the logits of the model change least.

    A matrix loses Σ (|w| ‖x‖)² over what is dropped, times two measured factors: how far the outputs of its block move
    per unit of that loss, when it alone is pruned by `pattern_for`, and how far the logits diverge from the dense ones
    per unit of such movement, when all of its block is. base: N:M that is kept in any case. windows: token ids
    [windows, tokens]. One pass over the blocks; the hidden states of one short window are kept for every block.
    """
    few = windows[:WINDOWS, :TOKENS]
    curves: dict[str, Curve] = {}
    places: list[tuple[dict[str, float], float]] = []  # by block: movement per loss of its linears, movement of all
    hidden: list[Tensor] = []  # after the blocks so far, with one of them pruned
    for block in model.blocks(few, batch=1):
        norms = block.collect(SquaredNorm)
        with torch.no_grad():
            hidden = [block.forward(states) for states in hidden]
            right = block.run(0)
            dense = {name: linear.weight.clone() for name, linear in block.linears.items()}  # setting may write into it
            pruned, movement = {}, {}
            for name, linear in block.linears.items():
                known = heard(linear, norms[name])
                worth = scores.wanda(dense[name], norms[name].norms()) if known else scores.magnitude(dense[name])
                keep = pattern_for(linear.shape, linear.name).keep(worth)
                loss = worth.square()
                always = base.keep(worth) if base else torch.zeros_like(keep)
                curves[linear.name] = curve_of(loss[~always], first=int(always.sum()))
                pruned[name] = linear.weight = torch.where(keep, dense[name], 0)
                lost = float(loss[~keep].sum(dtype=torch.float64))
                movement[linear.name] = _movement(block.run(0), right) / lost if lost else 0.0
                linear.weight = dense[name].clone()
            for name, linear in block.linears.items():
                linear.weight = pruned[name]
            hidden.append(block.run(0))
            places.append((movement, _movement(hidden[-1], right)))
            for name, linear in block.linears.items():
                linear.weight = dense[name]
    weighed = {}
    with model.outside(), torch.no_grad():
        truth = log_softmax(model.logits(model.activations.read(0, model.device)).float(), dim=-1)
        for (movement, whole), states in zip(places, hidden, strict=True):
            slope = _divergence(truth, model.logits(states)) / whole if whole else 0.0
            for name, each in movement.items():
                weighed[name] = Curve(curves[name].cost, [slope * each * loss for loss in curves[name].loss])
    return {name: int(count) for name, count in divide(weighed, total).items()}


def _movement(states: Tensor, right: Tensor) -> float:
    """Squared distance of hidden states [..., hidden] over their squared length, summed over tokens."""
    distance = (states.float() - right.float()).square().sum(dim=-1)
    return float((distance / right.float().square().sum(dim=-1).clamp(min=1e-30)).sum())


def _divergence(truth: Tensor, logits: Tensor) -> float:
    """KL of the dense distribution to the other, summed over tokens; never below 0."""
    other = log_softmax(logits.float(), dim=-1)
    return max(0.0, float(kl_div(other, truth, log_target=True, reduction="sum")))
