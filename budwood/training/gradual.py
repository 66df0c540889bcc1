"""Pruning while low-rank terms are trained (LoRAPrune: Zhang et al., Findings of ACL 2024, arXiv 2305.18403).

Only the low-rank factors have gradients. What a step would do to their product stands for the gradient of a weight.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.models.linears import read
from budwood.progress import Progress
from budwood.sparsity.lora_importance import importance, low_rank_gradient, ratio_at
from budwood.stream.model import Model
from budwood.training.adapters import MaskLora
from budwood.training.descent import Checkpoints, Curve, Descent, descend
from budwood.training.gradients import scale_of
from budwood.training.growing_masks import UnitMasks, WeightMasks
from budwood.training.move import Move
from budwood.training.recovery import Recovery, at_once, blocks_recomputed, slope
from budwood.training.trainable import Trainable, keys

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work


@dataclass(frozen=True)
class Gradual:
    """every: steps between two masks. squared: importances, as in the paper. finished: whether the last mask is whole.

    Others: see `Recovery`.
    """

    steps: int
    batch: int
    rate: float
    rank: int
    alpha: float
    seed: int
    every: int = 10
    squared: bool = False
    finished: bool = True
    save_every: int = 50

    @property
    def adapter(self) -> MaskLora:
        return MaskLora(self.rank, self.alpha)

    def share_at(self, step: int) -> float:
        """The share of the final mask after a step."""
        return ratio_at(step, self.steps, 1.0)

    def last_share(self) -> float:
        """The share of the final mask that the training ends with; below 1 where the last mask is not whole."""
        if self.finished:
            return 1.0
        shares = [self.share_at(step) for step in range(self.every, self.steps + 1, self.every)]
        return max((share for share in shares if share < 1), default=0.0)


def prune_while_training(
    model: Model,
    windows: Tensor,
    masks: UnitMasks | WeightMasks,
    settings: Gradual,
    work: "Work",
    name: str,
    progress: Progress | None = None,
) -> tuple[Curve, dict[str, Tensor]]:
    """The curve, and the trained factors by key (see `Trainable`); `masks` are those of the end.

    windows: token ids [windows, tokens]. work: keeps checkpoints under `name`, from which an interrupted call
    continues to the same bits with one thread. Raises RunError where a loss is not finite.
    """
    adapter = settings.adapter
    descent = Descent(settings.steps, settings.rate, warm_up=0.0)
    recovery = Recovery(Move(adapter=adapter), descent, settings.rank, settings.alpha, settings.batch, settings.seed)
    many = at_once(model, settings.batch, windows.shape[1])
    with model.resident():
        trainable = Trainable({}, model.linears, adapter, settings.seed)

        def step(index: int) -> float:
            loss = slope(model, windows, recovery, many, index)
            masks.observe(partial(importance_in, trainable, scale_of(model), settings.squared))
            share = settings.share_at(index + 1)
            if (index + 1) % settings.every == 0 and (share < 1 or settings.finished):
                masks.grow(share)
            return loss

        with trainable.attached(), blocks_recomputed(model, many * windows.shape[1]):
            curve = descend(
                trainable,
                step,
                descent,
                scale=scale_of(model),
                checkpoints=Checkpoints(work, name, settings.save_every, masks),
                progress=progress,
                what="pruning while training",
            )
        if settings.finished:
            masks.grow(1.0)
        return curve, trainable.values()


@torch.no_grad()
def importance_in(trainable: Trainable, scale: float, squared: bool, name: str) -> Tensor | None:
    """Of the weights [out, in] of a linear, from the gradients of its factors, which are multiplied by `scale`."""
    linear, rule, _ = trainable.adapters[name]
    a, b = (trainable.masters[key] for key in keys(name, rule))
    if a.grad is None or b.grad is None:
        return None
    gradient = low_rank_gradient(a, b, a.grad / scale, b.grad / scale)
    return importance(read(linear).float(), a, b, gradient, rule.scale, squared)
