"""Gradient descent on a small set of tensors: AdamW, a rate that rises and falls linearly, the best state kept.

Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; here without decay.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.progress import Progress, Silent
from budwood.training.trainable import Trainable

if TYPE_CHECKING:
    from budwood.checkpoints.work import Work

PARTS = ("now", "best", "exp_avg", "exp_avg_sq")  # of a checkpoint: one tensor of each for every trained tensor


@dataclass(frozen=True)
class Descent:
    """steps: of the optimiser. rate: the highest one. warm_up: the share of the steps in which the rate rises.

    clip: the largest norm of all gradients together, None: any. evaluations: how often the held-out loss is measured.
    patience: the evaluations in a row without a lower one after which it stops.
    """

    steps: int = 1000
    rate: float = 5e-4
    warm_up: float = 0.1
    clip: float | None = 1.0
    evaluations: int = 10
    patience: int = 3

    def factor(self, step: int) -> float:
        """The share of the rate that `step` is made with: 0 in the first where there is a warm-up."""
        rising = int(self.warm_up * self.steps)
        return step / rising if step < rising else (self.steps - step) / max(1, self.steps - rising)


@dataclass
class Curve:
    """losses: of the training windows, by step. held: step and held-out loss; step 0 is before the first step."""

    losses: list[float] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0  # the step after which the held-out loss was lowest; without one the last
    seconds: float = 0.0
    done: bool = False

    def record(self) -> dict[str, Any]:
        """JSON-plain, with at most a hundred means of the training loss."""
        width = max(1, math.ceil(len(self.losses) / 100))
        parts = [self.losses[start : start + width] for start in range(0, len(self.losses), width)]
        return {
            "steps": len(self.losses),
            "best_step": self.best,
            "held_out": [[step, loss] for step, loss in self.held],
            "loss": [sum(part) / len(part) for part in parts],
            "steps_per_loss": width,
            "seconds": self.seconds,
        }


class Resumable(Protocol):
    """What changes with the steps beside the trained tensors."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class Checkpoints:
    """The state of a descent in one file of a `Work`, replaced as a whole every `every` steps.

    beside: something that changes with the steps, and is kept with them.
    """

    def __init__(self, work: "Work", name: str, every: int, beside: Resumable | None = None):
        self.work, self.name, self.every, self.beside = work, name, every, beside

    @property
    def file(self) -> Path:
        return self.work.file(f"{self.name}.safetensors")

    def read(self) -> dict[str, Tensor] | None:
        if not self.file.is_file():
            return None
        return self.work.tensors(self.name)

    def write(self, curve: Curve, masters: Mapping[str, Tensor], best: Mapping[str, Tensor], adam: Any) -> None:
        tensors = {f"now/{key}": master for key, master in masters.items()}
        tensors |= {f"best/{key}": value for key, value in best.items()}
        if self.beside is not None:
            tensors |= {f"beside/{key}": value for key, value in self.beside.state().items()}
        for key, master in masters.items():
            for part, value in adam.state.get(master, {}).items():
                tensors[f"{part}/{key}"] = value
        numbers = [float(curve.best), curve.seconds, float(curve.done)]
        tensors["numbers"] = torch.tensor(numbers, dtype=torch.float64)
        if curve.losses:
            tensors["losses"] = torch.tensor(curve.losses, dtype=torch.float64)
        if curve.held:
            tensors["held"] = torch.tensor(curve.held, dtype=torch.float64)
        self.work.save(self.name, tensors)


def curve_of(tensors: Mapping[str, Tensor]) -> Curve:
    """The curve in a checkpoint."""
    best, seconds, done = tensors["numbers"].tolist()
    held = tensors["held"].tolist() if "held" in tensors else []
    losses = tensors["losses"].tolist() if "losses" in tensors else []
    return Curve(losses, [(int(step), loss) for step, loss in held], int(best), seconds, bool(done))


def check_state(found: Mapping[str, Tensor], masters: Mapping[str, Tensor], checkpoints: "Checkpoints | None") -> None:
    """Raises RunError where a checkpoint is not of a training of these tensors."""
    shapes = {f"{part}/{key}": master.shape for key, master in masters.items() for part in ("now", "best")}
    wanted = shapes | {f"{part}/{key}": m.shape for key, m in masters.items() for part in ("exp_avg", "exp_avg_sq")}
    known = {name: tensor.shape for name, tensor in found.items() if name.partition("/")[0] in PARTS}
    numbers = found.get("numbers")
    if (
        numbers is None
        or numbers.shape != (3,)
        or not known.items() <= wanted.items()
        or not shapes.keys() <= known.keys()
    ):
        where = checkpoints.file if checkpoints else "the checkpoint"
        raise RunError(f"{where} is of another training; delete it and give the same command again")


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one kind, by key."""
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}


def descend(
    trainable: Trainable,
    slope: Callable[[int], float],
    settings: Descent,
    *,
    held: Callable[[], float] | None = None,
    scale: float = 1.0,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
    what: str = "steps of training",
) -> Curve:
    """Trains what is attached, and leaves it at its best: at the start where no held-out loss was below that of there.

    slope: makes the gradients of a step, multiplied by `scale`, and returns its loss. held: the held-out loss.
    With checkpoints it continues where an earlier call was interrupted, to the same bits with one thread.
    """
    progress, masters = progress or Silent(), trainable.masters
    if not masters:
        return Curve(done=True)
    together = next(iter(masters.values())).is_cuda  # on a GPU one call for all tensors; else least memory
    adam = torch.optim.AdamW(masters.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=together)
    found = checkpoints.read() if checkpoints else None
    if found is not None:
        check_state(found, masters, checkpoints)
        curve, best = curve_of(found), part_of(found, "best")
        trainable.load(part_of(found, "now"))
        if checkpoints is not None and checkpoints.beside is not None:
            checkpoints.beside.load_state(part_of(found, "beside"))
        for part in ("step", "exp_avg", "exp_avg_sq"):
            for key, value in part_of(found, part).items():
                adam.state[masters[key]][part] = value if part == "step" else value.to(masters[key].device)
    else:
        curve, best = Curve(), trainable.values()
        if held is not None:
            curve.held.append((0, held()))
    every = max(1, settings.steps // settings.evaluations)
    progress.start(settings.steps, what)
    try:
        while not curve.done and len(curve.losses) < settings.steps:
            began, step = time.perf_counter(), len(curve.losses)
            for group in adam.param_groups:
                group["lr"] = settings.rate * settings.factor(step)
            curve.losses.append(slope(step))
            _step(adam, scale, settings.clip, together)
            trainable.push()
            done = step + 1
            if held is not None and (done % every == 0 or done == settings.steps):
                curve.held.append((done, held()))
                losses = [loss for _, loss in curve.held]
                if losses[-1] < min(losses[:-1]):
                    curve.best, best = done, trainable.values()
                curve.done = min(losses) < min(losses[-settings.patience :]) and len(losses) > settings.patience
            seconds = time.perf_counter() - began
            curve.seconds += seconds
            progress.block(step, f"step {done}", seconds, loss=curve.losses[-1])
            if done == settings.steps:
                curve.done = True
            if checkpoints and (done % checkpoints.every == 0 or curve.done):
                if curve.done and held is None:
                    curve.best, best = done, trainable.values()
                checkpoints.write(curve, masters, best, adam)
    finally:
        progress.finish()
    if held is None:
        curve.best = len(curve.losses)
    else:
        trainable.load(best)
    return curve


def _step(adam: torch.optim.Optimizer, scale: float, clip: float | None, together: bool) -> None:
    moving = [parameter for group in adam.param_groups for parameter in group["params"] if parameter.grad is not None]
    if scale != 1:
        for parameter in moving:
            parameter.grad /= scale
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(moving, clip, foreach=together)
    adam.step()
    adam.zero_grad(set_to_none=True)


def split(count: int) -> tuple[list[int], list[int]]:
    """Indices of windows to train on and to hold out: every eighth, at most a hundred; none out of a single one."""
    if count < 2:
        return list(range(count)), []
    out = max(1, min(100, count // 8))
    held = {(2 * place + 1) * count // (2 * out) for place in range(out)}
    return [index for index in range(count) if index not in held], sorted(held)
