"""The plan of a comparison: every run checked against its model, with estimated time and disk space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from budwood.comparison.fields import at
from budwood.comparison.recipe import Recipe
from budwood.comparison.rounding import Rtn
from budwood.comparison.runs import Run
from budwood.comparison.sources import DenseModel
from budwood.formats import known_layout
from budwood.methods.method import values_of
from budwood.planning import prediction, seconds_per_product

ITEMS, CHOICES, TOKENS = 1000, 3, 80  # of a task, where nothing better is known: items, answers to each, tokens of one
DEFAULT_WINDOWS = 128  # of a text without a limit
TIMING = 60.0  # seconds that `bench` takes at least


@dataclass(frozen=True)
class Estimate:
    """What a run will take. seconds: of forward passes, a lower bound; None where the model is not here yet."""

    run: Run
    done: bool  # finished by an earlier call
    seconds: float | None
    bytes: int | None  # of the written model
    work_bytes: int  # of intermediate results, until the model is finished

    def to_json(self) -> dict[str, Any]:
        run = self.run
        return {
            "name": run.name,
            "label": run.label,
            "source": run.source,
            "draw": run.draw,
            "done": self.done,
            "seconds": self.seconds,
            "bytes": self.bytes,
        }


def estimates(
    recipe: Recipe, runs: Sequence[Run], models: Mapping[str, DenseModel], done: Mapping[str, float]
) -> list[Estimate]:
    """One for each run. done: seconds of the runs that are finished, by name; others of the same row take as long.

    Raises UsageError, with the line, where a method cannot be applied to a model.
    """
    known = {run.row: done[run.name] for run in runs if done.get(run.name)}
    seen: dict[Any, Estimate] = {}
    found = []
    for run in runs:
        key = (run.source, str(run.method), run.calibration.model_dump_json(), run.prune.model_dump_json())
        if key not in seen:
            seen[key] = one(recipe, run, models[run.source])
        estimate = seen[key]
        seconds = known.get(run.row, estimate.seconds)
        found.append(Estimate(run, run.name in done, seconds, estimate.bytes, estimate.work_bytes))
    return found


def one(recipe: Recipe, run: Run, model: DenseModel) -> Estimate:
    if model.path is None:
        return Estimate(run, False, None, None, 0)
    with at(recipe.document, run.place):
        structure, config, _ = model.structure(run.prune.skip)
        head = structure.module.get_output_embeddings()
        weights = structure.in_scope + (head.weight.numel() if head is not None else 0)
        seconds = seconds_per_product() * weights * evaluated_tokens(recipe)
        if run.method is None:
            return Estimate(run, False, seconds, 0, 0)
        storage = model.storage(run.prune.dtype)
        values = values_of(run.method, run.prune.values)
        layout = "dense" if isinstance(run.method, Rtn) else known_layout(run.prune.format, values)
        tokens = run.calibration.num_samples * run.calibration.seq_length
        predicted = prediction(structure, config, storage, run.method, layout, tokens)
        timing = TIMING if recipe.fields.speed and run.kind == "pruned" else 0.0
        return Estimate(
            run, False, predicted["seconds"] + seconds + timing, predicted["bytes_after"], predicted["work_bytes"]
        )


def evaluated_tokens(recipe: Recipe) -> int:
    """Tokens that pass through each model in the evaluations, roughly."""
    asked = recipe.fields.evaluate
    tokens = sum((text.limit or DEFAULT_WINDOWS) * text.seq_length for text in asked.texts.values())
    if asked.divergence:  # the dense model runs too
        tokens *= 3
    if asked.tasks:
        items = min(asked.tasks.limit or ITEMS, ITEMS)
        tokens += len(asked.tasks.names) * items * CHOICES * TOKENS
    if asked.repetition:
        tokens += asked.repetition.continuations * (asked.repetition.prompt + asked.repetition.new)
    return tokens


def disk(found: Sequence[Estimate], keep: bool, jobs: int) -> int | None:
    """Bytes that the comparison takes at its peak: all models where they are kept, else those of the runs at work."""
    waiting = [(estimate.bytes, estimate) for estimate in found if not estimate.done]
    if any(size is None for size, _ in waiting):
        return None
    sizes = [(int(size or 0), estimate) for size, estimate in waiting]
    largest = sorted((size + estimate.work_bytes for size, estimate in sizes), reverse=True)[: max(jobs, 1)]
    if not keep:
        return sum(largest)
    stay = sum(size for size, estimate in sizes if estimate.run.kind == "pruned")
    return stay + max((estimate.work_bytes for _, estimate in sizes), default=0)
