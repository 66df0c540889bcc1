"""Retraining of a whole pruned model on text: a small set of its tensors, by the loss of the next token."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from budwood import humanize
from budwood.checkpoints.writer import Writer
from budwood.errors import RunError
from budwood.models.block_calls import record_calls
from budwood.models.linears import read
from budwood.progress import Progress
from budwood.stream.activations import batch_size
from budwood.stream.arithmetic import name_of
from budwood.stream.model import PROBE, Model
from budwood.training.adapters import MaskLora
from budwood.training.descent import Checkpoints, Curve, Descent, curve_of, descend, part_of, split
from budwood.training.gradients import scale_of
from budwood.training.move import Move, check_head, head_of, moving_outside, vectors, without_effect
from budwood.training.trainable import Trainable

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work

TOKENS = 2048  # in one forward and backward pass; a step adds up several
MORE = 4  # times as many on a GPU
KEPT = 40  # values that a block keeps of a token for its backward pass, per hidden feature, about
RECOMPUTED = 2**30  # bytes of these, in all blocks, above which a block is computed again in the backward pass


@dataclass(frozen=True)
class Recovery:
    """rank, alpha: of the head's plain low-rank term. batch: windows of a step. save_every: steps, of checkpoints."""

    move: Move
    descent: Descent = field(default_factory=Descent)
    rank: int = 16
    alpha: float = 32.0
    batch: int = 8
    seed: int = 0
    save_every: int = 50


@dataclass
class Recovered:
    """values: of the trained tensors by key, see `Trainable`. head: the adapter of the head, where it moved."""

    values: dict[str, Tensor]
    curve: Curve
    head: MaskLora | None = None


def retrain(
    model: Model,
    windows: Tensor,
    recovery: Recovery,
    work: "Work",
    name: str,
    writer: Writer | None = None,
    progress: Progress | None = None,
    note: Callable[[str], object] = lambda sentence: None,
) -> Recovered:
    """The trained tensors after retraining on windows [windows, tokens], of which an eighth are held out.

    writer: blocks that it has finished are read from there. work: keeps checkpoints under `name`, from which an
    interrupted call continues. Raises RunError where a loss is not finite, UsageError for a head that is tied.
    """
    check_head(recovery.move, model.module)
    head = MaskLora(recovery.rank, recovery.alpha) if recovery.move.head else None
    checkpoints = Checkpoints(work, name, recovery.save_every)
    found = checkpoints.read()
    if found is not None and (curve := curve_of(found)).done:
        return Recovered(part_of(found, "best"), curve, head)
    with model.resident(writer):
        trainable = trainable_of(model, recovery, windows, head)
        note(described(model, trainable, recovery, windows.shape[1]))
        training, out = split(len(windows))
        many = at_once(model, recovery.batch, windows.shape[1])
        with trainable.attached(), blocks_recomputed(model, many * windows.shape[1]):
            curve = descend(
                trainable,
                partial(slope, model, windows[training], recovery, many),
                recovery.descent,
                held=partial(held_out, model, trainable, windows[out], many) if out else None,
                scale=scale_of(model),
                checkpoints=checkpoints,
                progress=progress,
                what="retraining",
            )
        return Recovered(trainable.values(), curve, head)


def at_once(model: Model, batch: int, tokens: int) -> int:
    """How many of a step's windows of so many tokens go through the model together."""
    return batch_size(batch, tokens, TOKENS if model.device.type == "cpu" else MORE * TOKENS)


def trainable_of(model: Model, recovery: Recovery, windows: Tensor, head: MaskLora | None) -> Trainable:
    """What moves of a model in memory."""
    move = recovery.move
    parameters = vectors(model.module, move) | moving_outside(model.module, move)
    if move.biases:
        for name in biases_without_effect(model, windows):
            parameters.pop(name, None)
    dense = head_of(model.module) if head else {}
    return Trainable(parameters, model.linears, move.adapter, recovery.seed, dense, head)


def biases_without_effect(model: Model, windows: Tensor) -> set[str]:
    """See `without_effect`: of all blocks of a model in memory, by full name."""
    ids = windows[:1, :PROBE].to(model.device)
    calls = record_calls(model.module, model.modules, ids)
    hidden = calls.embed(ids)
    found: set[str] = set()
    for index, block in enumerate(model.modules):
        run = partial(_run, calls, index, block, hidden)
        found |= {f"{model.path}.{index}.{name}" for name in without_effect(block, run)}
    return found


def _run(calls: Any, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
    result: Tensor = calls.run(index, block, hidden.clone())
    return result


@contextmanager
def blocks_recomputed(model: Model, tokens: int) -> Iterator[None]:
    """In this context blocks keep only their inputs for the backward pass, where all values together take much."""
    width = model.module.get_input_embeddings().get_parameter("weight").shape[-1]
    kept = KEPT * width * tokens * len(model) * model.compute.itemsize
    if kept <= RECOMPUTED:
        yield
        return
    try:
        for block in model.modules:
            block.__dict__["forward"] = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for block in model.modules:
            block.__dict__.pop("forward", None)


def slope(model: Model, windows: Tensor, recovery: Recovery, many: int, step: int) -> float:
    """Makes the gradients of one step, a few windows at a time; the mean loss of its windows."""
    total = 0.0
    chosen = windows[order(len(windows), recovery.batch, step, recovery.seed)]
    with torch.enable_grad():
        for ids in chosen.split(many):
            share = len(ids) / len(chosen)
            loss = loss_of(model, ids) * share
            (loss * scale_of(model)).backward()
            total += loss.item()
    return total


def order(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The windows of a step: all of them once, in an order of its own for every pass, before any comes again."""
    places = range(step * batch, (step + 1) * batch)
    passes = {place // count for place in places}
    orders = {
        number: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 2**32 + number)).tolist()
        for number in passes
    }
    return [orders[place // count][place % count] for place in places]


def held_out(model: Model, trainable: Trainable, windows: Tensor, many: int) -> float:
    """The mean loss over windows of the model as it would be written."""
    with trainable.finished():
        return sum(float(loss_of(model, ids)) * len(ids) for ids in windows.split(many)) / len(windows)


def loss_of(model: Model, windows: Tensor) -> Tensor:
    """The mean cross-entropy of the next token over windows [windows, tokens], by a model in memory."""
    ids = windows.to(model.device)
    logits = model.module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if not loss.isfinite():
        raise RunError(
            f"the loss of retraining is {loss.item()} in {name_of(model.compute)}; "
            "lower the rate, or compute in float32"
        )
    return loss


def described(model: Model, trainable: Trainable, recovery: Recovery, tokens: int) -> str:
    """What is trained and what it takes, before it begins."""
    total = model.structure.parameters
    largest = max((read(linear).numel() for linear in model.linears.values()), default=0)
    memory = total * model.compute.itemsize + trainable.nbytes + 2 * 4 * largest
    return (
        f"training {trainable.count:,} numbers, {humanize.share(trainable.count / total)} of the {total:,} weights, "
        f"on {recovery.descent.steps:,} steps of {recovery.batch} windows of {tokens} tokens; "
        f"{humanize.size(memory)} of memory and the activations"
    )


def record_of(found: Recovered, model: Model, what: Mapping[str, Any]) -> dict[str, Any]:
    """The section of the report, JSON-plain. what: the options."""
    count = sum(value.numel() for value in found.values.values())
    return {
        **what,
        "trained": count,
        "trained_share": count / model.structure.parameters,
        "state_bytes": 5 * 4 * count,
        **found.curve.record(),
    }
