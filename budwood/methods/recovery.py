"""Retrains the finished model of a run and writes what changed."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from budwood.training.adapters import Adapter
from budwood.training.block_recovery import apply
from budwood.training.recovery import Recovered, Recovery, record_of, retrain
from budwood.training.trainable import merge

if TYPE_CHECKING:
    from budwood.runs.run import Run


def recover(run: "Run", windows: Tensor, recovery: Recovery, name: str, options: Mapping[str, Any]) -> None:
    """Trains on windows [windows, tokens] all that the run has written, rewrites it, and adds to the report.

    name: of the checkpoints in the run's `work`. options: for the report. See `retrain`.
    """
    model = run.model
    found = retrain(model, windows, recovery, run.work, name, run.writer, run.progress, run.note)
    curve = found.curve
    if curve.held and curve.best == 0 and curve.losses:
        run.note("the held-out loss did not fall, so the model stays as pruned; lower the rate, or train on more text")
    for block in run.rewrite():
        apply(block, recovery.move, found.values)
    for full, change in changes_outside(found, model.path).items():
        run.outside[full] = change
    run.sections.setdefault("training", []).append(record_of(found, model, options))


def changes_outside(found: Recovered, blocks: str) -> dict[str, Any]:
    """Of tensors outside the blocks, by full name: stored tensor -> the new one."""
    outside = {key: value for key, value in found.values.items() if not key.startswith(f"{blocks}.")}
    changes: dict[str, Any] = {}
    for key, value in outside.items():
        if ":" not in key:
            changes[key] = partial(_replaced, value)
        elif found.head is not None:
            linear = key.partition(":")[0].removesuffix(".weight")
            changes[f"{linear}.weight"] = partial(_merged, linear, found.head, outside)
    return changes


def _replaced(value: Tensor, stored: Tensor) -> Tensor:
    return value.to(stored.dtype)


def _merged(linear: str, head: Adapter, values: Mapping[str, Tensor], stored: Tensor) -> Tensor:
    return merge(stored, linear, head, values, dense=True)
