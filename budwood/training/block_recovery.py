"""Fits a small set of tensors of one pruned block to the outputs of the dense block for the same inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budwood.stream.activations import Activations
from budwood.training.descent import Curve, Descent, descend, split
from budwood.training.move import Move, vectors, without_effect
from budwood.training.trainable import Trainable, merge

if TYPE_CHECKING:
    from budwood.stream.block import Block


@dataclass(frozen=True)
class BlockRecovery:
    """batch: windows of a step, taken in turn. hold_out: whether an eighth of the windows decides what is kept."""

    move: Move
    descent: Descent = field(default_factory=lambda: Descent(steps=256, clip=None))
    batch: int = 4
    seed: int = 0
    hold_out: bool = True


def outputs_of(block: "Block", limit: int) -> Activations:
    """The block's outputs for all its inputs [windows, tokens, hidden]; in a file beyond `limit` bytes."""
    inputs = block.activations
    assert inputs is not None
    outputs = Activations(inputs.shape, inputs.hidden.dtype, inputs.batch, limit)
    with torch.no_grad():
        for batch in inputs.indices():
            outputs.write(batch, block.run(batch))
    return outputs


def recover_block(
    block: "Block", targets: Activations, recovery: BlockRecovery, start: Mapping[str, Tensor] | None = None
) -> tuple[Curve, int]:
    """Trains a block in place, its matrices merged; unchanged where the held-out error did not fall. The curve, and how
    many numbers were trained.

    targets: what it should give for its inputs. The loss is the mean squared error over tokens and features.
    start: trained tensors to begin with, by key, where not as usual.
    """
    assert block.activations is not None
    inputs = block.activations.hidden
    own, out = split(len(inputs)) if recovery.hold_out else (list(range(len(inputs))), [])
    batches = [own[start : start + recovery.batch] for start in range(0, len(own), recovery.batch)]
    trainable = trainable_of(block, recovery)
    trainable.load({**trainable.values(), **(start or {})})

    def error(windows: list[int]) -> Tensor:
        hidden = block.forward(inputs[windows].to(block.device))
        return (hidden.float() - targets.hidden[windows].to(block.device).float()).square().mean()

    def slope(step: int) -> float:
        with torch.enable_grad():
            loss = error(batches[step % len(batches)])
            loss.backward()
        return loss.item()

    def held() -> float:
        with trainable.finished():
            parts = [out[start : start + recovery.batch] for start in range(0, len(out), recovery.batch)]
            return sum(float(error(part)) * len(part) for part in parts) / len(out)

    with trainable.attached():
        curve = descend(trainable, slope, recovery.descent, held=held if out else None)
        values = trainable.values()
    apply(block, recovery.move, values)
    return curve, trainable.count


def trainable_of(block: "Block", recovery: BlockRecovery) -> Trainable:
    move = recovery.move
    moving = vectors(block.module, move)
    if move.biases:
        hidden = block.activations.hidden[:1, :16] if block.activations else torch.empty(0)
        for name in without_effect(block.module, partial(_probe, block, hidden)):
            moving.pop(name, None)
    return Trainable(
        {f"{block.name}.{name}": parameter for name, parameter in moving.items()},
        {linear.name: linear.module for linear in block.linears.values()},
        move.adapter,
        recovery.seed,
    )


def _probe(block: "Block", hidden: Tensor) -> Tensor:
    return block.forward(hidden.clone().to(block.device))


def apply(block: "Block", move: Move, values: dict[str, Tensor]) -> None:
    """Puts trained tensors (by key, see `Trainable`) of any blocks into this one, rounded to the storage dtype."""
    prefix = f"{block.name}."
    with torch.no_grad():
        for name, value in values.items():
            if name.startswith(prefix) and ":" not in name:
                parameter = block.module.get_parameter(name.removeprefix(prefix))
                held = block.stored.get(name)
                dtype = held.dtype if held is not None else next(iter(block.linears.values())).stored.dtype
                parameter.copy_(value.to(dtype))
    if move.adapter is not None:
        for linear in block.linears.values():
            linear.weight = merge(linear.stored, linear.name, move.adapter, values)


def record_of(curve: Curve, trained: int) -> dict[str, Any]:
    """Of one block, JSON-plain: held-out error before and after, or that of the first and the last step."""
    losses = [loss for _, loss in curve.held] or curve.losses or [0.0]
    before, after = losses[0], min(losses) if curve.held else losses[-1]
    return {"error_before": before, "error_after": after, "best_step": curve.best, "trained": trained}
