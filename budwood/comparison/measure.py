"""The evaluations of one run by the name of their step: what each finds, as the record of the step has it."""

from collections.abc import Callable
from typing import Any

from budwood.comparison.task import REPETITION, SPEED, TASKS, Task
from budwood.evaluation.perplexity import evaluate
from budwood.progress import Progress

Settings = dict[str, Any]
Measure = Callable[[Task, Settings, Progress], dict[str, Any]]  # {"results": [...]} or {"speed": ...}


def perplexity(task: Task, asked: Settings, progress: Progress) -> dict[str, Any]:
    found = evaluate(
        str(task.model),
        asked["data"],
        variant=asked["variant"],
        seq_length=asked["seq_length"],
        limit=asked["limit"],
        bos=asked["bos"],
        seed=asked["seed"],
        stream=task.stream,
        dtype=asked["dtype"],
        device=task.device,
        trust_remote_code=task.trust_remote_code,
        progress=progress,
    )
    text = {"name": asked["name"], "variant": asked["variant"], "sha256": found["data"].get("sha256")}
    return {"results": [{"kind": "perplexity", "text": text, **found}]}


def speed(task: Task, asked: Settings, progress: Progress) -> dict[str, Any]:
    from budwood.benchmarking import bench

    return {"speed": bench(task.model, task.dense, progress=progress, **asked)}


MEASURES: dict[str, Measure] = {"perplexity": perplexity, SPEED: speed, REPETITION: perplexity, TASKS: perplexity}
