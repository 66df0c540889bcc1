"""A survey of the dense model before pruning: how many weights each matrix should keep of a common budget."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from budwood.methods.metrics import reached
from budwood.sparsity import scores
from budwood.sparsity.allocation import Curve, curve_of, divide
from budwood.sparsity.patterns import NM, Shape
from budwood.sparsity.statistics import SquaredNorm

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work
    from budwood.methods.method import Method, PatternOf
    from budwood.stream.model import Model

WINDOWS, TOKENS = 8, 256  # of the calibration windows: norms from all of them, divergences on the first


def kept_counts(
    model: "Model",
    windows: Tensor,
    work: "Work",
    method: "Method",
    pattern_for: "PatternOf",
    base: NM | None,
    total: int,
) -> dict[str, int]:
    """How many weights each linear keeps, by full name: `total` in all, so that the logits of the model change least.

    Dropping weights of a matrix costs Σ (|w| ‖x‖)² over these weights, times two measured factors: how far the outputs
    of its block move per unit of that loss, when it alone is pruned by `pattern_for`, and how far the logits diverge
    from the dense ones per unit of such movement, when all of its block is. base: the N:M pattern that is kept in any
    case. windows: token ids [windows, tokens]. One pass over the blocks; the hidden states of one short window are kept
    for every block. `work` stores the counts under the name of the method, so that a resumed run reads them.
    """
    name = f"allocation-{hashlib.sha256(str(method).encode()).hexdigest()[:8]}"
    counts = work.record(name, lambda: survey(model, windows, pattern_for, base, total))
    return {linear: int(count) for linear, count in counts.items()}


def survey(model: "Model", windows: Tensor, pattern_for: "PatternOf", base: NM | None, total: int) -> dict[str, int]:
    """See `kept_counts`."""
    few = windows[:WINDOWS, :TOKENS]
    curves: dict[str, Curve] = {}
    movements: list[tuple[dict[str, float], float]] = []  # by block: per loss of each linear, and of the whole block
    hidden: list[Tensor] = []  # after the blocks so far, with one of them pruned
    for block in model.survey(few, "survey of the dense model", batch=1):
        inputs = block.hidden_states(0)  # before the pass, which replaces them
        norms = block.observe(SquaredNorm)
        with torch.no_grad():
            hidden = [block.forward(states) for states in hidden]
            right = block.forward(inputs.clone())
            dense = {name: linear.weight.clone() for name, linear in block.linears.items()}  # setters write into them
            pruned, movement = {}, {}
            for name, linear in block.linears.items():
                known = reached(linear, norms[name])
                score = scores.wanda(dense[name], norms[name].norms()) if known else scores.magnitude(dense[name])
                keep = pattern_for(linear.shape, linear.name).keep(score)
                loss = score.square()
                always = base.keep(score) if base else torch.zeros_like(keep)
                curves[linear.name] = curve_of(loss[~always], first=int(always.sum()))
                pruned[name] = linear.weight = torch.where(keep, dense[name], 0)
                lost = float(loss[~keep].sum(dtype=torch.float64))
                movement[linear.name] = _movement(block.forward(inputs.clone()), right) / lost if lost else 0.0
                linear.weight = dense[name].clone()
            for name, linear in block.linears.items():
                linear.weight = pruned[name]
            hidden.append(block.forward(inputs.clone()))
            movements.append((movement, _movement(hidden[-1], right)))
            for name, linear in block.linears.items():
                linear.weight = dense[name]
    return _divided(model, curves, movements, hidden, total)


def _divided(
    model: "Model",
    curves: Mapping[str, Curve],
    movements: list[tuple[dict[str, float], float]],
    hidden: list[Tensor],
    total: int,
) -> dict[str, int]:
    """The budget divided by the curves, each scaled by the effect of its block's movement on the logits."""
    assert model.activations is not None
    weighed = {}
    with model.outside(), torch.no_grad():
        dense = log_softmax(model.logits(model.activations.read(0, model.device)).float(), dim=-1)
        for (movement, whole), states in zip(movements, hidden, strict=True):
            slope = _divergence(dense, model.logits(states)) / whole if whole else 0.0
            for name, each in movement.items():
                weighed[name] = Curve(curves[name].cost, [slope * each * loss for loss in curves[name].loss])
    return {name: int(count) for name, count in divide(weighed, total).items()}


def kept_shares(counts: Mapping[str, int], shapes: Mapping[str, Shape]) -> dict[str, float]:
    """Counts as shares of all weights of a matrix."""
    return {name: count / (shapes[name][0] * shapes[name][1]) for name, count in counts.items()}


def _movement(states: Tensor, right: Tensor) -> float:
    """Squared distance of hidden states [..., hidden] over their squared length, summed over tokens."""
    distance = (states.float() - right.float()).square().sum(dim=-1)
    return float((distance / right.float().square().sum(dim=-1).clamp(min=1e-30)).sum())


def _divergence(dense: Tensor, logits: Tensor) -> float:
    """KL divergence of the dense distribution (log probabilities) to the other, summed over tokens; never below 0."""
    other = log_softmax(logits.float(), dim=-1)
    return max(0.0, float(kl_div(other, dense, log_target=True, reduction="sum")))
